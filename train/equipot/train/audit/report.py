"""An audit as JSON: everything numeric, under names that stay."""

import math
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from equipot.train.audit.duplicates import Kind, Pairs
from equipot.train.audit.pairs import PairStatistics, Regression
from equipot.train.audit.run import Audit, StoreAudit
from equipot.train.audit.sketch import Sketch
from equipot.train.splits import NAMES

FORMAT = "equipot-audit"
VERSION = 1
_SKETCHES = {
    "atoms_per_structure": "sizes",
    "energy_per_atom_ev": "energy_per_atom",
    "residual_energy_per_atom_ev": "residual",
    "number_density_per_cubic_angstrom": "number_density",
    "force_components_ev_per_angstrom": "force_components",
    "force_sizes_ev_per_angstrom": "force_sizes",
    "largest_force_of_structure_ev_per_angstrom": "largest_force",
    "net_force_relative": "net_force",
    "torque_relative": "torque",
    "pressure_ev_per_cubic_angstrom": "pressure",
    "stress_components_ev_per_cubic_angstrom": "stress_components",
    "pressure_energy_per_atom_ev": "pressure_energy",
}


def to_json(audit: Audit) -> dict[str, Any]:
    """As a JSON object; what is not a number is null."""
    names = [each.named.name for each in audit.stores]
    body = {
        "format": FORMAT,
        "version": VERSION,
        "answer": audit.answer,
        "findings": [finding.to_json() for finding in audit.findings],
        "sample": audit.options.sample,
        "seed": audit.options.seed,
        "tolerance_angstrom": audit.options.tolerance,
        "mix": str(audit.mix) if audit.mix else None,
        "structures": audit.structures,
        "structures_compared": audit.compared,
        "references_ev": {
            level: {
                chemical_symbols[z]: float(energies[z])
                for z in range(len(energies))
                if any(
                    each.statistics.elements[z]
                    for each in audit.stores
                    if each.named.store.manifest.level_of_theory == level
                )
            }
            for level, energies in audit.references.items()
        },
        "stores": [_store(each) for each in audit.stores],
        "exact_duplicates": [_pairs(names, kind, pairs) for kind, pairs in audit.exact.items()],
        "near_duplicates": [_pairs(names, kind, pairs) for kind, pairs in audit.near.pairs.items()],
    }
    cleaned = _clean(body)
    assert isinstance(cleaned, dict)
    return cleaned


def _store(audit: StoreAudit) -> dict[str, Any]:
    s, m, g = audit.statistics, audit.named.store.manifest, audit.geometry
    return {
        "name": audit.named.name,
        "path": str(audit.named.store.path),
        "digest": m.digest,
        "level_of_theory": m.level_of_theory,
        "licence": m.licence,
        "structures": s.structures,
        "atoms": s.atoms,
        "periodicity": dict(s.periodicity),
        "charges": {str(k): v for k, v in sorted(s.charges.items())},
        "spin_multiplicities": {str(k): v for k, v in sorted(s.spins.items())},
        "without_forces": s.no_forces.count,
        "with_zero_forces": s.zero_forces.count,
        "distributions": {name: getattr(s, attribute).summary() for name, attribute in _SKETCHES.items()},
        "closest_over_covalent_radii": g.closest.summary(),
        "cosine_of_forces_with_repulsion": g.outward.summary(),
        "examined": g.examined,
        "elements": {
            chemical_symbols[z]: {
                "atoms": int(s.elements[z]),
                "structures": int(s.structures_with[z]),
                "force_sizes_ev_per_angstrom": s.force_of.get(z, Sketch()).summary(),
                "residual_energy_per_atom_ev": s.residual_of.get(z, Sketch()).summary(),
            }
            for z in np.flatnonzero(s.elements).tolist()
        },
        "nearest_distances_angstrom": {
            f"{chemical_symbols[a]}-{chemical_symbols[b]}": sketch.summary()
            for (a, b), sketch in sorted(g.nearest.items())
        },
        "consistency": _consistency(audit.pairs),
    }


def _consistency(pairs: PairStatistics) -> dict[str, Any]:
    return {
        "energy_against_force_work": _regression(pairs.energy_force),
        "energy_against_stress_work": _regression(pairs.energy_stress),
        "pressure_against_density": _regression(pairs.pressure_density),
        "stiffness_ev_per_square_angstrom": pairs.stiffness,
    }


def _regression(found: Regression | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"slope": found.slope, "explained": found.explained, "pairs": found.pairs}


def _pairs(names: list[str], kind: Kind, pairs: Pairs) -> dict[str, Any]:
    return {
        "relation": kind.relation,
        "stores": [names[k] for k in kind.stores],
        "splits": [NAMES[k] if k >= 0 else None for k in kind.splits],
        "pairs": pairs.count,
        "examples": [
            {
                "one": [names[pair.one[0]], pair.one[1]],
                "two": [names[pair.two[0]], pair.two[1]],
                "delta": pair.delta,
            }
            for pair in pairs.examples
        ],
    }


def _clean(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {str(key): _clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
