// Memory against quality, and the sweep of learning rates.

function drawMemory(figure, data, state) {
  const methods = data.methods.filter((m) => state.shown.has(m.key) && m.test && m.peak_mib !== null);
  if (!methods.length) return show(figure, null, "No method with a test figure is switched on.");
  const factor = data.percent ? 100 : 1;
  const ends = methods.flatMap((m) => m.test.filter((v) => v !== null).map((v) => v * factor));
  const chart = frame(figure,
    { range: padded(methods.map((m) => m.peak_mib)), write: thousands, label: "peak MiB" },
    { range: padded(ends), write: short, label: `test ${data.metric}${data.percent ? " (%)" : ""}` });
  const spots = methods.map((m) => ({ method: m, x: chart.across(m.peak_mib), y: chart.up(m.test[0] * factor) }));
  for (const { method, x, y } of spots) {
    const [mean, low, high] = method.test;
    const group = svg("g", { class: `point c${method.colour}`, "data-key": method.key });
    const figures = low === null ? short(mean * factor) : `${(mean * factor).toPrecision(4)} (${(low * factor).toPrecision(4)} to ${(high * factor).toPrecision(4)})`;
    group.append(svg("title", {}, `${method.label}: ${thousands(method.peak_mib)} MiB, ${data.metric} ${figures}`));
    if (low !== null) group.append(svg("line", { class: "whisker", x1: x, x2: x, y1: chart.up(low * factor), y2: chart.up(high * factor) }));
    group.append(mark(x, y, method, 5));
    chart.root.append(group);
  }
  chart.root.append(...namePoints(spots, chart.box));
  show(figure, chart.root);
}

// Names beside points, each on the side where nothing stands yet; one that fits nowhere is left to its tooltip.
function namePoints(spots, box) {
  const taken = spots.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const meets = (a) => taken.some((b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]);
  const names = [];
  for (const { method, x, y } of [...spots].sort((a, b) => b.method.best - a.method.best || a.y - b.y)) {
    const label = method.label.length > 18 ? `${method.label.slice(0, 17)}…` : method.label;
    const wide = 7.6 * label.length;
    for (const [side, drop] of [[1, 0], [-1, 0], [1, -11], [-1, -11], [1, 11], [-1, 11], [1, -20], [1, 20], [-1, -20], [-1, 20]]) {
      const left = side > 0 ? x + 9 : x - 9 - wide, middle = y + drop;
      const area = [left, middle - 7, left + wide, middle + 7];
      if (left < box.left || left + wide > box.right || meets(area)) continue;
      taken.push(area);
      names.push(text(x + 9 * side, middle + 4, label, side > 0 ? "start" : "end", "name"));
      break;
    }
  }
  return names;
}

function drawRates(figure, data, state) {
  const methods = data.methods.filter((m) => state.shown.has(m.key) && m.sweep.length);
  if (!methods.length) return show(figure, null, "No method with a learning rate tried is switched on.");
  const all = methods.flatMap((m) => m.sweep), losses = all.map((p) => p[1]), rates = all.map((p) => p[0]);
  const steep = Math.min(...losses) > 0 && Math.max(...losses) / Math.min(...losses) > 4;
  const tried = [...new Set(rates)].sort((a, b) => a - b);
  const chart = frame(figure,
    { range: padded(rates, true), log: true, ticks: tried.length <= 5 ? tried : undefined, write: short, label: "learning rate; a ring marks the chosen one" },
    { range: padded(losses, steep), log: steep, write: short, label: "held-out loss, first seed" });
  for (const method of methods) {
    const at = method.sweep.map(([rate, loss]) => [chart.across(rate), chart.up(loss), rate, loss]);
    const group = svg("g", { class: `rate c${method.colour}`, "data-key": method.key });
    group.append(svg("path", { class: `line d${method.dash}`, d: at.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y}`).join("") }));
    for (const [x, y, rate, loss] of at) {
      const point = svg("g", {}, svg("title", {}, `${method.label} at ${short(rate)}: ${loss.toFixed(4)}`), mark(x, y, method, 3));
      if (rate === method.chosen) point.append(svg("circle", { class: "ring", cx: x, cy: y, r: 7 }));
      group.append(point);
    }
    chart.root.append(group);
  }
  show(figure, chart.root);
}
