// The kernel table of the chosen program: computed work, XLA's instructions, measured kernels with the gaps as rows.

function drawKernels(program) {
  const kinds = stepKinds(program);
  const tabs = [["Work", () => workTable(program)]];
  if (program.instructions.length) tabs.push(["XLA's instructions", () => instructionTable(program)]);
  for (const kind of kinds) tabs.push([`Measured in ${kind.name}`, () => measuredTable(kind)]);
  const buttons = tabs.map(([name, draw]) => h("button", { type: "button", role: "tab", onclick: (event) => pick(event.currentTarget, draw) }, name));
  function pick(button, draw) {
    buttons.forEach((one) => one.setAttribute("aria-selected", one === button));
    draw();
  }
  $("#kernels .tabs").replaceChildren(...buttons);
  pick(buttons[0], tabs[0][1]);
  $("#kernels .notes").replaceChildren(...(REPORT.profile?.notes ?? []).map((note) => h("p", {}, note)));
}

// Steps of a profile that ran the program: a sampler runs in steps of several kinds.
function stepKinds(program) {
  const profile = REPORT.profile;
  if (!profile) return [];
  const names = new Set(profile.kernels.filter((row) => row.program === program.name).map((row) => row.step));
  return profile.kinds.filter((kind) => names.has(kind.name));
}

const scopeCell = (value) => (value ? h("code", {}, value) : "");
const marking = (row) => ({ class: row.scope ? "pick" : null, "data-scope": row.scope || null, onclick: () => row.scope && markScope(row.scope) });

function workTable(program) {
  $("#kernels .lead").textContent = `What ${program.name} has to compute and move: ${program.bytes_source}. Flops: ${program.flops_source}. A click marks the scope in the program's texts.`;
  const measured = program.kernels.some((row) => row.measured_s !== null);
  sortable($("#kernels table"), [
    { name: "kernel", text: true, value: (row) => row.name },
    { name: "kind", text: true, value: (row) => row.kind, show: tag },
    { name: "scope", text: true, value: (row) => row.scope, show: scopeCell },
    { name: "count", value: (row) => row.count, show: count, title: "a step" },
    { name: "flops", value: (row) => row.flops, show: flops },
    { name: "bytes", value: (row) => row.bytes, show: bytes },
    { name: "limit", value: (row) => row.limit_s, show: seconds },
    { name: "share of limit", value: (row) => row.share, show: (value, row) => (value === null ? NONE : bar(value, kindClass(row.kind))) },
    ...(measured ? [
      { name: "measured", value: (row) => row.measured_s, show: seconds },
      { name: "reached", value: (row) => ratio(row.limit_s, row.measured_s), show: percent, title: "limit over measured time" },
    ] : []),
    { name: "from", text: true, value: (row) => row.source, title: "where flops and bytes come from" },
  ], program.kernels, { rowAttributes: marking });
}

function instructionTable(program) {
  $("#kernels .lead").textContent = `What XLA made of ${program.name}: operands and results of its instructions, of equal kind and scope together. A fusion that reads a few rows of a large operand counts it whole.`;
  sortable($("#kernels table"), [
    { name: "instruction", text: true, value: (row) => row.name },
    { name: "kind", text: true, value: (row) => row.kind, show: tag },
    { name: "scope", text: true, value: (row) => row.scope, show: scopeCell },
    { name: "count", value: (row) => row.count, show: count },
    { name: "bytes", value: (row) => row.bytes, show: bytes },
    { name: "from", text: true, value: (row) => row.source },
  ], program.instructions, { rowAttributes: marking });
}

function measuredTable(kind) {
  const whole = kind.kernels_s + kind.gaps_s + kind.host_gap_s;
  const accounted = kind.step_s ? ` That is ${percent(whole / kind.step_s)} of the ${seconds(kind.step_s)} a step takes by the host's clock.` : "";
  $("#kernels .lead").textContent = `${count(kind.steps)} steps: kernels ${seconds(kind.kernels_s)}, gaps between them ${seconds(kind.gaps_s)}, host gap ${seconds(kind.host_gap_s)}, means a step.${accounted}`;
  const kernels = REPORT.profile.kernels.filter((row) => row.step === kind.name)
    .map((row) => ({ ...row, launches: row.count / kind.steps, each: row.total_s / kind.steps }));
  const gap = (name, each) => ({ name, kind: "gap", scope: "", program: "", launches: null, each });
  const rows = [...kernels, gap("gaps between kernels", kind.gaps_s), gap("host gap", kind.host_gap_s)];
  sortable($("#kernels table"), [
    { name: "kernel", text: true, value: (row) => row.name, show: (value) => h("span", { class: "long", title: value }, value) },
    { name: "kind", text: true, value: (row) => row.kind, show: tag },
    { name: "scope", text: true, value: (row) => row.scope, show: scopeCell },
    { name: "program", text: true, value: (row) => row.program },
    { name: "launches", value: (row) => row.launches, show: (value) => (value === null ? "" : digits(value)), title: "a step" },
    { name: "time a step", value: (row) => row.each, show: seconds },
    { name: "share", value: (row) => (row.kind === "transfer" ? null : row.each / whole), show: (value, row) => (value === null ? "beside" : bar(value, kindClass(row.kind))) },
  ], rows.sort((a, b) => b.each - a.each), { rowAttributes: marking });
}
