"""Builds profiler traces by hand, as a GPU would leave them."""

from jax.profiler import ProfileData


class Space:
    """Planes of lines of events; times in microseconds."""

    def __init__(self):
        self.planes = {}

    def event(self, plane, line, name, start, duration, **stats):
        self.planes.setdefault(plane, {}).setdefault(line, []).append((name, start, duration, stats))

    def launch(self, number, start, *, thread="python", function="cuGraphLaunch"):
        self.event("/host:CPU", thread, function, start, 2, correlation_id=number)

    def step(self, name, number, start, duration, tokens=4, sequences=4):
        stats = {"step_num": number, "tokens": tokens, "sequences": sequences}
        self.event("/host:CPU", "python", name, start, duration, **stats)

    def kernel(self, name, start, duration, number=None, *, gpu=0, stream=13, **stats):
        if number is not None:
            stats["correlation_id"] = number
        self.event(f"/device:GPU:{gpu}", f"Stream #{stream}(Compute)", name, start, duration, **stats)

    def data(self):
        text = "".join(_plane(number, name, lines) for number, (name, lines) in enumerate(self.planes.items()))
        return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def _plane(number, name, lines):
    names, stat_names, body = {}, {}, ""
    for index, (line, events) in enumerate(lines.items()):
        body += f'lines {{ id: {index} name: "{line}" timestamp_ns: 0\n'
        for event, start, duration, stats in events:
            body += f"events {{ metadata_id: {_number(names, event)} offset_ps: {int(start * 1e6)} "
            body += f"duration_ps: {int(duration * 1e6)} "
            for key, value in stats.items():
                shown = f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}"
                body += f"stats {{ metadata_id: {_number(stat_names, key)} {shown} }} "
            body += "}\n"
        body += "}\n"
    for field, known in (("event_metadata", names), ("stat_metadata", stat_names)):
        for key, value in known.items():
            body += f'{field} {{ key: {value} value {{ id: {value} name: "{key}" }} }}\n'
    return f'planes {{ id: {number} name: "{name}"\n{body}}}\n'


def _number(known, name):
    return known.setdefault(name, len(known) + 1)
