// Models and their cards.

import { h, short } from "./dom.js";

/** One card for each version of each model. */
export function showModels(place, models, symbols) {
  place.replaceChildren(...models.map((model) => card(model, symbols)));
  if (!models.length) place.append(h("p", { class: "soft" }, "No model is served yet."));
}

function card(model, symbols) {
  const tags = [];
  if (model.is_default) tags.push(["default", "good"]);
  if (model.state && model.state !== "ready") tags.push([model.state, model.state === "failed" ? "bad" : ""]);
  tags.push(...model.labels.map((label) => [label, ""]));
  const forces = { conservative: "−∂E/∂r", direct: "direct head", none: "none", unknown: "yes" };
  const facts = [
    ["Elements", model.elements.length ? h("span", { class: "elements" }, ...model.elements.map((number) => h("span", {}, symbols[number] ?? `Z=${number}`))) : "any"],
    ["Level of theory", model.levels_of_theory.join(", ")],
    ["Cutoff", model.cutoff ? `${model.cutoff} Å` : "not said"],
    ["Forces", forces[model.force_mode] ?? model.force_mode],
    ["Stress", model.has_stress ? "yes" : "no"],
    ["Uncertainty", sureness(model)],
    ["Parameters", model.n_parameters ? short(model.n_parameters) : "not said"],
    ["Computes in", model.dtype || "not said"],
    ["Digest", h("code", { title: model.digest }, model.digest.slice(0, 19) + "…")],
  ];
  const licence = find(model.card, /^licen[cs]es?$/i);
  if (licence !== undefined) facts.splice(2, 0, ["Licence", text(licence)]);
  return h("article", { class: "card" },
    h("div", { class: "head" },
      h("h2", {}, model.name, model.version ? h("span", { class: "soft" }, ` @${model.version}`) : null),
      h("p", { class: "tags" }, ...tags.map(([word, kind]) => h("span", { class: `tag ${kind}` }, word)))),
    model.reason ? h("p", { class: "failure" }, model.reason) : null,
    h("dl", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    metrics(model.card.metrics),
    h("details", {}, h("summary", {}, "Whole card"), h("pre", {}, JSON.stringify(model.card, null, 1))),
  );
}

function sureness({ members, is_calibrated, has_domain }) {
  const known = [members > 1 && `${members} members`, is_calibrated && "calibrated", has_domain && "domain"].filter(Boolean);
  return known.join(" · ") || "not told";
}

function metrics(all) {
  const rows = flat(all ?? {}).slice(0, 40);
  if (!rows.length) return null;
  return h("details", { open: true }, h("summary", {}, "Metrics"), h("table", { class: "metrics" }, h("tbody", {},
    ...rows.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, text(value)))))));
}

function flat(object, before = "") {
  return Object.entries(object).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${before}${name} · `) : [[`${before}${name}`, value]]);
}

function find(object, pattern) {
  if (object === null || typeof object !== "object") return undefined;
  for (const [name, value] of Object.entries(object)) if (pattern.test(name) && value && !(Array.isArray(value) && !value.length)) return value;
  for (const value of Object.values(object)) {
    const found = find(value, pattern);
    if (found !== undefined) return found;
  }
  return undefined;
}

function text(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : value.toPrecision(4);
  if (Array.isArray(value)) return value.map(text).join(", ");
  return value !== null && typeof value === "object" ? Object.values(value).map(text).join(", ") : String(value);
}
