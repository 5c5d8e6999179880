"""Structures far from the rest of their store, and stores far from each other at one level of theory."""

from collections.abc import Iterator, Sequence

import numpy as np
from ase.data import chemical_symbols

from equipot.train.audit.duplicates import NO_SPLIT, Copies, Kind, Pair, Pairs
from equipot.train.audit.findings import Finding, NamedStore, Place, Severity
from equipot.train.audit.geometry_pass import GeometryStatistics
from equipot.train.audit.statistics import StoreStatistics
from equipot.train.splits import NAMES

_FAR = 15.0  # robust standard deviations
_FAR_AT_LEAST = 0.5  # eV per atom
_LARGE_FORCE = 50.0  # eV/Å
_OVERLAP = 0.5  # of the sum of covalent radii
_OFFSET = 1.0  # eV per atom between medians of two stores; phases of one element differ by less
_COPIES_OFFSET = 0.005  # eV per atom between copies


def judge_outliers(
    named: NamedStore, statistics: StoreStatistics, geometry: GeometryStatistics
) -> Iterator[Finding]:
    """Energies, forces and distances of single structures."""
    residual = statistics.residual
    centre, limit = residual.median, max(_FAR * residual.spread, _FAR_AT_LEAST)
    far = [
        (abs(value - centre), value, index)
        for sign, extremes in ((1, statistics.high_residuals), (-1, statistics.low_residuals))
        for value, index in ((sign * size, index) for size, index in extremes.largest())
        if abs(value - centre) > limit
    ]
    if far:
        count = max(residual.beyond(centre - limit, centre + limit), len({index for *_, index in far}))
        yield _listed(
            named,
            "energy-outliers",
            f"energies far from the rest, of {count} structure(s)",
            f"more than {limit:.3g} eV per atom from the median residual {centre:.3g} (robust standard "
            "deviation "
            f"{residual.spread:.2g}); the farthest is {max(far)[1]:+.4g} eV per atom",
            [(index, f"{value:+.4g} eV per atom") for _, value, index in sorted(far, reverse=True)],
            count,
            statistics.structures,
        )
    large = [(f, index) for f, index in statistics.large_forces.largest() if f > _LARGE_FORCE]
    if large:
        count = max(statistics.largest_force.beyond(-np.inf, _LARGE_FORCE), len(large))
        yield _listed(
            named,
            "force-outliers",
            f"forces above {_LARGE_FORCE:g} eV/Å, in {count} structure(s)",
            f"the largest is {large[0][0]:.4g}, the root mean square of the components "
            f"{statistics.force_components.rms:.3g} eV/Å; leave them out with --max-force",
            [(index, f"{f:.4g} eV/Å") for f, index in large],
            count,
            statistics.structures,
        )
    close = [(-r, index) for r, index in geometry.closest_few.largest() if -r < _OVERLAP]
    # In units other than Å everything is too close, which is another finding.
    if close and geometry.closest.median > 0.62:
        count = max(geometry.closest.beyond(_OVERLAP, np.inf), len(close))
        yield _listed(
            named,
            "close-atoms",
            f"atoms closer than half a bond, in {count} of {geometry.examined} structures looked at",
            f"{_OVERLAP:g} of the sum of covalent radii; the closest {close[0][0]:.2f}",
            [(index, f"{r:.2f} of the sum of covalent radii") for r, index in close],
            count,
            geometry.examined,
        )


def _listed(
    named: NamedStore,
    code: str,
    summary: str,
    evidence: str,
    places: Sequence[tuple[int, str]],
    count: int,
    of: int,
) -> Finding:
    return Finding(
        Severity.WARNING if count > 0.001 * of else Severity.NOTE,
        code,
        (named.name,),
        summary,
        f"{evidence}; {count / of:.2%} of the structures",
        "look at those listed; right or wrong, a squared loss is ruled by them",
        tuple(named.place(index, detail) for index, detail in places[:20]),
        count,
    )


