// The page: a structure, what a model says of it, and where it relaxes to.

import { Refused, call, lines, onTokenWanted } from "./api.js";
import { byId, fixed, h } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { showModels } from "./models.js";
import { plot } from "./plot.js";
import { keepPulse } from "./pulse.js";
import { Viewer } from "./viewer.js";
import { extxyz } from "./xyz.js";

const GPA = 160.21766208; // of 1 eV/Å³
const MOST_ROWS = 500; // of the table of atoms
const MOST_ATOMS_AT_ONCE = 5000; // asked for in one go
const ARROW = 2.2; // Å of the longest arrow, with the slider in the middle
const PLAY = 60; // ms a frame

const state = {
  elements: null, models: [], limits: null, viewer: null,
  track: null, frame: 0, selected: null, model: null, asking: null, relaxing: null, playing: null,
};

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

function chosen() {
  return state.models.find((model) => (model.version ? `${model.name}@${model.version}` : model.name) === byId("model").value);
}

function chooseLevels() {
  const levels = chosen()?.levels_of_theory ?? [];
  byId("level").replaceChildren(...levels.map((level) => h("option", { value: level }, level)));
  for (const option of byId("motion").options) option.disabled = option.value !== "fixed" && !chosen()?.has_stress;
  if (byId("motion").selectedOptions[0]?.disabled) byId("motion").value = "fixed";
}

// Files

async function open(name, body) {
  stopRelaxing();
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
  for (const id of ["tools", "result", "relax", "atoms-card"]) byId(id).hidden = false;
  byId("relax-plot").hidden = true;
  byId("relax-status").textContent = "";
  byId("relax-status").dataset.state = "";
  byId("download").disabled = true;
  state.viewer?.select(null);
  showFrame(0, look);
}

/** What the atoms are at a frame: those of a track that moves are always the same. */
const part = (index = state.frame) => state.track.parts?.[index] ?? state.track;

/** Asks for energies and forces of all frames, some at a time. */
async function evaluate() {
  const { track } = state;
  if (!track || track.relaxed) return;
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  for (const frame of track.frames) Object.assign(frame, { energy: undefined, forces: undefined, stress: undefined, failure: undefined });
  state.model = null;
  showFrame(state.frame);
  const model = chosen();
  let begin = 0;
  while (begin < track.frames.length && !asking.signal.aborted) {
    let end = begin, atoms = 0;
    while (end < track.frames.length && (end === begin || atoms + part(end).atomic_numbers.length <= MOST_ATOMS_AT_ONCE)) {
      atoms += part(end).atomic_numbers.length;
      end++;
    }
    const structures = track.frames.slice(begin, end).map((frame, offset) => structureOf(part(begin + offset), frame));
    // Stress of what is periodic alone, and those that are not must not be asked together with it.
    const stress = Boolean(model?.has_stress) && structures.every((one) => one.pbc.every(Boolean));
    try {
      const answer = await call("predict", { signal: asking.signal, body: { ...words(), structures, stress, forces: model?.force_mode !== "none" } });
      state.model = answer.model;
      answer.results.forEach((result, offset) => Object.assign(track.frames[begin + offset], result));
    } catch (error) {
      if (error.name === "AbortError") return;
      throw error;
    }
    begin = end;
    if (state.track === track) showFrame(state.frame);
  }
}

const words = () => ({ model: byId("model").value, level_of_theory: byId("level").value });

const structureOf = (atoms, frame) => ({
  atomic_numbers: atoms.atomic_numbers, positions: frame.positions, cell: frame.cell, pbc: atoms.pbc,
  charge: atoms.charge, spin_multiplicity: atoms.spin_multiplicity,
});

// What is shown

function showFrame(index, look = false) {
  const { track, viewer } = state;
  state.frame = Math.min(Math.max(0, index), track.frames.length - 1);
  const frame = track.frames[state.frame], atoms = part();
  const slider = byId("frame");
  slider.max = track.frames.length - 1;
  slider.value = state.frame;
  slider.closest(".row").hidden = track.frames.length < 2;
  byId("frame-now").textContent = `${(frame.step ?? state.frame) + (track.relaxed ? 0 : 1)} / ${(track.frames.at(-1).step ?? track.frames.length - 1) + (track.relaxed ? 0 : 1)}`;
  if (viewer) {
    viewer.options.scale = arrowScale();
    viewer.show(atoms, frame, { look });
  }
  showFacts(atoms, frame);
  showAtoms(atoms, frame);
  showCurves();
}

/** Å of an arrow for 1 eV/Å: the largest force of all frames decides, the slider stretches. */
function arrowScale() {
  let most = 0;
  for (const frame of state.track.frames) most = Math.max(most, largest(frame.forces) ?? 0);
  return (ARROW / Math.max(most, 0.05)) * 10 ** ((byId("scale").value - 50) / 40);
}

function largest(forces) {
  if (!forces) return undefined;
  return forces.reduce((most, force) => Math.max(most, Math.hypot(...force)), 0);
}

