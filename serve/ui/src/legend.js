// What the picture's colours and lengths mean.

import { byId, h, s } from "./dom.js";

const SHORTEST = 28, LONGEST = 90; // pixels of a scale

/** 1, 2 or 5 times a power of ten: the largest that is drawn within the longest scale. */
function round(perPixel) {
  const most = LONGEST * perPixel;
  const power = 10 ** Math.floor(Math.log10(most));
  return [5, 2, 1].map((digit) => digit * power).find((value) => value <= most) ?? power;
}

const plain = (value) => (value >= 1e-3 && value < 1e5 ? String(Number(value.toPrecision(1))) : value.toExponential(0).replace("-", "−"));

export function showElements(numbers, elements) {
  byId("legend-elements").replaceChildren(...[...new Set(numbers)].sort((one, two) => one - two).map((number) => {
    const dot = h("i");
    dot.style.background = elements.colors[number];
    return h("span", {}, dot, elements.symbols[number]);
  }));
}

/** Scales at the distance that is looked at: `pixels` of 1 Å, and `scale`, Å of 1 eV/Å, if there are arrows. */
export function showScales(pixels, scale) {
  const rows = [];
  const add = (value, width, kind, path, unit) => {
    if (!Number.isFinite(width) || width < SHORTEST / 3) return;
    const svg = s("svg", { width: width.toFixed(1), height: 9, "aria-hidden": "true" }, s("path", { class: kind, d: path(width) }));
    rows.push(h("div", {}, `${plain(value)} ${unit}`, svg));
  };
  if (scale) {
    const value = round(1 / (pixels * scale));
    const end = (width) => width.toFixed(1);
    add(value, value * scale * pixels, "force", (width) => `M0 4h${(width - 8).toFixed(1)}v-3.5L${end(width)} 4.5l-8 4v-3.5H0z`, "eV/Å");
  }
  const length = round(1 / pixels);
  add(length, length * pixels, "length", (width) => `M.5 1v7M.5 4.5h${(width - 1).toFixed(1)}M${(width - 0.5).toFixed(1)} 1v7`, "Å");
  byId("legend-scales").replaceChildren(...rows);
}
