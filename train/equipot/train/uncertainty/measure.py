"""Calibrates an ensemble on the validation split and learns its domain from the training split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from equipot.model.conformal import Calibration, LevelCalibration, Quantiles, quantiles_of
from equipot.model.domain import Domain
from equipot.model.uncertainty import DomainFacts, Uncertainty
from equipot.train.dataset import Dataset, Sizes
from equipot.train.errors import DataError
from equipot.train.mix import Mix
from equipot.train.uncertainty.cases import Cases, Members, Told, batches_of, look_at
from equipot.train.uncertainty.domain_fit import INSIDE, DomainFit, with_border


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What goes into a bundle, and the test split by it.

    Attributes:
        uncertainty: for the bundle.
        test: structures that neither training nor calibration saw; None if there are none.
    """

    uncertainty: Uncertainty
    test: Cases | None


def measure(members: Members, mix: Mix, told: Told) -> Measured:
    """The uncertainty of an ensemble, from splits that hold no group in common.

    Args:
        members: trained on the mix's training split, or a part of it.
        mix: of its data.
        told: what is being done, and which share of it is done.

    Raises:
        DataError: a split is empty, or cannot be read.
    """
    for split in ("train", "validation"):
        if not len(mix.part(split)):
            raise DataError(f"{mix.path}: its {split} split is empty, so nothing can be calibrated on it")
    config = members.config
    sizes = Sizes.of(mix.stores, config.cutoff, progress=True)
    fit, dataset = DomainFit(config.elements, config.cutoff), Dataset(mix.stores, config)
    structures = 0
    for batch, keys in batches_of(dataset, mix.part("train"), sizes, config, told, "train"):
        fit.add(batch.systems)
        structures += len(keys)
    domain = fit.finish()
    cases = look_at(members, domain, mix, sizes, "validation", told)
    domain = _rounded(
        with_border(domain, cases.strangeness, cases.element_idx, cases.system_idx, cases.group)
    )
    facts = DomainFacts(
        mix=mix.card.digest,
        structures=structures,
        atoms=int(domain.seen.sum()),
        calibrated_on=len(cases),
        inside=INSIDE,
    )
    uncertainty = Uncertainty(
        len(members), calibrated(cases, config.levels_of_theory, mix.card.digest), domain, facts
    )
    test = look_at(members, domain, mix, sizes, "test", told) if len(mix.part("test")) else None
    return Measured(uncertainty, test)


def calibrated(cases: Cases, levels: tuple[str, ...], mix: str) -> Calibration:
    """Quantiles of scores by level of theory, of those that the cases hold."""
    by_level = {}
    for k, name in enumerate(levels):
        of_structures = (cases.level == k) & np.isfinite(cases.energy_error)
        of_atoms = (cases.level[cases.system_idx] == k) & np.isfinite(cases.forces_error)
        if not (of_structures.any() or of_atoms.any()):
            continue
        by_level[name] = LevelCalibration(
            energy=quantiles_of(
                cases.energy_error[of_structures],
                cases.energy_spread[of_structures],
                cases.group[of_structures],
            ),
            forces=quantiles_of(
                cases.forces_error[of_atoms],
                cases.forces_spread[of_atoms],
                cases.group[cases.system_idx][of_atoms],
            ),
        )
    return Calibration(mix, len(cases), len(np.unique(cases.group)), by_level)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often intervals that are to hold the truth did, by nominal percent."""

    energy: dict[int, float]
    forces: dict[int, float]

    def to_json(self) -> dict[str, dict[str, float]]:
        """As plain values."""
        return {
            name: {str(percent): round(share, 4) for percent, share in getattr(self, name).items()}
            for name in self.__slots__
        }


def coverage_of(
    cases: Cases, calibration: Calibration, levels: tuple[str, ...], percents: tuple[int, ...]
) -> Coverage:
    """The observed coverage of labelled cases, at the percents that the calibration promises."""
    found = Coverage({}, {})
    for percent in percents:
        for name, into in (("energy", found.energy), ("forces", found.forces)):
            hits = []
            for k, level in enumerate(levels):
                known = calibration.by_level_of_theory.get(level)
                quantiles: Quantiles | None = None if known is None else getattr(known, name)
                if quantiles is None:
                    continue
                where = cases.level if name == "energy" else cases.level[cases.system_idx]
                error, spread = getattr(cases, f"{name}_error"), getattr(cases, f"{name}_spread")
                rows = (where == k) & np.isfinite(error)
                width = quantiles.half_width(spread[rows], percent / 100)
                hits.append((error[rows] <= width)[np.isfinite(width)])
            if hits and len(joined := np.concatenate(hits)):
                into[percent] = float(joined.mean())
    return found


def _rounded(domain: Domain) -> Domain:
    """As a bundle will hold it."""
    stored = domain.tensors()
    again = Domain.from_tensors(stored, domain.elements, domain.cutoff)
    return replace(again, cutoff=domain.cutoff)
