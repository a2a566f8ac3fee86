// The frame of a chart: axes, ticks, labels. A chart is drawn anew when its width, data or settings change.

function frame(figure, x, y) {
  const width = Math.max(280, Math.round(figure.clientWidth)), narrow = width < 480;
  const height = figure.id === "curves" ? (narrow ? 320 : 440) : (narrow ? 320 : 380);
  const box = { left: 58, right: width - 14, top: 26, bottom: height - 46, width, height };
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${y.label} over ${x.label}` });
  const across = scale(...x.range, box.left, box.right, x.log), up = scale(...y.range, box.bottom, box.top, y.log);
  for (const tick of up.ticks(7)) {
    const at = up(tick);
    root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }));
    root.append(text(box.left - 8, at + 4, y.write(tick), "end"));
  }
  for (const tick of (x.ticks ?? across.ticks(narrow ? 4 : 8)).filter((tick) => !x.whole || Number.isInteger(tick))) {
    root.append(svg("line", { class: "grid", x1: across(tick), x2: across(tick), y1: box.bottom, y2: box.bottom + 5 }));
    root.append(text(across(tick), box.bottom + 19, x.write(tick), "middle"));
  }
  root.append(text(0, 12, y.label, "start"), text(box.right, height - 8, x.label, "end"));
  return { root, across, up, box };
}

function text(x, y, content, anchor, name = "") {
  return svg("text", { x, y, "text-anchor": anchor, class: name }, content);
}

// Put a drawing, or a sentence where there is nothing to draw, in the place of what is there.
function show(figure, root, empty) {
  const focused = figure.contains(document.activeElement);
  figure.replaceChildren(root ?? html("p", { class: "hint" }, empty));
  if (focused && root) root.focus?.();
}
