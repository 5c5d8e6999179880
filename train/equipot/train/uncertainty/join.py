"""Makes an ensemble of bundles, and calibrates bundles that are there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from equipot.model.bundle import load_potential, member_prefix, tensor_reader, write_bundle
from equipot.model.card import BundleCard, read_card
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.model.shard_files import check_shards
from equipot.model.uncertainty import Uncertainty
from equipot.train.errors import TrainError
from equipot.train.long_work import told_bar
from equipot.train.mix import Mix
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.uncertainty.cases import Members
from equipot.train.uncertainty.measure import measure
from equipot.train.uncertainty.reliability import report


class EnsembleError(TrainError):
    """Models that cannot be members of one ensemble."""


def check_alike(members: Sequence[tuple[str, ModelConfig, References]]) -> None:
    """Checks that models differ in their weights alone.

    Raises:
        EnsembleError: they differ in what is named.
    """
    where, config, references = members[0]
    for other, its_config, its_references in members[1:]:
        for field in fields(ModelConfig):
            mine, its = getattr(config, field.name), getattr(its_config, field.name)
            # The order of evaluation changes no function.
            if mine != its and field.name != "messages":
                raise EnsembleError(
                    f"{other}: its {field.name} is {its}, that of {where} is {mine}: members differ in their "
                    "weights alone; train them by one recipe on one mix, each with its own seed"
                )
        same = all(
            np.array_equal(getattr(references, name), getattr(its_references, name))
            for name in ("energy", "scale")
        )
        if not same:
            raise EnsembleError(
                f"{other}: its reference energies are not those of {where}, so it was trained on other data; "
                "train members by one recipe on one mix, each with its own seed"
            )


def join_bundles(paths: Sequence[Path], out: Path, *, name: str, data: Path | None) -> None:
    """Write the ensemble of some bundles, or of one its copy; calibrated if there are data.

    Args:
        paths: of bundles; of an ensemble all members are taken.
        out: directory of the bundle; must not exist.
        name: of the model; "": the first one's.
        data: directory of a run or a mix: what the members were trained on.

    Raises:
        BundleError: a bundle cannot be read or written.
        TrainError: they cannot be one ensemble, or the data cannot be used.
    """
    console = Console(highlight=False)
    cards = [read_card(path) for path in paths]
    check_alike([(str(p), card.config, card.references) for p, card in zip(paths, cards, strict=True)])
    if len({card.digest for card in cards}) < len(cards):
        raise EnsembleError("a bundle comes twice: members must be trained apart, each with its own seed")
    for path, card in zip(paths, cards, strict=True):
        check_shards(path, card)
    uncertainty = Uncertainty(members=sum(card.members for card in cards))
    metrics: dict[str, Any] = dict(cards[0].metrics) if len(cards) == 1 else {}
    metrics.pop("uncertainty", None)
    if data is not None:
        mix = _mix_of(data)
        _warn_of_other_data(cards, mix, console)
        members = Members(list(_potentials(paths, cards)))
        with told_bar() as told:
            measured = measure(members, mix, told)
        picture = out.with_name(f"{out.name}-reliability.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        metrics |= report(measured, members.config.levels_of_theory, picture, console)
        uncertainty = measured.uncertainty
    written = write_bundle(
        out,
        name=name or cards[0].name,
        config=cards[0].config,
        references=cards[0].references,
        tensors=_tensors(paths, cards),
        provenance=_provenance(cards),
        metrics=metrics,
        dtype=_widest(cards),
        uncertainty=uncertainty,
    )
    console.print(
        escape(f"bundle {out}: {written.name}, {written.members} member(s), "
               f"{'calibrated' if data else 'not calibrated'}"), soft_wrap=True
    )  # fmt: skip
    console.print(escape(f"next: equipot serve {out}"), soft_wrap=True)


def _mix_of(path: Path) -> Mix:
    """The mix in a folder, or that of the run in it."""
    run = RunDirectory(path)
    return reopen_mix(run, RunCard.read(run.card)) if run.card.exists() else Mix.open(path)


def _warn_of_other_data(cards: Sequence[BundleCard], mix: Mix, console: Console) -> None:
    known = {card.provenance.get("mix", {}).get("digest") for card in cards}
    if known != {mix.card.digest}:
        console.print(
            f"[yellow]warning:[/] {escape(str(mix.path))} is not the mix that all members were trained on: "
            "intervals hold only if its validation split has nothing of what they were trained on",
            soft_wrap=True,
        )


def _potentials(paths: Sequence[Path], cards: Sequence[BundleCard]) -> Iterator[Potential]:
    for path, card in zip(paths, cards, strict=True):
        for member in range(card.members):
            yield load_potential(path, verify=False, member=member)[0]


def _tensors(paths: Sequence[Path], cards: Sequence[BundleCard]) -> Iterator[tuple[str, Tensor]]:
    number = 0
    for path, card in zip(paths, cards, strict=True):
        read = tensor_reader(path, card)
        names = _names(card)
        for member in range(card.members):
            for name in names:
                yield member_prefix(number) + name, read(member_prefix(member) + name)
            number += 1


def _names(card: BundleCard) -> list[str]:
    with torch.device("meta"):
        return list(Potential(card.config, card.references).state_dict())


def _provenance(cards: Sequence[BundleCard]) -> dict[str, Any]:
    if len(cards) == 1:
        return dict(cards[0].provenance)
    members = [{"name": card.name, "digest": card.digest, **card.provenance} for card in cards]
    return {**cards[0].provenance, "members": members}


def _widest(cards: Sequence[BundleCard]) -> torch.dtype:
    """What holds all weights as they are: tensors are read as float32, which loses nothing of bfloat16."""
    return torch.bfloat16 if all(card.dtype == "bfloat16" for card in cards) else torch.float32
