"""Turns a checkpoint into a bundle: weights put together from the ranks' shares, provenance, test errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from equipot.model.bundle import member_prefix, write_bundle
from equipot.model.potential import Potential
from equipot.model.uncertainty import Uncertainty
from equipot.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    Shares,
    newest_valid,
    read_checkpoint,
    read_weights,
    step_name,
)
from equipot.train.dataset import Dataset, Sizes
from equipot.train.errors import DataError, TrainError
from equipot.train.evaluate import Errors, Tally, evaluate, evaluate_references
from equipot.train.inherit import PREFIX, Inherited
from equipot.train.long_work import told_bar
from equipot.train.mix import Mix
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory, RunError
from equipot.train.scaling.controls.names import control_of
from equipot.train.uncertainty.cases import Members
from equipot.train.uncertainty.join import check_alike
from equipot.train.uncertainty.measure import measure
from equipot.train.uncertainty.reliability import report
from equipot.train.world import World


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The weights of one run that are exported: of a checkpoint, ``ema`` or ``weights``."""

    run: RunDirectory
    card: RunCard
    checkpoint: Checkpoint
    kind: str

    @staticmethod
    def of(path: Path, checkpoint: str, *, raw: bool) -> Trained:
        """Those of a checkpoint called ``best``, ``last`` or by its name."""
        run = RunDirectory(path)
        card = RunCard.read(run.card)
        if (control := control_of(card.config)) is not None:
            raise TrainError(
                f"{path}: {control} is a control of the scaling study, made to be compared with and not to "
                "be used, so it is not exported. Train egnn or moments, with invariant inputs and "
                "conservative or direct forces"
            )
        chosen = choose_checkpoint(run, checkpoint)
        return Trained(run, card, chosen, "weights" if raw else averaged(chosen))


def export_runs(
    paths: Sequence[Path],
    out: Path,
    *,
    checkpoint: str = "best",
    name: str,
    raw: bool = False,
    test: bool = True,
    calibrate: bool | None = None,
) -> None:
    """Write a bundle from the checkpoints of runs and print how it does on the test split.

    The bundle is written in the memory of the largest tensor; test and calibration take that of all models.

    Args:
        paths: directories of the runs; several become the members of an ensemble.
        out: directory of the bundle; must not exist, or be a bundle.
        checkpoint: ``best``, ``last`` or a checkpoint's name.
        name: of the model.
        raw: the weights themselves instead of their moving average.
        test: compute the errors on the test split, for the bundle's card.
        calibrate: measure on the validation split how sure its answers are, and learn what is known to it;
            None: if it is tested.

    Raises:
        TrainError: no such run or checkpoint, a damaged one, or runs that cannot be one ensemble.
        BundleError: the bundle cannot be written.
    """
    calibrate = test if calibrate is None else calibrate
    console = Console(highlight=False)
    all_trained = [Trained.of(path, checkpoint, raw=raw) for path in paths]
    _check_one_mix(all_trained)
    check_alike([(str(one.run.path), one.card.config, one.card.references) for one in all_trained])
    first = all_trained[0]
    metrics: dict[str, Any] = {}
    uncertainty = Uncertainty(members=len(all_trained))
    if test or calibrate:
        try:
            mix = reopen_mix(first.run, first.card)
            members = Members(
                [restore_potential(one.run, one.card, one.checkpoint, one.kind) for one in all_trained]
            )
            if test:
                metrics = _test(first.card, mix, members, console)
            if calibrate:
                with told_bar() as told:
                    measured = measure(members, mix, told)
                picture = first.run.path / "reliability.png"
                metrics |= report(measured, members.config.levels_of_theory, picture, console)
                uncertainty = measured.uncertainty
        except DataError as error:
            lacking = "what the data would tell" if metrics == {} else "calibration"
            console.print(
                f"[yellow]warning:[/] exported without {lacking}: {escape(str(error))}", soft_wrap=True
            )
    written = write_bundle(
        out,
        name=name,
        config=first.card.config,
        references=first.card.references,
        tensors=_all_tensors(all_trained),
        provenance=_provenance_of_all(all_trained),
        metrics=metrics,
        uncertainty=uncertainty,
    )
    origin = ", ".join(str(one.checkpoint.path) for one in all_trained)
    console.print(
        escape(f"bundle {out}: {name}, {written.n_parameters:,} parameters, from {origin}"), soft_wrap=True
    )
    console.print(escape(f"next: equipot serve {out}"), soft_wrap=True)


def _check_one_mix(all_trained: Sequence[Trained]) -> None:
    first = all_trained[0]
    for one in all_trained[1:]:
        if one.card.mix.digest != first.card.mix.digest:
            raise RunError(
                f"{one.run.path} was trained on another mix than {first.run.path}: what one was trained on "
                "must not be what the other is judged by; train all on one mix, each with its own seed"
            )
        if one.checkpoint.path == first.checkpoint.path:
            raise RunError(
                f"{one.run.path} comes twice: members must be trained apart, each with its own seed"
            )


def _all_tensors(all_trained: Sequence[Trained]) -> Iterator[tuple[str, Tensor]]:
    for k, one in enumerate(all_trained):
        for name, tensor in named_tensors(one.run, one.card, one.checkpoint, one.kind):
            yield member_prefix(k) + name, tensor


