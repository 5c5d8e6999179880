// Structures as extended xyz, with what was computed of them.

export function extxyz(track, symbols, model) {
  return track.frames.map((frame, index) => {
    const periodic = track.pbc.some(Boolean);
    const words = [];
    if (periodic || frame.cell.flat().some(Boolean)) words.push(`Lattice="${frame.cell.flat().join(" ")}"`);
    words.push(`Properties=species:S:1:pos:R:3${frame.forces ? ":forces:R:3" : ""}`);
    words.push(`pbc="${track.pbc.map((flag) => (flag ? "T" : "F")).join(" ")}"`);
    if (frame.energy != null) words.push(`energy=${frame.energy}`);
    if (frame.stress) words.push(`stress="${frame.stress.flat().join(" ")}"`);
    if (track.charge) words.push(`charge=${track.charge}`);
    if (track.spin_multiplicity) words.push(`spin_multiplicity=${track.spin_multiplicity}`);
    if (model) words.push(`model="${model.name.replace(/["\\\n]/g, "")}"`, `model_digest="${model.digest}"`);
    if (frame.temperature != null) words.push(`time_fs=${frame.step * track.timestep}`, `kinetic_energy=${frame.kinetic}`, `temperature=${frame.temperature}`);
    words.push(`step=${frame.step ?? index}`);
    const rows = frame.positions.map((position, atom) =>
      [symbols[track.atomic_numbers[atom]], ...position, ...(frame.forces ? frame.forces[atom] : [])].join(" "));
    return [track.atomic_numbers.length, words.join(" "), ...rows].join("\n");
  }).join("\n") + "\n";
}
