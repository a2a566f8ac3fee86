// The page comes to life: theme, copying, sorting, charts.

function addTheme(button) {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const update = () => button.setAttribute("aria-pressed", dark());
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; update(); });
  system.addEventListener("change", update);
  update();
}

async function copy(text, code) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without permission the command is selected, to be copied by hand.
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}

function addCopying(button) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    button.textContent = (await copy(code.textContent, code)) ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

function addCharts(data) {
  const figures = ["curves", "memory", "rates"].map((id) => document.getElementById(id));
  const state = { shown: new Set(data.methods.map((m) => m.key)), kind: "held_out", x: "step", log: false };
  const redraw = () => {
    figures[0].dataset.x = state.x;
    [drawCurves, drawMemory, drawRates].forEach((draw, i) => draw(figures[i], data, state));
  };
  document.getElementById("charts").hidden = false;
  addControls(document.getElementById("controls"), state, redraw);
  addLegend(document.getElementById("legend"), data, state, redraw);
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
}

addTheme(document.getElementById("theme"));
makeSortable(document.getElementById("methods"));
document.querySelectorAll(".copy").forEach(addCopying);
const data = JSON.parse(document.getElementById("data").textContent);
if (data.methods.length) addCharts(data);
