// Learning curves: a line for each method, a band over its seeds, and a cursor that reads values.

function curvesOf(methods, state) {
  return methods
    .filter((method) => state.shown.has(method.key) && method[state.kind])
    .map((method) => {
      const curve = method[state.kind];
      const points = curve[state.x]
        .map((x, i) => ({ x, mean: curve.mean[i], low: curve.low[i], high: curve.high[i] }))
        .filter((p) => p.x !== null && p.mean !== null && (!state.log || p.low > 0));
      return { method, points };
    })
    .filter((curve) => curve.points.length);
}

function drawCurves(figure, data, state) {
  const curves = curvesOf(data.methods, state);
  if (!curves.length) return show(figure, null, "No method with a curve is switched on.");
  const points = curves.flatMap((curve) => curve.points);
  const kind = state.kind === "train" ? "training" : "held-out";
  const y = { range: padded(points.flatMap((p) => [p.low, p.high]), state.log), log: state.log, write: short, label: `${kind} loss (${data.loss_unit})` };
  const far = Math.max(...points.map((p) => p.x));
  const x = { range: [0, far || 1], whole: state.x === "step", write: thousands, label: state.x === "step" ? "steps" : "seconds of training, with start-up" };
  const chart = frame(figure, x, y);
  const groups = new Map(curves.map((curve) => [curve.method.key, drawCurve(chart, curve, curves.length <= 4)]));
  chart.root.append(...groups.values());
  chart.root.setAttribute("tabindex", "0");
  chart.root.setAttribute("aria-label", `${y.label} over ${x.label}; arrow keys read values`);
  show(figure, chart.root);
  addCursor(figure, chart, curves, groups);
}

function drawCurve(chart, { method, points }, withBand) {
  const { across, up } = chart;
  const path = (list, key) => list.map((p, i) => `${i ? "L" : "M"}${across(p.x).toFixed(1)} ${up(p[key]).toFixed(1)}`).join("");
  const group = svg("g", { class: `curve c${method.colour}`, "data-key": method.key });
  const band = svg("path", { class: "band", d: `${path(points, "high")}${path([...points].reverse(), "low").replace("M", "L")}z` });
  if (!withBand) band.setAttribute("visibility", "hidden");
  group.append(band, svg("path", { class: `line d${method.dash}`, d: path(points, "mean") }));
  if (points.length <= 20) group.append(...points.map((p) => mark(across(p.x), up(p.mean), method, 3)));
  return group;
}

function addCursor(figure, chart, curves, groups) {
  const { root, across, up, box } = chart;
  const line = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const readout = html("div", { class: "readout", role: "status", hidden: "" });
  root.append(line);
  figure.append(readout);
  const stops = [...new Set(curves.flatMap((curve) => curve.points.map((p) => p.x)))].sort((a, b) => a - b);
  let stop = -1;

  function read(x, pixel = null) {
    const values = curves.map((curve) => ({ ...curve, value: valueAt(curve.points, x) })).filter((v) => v.value !== null);
    if (!values.length) return hide();
    values.sort((a, b) => a.value - b.value);
    const gap = (v) => Math.abs(up(v.value) - pixel);
    const near = pixel === null ? null : values.reduce((a, b) => (gap(a) <= gap(b) ? a : b)).method.key;
    for (const [key, group] of groups) {
      group.classList.toggle("faded", near !== null && key !== near);
      group.firstChild.setAttribute("visibility", key === near || groups.size <= 4 ? "visible" : "hidden");
    }
    line.setAttribute("x1", across(x));
    line.setAttribute("x2", across(x));
    line.setAttribute("visibility", "visible");
    readout.hidden = false;
    readout.replaceChildren(html("div", {}, `${figure.dataset.x === "step" ? "step" : "second"} ${thousands(x)}`), listOf(values, near));
    const right = across(x) > (box.left + box.right) / 2;
    const shift = (across(x) / box.width) * 100;
    readout.style.left = right ? "auto" : `calc(${shift}% + 14px)`;
    readout.style.right = right ? `calc(${100 - shift}% + 14px)` : "auto";
  }

  function hide() {
    line.setAttribute("visibility", "hidden");
    readout.hidden = true;
    stop = -1;
    for (const group of groups.values()) {
      group.classList.remove("faded");
      group.firstChild.setAttribute("visibility", groups.size <= 4 ? "visible" : "hidden");
    }
  }

  const follow = (event) => {
    const area = root.getBoundingClientRect(), zoom = box.width / area.width;
    const x = across.invert((event.clientX - area.left) * zoom);
    const closest = stops.reduce((a, b) => (Math.abs(a - x) <= Math.abs(b - x) ? a : b));
    stop = stops.indexOf(closest);
    read(closest, (event.clientY - area.top) * zoom);
  };
  root.addEventListener("pointermove", follow);
  root.addEventListener("pointerdown", follow);
  root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hide();
    if (move === undefined) return;
    event.preventDefault();
    stop = Math.min(Math.max((stop < 0 && move < 0 ? stops.length : stop) + move, 0), stops.length - 1);
    read(stops[stop]);
  });
}

// The mean at x, on the straight line between two points; null outside of the curve.
function valueAt(points, x) {
  if (x < points[0].x || x > points.at(-1).x) return null;
  const after = points.findIndex((p) => p.x >= x), b = points[after], a = points[Math.max(after - 1, 0)];
  return b.x === a.x ? b.mean : a.mean + ((b.mean - a.mean) * (x - a.x)) / (b.x - a.x);
}

function listOf(values, near) {
  const rows = values.map(({ method, value }) =>
    html("tr", method.key === near ? { class: "near" } : {},
      html("td", {}, sample(method), method.label),
      html("td", { class: "number" }, value.toFixed(4))));
  return html("table", {}, html("tbody", {}, ...rows));
}