function showFacts(atoms, frame) {
  byId("title").textContent = state.track.name;
  const n = atoms.atomic_numbers.length;
  byId("failure").hidden = !frame.failure;
  byId("failure").textContent = frame.failure ? `${frame.failure.message}. ${frame.failure.remedy}` : "";
  const lengths = frame.cell.map((vector) => Math.hypot(...vector));
  const energy = h("dd", { class: "headline" }, frame.energy === undefined ? (frame.failure ? "–" : "…") : `${fixed(frame.energy, 4)} eV`);
  energy.id = "energy";
  if (frame.energy != null) energy.dataset.value = frame.energy;
  const rows = [
    ["Energy", energy],
    ["Per atom", frame.energy == null ? "–" : `${fixed(frame.energy / n, 4)} eV`],
    ["Largest force", frame.forces ? `${fixed(largest(frame.forces), 4)} eV/Å` : "–"],
    ["Formula", h("span", {}, ...formula(atoms.formula))],
    ["Atoms", String(n)],
  ];
  if (lengths.some(Boolean)) {
    rows.push(["Cell", `${lengths.map((length) => fixed(length, 3)).join(" · ")} Å`]);
    rows.push(["Volume", `${fixed(volume(frame.cell), 2)} Å³`]);
  }
  if (frame.stress) rows.push(["Pressure", `${fixed((-GPA * (frame.stress[0][0] + frame.stress[1][1] + frame.stress[2][2])) / 3, 3)} GPa`]);
  if (state.model) rows.push(["Computed by", [`${state.model.name}${state.model.version ? ` @${state.model.version}` : ""}`, state.model.level_of_theory, state.model.dtype].filter(Boolean).join(", ")]);
  byId("facts").replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), value instanceof HTMLElement && value.tagName === "DD" ? value : h("dd", {}, value)]));
  byId("stress").hidden = !frame.stress;
  if (frame.stress) {
    byId("stress").querySelector("tbody").replaceChildren(...frame.stress.map((row) => h("tr", {}, ...row.map((value) => h("td", {}, fixed(GPA * value, 2))))));
  }
}

function formula(text) {
  return text.split(/(\d+)/).filter(Boolean).map((piece) => (/^\d/.test(piece) ? h("sub", {}, piece) : piece));
}

function volume([a, b, c]) {
  return Math.abs(a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]));
}

function showAtoms(atoms, frame) {
  const body = byId("atoms").tBodies[0];
  const shown = Math.min(MOST_ROWS, atoms.atomic_numbers.length);
  while (body.rows.length > shown) body.deleteRow(-1);
  for (let index = body.rows.length; index < shown; index++) {
    const row = h("tr", { tabindex: 0 }, h("td", {}, String(index)), ...Array.from({ length: 5 }, () => h("td")));
    row.addEventListener("click", () => select(index));
    row.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), select(index)));
    body.append(row);
  }
  for (let index = 0; index < shown; index++) {
    const cells = body.rows[index].cells;
    cells[1].textContent = state.elements.symbols[atoms.atomic_numbers[index]];
    frame.positions[index].forEach((value, axis) => (cells[2 + axis].textContent = fixed(value, 3)));
    cells[5].textContent = frame.forces ? fixed(Math.hypot(...frame.forces[index]), 3) : "–";
    body.rows[index].classList.toggle("selected", index === state.selected);
  }
  byId("atoms-more").hidden = shown === atoms.atomic_numbers.length;
  byId("atoms-more").textContent = `the first ${shown} of ${atoms.atomic_numbers.length}`;
}

function showCurves() {
  const { track, frame } = state;
  const place = byId(track.relaxed ? "relax-plot" : "frames-plot");
  byId("frames-plot").hidden = track.relaxed || track.frames.length < 2;
  byId("relax-plot").hidden = !track.relaxed;
  if (place.hidden) return;
  const energies = track.frames.map((one) => one.energy ?? null);
  const make = (index, what) => {
    while (place.children.length <= index) place.append(h("div"));
    const box = place.children[index];
    const { xOf } = plot(box, { mark: frame, from: track.relaxed ? "step 0" : "1", to: String(track.relaxed ? track.frames.at(-1).step : track.frames.length), ...what });
    box.onpointerdown = box.onpointermove = (event) => (event.type === "pointerdown" || event.buttons) && !state.relaxing && (stopPlaying(), showFrame(xOf(event.clientX)));
  };
  make(0, { lines: [{ name: "energy, eV", values: energies }], unit: "eV" });
  make(1, { lines: [{ name: "fmax, eV/Å", values: track.frames.map((one) => one.fmax ?? largest(one.forces) ?? null) }], log: true, target: track.target });
}

function select(atom, scroll = false) {
  state.selected = atom === state.selected ? null : atom;
  state.viewer?.select(state.selected);
  const rows = byId("atoms").tBodies[0].rows;
  for (const row of rows) row.classList.remove("selected");
  const row = state.selected != null && rows[state.selected];
  if (row) {
    row.classList.add("selected");
    const box = row.closest(".scroll");
    if (scroll) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }
}

