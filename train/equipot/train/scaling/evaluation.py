"""What a finished point of a study is worth: errors on the test split and on sources never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipot.model.potential import Potential, Prediction
from equipot.model.references import References
from equipot.train.dataset import Batch, Dataset, Sizes
from equipot.train.evaluate import Errors, Observer, Tally, evaluate, evaluate_references
from equipot.train.export import averaged, choose_checkpoint, restore_potential
from equipot.train.mix import Mix
from equipot.train.places import Places, in_blocks
from equipot.train.prepare import reopen_mix
from equipot.train.recipe import LossSection
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.scaling.details import Details, Parity, ParitySample
from equipot.train.scaling.unseen import Unseen, prepare_unseen
from equipot.train.store import Store
from equipot.train.world import World

_ALONE = World(rank=0, size=1, device=torch.device("cpu"))
_CACHE_MIB = 256
_ENERGIES_ONLY = ("loss", "energy_mae_per_atom", "energy_rmse_per_atom")


@dataclass(frozen=True, slots=True, eq=False)
class PointEvaluation:
    """Errors in eV/atom and eV/Å, and what to plot; a number that is not finite is None."""

    test: dict[str, Any]
    """Of all test structures, `by_source` and `by_element`."""
    unseen: dict[str, dict[str, Any]]
    """Of each source never trained on, with what of it was left out; `problem` where that was all of it."""
    baselines: dict[str, Any]
    """Of zero forces, of reference energies, and of the training split's mean energy per atom."""
    parity: dict[str, Parity]
    """By source of the test split."""

    def to_json(self) -> dict[str, Any]:
        """The parts of a point's result that this knows."""
        return {"test": self.test, "unseen": self.unseen, "baselines": self.baselines}

    def write_parity(self, path: Path) -> None:
        """The sample as .npz: arrays ``SOURCE/energy`` and ``SOURCE/forces`` (n, 2), label and prediction."""
        arrays = {
            f"{name}/{label}": getattr(parity, label).astype(np.float32)
            for name, parity in self.parity.items()
            for label in ("energy", "forces")
        }
        np.savez_compressed(path, allow_pickle=False, **arrays)


def evaluate_point(
    run: Path,
    *,
    unseen: Mapping[str, Path] | None = None,
    checkpoint: str = "last",
    most_unseen: int = 500,
    most_parity: int = 1000,
    stopped: Callable[[], bool] | None = None,
) -> PointEvaluation:
    """Evaluate a run's model as the field does: errors per atom and component, by source and element.

    The test split is the mix's, split by group and the same for every subset of the training split. Weights
    are the moving average where one was kept.

    Args:
        run: directory of an ordinary training run with its checkpoints.
        unseen: stores of sources never trained on, by name.
        checkpoint: ``last``, ``best`` or a checkpoint's name.
        most_unseen: structures of each unseen source.
        most_parity: structures, and force components, of each source that are kept for plots.
        stopped: asked between batches whether to give up.

    Raises:
        EvaluationStopped: `stopped` said so.
        TrainError: no such run or checkpoint, or its data are gone.
    """
    directory = RunDirectory(run)
    card = RunCard.read(directory.card)
    mix = reopen_mix(directory, card)
    chosen = choose_checkpoint(directory, checkpoint)
    kind = averaged(chosen)

    def restore(references: References) -> Potential:
        return restore_potential(directory, replace(card, references=references), chosen, kind)

    test = _Test(mix, card, restore(card.references), most_parity, stopped)
    return PointEvaluation(
        test=test.errors(),
        unseen={
            name: _unseen(Store.open(path), card, restore, most_unseen, stopped)
            for name, path in (unseen or {}).items()
        },
        baselines=test.baselines(),
        parity=test.parity,
    )


