// Three panes of the chosen program's texts: blocks fold, a search runs over all, a click marks one named scope in all.

const LANGUAGES = ["jaxpr", "stablehlo", "hlo", "triton", "ptx"];
const TITLES = { jaxpr: "jaxpr", stablehlo: "StableHLO", hlo: "HLO, optimised", triton: "Triton IR", ptx: "PTX" };
let panes = [];
let marked = null;
let hits = [];
let current = -1;

function drawTexts(program) {
  const there = LANGUAGES.filter((name) => program.texts[name]);
  const wanted = [...there.slice(0, 3)];
  panes = wanted.map((language, index) => new Pane(program, language, there, index));
  $("#texts .panes").replaceChildren(...panes.map((pane) => pane.element));
  const missing = program.texts.hlo ? "" : ` The optimised HLO needs ${program.needs ?? "compiling"}.`;
  $("#texts .lead").textContent = `${program.name}: layers that are alike are shown once (×${REPORT.card.shape.num_layers}). A click on a line marks its named scope in every pane.${missing}`;
  if (marked) markScope(marked, false);
  search($("#search").value);
}

class Pane {
  constructor(program, language, languages, index) {
    this.program = program;
    this.body = h("div", { class: "code", tabindex: 0, role: "region", "aria-label": `Program text ${index + 1}` });
    const select = h("select", { "aria-label": `Language of pane ${index + 1}`, onchange: () => { this.show(select.value); refresh(); } },
      languages.map((name) => h("option", { value: name, selected: name === language ? "" : null }, TITLES[name])));
    this.info = h("small");
    const button = (name, folded) => h("button", { type: "button", onclick: () => this.foldAll(folded) }, name);
    this.element = h("div", { class: "pane" }, h("div", { class: "head" }, select, this.info, button("fold", true), button("unfold", false)), this.body);
    this.body.addEventListener("click", (event) => this.clicked(event));
    this.show(language);
  }

  show(language) {
    const source = this.program.texts[language];
    this.lines = source.lines;
    this.scopes = source.scopes.map((number) => this.program.scopes[number]);
    this.ends = blockEnds(source.lines);
    this.folded = new Set();
    this.rows = source.lines.map((line, at) => this.row(line, at));
    if (language === "hlo") this.ends.forEach((end, at) => end > at && !this.lines[at].startsWith("ENTRY") && this.folded.add(at));
    this.body.replaceChildren(...this.rows);
    const lines = source.full_lines > source.lines.length ? `${count(source.lines.length)} lines of ${count(source.full_lines)}` : `${count(source.lines.length)} lines`;
    this.info.textContent = lines;
    this.hide();
  }

  row(line, at) {
    const fold = this.ends[at] > at ? h("button", { class: "fold", type: "button", "aria-label": "Fold or unfold", "aria-expanded": "true" }) : h("span", { class: "fold" });
    const row = h("div", { class: `line ${family(this.scopes[at])}`, "data-line": at, title: this.scopes[at] || null }, h("span", { class: "number" }, at + 1), fold);
    row.append(...tinted(line));
    return row;
  }

  clicked(event) {
    const row = event.target.closest(".line");
    if (!row) return;
    const at = Number(row.dataset.line);
    if (event.target.closest("button.fold")) {
      this.folded.has(at) ? this.folded.delete(at) : this.folded.add(at);
      this.hide();
    } else if (this.scopes[at] && !String(getSelection())) markScope(this.scopes[at] === marked ? null : this.scopes[at], true, this);
  }

  foldAll(folded) {
    this.folded = new Set(folded ? this.ends.flatMap((end, at) => (end > at && !/^ENTRY|^module/.test(this.lines[at]) ? [at] : [])) : []);
    this.hide();
  }

  // Hide what is inside folded blocks.
  hide() {
    let until = -1;
    this.rows.forEach((row, at) => {
      row.hidden = at <= until;
      const folded = this.folded.has(at);
      row.classList.toggle("folded", folded);
      if (this.ends[at] > at) row.children[1].setAttribute("aria-expanded", String(!folded));
      if (folded && at > until) until = this.ends[at];
    });
  }

