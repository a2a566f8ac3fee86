// Switches: what is drawn, over what, and which methods.

const CHOICES = [
  { name: "kind", label: "Loss", options: [["held_out", "Held-out"], ["train", "Training"]] },
  { name: "x", label: "Over", options: [["step", "Steps"], ["seconds", "Seconds"]] },
  { name: "log", label: "Scale", options: [[false, "Linear"], [true, "Log"]] },
];

function addControls(place, state, redraw) {
  for (const { name, label, options } of CHOICES) {
    const group = html("div", { class: "switch", role: "group", "aria-label": label });
    for (const [value, title] of options) {
      const button = html("button", { type: "button", "data-choice": `${name}:${value}` }, title);
      button.addEventListener("click", () => { state[name] = value; update(); redraw(); });
      group.append(button);
    }
    const update = () => options.forEach(([value], i) => group.children[i].setAttribute("aria-pressed", state[name] === value));
    update();
    place.append(group);
  }
}

function addLegend(place, data, state, redraw) {
  const update = () => {
    for (const button of place.querySelectorAll("[data-key]")) button.setAttribute("aria-pressed", state.shown.has(button.dataset.key));
    redraw();
  };
  for (const method of data.methods) {
    const button = html("button", { type: "button", "data-key": method.key, "aria-pressed": "true" }, sample(method), html("span", {}, method.label));
    button.addEventListener("click", () => {
      state.shown.has(method.key) ? state.shown.delete(method.key) : state.shown.add(method.key);
      update();
    });
    place.append(button);
  }
  const presets = [["All", () => true], ["Best", (method) => method.best], ["None", () => false]];
  for (const [title, wanted] of presets) {
    if (title === "Best" && !data.methods.some(wanted)) continue;
    const button = html("button", { type: "button", class: "all", "data-preset": title.toLowerCase() }, title);
    button.addEventListener("click", () => {
      state.shown = new Set(data.methods.filter(wanted).map((method) => method.key));
      update();
    });
    place.append(button);
  }
}
