"""Makes a mix from stores in passes over them in blocks.

Memory grows with the groups, 90 bytes each while they are dealt, and with the lists: 4 bytes a structure,
and as many again while one is written.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.arrays import Field, append_rows
from equipot.train.chemistry import Chemistry, supported_of_store
from equipot.train.errors import DataError
from equipot.train.manifest import write_json
from equipot.train.mix import CARD, Count, Mix, MixCard, MixSource, bytes_of, caps_of, file_digest
from equipot.train.mix_request import MixRequest, SourceRequest
from equipot.train.places import BLOCK
from equipot.train.splits import NAMES, TEST, TRAIN, VALIDATION, Dealer, Groups, blocks_of, place
from equipot.train.store import Store
from equipot.train.survey import Survey

_FORCES_OF = 2**20
"""The scale of a level of theory is that of the forces of so many training structures at most."""
_INDEX = Field("<u4")

Progress = Callable[[str, float], None]
"""Called with what is done, and how much of everything."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A source on its way into the mix."""

    name: str
    request: SourceRequest
    store: Store


@dataclass(slots=True, eq=False)
class _Taken:
    """What was found of a source."""

    lists: list[NDArray[np.uint32]]
    atoms: NDArray[np.int64]
    elements: NDArray[np.int64]
    sizes: NDArray[np.int64]
    too_large: int


def build_mix(request: MixRequest, out: Path, *, on_progress: Progress = lambda what, fraction: None) -> Mix:
    """Makes a mix; its folder has its name only when all of it is there.

    Groups are dealt into training, validation and test source by source. Then one pass reads the training
    structures' elements, energies and some of their forces, from which come reference energies and scales;
    of the other splits it reads groups alone. Structures for validation and test that hold elements, charges
    or spins absent from training are left out.

    Raises:
        DataError: a source that cannot be used, too few groups, or a folder that is taken or cannot be
            written.
    """
    if out.exists():
        raise DataError(f"{out}: is there already; remove it, or give another --out")
    parts = _open(request)
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        card = _fill(request, parts, aside, out, on_progress)
        write_json(aside / CARD, card.to_json())
        aside.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Mix(out, card, [part.store for part in parts])


def _open(request: MixRequest) -> list[_Part]:
    parts: list[_Part] = []
    for name, source in request.sources.items():
        try:
            store = Store.open(source.store)
        except DataError as error:
            raise DataError(f"source {name}: {error}") from None
        level = store.manifest.level_of_theory
        if not len(store):
            raise DataError(f"source {name}: {store.path} holds no structures; import some, or leave it out")
        if len(store) > np.iinfo(np.uint32).max:
            raise DataError(f"source {name}: {store.path} holds more than 2³² structures; import it in parts")
        if source.level_of_theory not in (None, level):
            raise DataError(
                f"source {name}: {store.path} is of level of theory {level!r}, the mix wants "
                f"{source.level_of_theory!r}; give another store, or change level_of_theory"
            )
        for other in parts:
            if other.store.manifest.digest == store.manifest.digest:
                raise DataError(
                    f"sources {other.name} and {name} are the same data ({other.store.path}, {store.path}); "
                    "leave one out, and say weight = 2 to see it twice"
                )
        parts.append(_Part(name, source, store))
    return parts


def _fill(
    request: MixRequest, parts: Sequence[_Part], aside: Path, out: Path, on_progress: Progress
) -> MixCard:
    on_progress("dealing groups", 0.0)
    dealer = Dealer(request.fractions, request.seed)
    dealt = [dealer.deal(part.store, part.request.caps) for part in parts]
    dealer.check()
    survey = Survey()
    total, done = sum(len(part.store) for part in parts), 0
    rows = dict.fromkeys(NAMES, 0)
    taken: list[_Taken] = []
    for part, groups in zip(parts, dealt, strict=True):
        found = _read(
            part,
            groups,
            survey,
            forces=_share_with_forces(part, parts, dealt),
            on_block=_reporter(on_progress, part.name, done, total),
        )
        done += len(part.store)
        rows["train"] = _append(aside, "train", rows["train"], found.lists[TRAIN])
        taken.append(found)
    known = survey.chemistry
    strange = [_drop_unsupported(known, part, found) for part, found in zip(parts, taken, strict=True)]
    for found in taken:
        for k in (VALIDATION, TEST):
            found.lists[k].sort()  # read in the order they lie; the training list's order makes the subsets
            rows[NAMES[k]] = _append(aside, NAMES[k], rows[NAMES[k]], found.lists[k])
    levels = tuple(dict.fromkeys(part.store.manifest.level_of_theory for part in parts))
    sources = tuple(
        _record(part, groups, found, dropped, out)
        for part, groups, found, dropped in zip(parts, dealt, taken, strange, strict=True)
    )
    card = MixCard(
        digest="",
        seed=request.seed,
        fractions=request.fractions,
        chemistry=known,
        levels=levels,
        references=survey.references(levels, _again(parts, taken)),
        sources=sources,
        files={name: {"rows": rows[name], "sha256": file_digest(aside / f"{name}.npy")} for name in NAMES},
    )
    return dataclasses.replace(card, digest=card.identity())