  reveal(lines) {
    for (const at of this.folded) {
      if (lines.some((line) => line > at && line <= this.ends[at])) this.folded.delete(at);
    }
    this.hide();
  }

  scrollTo(at) {
    const row = this.rows[at];
    this.body.scrollTop = row.offsetTop - this.body.clientHeight / 3;
  }

  mark(scope) {
    const lines = [];
    this.rows.forEach((row, at) => {
      const inside = scope !== null && (this.scopes[at] === scope || this.scopes[at].startsWith(`${scope}/`));
      row.classList.toggle("marked", inside);
      if (inside) lines.push(at);
    });
    this.reveal(lines);
    return lines;
  }
}

// For each line the last line of the block that it opens: what follows with deeper indentation.
function blockEnds(lines) {
  const indents = lines.map((line) => line.length - line.trimStart().length);
  const ends = lines.map((_, at) => at);
  const open = [];
  lines.forEach((line, at) => {
    while (open.length && indents[open.at(-1)] >= indents[at]) ends[open.pop()] = at - 1;
    if (at + 1 < lines.length && indents[at + 1] > indents[at] && line.trim()) open.push(at);
  });
  while (open.length) ends[open.pop()] = lines.length - 1;
  return ends;
}

function tinted(line) {
  return line.split(/(%[\w.#]+|\/\/.*|\s×\d+)/).filter(Boolean).map((part) => {
    if (part.startsWith("%")) return h("i", {}, part);
    if (part.startsWith("//")) return h("em", {}, part);
    return /^\s×\d+$/.test(part) ? h("b", { class: "times" }, part.trim()) : document.createTextNode(part);
  });
}

function family(scope) {
  if (scope.split("/").some((part) => DATA.kernels.includes(part))) return "s-kernel";
  if (/attention/.test(scope)) return "s-attention";
  if (/mlp/.test(scope)) return "s-mlp";
  return /lm_head|sample/.test(scope) ? "s-head" : "";
}

function markScope(scope, scroll = true, source = null) {
  marked = scope;
  for (const pane of panes) {
    const lines = pane.mark(scope);
    if (scroll && lines.length && pane !== source) pane.scrollTo(lines[0]);
  }
  document.querySelectorAll("[data-scope]").forEach((one) => one.classList.toggle("marked", scope !== null && one.dataset.scope === scope));
  const parts = scope === null ? [] : scope.split("/");
  $("#scope").replaceChildren(...parts.map((part, index) => h("button", { type: "button", title: "mark this scope", onclick: () => markScope(parts.slice(0, index + 1).join("/")) }, part)),
    ...(parts.length ? [h("button", { type: "button", "aria-label": "Clear the mark", onclick: () => markScope(null) }, "✕")] : []));
}

function search(wanted) {
  hits = [];
  current = -1;
  const low = wanted.trim().toLowerCase();
  for (const pane of panes) {
    const lines = [];
    pane.rows.forEach((row, at) => {
      const found = low !== "" && pane.lines[at].toLowerCase().includes(low);
      row.classList.toggle("hit", found);
      row.classList.remove("current");
      if (found) lines.push(at);
    });
    pane.reveal(lines);
    hits.push(...lines.map((at) => ({ pane, at })));
  }
  $("#hits").textContent = low === "" ? "" : `${count(hits.length)} lines`;
  if (hits.length) go(1);
}

function go(step) {
  if (!hits.length) return;
  if (current >= 0) hits[current].pane.rows[hits[current].at].classList.remove("current");
  current = (current + step + hits.length) % hits.length;
  const { pane, at } = hits[current];
  pane.rows[at].classList.add("current");
  pane.scrollTo(at);
  $("#hits").textContent = `${count(current + 1)} of ${count(hits.length)} lines`;
}

function refresh() {
  if (marked) markScope(marked, false);
  search($("#search").value);
}
