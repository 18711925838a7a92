// Steps on the host and on the device with the gaps between them, and the compile log.

function drawSteps() {
  const profile = REPORT.profile;
  const box = $("#steps");
  if (!profile) {
    box.replaceChildren(h("h3", {}, "Steps"), h("p", { class: "lead" }, "No profile was given: with llm.profile(folder) as profile: …, then llm.inspect(profile=profile)."));
    return;
  }
  const rows = profile.steps;
  const end = Math.max(...rows.map((row) => Math.max(row.end_s ?? 0, row.dispatch_start_s + row.dispatch_s)));
  const scroll = h("div", { class: "scroll lanes" });
  const zooms = [1, 4, 16, 64];
  const buttons = zooms.map((zoom) => h("button", { type: "button", onclick: () => draw(zoom) }, `${zoom}×`));
  function draw(zoom) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", zooms[index] === zoom));
    const middle = (scroll.scrollLeft + scroll.clientWidth / 2) / Math.max(1, scroll.scrollWidth);
    scroll.replaceChildren(lanes(rows, end, zoom));
    scroll.scrollLeft = middle * scroll.scrollWidth - scroll.clientWidth / 2;
  }
  const kinds = h("table");
  box.replaceChildren(
    h("h3", {}, "Steps"),
    h("p", { class: "lead" }, `${count(rows.length)} steps in ${seconds(profile.span_s)} on ${profile.device}: busy ${percent(profile.busy_s / profile.span_s)}, gaps between kernels ${percent(profile.gaps_s / profile.span_s)}, waiting for the host ${percent(profile.host_gap_frac)}.`),
    h("div", { class: "tabs" }, buttons, h("span", { class: "legend" }, key("decode"), key("prefill"), key("wait"), key("host"))),
    scroll,
    h("div", { class: "scroll" }, kinds),
  );
  draw(1);
  sortable(kinds, [
    { name: "step", text: true, value: (row) => row.name },
    { name: "steps", value: (row) => row.steps, show: count },
    { name: "tokens", value: (row) => row.tokens, show: count },
    { name: "step time", value: (row) => row.step_s, show: seconds, title: "from one dispatch to the next, by the host's clock" },
    { name: "kernels", value: (row) => row.kernels_s, show: seconds },
    { name: "gaps between", value: (row) => row.gaps_s, show: seconds },
    { name: "host gap", value: (row) => row.host_gap_s, show: seconds },
    { name: "accounted", value: (row) => ratio(row.kernels_s + row.gaps_s + row.host_gap_s, row.step_s), show: percent, title: "kernels and gaps over the step's time" },
  ], profile.kinds);
}

const key = (name) => h("span", {}, h("i", { class: `key ${name}` }), { wait: "host gap", host: "host dispatch" }[name] ?? name);

function lanes(rows, end, zoom) {
  const width = 1000 * zoom, height = 92;
  const X = (time) => (time / end) * width;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", style: `width:${zoom * 100}%`, role: "img", "aria-label": "Steps over time" });
  let free = null;
  for (const row of rows) {
    chart.append(lane("host", X(row.dispatch_start_s), X(row.dispatch_s), 12, 18, `${row.name} dispatched in ${seconds(row.dispatch_s)}`));
    if (row.start_s === null) continue;
    if (free !== null && row.host_gap_s > 0) {
      chart.append(lane("wait", X(free), X(row.host_gap_s), 44, 34, `the device waits ${seconds(row.host_gap_s)}`));
    }
    const kind = row.name.startsWith("decode") ? "decode" : "prefill";
    const title = `${row.name}: ${seconds(row.end_s - row.start_s)}, ${count(row.tokens)} tokens of ${row.sequences} sequences, busy ${seconds(row.busy_s)}`;
    chart.append(lane(kind, X(row.start_s), X(row.end_s - row.start_s), 44, 34, title));
    free = Math.max(free ?? 0, row.end_s);
  }
  return chart;
}

const lane = (kind, x, width, y, height, title) =>
  svg("rect", { class: kind, x: x.toFixed(2), width: Math.max(width, 0.4).toFixed(2), y, height }, svg("title", {}, title));

function drawCompilations() {
  const log = REPORT.compilations;
  const box = $("#compilations");
  if (!log.length) {
    box.replaceChildren(h("h3", {}, "Compilations"), h("p", { class: "lead" }, "Nothing was compiled: the programs were lowered only."));
    return;
  }
  const end = Math.max(...log.map((one) => one.compile_start_s + one.compile_s));
  const part = (name, start, length) => h("i", { class: name, style: `left:${((100 * start) / end).toFixed(3)}%;width:${Math.max((100 * length) / end, 0.15).toFixed(3)}%`, title: `${name} ${seconds(length)}` });
  const rows = [...log].sort((a, b) => a.start_s - b.start_s).map((one) => h("div", { class: "gantt" },
    h("code", {}, one.program),
    h("div", { class: "track" }, part("trace", one.start_s, one.trace_s), part("lower", one.start_s + one.trace_s, one.lower_s), part(one.cache_hit ? "cached" : "compile", one.compile_start_s, one.compile_s)),
    h("span", { class: "number" }, seconds(one.trace_s + one.lower_s + one.compile_s)),
    h("small", { title: one.reason }, one.reason)));
  const hits = log.filter((one) => one.cache_hit).length;
  box.replaceChildren(
    h("h3", {}, "Compilations"),
    h("p", { class: "lead" }, `${log.length} programs in ${seconds(end)}, ${hits} from the cache; the last column says why each was compiled.`),
    h("p", { class: "legend" }, ["trace", "lower", "compile", "cached"].map((name) => h("span", {}, h("i", { class: `key ${name}` }), name))),
    h("div", { class: "scroll tall" }, rows),
  );
}
