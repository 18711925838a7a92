// Roofline (Williams, Waterman and Patterson 2009): what a kernel reaches against what its arithmetic intensity allows.

function drawRoofline(program) {
  const { flops_per_s: peak, bytes_per_s: bandwidth } = REPORT.card;
  const lead = $("#roofline .lead");
  const rows = program.kernels.filter((row) => row.flops > 0 && row.bytes > 0);
  if (!peak || !rows.length) {
    $("#roofline .chart").replaceChildren();
    lead.textContent = peak ? `${program.name} has no kernel with arithmetic.` : "There is no roof to draw: the peaks of this device are not known.";
    return;
  }
  const measured = rows.some((row) => row.measured_s);
  lead.textContent = `Kernels of ${program.name} by arithmetic intensity. `
    + (measured ? "Filled: measured, under the ring that the device allows." : "Rings: what the device allows; a profile adds what was reached.");
  const points = rows.map((row) => {
    const x = row.flops / row.bytes;
    return { row, x, roof: Math.min(peak, x * bandwidth), reached: row.measured_s ? row.flops / row.measured_s : null };
  });
  $("#roofline .chart").replaceChildren(rooflineChart(points, peak, bandwidth));
}

function rooflineChart(points, peak, bandwidth) {
  const width = 1000, height = 330, left = 92, right = 16, top = 34, bottom = 40;
  const decade = Math.log10;
  const low = Math.min(...points.map((p) => decade(p.x))) - 0.7;
  const high = Math.max(decade(peak / bandwidth), ...points.map((p) => decade(p.x))) + 0.7;
  const ceiling = decade(peak);
  const floor = Math.min(decade(bandwidth) + low + 0.3, ...points.map((p) => decade(p.reached ?? p.roof) - 0.3));
  const X = (value) => left + ((decade(value) - low) / (high - low)) * (width - left - right);
  const Y = (value) => height - bottom - ((decade(value) - floor) / (ceiling - floor)) * (height - top - bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Roofline" });
  for (const at of ticks(low, high)) {
    chart.append(svg("line", { class: "grid", x1: X(at), x2: X(at), y1: top, y2: height - bottom }), text(X(at), height - bottom + 16, digits(at), "middle"));
  }
  for (const at of ticks(floor, ceiling)) {
    chart.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(at), y2: Y(at) }), text(left - 8, Y(at) + 4, rate(at), "end"));
  }
  const knee = peak / bandwidth;
  const start = Math.max(10 ** low, 10 ** floor / bandwidth);
  chart.append(
    svg("path", { class: "roof", d: `M${X(start)},${Y(start * bandwidth)} L${X(knee)},${Y(peak)} L${X(10 ** high)},${Y(peak)}` }),
    text(width - right, Y(peak) - 6, rate(peak), "end"),
    text(X(start) + 34, Y(start * bandwidth) - 4, `${bytes(bandwidth)}/s`, "start"),
    text((left + width - right) / 2, height - 6, "FLOP per byte", "middle"),
  );
  const taken = points.map(({ row, x, roof, reached }) => circleBox(X(x), Y(reached ?? roof), radiusOf(row)));
  for (const point of [...points].sort((a, b) => (b.row.share ?? 0) - (a.row.share ?? 0))) drawPoint(chart, point, X, Y, taken, width);
  return chart;
}

// Powers of ten, and 2 and 5 times them where there are few, between two exponents.
function ticks(low, high) {
  const steps = high - low < 2.2 ? [1, 2, 5] : [1];
  const found = [];
  for (let at = Math.floor(low); at <= high; at++) found.push(...steps.map((step) => step * 10 ** at));
  return found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}

const radiusOf = (row) => 4 + 9 * Math.sqrt(row.share ?? 0);
const circleBox = (x, y, radius) => [x - radius, y - radius, x + radius, y + radius];

function drawPoint(chart, { row, x, roof, reached }, X, Y, taken, width) {
  const at = X(x), y = Y(reached ?? roof);
  const radius = radiusOf(row);
  const name = row.scope.split("/").at(-1) || row.name;
  const title = `${row.name}\n${row.scope}\n${digits(x)} FLOP/B, at most ${rate(roof)}${reached ? `, reached ${rate(reached)} (${percent(reached / roof)})` : ""}`;
  const group = svg("g", { class: `point ${kindClass(row.kind)}`, tabindex: 0, "data-scope": row.scope }, svg("title", {}, title));
  group.addEventListener("click", () => markScope(row.scope));
  if (reached) group.append(svg("line", { x1: at, x2: at, y1: Y(roof), y2: y }), svg("circle", { class: "ring", cx: at, cy: Y(roof), r: 3.5 }));
  group.append(svg("circle", { class: reached ? "dot" : "ring", cx: at, cy: y, r: radius }));
  // The label goes right of the point, left, below or above, nearer or farther, where nothing is yet.
  const wide = name.length * 6.6;
  const places = [1, 2.6, 4.2, 5.8].flatMap((far) => [
    [radius + 5, 4 + (far - 1) * 9, "start"], [-radius - 5, 4 + (far - 1) * 9, "end"], [0, radius + 12 * far, "middle"], [0, -radius - 6 * far, "middle"],
  ]);
  for (const [dx, dy, anchor] of places) {
    const from = at + dx - (anchor === "end" ? wide : anchor === "middle" ? wide / 2 : 0);
    const box = [from, y + dy - 10, from + wide, y + dy + 3];
    const free = taken.every((other) => box[0] > other[2] || box[2] < other[0] || box[1] > other[3] || box[3] < other[1]);
    if (free && from > 94 && box[2] < width - 8 && box[1] > 4) {
      taken.push(box);
      group.append(text(at + dx, y + dy, name, anchor));
      break;
    }
  }
  chart.append(group);
}

const text = (x, y, content, anchor) => svg("text", { x, y, "text-anchor": anchor }, document.createTextNode(content));
