"""What a mix says of itself on the terminal, and a picture of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from equipot.train.mix import PICTURE, Mix, MixCard, MixSource
from equipot.train.splits import NAMES

_LISTED = 24
"""Reference energies shown at most; mix.json has all."""


def print_mix(mix: Mix, console: Console, *, verified: bool = False) -> None:
    """Per source structures, atoms and bytes per split, weights and what was left out; references; where."""
    card = mix.card
    table = Table(
        "source", "split", "structures", "atoms", "size", "drawn", title=escape(str(mix.path)),
        title_justify="left",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for source in card.sources:
        _add_source(table, source)
    if len(card.sources) > 1:
        _add_rows(table, "all", card.sources, f"{sum(source.draws for source in card.sources):,}")
    console.print(table)
    for k, source in enumerate(card.sources):
        _say(console, f"{source.name}: {_describe(source)}; {mix.stores[k].path}")
    for name, count in _nothing_of(card):
        _say(console, f"note: {count} source(s) have nothing in {name}: too few groups, or all left out")
    _print_references(card, console)
    shares = ", ".join(f"{share:g}" for share in card.fractions)
    _say(console, f"seed {card.seed}; fractions {shares}")
    _say(console, f"digest {card.digest}{' (verified)' if verified else ''}")
    picture = mix.path / PICTURE
    _say(console, f"mix: {mix.path}" + (f", picture: {picture}" if picture.exists() else ""))


def draw_mix(card: MixCard, picture: Path) -> None:
    """Elements and sizes of each source's training structures; writes `picture`."""
    import matplotlib  # a second to import, and for this alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.2 + 1.1 * len(card.sources)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height + 1.2), width_ratios=[3, 1])
    elements = card.chemistry.elements
    shares = np.array(
        [[source.elements.get(str(z), 0) for z in elements] for source in card.sources], dtype=float
    )
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    names = [source.name for source in card.sources]
    image = left.imshow(np.where(shares > 0, shares, np.nan), aspect="auto", cmap="viridis", norm="log")
    crowded = len(elements) > 40  # then in two rows
    labels = ["\n" * (crowded and k % 2) + chemical_symbols[z] for k, z in enumerate(elements)]
    left.set_xticks(range(len(elements)), labels, fontsize=7)
    left.set_yticks(range(len(names)), names)
    left.set_title("share of the training atoms")
    figure.colorbar(image, ax=left, pad=0.01)
    for source in card.sources:
        sizes = np.asarray(source.sizes, dtype=float)
        edges = 2.0 ** np.arange(len(sizes) + 1)
        right.stairs(sizes / max(sizes.sum(), 1), edges, label=source.name)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="atoms per structure", title="share of the training structures")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _add_source(table: Table, source: MixSource) -> None:
    weight = f" (× {float(Fraction(source.weight)):g})" if source.weight != "1" else ""
    _add_rows(table, source.name, [source], f"{source.draws:,}{weight}")


def _add_rows(table: Table, name: str, sources: Sequence[MixSource], draws: str) -> None:
    for split in NAMES:
        counts = [source.counts[split] for source in sources]
        table.add_row(
            escape(name) if split == "train" else "",
            split,
            f"{sum(count.structures for count in counts):,}",
            f"{sum(count.atoms for count in counts):,}",
            _size(sum(count.bytes for count in counts)),
            draws if split == "train" else "",
            end_section=split == NAMES[-1],
        )


def _describe(source: MixSource) -> str:
    elements = " ".join(chemical_symbols[int(z)] for z in source.elements)
    parts = [f"{source.groups:,} groups of {elements}", source.level_of_theory, source.licence]
    caps = [f"{name} = {value}" for name, value in source.caps.items() if value is not None]
    left_out = [f"{count:,} left out ({reason})" for reason, count in source.left_out.items()]
    return ", ".join(parts + caps + left_out)


def _nothing_of(card: MixCard) -> list[tuple[str, int]]:
    found = []
    for name, share in zip(NAMES, card.fractions, strict=True):
        without = sum(not source.counts[name].structures for source in card.sources)
        if share and without:
            found.append((name, without))
    return found


def _print_references(card: MixCard, console: Console) -> None:
    for row, level in enumerate(card.levels):
        of_level = [source for source in card.sources if source.level_of_theory == level]
        seen = {int(z) for source in of_level for z in source.elements}
        shown = [
            f"{chemical_symbols[z]} {card.references.energy[row, k]:.4f}"
            for k, z in enumerate(card.chemistry.elements)
            if z in seen
        ]
        more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
        _say(console, f"references of {level}, eV: {', '.join(shown[:_LISTED])}{more}")
        _say(console, f"scale of {level}: {card.references.scale[row]:.4g} eV (RMS force, eV/Å)")
    if len(card.levels) > 1:
        _say(console, f"{len(card.levels)} levels of theory: each has its own references and output")


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)
