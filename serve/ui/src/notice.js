// What went wrong, above everything.

import { byId, sentences } from "./dom.js";

export function complain(error) {
  byId("alert").querySelector("span").textContent = sentences(error.message);
  byId("alert").hidden = false;
}

export function quiet() {
  byId("alert").hidden = true;
}
