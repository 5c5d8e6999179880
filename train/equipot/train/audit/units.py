"""Judges one store's labels: per atom, Hartree, kbar, bohr, wrong signs, missing values; with evidence."""

from collections.abc import Iterator, Sequence

import numpy as np

from equipot.train.audit.findings import Finding, NamedStore, Severity
from equipot.train.audit.geometry_pass import GeometryStatistics
from equipot.train.audit.labels import HARTREE, against_free_atoms, not_extensive, weakly_bound
from equipot.train.audit.pairs import CLEAR, PairStatistics, Regression
from equipot.train.audit.statistics import StoreStatistics

_MIN_PAIRS = 12
_GPA = 160.21766208  # GPa in an eV/Å³, CODATA 2018
_BOHR = 0.529177210903  # Å, CODATA 2018
_CLOSE = 0.2  # of logarithms: slopes of near frames are good to some per cent, unless the pairs are few
_AGAIN = "import again with the unit or sign converted in the source"
_PER_ATOM = "import again into a new store with --energy-per-atom"
_ABOUT_ENERGY = {
    *("energy-per-atom", "energy-unit", "energy-hartree", "energy-forces"),
    *("forces-sign", "forces-unit", "positions-unit"),
}
_ENERGY_FORCE = {
    1 / HARTREE: "the energies look like Hartree beside forces in eV/Å",
    HARTREE: "the forces look like Hartree/Å beside energies in eV",
    HARTREE / _BOHR: "the forces look like Hartree/bohr beside energies in eV",
    1 / _BOHR: "the forces look like those per bohr, or the positions are too short by 0.529",
    _BOHR: "the positions look like bohr, or the forces are too large by 1.89",
    23.0605: "the energies look like kcal/mol beside forces in eV/Å",
    1 / 23.0605: "the forces look like kcal/mol/Å beside energies in eV",
    96.4853: "the energies look like kJ/mol beside forces in eV/Å",
    1 / 96.4853: "the forces look like kJ/mol/Å beside energies in eV",
}


def judge_labels(
    named: NamedStore, statistics: StoreStatistics, pairs: PairStatistics, geometry: GeometryStatistics
) -> list[Finding]:
    """All suspicions of units and signs about one store."""
    positions = list(_positions(named, geometry))
    found = [
        *positions,
        *_energies(named, statistics, pairs, geometry),
        # In other units of length than Å volumes are wrong, and the work of the stress with them.
        *(() if positions else _stress(named, statistics, pairs)),
        *_forces(named, statistics, geometry),
        *_cells(named, statistics),
    ]
    found = [f for k, f in enumerate(found) if f.code not in {earlier.code for earlier in found[:k]}]
    said = {finding.code for finding in found if finding.severity is Severity.ERROR}
    for warning in named.store.manifest.warnings:
        # What the audit itself has found needs no second voice.
        if not said & _ABOUT_ENERGY:
            found.append(
                Finding(
                    Severity.WARNING,
                    "import-warning",
                    (named.name,),
                    "the import warned of one file's labels",
                    warning,
                    "see the file; what it says there holds for that file alone",
                )
            )
    return found


def believable(regression: Regression | None) -> bool:
    """Whether a slope rests on enough pairs, and explains enough of them."""
    return regression is not None and regression.pairs >= _MIN_PAIRS and regression.explained >= CLEAR


def _positions(named: NamedStore, geometry: GeometryStatistics) -> Iterator[Finding]:
    ratio = geometry.closest.median
    if geometry.closest.n >= 5 and (ratio > 1.38 or ratio < 0.62):
        bohr = ratio > 1
        yield Finding(
            Severity.ERROR,
            "positions-unit",
            (named.name,),
            "the positions look like bohr, not Å" if bohr else "the positions look too short, as if by 0.529",
            f"in the median the closest two atoms of a structure are {ratio:.2f} sums of their covalent "
            "radii "
            f"apart, where 0.75 to 1.25 is usual; times {_BOHR if bohr else 1 / _BOHR:.3f} it were "
            f"{ratio * (_BOHR if bohr else 1 / _BOHR):.2f}",
            f"import again with positions and cell in Å; 1 bohr is {_BOHR:.6f} Å",
        )


