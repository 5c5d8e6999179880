// What the page knows, in one place.

import { byId } from "./dom.js";

export const state = {
  elements: null, models: [], limits: null, viewer: null,
  track: null, frame: 0, selected: null, model: null, asking: null, moving: null, playing: null,
};

export function chosen() {
  return state.models.find((model) => (model.version ? `${model.name}@${model.version}` : model.name) === byId("model").value);
}

/** What the atoms are at a frame: those of a track that moves are always the same. */
export const part = (index = state.frame) => state.track.parts?.[index] ?? state.track;

export const words = () => ({ model: byId("model").value, level_of_theory: byId("level").value });

export const structureOf = (atoms, frame) => ({
  atomic_numbers: atoms.atomic_numbers, positions: frame.positions, cell: frame.cell, pbc: atoms.pbc,
  charge: atoms.charge, spin_multiplicity: atoms.spin_multiplicity,
});
