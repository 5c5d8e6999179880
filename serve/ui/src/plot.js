// Small line plots in SVG.

import { s } from "./dom.js";

const HEIGHT = 120, LEFT = 54, RIGHT = 8, TOP = 8, BOTTOM = 18;

/**
 * Draws lines into an element.
 *
 * @param {HTMLElement} place
 * @param {{lines: {name: string, values: (number|null)[]}[], xs?: number[], log?: boolean, mark?: number,
 *   from?: string, to?: string, unit?: string, zero?: boolean, target?: number, width?: number}} what
 */
export function plot(place, { lines, xs, log = false, mark, from = "", to = "", unit = "", zero = false, target, width: WIDTH = 320 }) {
  const n = Math.max(...lines.map((line) => line.values.length));
  const at = xs ?? Array.from({ length: n }, (_, index) => index);
  const scale = (value) => (log ? Math.log10(value) : value);
  const usable = (value) => value != null && Number.isFinite(value) && (!log || value > 0);
  const all = lines.flatMap((line) => line.values.filter(usable)).map(scale);
  if (target !== undefined && all.length) all.push(scale(target));
  let low = all.length ? Math.min(...all) : 0;
  let high = all.length ? Math.max(...all) : 1;
  if (zero) low = Math.min(low, 0);
  if (high - low < 1e-12) high = low + (log ? 1 : Math.max(1e-6, Math.abs(low) * 1e-6));
  const first = at[0] ?? 0, last = at[at.length - 1] ?? 1;
  const x = (value) => LEFT + ((value - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (scale(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot", role: "img" });
  const last_values = lines.map((line) => `${line.name} ${label(line.values.filter(usable).at(-1))} ${unit}`);
  svg.append(s("title", {}, last_values.join(", ")));
  for (const edge of [low, high]) {
    const place_y = TOP + (1 - (edge - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    svg.append(s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: place_y, y2: place_y }));
    const text = s("text", { x: LEFT - 5, y: place_y + 3.5, "text-anchor": "end" });
    text.textContent = all.length ? label(log ? 10 ** edge : edge, high - low) : "";
    svg.append(text);
  }
  if (target !== undefined && all.length) {
    svg.append(s("line", { class: "target", x1: LEFT, x2: WIDTH - RIGHT, y1: y(target), y2: y(target) }));
  }
  lines.forEach((line, index) => {
    let path = "";
    line.values.forEach((value, place_x) => {
      if (!usable(value)) return;
      const [before, after] = [usable(line.values[place_x - 1]), usable(line.values[place_x + 1])];
      path += `${before ? "L" : "M"}${x(at[place_x]).toFixed(1)} ${y(value).toFixed(1)}`;
      if (!before && !after) svg.append(s("circle", { class: `dot line-${index}`, cx: x(at[place_x]), cy: y(value), r: 1.8 }));
    });
    svg.append(s("path", { class: `line line-${index}`, d: path || "M0 0" }));
    if (mark !== undefined && usable(line.values[mark])) {
      svg.append(s("circle", { class: `dot line-${index}`, cx: x(at[mark]), cy: y(line.values[mark]), r: 3 }));
    }
  });
  if (!all.length) {
    const none = s("text", { class: "none", x: (LEFT + WIDTH - RIGHT) / 2, y: (HEIGHT - BOTTOM + TOP) / 2, "text-anchor": "middle" });
    none.textContent = "nothing yet";
    svg.append(none);
  }
  for (const [text, place_x, anchor] of [[from, LEFT, "start"], [to, WIDTH - RIGHT, "end"]]) {
    const element = s("text", { x: place_x, y: HEIGHT - 4, "text-anchor": anchor });
    element.textContent = text;
    svg.append(element);
  }
  lines.forEach((line, index) => {
    const element = s("text", { class: `name line-${index}`, x: WIDTH / 2 + (index - (lines.length - 1) / 2) * 84, y: HEIGHT - 4, "text-anchor": "middle" });
    element.textContent = line.name;
    svg.append(element);
  });
  place.replaceChildren(svg);
  return { xOf: (clientX) => {
    const box = svg.getBoundingClientRect();
    const inside = ((clientX - box.left) / box.width) * WIDTH;
    return Math.round(Math.min(1, Math.max(0, (inside - LEFT) / (WIDTH - LEFT - RIGHT))) * (n - 1));
  } };
}

function label(value, range = 0) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(0).replace("-", "−");
  const digits = range ? Math.min(5, Math.max(0, 2 - Math.floor(Math.log10(range)))) : 3;
  const shown = size < 10 ? value.toPrecision(Math.min(4, Math.max(2, digits + 1))) : value.toFixed(Math.min(digits, size >= 1000 ? 2 : 3));
  return shown.replace("-", "−");
}