def _energies(
    named: NamedStore, statistics: StoreStatistics, pairs: PairStatistics, geometry: GeometryStatistics
) -> list[Finding]:
    counts, energy = geometry.counts, geometry.energy
    as_total, as_mean = against_free_atoms(counts, energy)
    of_atoms = f"energies are {as_total:.4g} of those of the free all-electron atoms"
    if believable(pairs.energy_force):
        assert pairs.energy_force is not None
        slope = pairs.energy_force.slope
        if not 0.6 < slope < 1.6:
            if geometry.closest.median > 1.38 and abs(np.log(abs(slope) / _BOHR)) < _CLOSE and slope > 0:
                return []  # the positions are in bohr, which is said already
            return [_slope_finding(named, pairs.energy_force, pairs)]
    stiff = (
        believable(pairs.energy_force) and pairs.stiffness > 1.2
    )  # forces are in eV/Å, so energies are too
    if abs(as_total * HARTREE - 1) < 0.1 and not stiff:
        also = " (or, with that many atoms, energies per atom)" if abs(as_mean - 1) < 0.1 else ""
        return [
            _finding(
                named,
                "energy-hartree",
                f"the energies look like Hartree, not eV{also}",
                f"{of_atoms}; 1/27.2 = 0.0367 is Hartree",
                _AGAIN + "; the forces are likely in Hartree/Å or Hartree/bohr too",
            )
        ]
    if abs(as_mean - 1) < 0.05 and not abs(as_total - 1) < 0.05:
        return [
            _finding(
                named,
                "energy-per-atom",
                "the energies look like energies per atom, not totals",
                f"{of_atoms}, but times the number of atoms {as_mean:.3f}",
                _PER_ATOM,
            )
        ]
    if abs(as_total - 1) < 0.05:
        return []
    per_atom = statistics.energy_per_atom
    small = max(abs(per_atom.quantile(0.25)), abs(per_atom.quantile(0.75)))
    if believable(pairs.energy_force) and pairs.stiffness < 0.6 and small < 0.6:
        return [
            _finding(
                named,
                "energy-hartree",
                "energies and forces both look like Hartree, not eV",
                f"they fit together, but the energies are only {per_atom.median:.3g} per atom and the forces "
                f"grow by {pairs.stiffness:.3g} per Å and Å; in eV solids and molecules have 1 to 15 and "
                "1 to 20",
                _AGAIN,
            )
        ]
    if believable(pairs.energy_force):
        return []
    if evidence := not_extensive(counts, energy):
        return [
            _finding(
                named,
                "energy-per-atom",
                "the energies look like energies per atom, not totals",
                evidence,
                _PER_ATOM,
            )
        ]
    if evidence := weakly_bound(counts.sum(axis=1), energy, geometry.periodic):
        return [
            _finding(
                named,
                "energy-small",
                "the energies are small for totals of periodic structures",
                evidence,
                "are they per atom (--energy-per-atom), in Hartree, or relative to something?",
                Severity.WARNING,
            )
        ]
    return []