class _Test:
    """The test split, source by source."""

    def __init__(
        self,
        mix: Mix,
        card: RunCard,
        potential: Potential,
        most_parity: int,
        stopped: Callable[[], bool] | None,
    ) -> None:
        self._card = card
        self._mix = mix
        self._dataset = Dataset(mix.stores, card.config, cache_mib=_CACHE_MIB)
        sizes = Sizes.of(mix.stores, card.config.cutoff, progress=False)
        self._places = {
            source.name: places
            for k, source in enumerate(mix.card.sources)
            if len(places := mix.part("test").of_store(k))
        }
        self._tallies: dict[str, Tally] = {}
        self._details: dict[str, Details] = {}
        self.parity: dict[str, Parity] = {}
        for name, places in self._places.items():
            sample = ParitySample(most_parity, mix.card.references.energy, mix.card.chemistry.elements)
            self._details[name] = Details()
            self._tallies[name] = _evaluate(
                potential,
                self._dataset,
                places,
                sizes,
                card.recipe.loss,
                [self._details[name], sample],
                stopped,
            )
            self.parity[name] = sample.sample()

    def errors(self) -> dict[str, Any]:
        details = Details()
        for each in self._details.values():
            details.include(each)
        return {
            **_metrics(self._sum(self._tallies), details),
            "by_source": {
                name: _metrics(tally, self._details[name]) for name, tally in self._tallies.items()
            },
            "by_element": details.by_element(),
        }

    def baselines(self) -> dict[str, Any]:
        references = self._mix.card.references
        known, mean = (
            self._of(table) for table in (references, _mean_energies(self._mix, self._card, references))
        )
        return {
            "zero_forces": _select(known, ("force_mae", "force_rmse")),
            "references": _select(known, _ENERGIES_ONLY),
            "mean": _select(mean, _ENERGIES_ONLY),
        }

    def _of(self, references: References) -> dict[str, Any]:
        loss, elements = self._card.recipe.loss, self._mix.card.chemistry.elements
        tallies = {
            name: evaluate_references(references, elements, self._dataset, places, loss)
            for name, places in self._places.items()
        }
        return {
            **_metrics(self._sum(tallies)),
            "by_source": {name: _metrics(tally) for name, tally in tallies.items()},
        }

    def _sum(self, tallies: Mapping[str, Tally]) -> Tally:
        total = Tally(len(self._card.config.levels_of_theory), self._card.recipe.loss)
        for tally in tallies.values():
            total.include(tally)
        return total


def _unseen(
    store: Store,
    card: RunCard,
    restore: Callable[[References], Potential],
    most: int,
    stopped: Callable[[], bool] | None,
) -> dict[str, Any]:
    found = prepare_unseen(store, card.config, card.references, restore, most)
    if found is None:
        return {
            "problem": "no structure of it has only elements, charges and spins that the model knows",
            "structures_in_store": len(store),
        }
    details, loss = Details(), card.recipe.loss
    dataset = Dataset([store], found.config, cache_mib=_CACHE_MIB)
    sizes = Sizes.of([store], card.config.cutoff, progress=False)
    tally = _evaluate(found.potential, dataset, found.places, sizes, loss, [details], stopped)
    return {
        **_metrics(tally, details),
        **found.to_json(),
        "by_element": details.by_element(),
        "baseline": _baseline(found, dataset, loss),
    }


def _baseline(found: Unseen, dataset: Dataset, loss: LossSection) -> dict[str, Any]:
    tally = evaluate_references(found.references, found.config.elements, dataset, found.places, loss)
    return _metrics(tally)


def _evaluate(
    potential: Potential,
    dataset: Dataset,
    places: Places,
    sizes: Sizes,
    loss: LossSection,
    observers: Sequence[Observer],
    stopped: Callable[[], bool] | None,
) -> Tally:
    def observe(batch: Batch, prediction: Prediction) -> None:
        for observer in observers:
            observer(batch, prediction)

    return evaluate(
        potential,
        dataset,
        places,
        sizes.costs(places),
        _ALONE,
        loss,
        stress=loss.stress > 0,
        stopped=stopped,
        observe=observe,
    )


def _metrics(tally: Tally, details: Details | None = None) -> dict[str, Any]:
    errors: Errors = tally.errors()
    values: dict[str, float | int | None] = {
        "loss": tally.loss(),
        "energy_mae_per_atom": _in_ev(errors.energy_mae),
        "energy_rmse_per_atom": _in_ev(errors.energy_rmse),
        "force_mae": errors.forces_mae,
        "force_rmse": errors.forces_rmse,
        "structures": errors.structures,
    }
    if details is not None:
        values |= {
            "force_cosine": details.force_cosine,
            "atoms_without_force_direction": details.without_direction,
        }
    return {name: _finite(value) for name, value in values.items()}


def _select(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    by_source = {
        source: {name: each[name] for name in names} for source, each in metrics["by_source"].items()
    }
    return {**{name: metrics[name] for name in names}, "by_source": by_source}


def _mean_energies(mix: Mix, card: RunCard, references: References) -> References:
    """Every element at its level's mean energy per atom over the structures that were trained on."""
    sums = np.zeros((len(references.scale), 2))
    structures, _ = mix.training(card.recipe.data.subset)
    for keys in in_blocks(structures):
        for k in np.unique(keys[:, 0]).tolist():
            store, rows = mix.stores[k], keys[keys[:, 0] == k, 1]
            energies = store.values("energy", rows) / store.n_atoms[rows]
            energies = energies[np.isfinite(energies)]
            level = card.config.levels_of_theory.index(store.manifest.level_of_theory)
            sums[level] += (energies.sum(), len(energies))
    means = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return References(energy=np.tile(means[:, None], references.energy.shape[1]), scale=references.scale)


def _in_ev(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None
