// Energies and forces of what is shown.

import { call } from "./api.js";
import { showFrame } from "./shown.js";
import { chosen, part, state, structureOf, words } from "./state.js";

const MOST_ATOMS_AT_ONCE = 5000; // asked for in one go

/** Asks for energies and forces of all frames, some at a time. */
export async function evaluate() {
  const { track } = state;
  if (!track || track.moved) return;
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  for (const frame of track.frames) Object.assign(frame, { energy: undefined, forces: undefined, stress: undefined, failure: undefined, uncertainty: undefined });
  state.model = null;
  showFrame(state.frame);
  const model = chosen();
  // Members cost several times as much: only where there is something to learn from them.
  const uncertainty = Boolean(model && (model.members > 1 || model.is_calibrated || model.has_domain));
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
      const answer = await call("predict", { signal: asking.signal, body: { ...words(), structures, stress, uncertainty, forces: model?.force_mode !== "none" } });
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