def _slope_finding(named: NamedStore, found: Regression, pairs: PairStatistics) -> Finding:
    size = abs(found.slope)
    evidence = (
        f"over {found.pairs} pairs of near frames the energy changes by {found.slope:.4g} times the work "
        "of the "
        f"forces, which explains {found.explained:.0%} of the changes; 1 is right"
    )
    if 0.6 < size < 1.6:
        return _finding(
            named,
            "forces-sign",
            "the forces look like gradients: of the wrong sign",
            evidence,
            "import again with forces = −gradient",
        )
    guesses = [
        (abs(np.log(size / target)), "energy-unit" if "energies look" in words else "forces-unit", words)
        for target, words in _ENERGY_FORCE.items()
    ]
    times_n = pairs.per_atom
    if times_n is not None and times_n.slope != 0 and times_n.explained > found.explained - 0.05:
        distance = abs(np.log(abs(times_n.slope)))
        guesses.append((distance, "energy-per-atom", "the energies look like energies per atom"))
    guesses.sort()
    likely = [guess for guess in guesses if guess[0] < _CLOSE]
    sign = ", and the forces are of the wrong sign" if found.slope < 0 else ""
    if not likely:
        return _finding(
            named, "energy-forces", "energies and forces do not fit together" + sign, evidence, _AGAIN
        )
    per_atom = ""
    if times_n is not None and likely[0][1] == "energy-per-atom":
        per_atom = f"; times the number of atoms, {pairs.n_atoms:.3g} in the mean, by {times_n.slope:.3g}"
    return _finding(
        named,
        likely[0][1],
        " (or: ".join(words for _, _, words in likely[:2]) + ")" * (len(likely) > 1) + sign,
        evidence + per_atom,
        _PER_ATOM if per_atom else _AGAIN,
    )


def _stress(named: NamedStore, statistics: StoreStatistics, pairs: PairStatistics) -> Iterator[Finding]:
    work, pressure = pairs.energy_stress, pairs.pressure_density
    if work is not None and believable(work):
        evidence = (
            f"over {work.pairs} pairs of near cells the energy changes by {work.slope:.4g} times the work "
            "of the "
            f"stress, which explains {work.explained:.0%} of the changes; 1 is right"
        )
        # Where energies or forces are wrong, what the stress has to fit is as wrong.
        of_forces = pairs.energy_force.slope if pairs.energy_force and believable(pairs.energy_force) else 1.0
        if 0.5 < work.slope < 2 or 0.5 < work.slope / of_forces < 2:
            return
        if abs(np.log(abs(work.slope) * HARTREE)) < _CLOSE and work.slope > 0:
            yield _finding(
                named,
                "energy-unit",
                "the energies look like Hartree beside a stress in eV/Å³",
                evidence,
                _AGAIN,
            )
            return
        sign = " and of the wrong sign" if work.slope < 0 else ""
        targets = {
            1.0: "positive in compression",
            1 / _GPA: "in GPa",
            0.1 / _GPA: "in kbar",
            1 / pairs.volume: "a virial, not divided by the volume",
        }
        far, unit = min((abs(np.log(abs(work.slope) / target)), words) for target, words in targets.items())
        what = f"the stress looks to be {unit}" if far < 0.4 else "stress and energy do not fit together"
        code = "stress-sign" if unit.startswith("positive") and far < 0.4 else "stress-unit"
        yield _finding(
            named,
            code,
            what + sign * (code != "stress-sign"),
            evidence,
            "import again with --stress-key, in eV/Å³ positive in tension",
        )
        return
    if pressure is not None and believable(pressure) and pressure.slope < 0:
        yield _finding(
            named,
            "stress-sign",
            "the stress looks to be positive in compression",
            f"over {pressure.pairs} pairs of cells of one composition the pressure −tr σ/3 falls by "
            f"{-pressure.slope:.3g} eV/Å³ per unit of relative density, where it must rise",
            "import again with the stress positive in tension",
        )
    ratio = statistics.pressure_energy.median / (statistics.residual.spread + 1.0)
    if ratio > 2.5:
        yield _finding(
            named,
            "stress-unit",
            "the stress is too large for eV/Å³: in kbar or GPa?",
            f"pressure × volume is {statistics.pressure_energy.median:.3g} eV per atom in the median, "
            "while the "
            f"energies scatter by {statistics.residual.spread:.2g} eV per atom around their references; "
            "1 eV/Å³ is 160 GPa, 1,602 kbar",
            "import again with the stress in eV/Å³",
            Severity.ERROR if ratio > 10 else Severity.WARNING,
        )