def _reporter(on_progress: Progress, name: str, done: int, total: int) -> Callable[[int], None]:
    return lambda count: on_progress(name, (done + count) / total)


def _share_with_forces(part: _Part, parts: Sequence[_Part], dealt: Sequence[Groups]) -> float:
    level = part.store.manifest.level_of_theory
    of_level = sum(
        groups.lengths[TRAIN]
        for other, groups in zip(parts, dealt, strict=True)
        if other.store.manifest.level_of_theory == level
    )
    return min(1.0, _FORCES_OF / max(of_level, 1))


def _read(
    part: _Part, groups: Groups, survey: Survey, *, forces: float, on_block: Callable[[int], None]
) -> _Taken:
    """Puts every structure into the list of its split and the training structures into the survey."""
    found = _Taken(
        lists=[np.empty(length, dtype=np.uint32) for length in groups.lengths],
        atoms=np.zeros(3, dtype=np.int64),
        elements=np.zeros(119, dtype=np.int64),
        sizes=np.zeros(32, dtype=np.int64),
        too_large=0,
    )
    seen = np.zeros(len(groups.numbers), dtype=np.int64)
    max_atoms = part.request.max_atoms
    for block in blocks_of(part.store):
        rows, owner, places = place(block, groups, seen, max_atoms)
        found.atoms += np.bincount(owner, block.n_atoms[rows], minlength=3).astype(np.int64)
        if max_atoms is not None:
            found.too_large += int((block.n_atoms > max_atoms).sum())
        for k in range(3):
            mine = owner == k
            found.lists[k][places[mine]] = block.first + rows[mine]
        training = rows[owner == TRAIN]
        # the beginning of the list is as good a sample as any, being in an order drawn by the seed
        sampled = rows[(owner == TRAIN) & (places < np.ceil(forces * groups.lengths[TRAIN]))]
        found.elements += survey.add(part.store, block.first + training, block.first + sampled)
        powers = np.frexp(block.n_atoms[training].astype(np.float64))[1] - 1
        found.sizes += np.bincount(powers, minlength=32)
        on_block(block.first + len(block.groups))
    return found


def _drop_unsupported(known: Chemistry, part: _Part, found: _Taken) -> int:
    """Leaves out what a model of the training split cannot compute; returns how many structures."""
    if known.covers(part.store.manifest):
        return 0
    dropped = 0
    for k in (VALIDATION, TEST):
        kept = []
        for at in range(0, len(found.lists[k]), BLOCK):
            block = found.lists[k][at : at + BLOCK]
            fine = supported_of_store(known, part.store, block.astype(np.int64))
            found.atoms[k] -= int(part.store.element_counts(block[~fine]).sum())
            kept.append(block[fine])
        before = len(found.lists[k])
        found.lists[k] = np.concatenate(kept) if kept else found.lists[k]
        dropped += before - len(found.lists[k])
    return dropped


def _again(parts: Sequence[_Part], taken: Sequence[_Taken]) -> Iterator[tuple[Store, NDArray[np.int64]]]:
    for part, found in zip(parts, taken, strict=True):
        for at in range(0, len(found.lists[TRAIN]), BLOCK):
            yield part.store, found.lists[TRAIN][at : at + BLOCK].astype(np.int64)


def _append(folder: Path, name: str, before: int, indices: NDArray[Any]) -> int:
    append_rows(folder / f"{name}.npy", _INDEX, before, indices)
    return before + len(indices)


def _record(part: _Part, groups: Groups, found: _Taken, unsupported: int, out: Path) -> MixSource:
    manifest = part.store.manifest
    counts = {
        name: Count(
            structures=len(found.lists[k]),
            atoms=int(found.atoms[k]),
            bytes=bytes_of(part.store, len(found.lists[k]), int(found.atoms[k])),
        )
        for k, name in enumerate(NAMES)
    }
    left_out = {
        "more atoms than max_atoms": found.too_large,
        "caps": len(part.store) - found.too_large - sum(groups.lengths),
        "elements, charges or spins absent from training": unsupported,
    }
    path = part.store.path.resolve()
    return MixSource(
        name=part.name,
        path=str(path),
        relative=os.path.relpath(path, out.resolve()),
        digest=manifest.digest,
        level_of_theory=manifest.level_of_theory,
        licence=manifest.licence,
        structures=len(part.store),
        weight=str(part.request.exact_weight),
        caps=caps_of(part.request),
        groups=int((groups.quotas > 0).sum()),
        counts=counts,
        left_out={reason: count for reason, count in left_out.items() if count},
        elements={str(z): int(found.elements[z]) for z in np.flatnonzero(found.elements)},
        sizes=np.trim_zeros(found.sizes, "b").tolist(),
    )