def _provenance_of_all(all_trained: Sequence[Trained]) -> dict[str, Any]:
    found = [_provenance(one.card, one.checkpoint, one.kind) for one in all_trained]
    return found[0] if len(found) == 1 else {**found[0], "members": found}


def choose_checkpoint(run: RunDirectory, wanted: str) -> Checkpoint:
    """The checkpoint called ``best``, ``last`` or by its name, checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if wanted not in ("best", "last"):
        return read_checkpoint(run.checkpoints / wanted)
    last, problems = newest_valid(run.checkpoints)
    if last is None:
        found = "; ".join(problems) or "none was saved yet"
        raise CheckpointError(f"{run.path} has no usable checkpoint: {found}")
    if wanted == "last" or last.state.best_step in (-1, last.state.step):
        return last
    return read_checkpoint(run.checkpoints / step_name(last.state.best_step))


def named_tensors(
    run: RunDirectory, card: RunCard, checkpoint: Checkpoint, kind: str
) -> Iterator[tuple[str, Tensor]]:
    """The potential's fp32 tensors by name, one at a time; `kind` is ``ema`` or ``weights``.

    What was not trained is in no checkpoint, but in the bundle that the run began from.
    """
    trained = set()
    for name, tensor in read_weights(checkpoint.path, kind):
        trained.add(name.removeprefix(PREFIX))
        yield name.removeprefix(PREFIX), tensor
    if card.parent is not None:
        inherited = Inherited(run.parent, card.config, card.references)
        yield from ((name, inherited.tensor(name)) for name in inherited.names if name not in trained)


def averaged(checkpoint: Checkpoint) -> str:
    """Which weights of a checkpoint are used by default: ``ema`` where an average was kept."""
    with Shares(checkpoint.path) as shares:
        return "ema" if shares.has_average else "weights"


def restore_potential(run: RunDirectory, card: RunCard, checkpoint: Checkpoint, kind: str) -> Potential:
    """The trained potential in this process's memory, its weights frozen; `kind` as for `named_tensors`."""
    with torch.device("meta"):
        potential = Potential(card.config, card.references)
    # Assigned, not copied: there is one copy of the weights, not two.
    potential.load_state_dict(dict(named_tensors(run, card, checkpoint, kind)), assign=True)
    return potential.requires_grad_(False)


def _test(card: RunCard, mix: Mix, members: Members, console: Console) -> dict[str, Any]:
    if not card.mix.sizes["test"]:
        console.print("the test split is empty: exported without test errors")
        return {}
    loss, levels = card.recipe.loss, dict(enumerate(card.config.levels_of_theory))
    dataset, places = Dataset(mix.stores, card.config), mix.part("test")
    sizes = Sizes.of(mix.stores, card.config.cutoff, progress=True)
    stress = card.config.forces == "conservative" and any(store.manifest.has_stress for store in mix.stores)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    tally, by_source = Tally(len(levels), loss), {}
    for k, source in enumerate(mix.card.sources):
        part = places.of_store(k)
        if len(part):
            found = evaluate(members, dataset, part, sizes.costs(part), world, loss, stress=stress)
            by_source[source.name] = found.errors()
            tally.include(found)
    baseline = evaluate_references(card.references, card.config.elements, dataset, places, loss)
    _print_errors(console, tally.errors(), baseline.errors(), by_source if len(by_source) > 1 else {})
    return {
        "test": {
            **tally.errors().to_json(),
            "by_level_of_theory": {name: tally.errors(level).to_json() for level, name in levels.items()},
            "by_source": {name: errors.to_json() for name, errors in by_source.items()},
            "baseline_references_zero_forces": baseline.errors().to_json(),
        }
    }


def _print_errors(console: Console, model: Errors, baseline: Errors, by_source: Mapping[str, Errors]) -> None:
    table = Table(
        title=f"{model.structures} structures of the test split, mean absolute errors", title_justify="left"
    )
    columns = (
        ("energy, meV/atom", "energy_mae"),
        ("forces, eV/Å", "forces_mae"),
        ("stress, eV/Å³", "stress_mae"),
    )
    shown = [(title, field) for title, field in columns if getattr(model, field) is not None]
    table.add_column("")
    for title, _ in shown:
        table.add_column(title, justify="right")
    rows = {
        "model": model,
        **{f"  on {name}": errors for name, errors in by_source.items()},
        "reference energies, zero forces": baseline,
    }
    for label, errors in rows.items():
        values = (getattr(errors, field) for _, field in shown)
        table.add_row(escape(label), *("–" if value is None else f"{value:.4g}" for value in values))
    console.print(table)


def _provenance(card: RunCard, checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    return {
        "equipot_version": version("equipot"),
        "recipe": card.recipe.model_dump(mode="json"),
        "stores": [
            # the path is of the machine that trained, and says nothing elsewhere
            {key: value for key, value in store.to_json().items() if key != "path"}
            for store in card.stores
        ],
        "mix": {key: value for key, value in card.mix.to_json().items() if key != "path"},
        "parent": None if card.parent is None else card.parent.to_json(),
        "seeds": {"run": card.recipe.seed},
        "checkpoint": checkpoint.name,
        "steps": checkpoint.state.step,
        "epochs": checkpoint.state.epoch,
        "training_seconds": round(checkpoint.state.seconds, 1),
        "trained_with": asdict(checkpoint.parallelism),
        "weights": "exponential moving average" if kind == "ema" else "last",
    }
