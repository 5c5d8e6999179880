// What is shown of the frame that is looked at.

import { byId, fixed, h, sentences } from "./dom.js";
import { plot } from "./plot.js";
import { part, state } from "./state.js";

const GPA = 160.21766208; // of 1 eV/Å³
const MOST_ROWS = 500; // of the table of atoms
const ARROW = 2.2; // Å of the longest arrow, with the slider in the middle
const PLAY = 60; // ms a frame

export function showFrame(index, look = false) {
  const { track, viewer } = state;
  state.frame = Math.min(Math.max(0, index), track.frames.length - 1);
  const frame = track.frames[state.frame], atoms = part();
  const slider = byId("frame");
  slider.max = track.frames.length - 1;
  slider.value = state.frame;
  slider.closest(".row").hidden = track.frames.length < 2;
  byId("frame-now").textContent = whereabouts(track, frame);
  if (viewer) {
    viewer.options.scale = arrowScale();
    viewer.options.suspect = frame.uncertainty?.outside?.atom ?? null;
    viewer.show(atoms, frame, { look });
  }
  showFacts(atoms, frame);
  showAtoms(atoms, frame);
  showCurves();
}

/** Which frame of how many, in the words of what the track is. */
function whereabouts(track, frame) {
  const last = track.frames.at(-1);
  if (track.moved === "dynamics") return `${fixed(frame.step * track.timestep, 1)} / ${fixed(last.step * track.timestep, 1)} fs`;
  if (track.moved) return `step ${frame.step} / ${last.step}`;
  return `${state.frame + 1} / ${track.frames.length}`;
}

/** Å of an arrow for 1 eV/Å: the largest force of all frames decides, the slider stretches. */
export function arrowScale() {
  let most = 0;
  for (const frame of state.track.frames) most = Math.max(most, largest(frame.forces) ?? 0);
  return (ARROW / Math.max(most, 0.05)) * 10 ** ((byId("scale").value - 50) / 40);
}

const measured = new WeakMap();

/** eV/Å of the largest force of a frame, which is looked for once. */
export function largest(forces) {
  if (!forces) return undefined;
  if (!measured.has(forces)) measured.set(forces, forces.reduce((most, force) => Math.max(most, Math.hypot(...force)), 0));
  return measured.get(forces);
}

function showFacts(atoms, frame) {
  byId("title").textContent = state.track.name;
  const n = atoms.atomic_numbers.length;
  byId("failure").hidden = !frame.failure;
  byId("failure").textContent = frame.failure ? sentences(frame.failure.message, frame.failure.remedy) : "";
  showOutside(atoms, frame.uncertainty?.outside);
  const lengths = frame.cell.map((vector) => Math.hypot(...vector));
  const energy = h("dd", { class: "headline" }, frame.energy === undefined ? "…" : `${fixed(frame.energy, 4)} eV`);
  energy.id = "energy";
  if (frame.energy != null) energy.dataset.value = frame.energy;
  const rows = [
    ...(frame.failure ? [] : [
      ["Energy", energy],
      ["Per atom", frame.energy == null ? "–" : `${fixed(frame.energy / n, 4)} eV`],
      ...sureness(frame),
      ["Largest force", frame.forces ? `${fixed(largest(frame.forces), 4)} eV/Å` : "–"],
    ]),
    ["Formula", h("span", {}, ...formula(atoms.formula))],
    ["Atoms", String(n)],
  ];
  if (frame.temperature != null) {
    rows.splice(2, 0, ["Kinetic energy", `${fixed(frame.kinetic, 4)} eV`], ["Total energy", `${fixed(frame.energy + frame.kinetic, 4)} eV`], ["Temperature", `${fixed(frame.temperature, 1)} K`]);
  }
  if (lengths.some(Boolean)) {
    rows.push(["Cell", `${lengths.map((length) => fixed(length, 3)).join(" · ")} Å`]);
    rows.push(["Volume", `${fixed(volume(frame.cell), 2)} Å³`]);
  }
  if (frame.stress) rows.push(["Pressure", `${fixed((-GPA * (frame.stress[0][0] + frame.stress[1][1] + frame.stress[2][2])) / 3, 3)} GPa`]);
  if (state.model && !frame.failure) rows.push(["Computed by", [`${state.model.name}${state.model.version ? ` @${state.model.version}` : ""}`, state.model.level_of_theory, state.model.dtype].filter(Boolean).join(", ")]);
  byId("facts").replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), value instanceof HTMLElement && value.tagName === "DD" ? value : h("dd", {}, value)]));
  byId("stress").hidden = !frame.stress;
  if (frame.stress) {
    byId("stress").querySelector("tbody").replaceChildren(...frame.stress.map((row) => h("tr", {}, ...row.map((value) => h("td", {}, fixed(GPA * value, 2))))));
  }
}