function hover(atom, event) {
  const tip = byId("tip");
  tip.hidden = atom == null;
  if (atom == null) return;
  const frame = state.track.frames[state.frame], atoms = part();
  const force = frame.forces?.[atom];
  tip.replaceChildren(
    h("b", {}, `${state.elements.symbols[atoms.atomic_numbers[atom]]} ${atom}`),
    h("div", {}, `r ${frame.positions[atom].map((value) => fixed(value, 3)).join("  ")} Å`),
    force ? h("div", {}, `F ${force.map((value) => fixed(value, 3)).join("  ")} eV/Å`) : null);
  const box = byId("viewer").getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - 210)}px`;
  tip.style.top = `${Math.min(event.clientY - box.top + 14, box.height - 70)}px`;
}

// Relaxing

async function relax() {
  const frame = state.track.frames[state.frame], atoms = part();
  const body = {
    ...words(), structures: [structureOf(atoms, frame)], optimizer: byId("optimizer").value, cell: byId("motion").value,
    fmax: Number(byId("fmax").value), max_steps: Math.round(Number(byId("steps").value)),
  };
  quiet();
  stopPlaying();
  state.asking?.abort();
  const mine = (state.relaxing = new AbortController());
  const status = byId("relax-status");
  const tell = (text, kind) => ((status.textContent = text), (status.dataset.state = kind));
  const { parts, ...rest } = { ...state.track, ...atoms };
  const track = { ...rest, relaxed: true, target: body.fmax, frames: [{ ...frame, step: 0, fmax: largest(frame.forces) }] };
  let drawn = 0;
  const follow = () => ((drawn = performance.now()), showFrame(track.frames.length - 1));
  try {
    busyRelaxing(true);
    tell("waiting for its turn…", "running");
    for await (const line of lines("relax", { body, signal: mine.signal })) {
      if (state.relaxing !== mine) return;
      if (state.track !== track) {
        state.track = track;
        state.frame = 0;
      }
      if (line.kind === "begun") state.model = line.model;
      if (line.kind === "step") {
        track.frames.push(line);
        tell(`step ${line.step}: fmax ${fixed(line.fmax, 4)} eV/Å`, "running");
        // Steps may come faster than they can be drawn.
        if (performance.now() - drawn > 50) follow();
      }
      if (line.kind === "error") throw new Refused(line.error, 0);
      if (line.kind === "result") {
        const last = track.frames.at(-1);
        if (line.forces) Object.assign(last, { positions: line.positions, cell: line.cell, forces: line.forces, energy: line.energy, stress: line.stress ?? undefined });
        if (line.failure) tell(`${line.failure.message}. ${line.failure.remedy}`, "failed");
        else if (line.converged) tell(`relaxed in ${line.steps} steps`, "converged");
        else tell(`not relaxed after ${line.steps} steps: go on with Relax`, "unfinished");
      }
    }
    follow();
  } catch (error) {
    if (error.name === "AbortError") tell(`stopped after ${track.frames.at(-1).step} steps`, "stopped");
    else {
      tell("", "failed");
      complain(error);
    }
    if (state.track === track) follow();
  } finally {
    if (state.relaxing === mine) state.relaxing = null;
    busyRelaxing(false);
    byId("download").disabled = !state.track.relaxed;
  }
}

function stopRelaxing() {
  state.relaxing?.abort();
}

function busyRelaxing(busy) {
  byId("go").textContent = busy ? "Stop" : "Relax";
  byId("go").classList.toggle("primary", !busy);
  for (const id of ["model", "level", "optimizer", "motion", "fmax", "steps"]) byId(id).disabled = busy;
}

function download() {
  const text = extxyz(state.track, state.elements.symbols, state.model);
  const url = URL.createObjectURL(new Blob([text], { type: "chemical/x-xyz" }));
  const stem = state.track.name.replace(/\.[^.]*$/, "").replace(/[^\w.-]+/g, "_") || "structure";
  h("a", { href: url, download: `${stem}-relaxed.extxyz` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// Playing

function play() {
  if (state.playing) return stopPlaying();
  if (state.frame === state.track.frames.length - 1) showFrame(0);
  byId("play").textContent = "⏸";
  state.playing = setInterval(() => {
    if (state.frame >= state.track.frames.length - 1) return stopPlaying();
    showFrame(state.frame + 1);
  }, PLAY);
}

function stopPlaying() {
  clearInterval(state.playing);
  state.playing = null;
  byId("play").textContent = "▶";
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
  byId("go").addEventListener("click", () => (state.relaxing ? stopRelaxing() : relax()));
  byId("download").addEventListener("click", download);
}

/** With another model: what was relaxed with the last one is shown as it is now. */
function again() {
  if (!state.track) return;
  if (state.track.relaxed) {
    const { relaxed, target, ...track } = state.track;
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

function complain(error) {
  byId("alert").querySelector("span").textContent = error.message;
  byId("alert").hidden = false;
}

function quiet() {
  byId("alert").hidden = true;
}
