// Elements, numbers, tables that sort, and the theme.

const DATA = JSON.parse(document.getElementById("data").textContent);
const REPORT = DATA.report;
const NONE = "–";

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(Boolean));
  return element;
}

const $ = (selector, root = document) => root.querySelector(selector);

function digits(value, places = 3) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toLocaleString("en-US", { maximumFractionDigits: Math.max(0, places - size) });
}

function scaled(value, units) {
  if (value === null || value === undefined) return NONE;
  for (const [scale, unit] of units) {
    if (Math.abs(value) >= scale) return `${digits(value / scale)}\u202f${unit}`;
  }
  return value === 0 ? "0" : `${digits(value / units.at(-1)[0])}\u202f${units.at(-1)[1]}`;
}

const seconds = (value) => scaled(value, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]]);
const bytes = (value) => scaled(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]);
const flops = (value) => scaled(value, [[1e12, "TFLOP"], [1e9, "GFLOP"], [1e6, "MFLOP"], [1e3, "kFLOP"], [1, "FLOP"]]);
const rate = (value) => scaled(value, [[1e12, "TFLOP/s"], [1e9, "GFLOP/s"], [1e6, "MFLOP/s"], [1, "FLOP/s"]]);
const count = (value) => (value === null || value === undefined ? NONE : value.toLocaleString("en-US"));
const percent = (value) => (value === null || value === undefined ? NONE : `${digits(value * 100)}\u202f%`);
const ratio = (part, whole) => (part === null || part === undefined || !whole ? null : part / whole);

// Columns: {name, value(row), show(value, row), text: left-aligned, title}. Rows stay objects until they are drawn.
function sortable(table, columns, rows, { rowAttributes = () => ({}) } = {}) {
  let by = null;
  let descending = false;
  const body = h("tbody");
  const heads = columns.map((column, index) =>
    h("th", { class: column.text ? "text" : null, scope: "col", title: column.title, "aria-sort": "none" },
      h("button", { type: "button", onclick: () => sort(index) }, column.name)));

  function cells(row) {
    return columns.map((column) => {
      const value = column.value(row);
      const shown = column.show ? column.show(value, row) : value ?? NONE;
      const missing = value === null || value === undefined;
      return h("td", { class: [column.text ? "text" : "", missing ? "none" : ""].join(" ").trim() || null }, shown);
    });
  }

  function draw() {
    const shown = [...rows];
    if (by !== null) {
      const key = (row) => columns[by].value(row);
      shown.sort((a, b) => compare(key(a), key(b), descending));
    }
    body.replaceChildren(...shown.map((row) => h("tr", rowAttributes(row), cells(row))));
  }

  function sort(index) {
    descending = by === index ? !descending : !columns[index].text;
    by = index;
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== by ? "none" : descending ? "descending" : "ascending"));
    draw();
  }

  table.replaceChildren(h("thead", {}, h("tr", {}, heads)), body);
  draw();
}

function compare(a, b, descending) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return descending ? -order : order;
}

function bar(share, kind) {
  const part = Math.max(0, Math.min(1, share ?? 0));
  return h("span", { class: "share" }, h("i", { class: kind, style: `width:${(part * 100).toFixed(2)}%` }), percent(share));
}

const KINDS = { product: "product", cublas: "product", cudnn: "product", triton: "kernel", mosaic: "kernel", xla: "kernel", kernel: "kernel", "xla instruction": "transfer", copy: "transfer", transfer: "transfer", gap: "gap" };
const kindClass = (kind) => KINDS[kind] ?? "fusion";
const tag = (kind) => h("span", { class: `tag ${kindClass(kind)}` }, kind);

function setUpTheme() {
  const root = document.documentElement;
  const button = $("#theme");
  const preferred = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const current = () => root.dataset.theme ?? preferred();
  const show = () => (button.textContent = current() === "dark" ? "☀" : "☾");
  try {
    const kept = localStorage.getItem("nanovllm-theme");
    if (kept) root.dataset.theme = kept;
  } catch { /* a frame without an origin keeps nothing */ }
  button.addEventListener("click", () => {
    root.dataset.theme = current() === "dark" ? "light" : "dark";
    try { localStorage.setItem("nanovllm-theme", root.dataset.theme); } catch { /* likewise */ }
    show();
  });
  show();
}
