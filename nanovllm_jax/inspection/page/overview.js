// Card, findings, bucket table, memory and differences.

const WIDE = new Set(["Shape", "Engine", "Versions", "Flags"]);

function drawCard() {
  const card = REPORT.card;
  const log = REPORT.compilations;
  const hits = log.filter((one) => one.cache_hit).length;
  const pairs = (values) => Object.entries(values).map(([name, value]) => `${name}\u00a0${value}`).join(", ");
  const facts = [
    ["Target", card.target],
    ["Devices", count(card.devices)],
    ["Weights", card.dtype],
    ["Cache", card.cache_dtype],
    ["Peaks", card.flops_per_s ? `${rate(card.flops_per_s)}, ${bytes(card.bytes_per_s)}/s` : "not known of this device"],
    ["Context", `${count(card.context)} tokens a sequence, for attention's costs`],
    ["Compiled", log.length ? `${log.length} programs, ${hits} from the cache` : "nothing: lowered only"],
    ["Shape", pairs(card.shape)],
    ["Engine", pairs(card.engine)],
    ["Versions", pairs(card.versions)],
    ["Flags", Object.keys(card.flags).length ? pairs(card.flags) : "none set"],
  ];
  $("#card").replaceChildren(
    h("h1", {}, card.model),
    h("p", { class: "lead" }, `${card.family}, ${card.shape.num_layers} layers, ${digits(card.parameters / 1e6)}M parameters`),
    h("div", { class: "tiles" }, tiles()),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", { class: WIDE.has(name) ? "wide" : null }, h("dt", {}, name), h("dd", {}, value)))),
  );
}

function tiles() {
  const found = REPORT.programs.map((program) => {
    const bucket = REPORT.buckets.find((one) => one.name === program.name);
    const measured = bucket?.measured_s ?? null;
    const value = measured ?? program.limit_s;
    const of = measured && program.limit_s ? `${percent(program.limit_s / measured)} of its limit ${seconds(program.limit_s)}` : "";
    const what = measured ? of || "measured" : program.limit_s ? "at least" : "no peaks known";
    return tile(program.name, value === null ? flops(program.flops) : seconds(value), what, `${flops(program.flops)}, ${bytes(program.bytes)}`);
  });
  const profile = REPORT.profile;
  if (profile) {
    found.push(tile("host gap", percent(profile.host_gap_frac), `${seconds(profile.host_gap_s)} of ${seconds(profile.span_s)}`,
      `${count(profile.steps.length)} steps, ${count(profile.tokens)} tokens`));
  }
  return found;
}

const tile = (name, value, ...lines) =>
  h("div", { class: "tile" }, h("span", {}, name), h("strong", {}, value), lines.filter(Boolean).map((line) => h("small", {}, line)));

function drawFindings() {
  const found = REPORT.findings;
  const body = $("#findings .body");
  if (!found.length) {
    body.replaceChildren(h("p", { class: "good" }, "Nothing. State is updated in place; no stray float32, large copy, host transfer, fallback or surplus collective."));
    return;
  }
  body.replaceChildren(h("ul", { class: "findings" }, found.map((one) =>
    h("li", {}, h("b", {}, one.kind), h("code", {}, one.program), h("span", {}, one.message)))));
}

