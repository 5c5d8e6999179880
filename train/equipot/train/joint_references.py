"""One reference energy of each element for all levels of theory: a control of those by level."""

from __future__ import annotations

import numpy as np

from equipot.model.references import References
from equipot.train.mix import Mix
from equipot.train.places import in_blocks
from equipot.train.reference_fit import NormalEquations


def joint_references(mix: Mix) -> References:
    """References fitted to the training split as if all its energies were of one level of theory.

    Energies of different levels of theory differ by electronvolts an atom, which are left to the network. The
    scales stay those of the levels.

    Args:
        mix: whose training split is taken whole, every structure once.
    """
    fit = NormalEquations()
    for keys in in_blocks(mix.part("train")):
        for k in np.unique(keys[:, 0]).tolist():
            store, rows = mix.stores[k], keys[keys[:, 0] == k, 1]
            fit.add(np.asarray(store.element_counts(rows), dtype=np.float64), store.values("energy", rows))
    known = mix.card.references
    energies = fit.solve(np.array(mix.card.chemistry.elements))
    return References(energy=np.tile(energies, (len(known.scale), 1)), scale=known.scale)
