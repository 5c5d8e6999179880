// The page: a structure, what a model says of it, and how it moves.

import { call, onTokenWanted } from "./api.js";
import { evaluate } from "./asking.js";
import { byId, h } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { showModels } from "./models.js";
import { stopMoving, wireMoving } from "./moving.js";
import { complain, quiet } from "./notice.js";
import { keepPulse } from "./pulse.js";
import { arrowScale, hover, play, select, showFrame, stopPlaying } from "./shown.js";
import { chosen, state } from "./state.js";
import { Viewer } from "./viewer.js";

start().catch(complain);

async function start() {
  wireTheme();
  wireTabs();
  wireDialogs();
  state.elements = await call("elements");
  try {
    state.viewer = new Viewer(byId("viewer"), state.elements, { onHover: hover, onPick: (atom) => select(atom, true) });
  } catch {
    complain(new Error("this browser draws no WebGL: energies and forces are shown without a picture"));
  }
  await loadModels();
  wireStructure();
  wireMoving();
  document.documentElement.dataset.ready = "yes";
  keepPulse();
}

async function loadModels() {
  for (;;) {
    try {
      const answer = await call("models");
      Object.assign(state, { models: answer.models, limits: answer.limits });
      break;
    } catch (error) {
      if (error.reason !== "NOT_READY") throw error;
      await new Promise((done) => setTimeout(done, 1500));
    }
  }
  showModels(byId("models"), state.models, state.elements.symbols);
  const ready = state.models.filter((model) => model.state !== "failed");
  const chooser = byId("model");
  const before = chooser.value;
  chooser.replaceChildren(...ready.map((model) =>
    h("option", { value: model.version ? `${model.name}@${model.version}` : model.name },
      model.version ? `${model.name} @${model.version}` : model.name)));
  const usual = ready.findIndex((model) => model.is_default);
  chooser.selectedIndex = Math.max(0, usual);
  if ([...chooser.options].some((option) => option.value === before)) chooser.value = before;
  chooseLevels();
}

function chooseLevels() {
  const levels = chosen()?.levels_of_theory ?? [];
  byId("level").replaceChildren(...levels.map((level) => h("option", { value: level }, level)));
  for (const option of byId("cell-motion").options) option.disabled = option.value !== "fixed" && !chosen()?.has_stress;
  if (byId("cell-motion").selectedOptions[0]?.disabled) byId("cell-motion").value = "fixed";
}

// Files

async function open(name, body) {
  stopMoving({ forget: true });
  stopPlaying();
  quiet();
  document.body.classList.add("busy");
  try {
    if (state.limits && body.size > state.limits.bytes) {
      throw new Error(`${name} has ${body.size} bytes, the page takes ${state.limits.bytes}`);
    }
    const { frames } = await call(`read?name=${encodeURIComponent(name)}`, { body });
    const tracks = frames.map(({ positions, cell, ...rest }) => ({ ...rest, frames: [{ positions, cell }] }));
    // Frames of the same atoms are one track; of others, each has its own atoms.
    take({ name: name || "pasted text", ...tracks[0], parts: tracks, frames: tracks.map((one) => one.frames[0]) }, true);
    await evaluate();
  } catch (error) {
    complain(error);
  } finally {
    document.body.classList.remove("busy");
  }
}

function take(track, look) {
  state.track = track;
  state.selected = null;
  byId("empty").hidden = true;
  for (const id of ["tools", "result", "move", "atoms-card", "legend"]) byId(id).hidden = false;
  byId("move-plot").hidden = true;
  byId("move-status").textContent = "";
  byId("move-status").dataset.state = "";
  byId("download").disabled = true;
  state.viewer?.select(null);
  showFrame(0, look);
}

// Wires

function wireStructure() {
  const pick = byId("file");
  for (const id of ["choose", "other"]) byId(id).addEventListener("click", () => pick.click());
  pick.addEventListener("change", () => {
    if (pick.files[0]) open(pick.files[0].name, pick.files[0]);
    pick.value = "";
  });
  for (const link of document.querySelectorAll("[data-example]")) {
    link.addEventListener("click", () => {
      const [name, text] = EXAMPLES[link.dataset.example];
      open(name, new Blob([text]));
    });
  }
  let depth = 0;
  const over = (change) => (byId("dropping").hidden = (depth = Math.max(0, depth + change)) === 0);
  addEventListener("dragenter", (event) => (event.preventDefault(), over(1)));
  addEventListener("dragleave", () => over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    over(0);
    const file = event.dataTransfer.files[0];
    if (file) open(file.name, file);
  });
  addEventListener("paste", (event) => {
    if (/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
    const file = event.clipboardData.files[0];
    const text = event.clipboardData.getData("text");
    if (file) open(file.name, file);
    else if (text.trim()) open("", new Blob([text]));
  });
  byId("model").addEventListener("change", () => (chooseLevels(), again()));
  byId("level").addEventListener("change", again);
  byId("frame").addEventListener("input", (event) => (stopPlaying(), showFrame(Number(event.target.value))));
  byId("play").addEventListener("click", play);
  byId("scale").addEventListener("input", () => state.viewer?.set({ scale: arrowScale() }));
  for (const id of ["bonds", "cell"]) byId(id).addEventListener("change", (event) => state.viewer?.set({ [id]: event.target.checked }));
  byId("repeat").addEventListener("change", (event) => (state.viewer?.set({ repeat: Number(event.target.value) }), state.viewer?.look()));
  byId("centre").addEventListener("click", () => state.viewer?.look());
}

/** With another model: where the last one led is shown as it is now. */
function again() {
  if (!state.track) return;
  if (state.track.moved) {
    const { moved, target, timestep, ...track } = state.track;
    const { positions, cell } = track.frames[state.frame];
    take({ ...track, frames: [{ positions, cell }] }, false);
  }
  quiet();
  evaluate().catch(complain);
}

function wireTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const go = (tab) => {
    for (const one of tabs) {
      const on = one === tab;
      one.setAttribute("aria-selected", on);
      one.tabIndex = on ? 0 : -1;
      byId(one.getAttribute("aria-controls")).hidden = !on;
    }
    if (tab.id === "tab-models" && state.elements) loadModels().catch(complain);
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => go(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      next.focus();
      go(next);
    });
  });
}

function wireTheme() {
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    state.viewer?.recolor();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.viewer?.recolor());
}

function wireDialogs() {
  onTokenWanted((why) => new Promise((done) => {
    const dialog = byId("token-dialog"), input = byId("token");
    byId("token-why").textContent = why;
    input.value = "";
    const finish = () => {
      if (!input.value.trim()) return;
      const value = input.value.trim();
      input.value = "";
      dialog.close();
      done(value);
    };
    byId("token-ok").onclick = finish;
    input.onkeydown = (event) => event.key === "Enter" && finish();
    dialog.oncancel = (event) => event.preventDefault();
    if (!dialog.open) dialog.showModal();
    input.focus();
  }));
  const paste = byId("paste-dialog");
  for (const id of ["paste", "paste-other"]) byId(id).addEventListener("click", () => paste.showModal());
  byId("paste-cancel").addEventListener("click", () => paste.close());
  byId("paste-ok").addEventListener("click", () => {
    paste.close();
    open(byId("paste-name").value.trim(), new Blob([byId("paste-text").value]));
  });
  byId("alert").querySelector("button").addEventListener("click", quiet);
}