/** How sure the energy is, of models that know. */
function sureness({ uncertainty }) {
  if (!uncertainty) return [];
  const { members, coverage, energy_interval: interval, energy_spread: spread } = uncertainty;
  const rows = [];
  if (interval != null) rows.push([`True within, ${Math.round(100 * coverage)} %`, `± ${fixed(interval, 4)} eV`]);
  if (spread != null) rows.push([`Spread of ${members} members`, `${fixed(spread, 4)} eV`]);
  return rows;
}

function showOutside(atoms, outside) {
  const place = byId("outside");
  place.hidden = !outside;
  if (!outside) return;
  const name = `${state.elements.symbols[atoms.atomic_numbers[outside.atom]]} ${outside.atom}`;
  const link = h("button", { class: "link" }, name);
  link.addEventListener("click", () => state.selected === outside.atom || select(outside.atom, true));
  place.replaceChildren(h("b", {}, "Outside what the model was trained on: "), "the numbers are a guess. Strangest is ", link, `: ${outside.reason}`);
}

function formula(text) {
  return text.split(/(\d+)/).filter(Boolean).map((piece) => (/^\d/.test(piece) ? h("sub", {}, piece) : piece));
}

function volume([a, b, c]) {
  return Math.abs(a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]));
}

function showAtoms(atoms, frame) {
  const body = byId("atoms").tBodies[0];
  const sure = frame.uncertainty?.forces_interval ?? frame.uncertainty?.forces_spread;
  byId("atoms").classList.toggle("sure", Boolean(sure));
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
    const size = frame.forces ? fixed(Math.hypot(...frame.forces[index]), 3) : "–";
    cells[5].replaceChildren(size, ...(sure ? [h("span", { class: "soft" }, ` ± ${fixed(sure[index], 3)}`)] : []));
    body.rows[index].classList.toggle("selected", index === state.selected);
  }
  byId("atoms-more").hidden = shown === atoms.atomic_numbers.length;
  byId("atoms-more").textContent = `the first ${shown} of ${atoms.atomic_numbers.length}`;
}

function showCurves() {
  const { track, frame } = state;
  const place = byId(track.moved ? "move-plot" : "frames-plot");
  byId("frames-plot").hidden = Boolean(track.moved) || track.frames.length < 2;
  byId("move-plot").hidden = !track.moved;
  if (place.hidden) return;
  const [from, to] = ends(track);
  const make = (index, what) => {
    while (place.children.length <= index) place.append(h("div"));
    const box = place.children[index];
    const { xOf } = plot(box, { mark: frame, from, to, ...what });
    box.onpointerdown = box.onpointermove = (event) => (event.type === "pointerdown" || event.buttons) && !state.moving && (stopPlaying(), showFrame(xOf(event.clientX)));
  };
  const of = (value) => track.frames.map(value);
  if (track.moved === "dynamics") {
    const total = (one) => (one.energy == null || one.kinetic == null ? null : one.energy + one.kinetic);
    make(0, { lines: [{ name: "potential, eV", values: of((one) => one.energy) }, { name: "total, eV", values: of(total) }] });
    make(1, { lines: [{ name: "temperature, K", values: of((one) => one.temperature) }], target: track.target });
  } else {
    make(0, { lines: [{ name: "energy, eV", values: of((one) => one.energy ?? null) }] });
    make(1, { lines: [{ name: "largest force, eV/Å", values: of((one) => one.fmax ?? largest(one.forces) ?? null) }], log: true, target: track.target });
  }
}

/** What stands below a curve's ends. */
function ends(track) {
  const last = track.frames.at(-1).step;
  if (track.moved === "dynamics") return ["0 fs", `${fixed(last * track.timestep, 0)} fs`];
  return track.moved ? ["step 0", String(last)] : ["frame 1", String(track.frames.length)];
}

export function select(atom, scroll = false) {
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

export function hover(atom, event) {
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

// Playing

export function play() {
  if (state.playing) return stopPlaying();
  if (state.frame === state.track.frames.length - 1) showFrame(0);
  byId("play").textContent = "⏸";
  state.playing = setInterval(() => {
    if (state.frame >= state.track.frames.length - 1) return stopPlaying();
    showFrame(state.frame + 1);
  }, PLAY);
}

export function stopPlaying() {
  clearInterval(state.playing);
  state.playing = null;
  byId("play").textContent = "▶";
}