function drawBuckets() {
  const known = (pick) => REPORT.buckets.some((row) => pick(row) !== null);
  const memory = (name) => (row) => row.memory?.[name] ?? null;
  const columns = [
    { name: "program", text: true, value: (row) => row.name },
    { name: "input", text: true, value: (row) => row.input, title: "what the host sends down" },
    { name: "flops", value: (row) => row.flops, show: flops },
    { name: "bytes", value: (row) => row.bytes, show: bytes, title: "from and to device memory" },
    { name: "limit", value: (row) => row.limit_s, show: seconds, title: "the least time at the device's peaks" },
    { name: "measured", value: (row) => row.measured_s, show: seconds, title: "sum over the program's kernels" },
    { name: "of limit", value: (row) => ratio(row.limit_s, row.measured_s), show: percent },
    { name: "temporary", value: memory("temporaries"), show: bytes },
    { name: "alias", value: memory("reused"), show: bytes, title: "results that take over an argument's buffer" },
    { name: "peak", value: memory("peak"), show: bytes },
    { name: "state", text: true, value: (row) => row.state, show: state },
    { name: "trace", value: (row) => row.trace_s, show: seconds },
    { name: "lower", value: (row) => row.lower_s, show: seconds },
    { name: "compile", value: (row) => row.compile_s, show: (value, row) => (row.cache_hit ? `${seconds(value)} ⟲` : seconds(value)) },
  ].filter((column) => !["measured", "of limit", "limit"].includes(column.name) || known(column.value));
  sortable($("#buckets table"), columns, REPORT.buckets, {
    rowAttributes: (row) => ({
      class: REPORT.programs.some((one) => one.name === row.name) ? "pick" : null,
      onclick: () => REPORT.programs.some((one) => one.name === row.name) && choose(row.name),
    }),
  });
  const needs = [...new Set(REPORT.programs.map((one) => one.needs).filter(Boolean))];
  $("#buckets .lead").textContent = "Every shape that a step is compiled for. ⟲ came from the compilation cache."
    + (needs.length ? ` ${NONE} needs ${needs.join(", ")}.` : "");
}

function state(value) {
  const good = { "in place": "good", donated: "good", copied: "bad" };
  return h("span", { class: good[value] ?? "" }, value);
}

function drawMemory() {
  const plan = REPORT.memory;
  const rows = [["weights", plan.weights], ["KV cache", plan.cache], ["rows, penalties", plan.rows + plan.extras], ["temporaries", plan.temporaries]];
  const used = rows.reduce((sum, [, size]) => sum + (size ?? 0), 0);
  if (plan.total) rows.push(["free", Math.max(0, plan.total - used)]);
  const whole = Math.max(plan.total ?? used, used);
  let start = 0;
  $("#memory .body").replaceChildren(h("div", { class: "waterfall" }, rows.map(([name, size]) => {
    const left = start;
    start += size ?? 0;
    const style = `left:${((100 * left) / whole).toFixed(3)}%;width:${((100 * (size ?? 0)) / whole).toFixed(3)}%`;
    return h("div", {}, h("span", {}, name), h("div", { class: "track" }, size === null ? null : h("i", { class: name.replace(" ", "-"), style })),
      h("b", { class: size === null ? "none" : null }, bytes(size)), h("small", {}, size === null ? "" : percent(size / whole)));
  })));
  $("#memory .lead").textContent = plan.total
    ? `On one device of ${bytes(plan.total)}, while the engine runs.`
    : "On one device, while the engine runs; its total is not known.";
}

function drawDiff() {
  const found = DATA.differences;
  const lead = $("#diff .lead");
  if (!found) {
    lead.textContent = "No older report was given: --diff OLD.json, or report.html(before).";
    $("#diff .scroll").hidden = true;
    return;
  }
  lead.textContent = found.length
    ? `${count(found.length)} values differ from the report of ${DATA.before.model} for ${DATA.before.target}.`
    : `No difference from the report of ${DATA.before.model} for ${DATA.before.target}.`;
  const shown = (value) => (typeof value === "number" ? digits(value, 6) : value ?? NONE);
  const change = (row) => (typeof row.before === "number" && typeof row.after === "number" && row.before ? row.after / row.before - 1 : null);
  sortable($("#diff table"), [
    { name: "value", text: true, value: (row) => row.path, show: (value) => h("code", {}, value) },
    { name: "before", value: (row) => row.before, show: shown },
    { name: "after", value: (row) => row.after, show: shown },
    { name: "change", value: change, show: (value) => (value === null ? "" : `${value > 0 ? "+" : ""}${percent(value)}`) },
  ], found);
}