def judge_offsets(stores: Sequence[NamedStore], statistics: Sequence[StoreStatistics]) -> Iterator[Finding]:
    """Stores of one level of theory whose energies lie apart, after common references."""
    for a, b in _same_level(stores):
        one, two = statistics[a].residual, statistics[b].residual
        apart = two.median - one.median
        common = np.flatnonzero((statistics[a].elements > 0) & (statistics[b].elements > 0))
        if len(common) and abs(apart) > max(_OFFSET, 5 * min(one.spread, two.spread)):
            yield Finding(
                Severity.WARNING,
                "reference-offset",
                (stores[a].name, stores[b].name),
                "two stores of one level of theory lie apart in energy",
                f"with common references for {' '.join(chemical_symbols[z] for z in common)} and the rest "
                "their "
                f"median residuals are {one.median:.3g} and {two.median:.3g} eV per atom (robust standard "
                f"deviations {one.spread:.2g} and {two.spread:.2g})",
                "is it one functional, one set of pseudopotentials, one reference? if not, give them "
                "different "
                "--level-of-theory",
            )


def judge_copies(stores: Sequence[NamedStore], exact: dict[Kind, Pairs], near: Copies) -> Iterator[Finding]:
    """Leaks, duplicates, and copies whose labels differ."""
    for what, found in (("to the bit", exact), ("nearly", near.pairs)):
        for kind, pairs in found.items():
            yield _copies(stores, what, kind, pairs)
    for (a, b), pairs in near.conflicts.items():
        names = (stores[a].name,) if a == b else (stores[a].name, stores[b].name)
        offsets = np.array(near.offsets.get((a, b), []))
        constant = len(offsets) >= 5 and abs(np.median(offsets)) > max(
            _COPIES_OFFSET, 3 * 1.4826 * float(np.median(np.abs(offsets - np.median(offsets))))
        )
        evidence = "for example " + "; ".join(pair.detail for pair in pairs.examples[:3])
        if constant:
            evidence = (
                f"the energies of {len(offsets)} copies differ by {np.median(offsets):+.4g} eV per atom "
                "in the "
                f"median, hardly more or less; {evidence}"
            )
        yield Finding(
            Severity.ERROR if constant else Severity.WARNING,
            "label-conflict",
            names,
            "the same geometry has different energies at one level of theory",
            evidence,
            "another level of theory, other references, or another electronic state (spin, magnetic order): "
            "keep one, or give the stores different --level-of-theory",
            _places(stores, pairs.examples),
            pairs.count,
        )


def _copies(stores: Sequence[NamedStore], what: str, kind: Kind, pairs: Pairs) -> Finding:
    a, b = kind.stores
    names = (stores[a].name,) if a == b else (stores[a].name, stores[b].name)
    deltas = [pair.delta for pair in pairs.examples]
    evidence = (
        f"{pairs.count} pairs; interatomic distances differ by {min(deltas):.2g} to {max(deltas):.2g} Å"
    )
    if what == "to the bit":
        evidence = f"{pairs.count} pairs with equal fingerprints of structure and labels"
    severity = Severity.WARNING
    if kind.relation == "splits":
        splits = " and ".join(NAMES[k] for k in kind.splits)
        severity, code = Severity.ERROR, "leak"
        summary = f"structures of {splits} are {what} the same"
        remedy = "import with a --group-by that keeps them together, or leave the copies out"
    elif kind.relation == "stores":
        sides = " and ".join(
            f"{stores[k].name} ({NAMES[split]})" if split != NO_SPLIT else stores[k].name
            for k, split in zip(kind.stores, kind.splits, strict=True)
        )
        code, summary = "duplicates-across-stores", f"structures of {sides} are {what} the same"
        remedy = "in different splits they leak: leave one of each pair out, or group by composition"
    elif kind.relation == "groups":
        code, summary = "duplicates-across-groups", f"structures of different groups are {what} the same"
        remedy = "in different splits they leak: import with a coarser --group-by (formula, info:KEY)"
    else:
        severity, code = Severity.NOTE, "duplicates-in-groups"
        summary = f"structures of one group are {what} the same"
        remedy = "none needed: groups stay together in splits; thinned out, training loses little"
    return Finding(
        severity, code, names, summary, evidence, remedy, _places(stores, pairs.examples), pairs.count
    )


def _places(stores: Sequence[NamedStore], pairs: Sequence[Pair]) -> tuple[Place, ...]:
    places = []
    for pair in pairs:
        places.append(stores[pair.one[0]].place(pair.one[1], f"{pair.delta:.2g} Å"))
        places.append(stores[pair.two[0]].place(pair.two[1], pair.detail))
    return tuple(places)


def _same_level(stores: Sequence[NamedStore]) -> Iterator[tuple[int, int]]:
    levels = [named.store.manifest.level_of_theory for named in stores]
    for b in range(len(stores)):
        for a in range(b):
            if levels[a] == levels[b]:
                yield a, b