def _forces(
    named: NamedStore, statistics: StoreStatistics, geometry: GeometryStatistics
) -> Iterator[Finding]:
    outward = geometry.outward
    if outward.n >= 10 and outward.median < -0.5 and outward.quantile(0.75) < 0:
        yield _finding(
            named,
            "forces-sign",
            "the forces look like gradients: of the wrong sign",
            "they pull close atoms towards each other: the cosine between the forces and the repulsion "
            f"of close neighbours is {outward.median:.2f} in the median of {outward.n} structures; away "
            "from minima it is 0.2 to 1, near them about 0",
            "import again with forces = −gradient",
        )
    zero, unlabelled = statistics.zero_forces, geometry.zero_unsymmetric
    if unlabelled.count:
        share = unlabelled.count / max(geometry.examined, 1)
        yield Finding(
            Severity.ERROR if share > 0.001 else Severity.WARNING,
            "forces-missing",
            (named.name,),
            "forces are all zero in structures where symmetry does not make them so: were there none?",
            f"{unlabelled.count} of {geometry.examined} structures looked at; all-zero forces in "
            f"{zero.count} of "
            f"{statistics.structures} altogether",
            "leave these forces out at the source (no forces is better than wrong ones), and import again",
            tuple(named.place(i) for i in unlabelled.first),
            unlabelled.count,
        )
    elif zero.count:
        yield Finding(
            Severity.NOTE,
            "forces-zero",
            (named.name,),
            f"all forces are zero in {zero.count} of {statistics.structures} structures, by symmetry",
            "every one looked at is so symmetric that no atom can feel a force",
            "none needed; they teach a model no forces",
            tuple(named.place(i) for i in zero.first),
            zero.count,
        )
    if statistics.no_forces.count:
        yield Finding(
            Severity.NOTE,
            "no-forces",
            (named.name,),
            f"{statistics.no_forces.count} of {statistics.structures} structures have no forces",
            "masked in the loss",
            "none needed",
            tuple(named.place(i) for i in statistics.no_forces.first),
            statistics.no_forces.count,
        )
    for sketch, code, words in (
        (statistics.net_force, "net-force", "the forces of a structure do not add up to zero"),
        (statistics.torque, "torque", "the forces on isolated structures turn them"),
    ):
        if sketch.n >= 5 and sketch.median > 0.1:
            yield Finding(
                Severity.WARNING,
                code,
                (named.name,),
                words,
                f"their sum is {sketch.median:.2g} of the root of the sum of squares in the median (0.95 "
                "quantile "
                f"{sketch.quantile(0.95):.2g}); right ones have less than 0.01, random ones 1",
                "were atoms, or the forces on some, left out? is the order of forces that of the atoms?",
            )


def _cells(named: NamedStore, statistics: StoreStatistics) -> Iterator[Finding]:
    checks: Sequence[tuple[Severity, str, str, str]] = (
        (
            Severity.ERROR,
            "no-cell",
            "periodic, but without a cell in that direction",
            "set the cell, or no pbc",
        ),
        (
            Severity.WARNING,
            "lost-periodicity",
            "not periodic, but in a cell that they fill as densely as a solid or liquid",
            "set pbc at the source and import again; without it atoms at the border lack their neighbours",
        ),
    )
    for places, (severity, code, words, remedy) in zip(
        (statistics.no_cell, statistics.lost_periodicity), checks, strict=True
    ):
        if places.count:
            yield Finding(
                severity,
                code,
                (named.name,),
                f"{places.count} of {statistics.structures} structures are {words}",
                f"{places.count / statistics.structures:.1%} of them, by number of atoms, pbc and cell",
                remedy,
                tuple(named.place(i) for i in places.first),
                places.count,
            )


def _finding(
    named: NamedStore,
    code: str,
    summary: str,
    evidence: str,
    remedy: str,
    severity: Severity = Severity.ERROR,
) -> Finding:
    return Finding(severity, code, (named.name,), summary, evidence, remedy)
