"use strict";
// Elements, scales and numbers that all charts share.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// A scale from values to pixels; logarithmic ones take positive values only.
function scale(low, high, from, to, logarithmic = false) {
  const put = logarithmic ? Math.log : (value) => value;
  const take = logarithmic ? Math.exp : (value) => value;
  const [a, b] = [put(low), put(high)];
  const at = (value) => from + ((put(value) - a) / (b - a || 1)) * (to - from);
  at.invert = (pixel) => take(a + ((pixel - from) / (to - from)) * (b - a));
  at.ticks = (count) => (logarithmic ? logTicks(low, high, count) : niceTicks(low, high, count));
  return at;
}

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(+(n * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of [1, 2, 5]) {
      const tick = +(factor * 10 ** power).toPrecision(12);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  if (ticks.length < 3) return niceTicks(low, high, count).filter((tick) => tick > 0);
  const decades = ticks.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9);
  return ticks.length > 2 * count && decades.length > 1 ? decades : ticks;
}

// A range with room at both ends; a single value gets a range around it.
function padded(values, logarithmic = false) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (logarithmic) {
    const room = (high / low) ** 0.05 * (high === low ? 1.2 : 1.02);
    return [low / room, high * room];
  }
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

const short = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(+value.toPrecision(6)));
const thousands = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 1 });

// The marker of a method: circle, square, triangle.
function mark(x, y, method, size = 4) {
  const name = `mark c${method.colour}`;
  if (method.dash === 1) return svg("rect", { class: name, x: x - size, y: y - size, width: 2 * size, height: 2 * size });
  if (method.dash === 2) return svg("path", { class: name, d: `M${x} ${y - size * 1.2}l${size * 1.2} ${size * 2.2}h${-size * 2.4}z` });
  return svg("circle", { class: name, cx: x, cy: y, r: size });
}

// A piece of a method's line with its marker, for legends.
function sample(method) {
  const line = svg("line", { class: `line c${method.colour} d${method.dash}`, x1: 0, x2: 28, y1: 6, y2: 6 });
  return svg("svg", { class: "sample", viewBox: "0 0 28 12", "aria-hidden": "true" }, line, mark(14, 6, method));
}
