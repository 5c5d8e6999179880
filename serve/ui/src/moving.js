// Relaxations and dynamics: asked for, followed as they run, kept as a track of frames.

import { Refused, lines } from "./api.js";
import { byId, fixed, h, sentences } from "./dom.js";
import { complain, quiet } from "./notice.js";
import { largest, showFrame, stopPlaying } from "./shown.js";
import { part, state, structureOf, words } from "./state.js";
import { extxyz } from "./xyz.js";

const DRAWN = 50; // ms; steps may come faster than they can be drawn
const number = (id) => Number(byId(id).value);

/** What is asked for, and what is said of it. `begin`: the first frame, where the server does not tell it. */
const KINDS = {
  relax: {
    path: "relax", go: "Relax", suffix: "relaxed",
    body: () => ({ optimizer: byId("optimizer").value, cell: byId("cell-motion").value, fmax: number("fmax"), max_steps: Math.round(number("max-steps")) }),
    track: (body) => ({ target: body.fmax }),
    begin: (frame) => [{ ...frame, uncertainty: undefined, step: 0, fmax: largest(frame.forces) }],
    step: (line) => `step ${line.step}: largest force ${fixed(line.fmax, 4)} eV/Å`,
    end: (line) => (line.converged ? [`relaxed in ${line.steps} steps`, "converged"] : [`not relaxed after ${line.steps} steps: go on with Relax`, "unfinished"]),
  },
  dynamics: {
    path: "simulate", go: "Run", suffix: "dynamics",
    body: () => ({ integrator: byId("integrator").value, timestep: number("timestep"), temperature: number("temperature"), steps: Math.round(number("md-steps")) }),
    track: (body) => ({ timestep: body.timestep, target: body.integrator === "langevin" ? body.temperature : undefined }),
    begin: () => [],
    step: (line, body) => `step ${line.step} of ${body.steps}: ${fixed(line.temperature, 0)} K`,
    end: (line, track, body) => [`${line.steps} steps, ${fixed(line.steps * body.timestep, 1)} fs; ${outcome(track, body)}`, "converged"],
  },
};

const kind = () => document.querySelector("[name=kind]:checked").value;

/** What a run can be judged by: energy that is conserved, or temperature that is kept. */
function outcome({ frames }, body) {
  if (body.integrator === "nve") {
    const totals = frames.map((frame) => frame.energy + frame.kinetic);
    const half = (totals.reduce((most, value) => Math.max(most, value), -Infinity) - totals.reduce((least, value) => Math.min(least, value), Infinity)) / 2;
    return `total energy kept within ± ${fixed(1000 * half, 2)} meV`;
  }
  const late = frames.slice(Math.floor(frames.length / 2));
  return `mean of the second half ${fixed(late.reduce((sum, frame) => sum + frame.temperature, 0) / late.length, 0)} K`;
}

const tell = (text, how) => ((byId("move-status").textContent = text), (byId("move-status").dataset.state = how));

async function move() {
  const what = KINDS[kind()];
  const frame = state.track.frames[state.frame], atoms = part();
  const body = { ...words(), structures: [structureOf(atoms, frame)], ...what.body() };
  quiet();
  stopPlaying();
  state.asking?.abort();
  const mine = (state.moving = new AbortController());
  const { parts, ...rest } = { ...state.track, ...atoms };
  const track = { ...rest, timestep: undefined, moved: kind(), ...what.track(body), frames: what.begin(frame) };
  let drawn = 0, warning = "";
  const follow = () => {
    if (!track.frames.length) return;
    state.track = track;
    drawn = performance.now();
    showFrame(track.frames.length - 1);
  };
  try {
    busy(what);
    tell("waiting for its turn…", "running");
    for await (const line of lines(what.path, { body, signal: mine.signal })) {
      if (state.moving !== mine) return;
      if (line.kind === "begun") {
        state.model = line.model;
        warning = (line.warnings ?? []).map((text) => ` (${text})`).join("");
      }
      if (line.kind === "step") {
        track.frames.push(line);
        tell(what.step(line, body), "running");
        if (performance.now() - drawn > DRAWN) follow();
      }
      if (line.kind === "error") throw new Refused(line.error, 0);
      if (line.kind === "result") {
        const last = track.frames.at(-1);
        if (line.forces) Object.assign(last, { positions: line.positions, cell: line.cell, forces: line.forces, energy: line.energy, stress: line.stress ?? undefined });
        if (line.failure) tell(sentences(line.failure.message, line.failure.remedy), "failed");
        else {
          const [text, how] = what.end(line, track, body);
          tell(text + warning, how);
        }
      }
    }
    follow();
  } catch (error) {
    if (state.moving !== mine) return;
    if (error.name === "AbortError") tell(`stopped after ${track.frames.at(-1)?.step ?? 0} steps`, "stopped");
    else {
      tell("", "failed");
      complain(error);
    }
    follow();
  } finally {
    if (state.moving === mine) {
      state.moving = null;
      busy(null);
      byId("download").disabled = !state.track.moved;
    }
  }
}

/** Ends what runs; what it came to so far is forgotten if `forget`. */
export function stopMoving({ forget = false } = {}) {
  const { moving } = state;
  if (forget) {
    state.moving = null;
    busy(null);
  }
  moving?.abort();
}

function busy(what) {
  const go = byId("go");
  go.textContent = what ? "Stop" : KINDS[kind()].go;
  go.classList.toggle("primary", !what);
  for (const one of document.querySelectorAll("#move :is(select, input), #model, #level")) one.disabled = Boolean(what);
}

function download() {
  const text = extxyz(state.track, state.elements.symbols, state.model);
  const url = URL.createObjectURL(new Blob([text], { type: "chemical/x-xyz" }));
  const stem = state.track.name.replace(/\.[^.]*$/, "").replace(/[^\w.-]+/g, "_") || "structure";
  h("a", { href: url, download: `${stem}-${KINDS[state.track.moved].suffix}.extxyz` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function chooseKind() {
  for (const name of Object.keys(KINDS)) byId(`${name}-settings`).hidden = name !== kind();
  byId("go").textContent = KINDS[kind()].go;
}

export function wireMoving() {
  for (const one of document.querySelectorAll("[name=kind]")) one.addEventListener("change", chooseKind);
  if (state.limits) byId("md-steps").max = state.limits.steps;
  byId("go").addEventListener("click", () => (state.moving ? stopMoving() : move()));
  byId("download").addEventListener("click", download);
  chooseKind();
}
