"""What is sent to submit a job: its parts, made as each is wanted. Opens no connection itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any
from uuid import uuid4

import numpy as np

from equipot.client.batches import PRIORITIES, Part, Priority, Wish, cut
from equipot.client.dynamics import SimulateSettings, SimulateWords
from equipot.client.moving import fixed_of, flags
from equipot.client.relax import RelaxSettings, RelaxWords
from equipot.client.results import Limits
from equipot.client.settings import Asked, Settings
from equipot.client.starts import PLAIN_SHARE, masses_of, put_start, share_of, velocities_of
from equipot.client.structures import StructuresLike, each_structure, pack
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import StructureArrays, decode_structures, encode_failures, encode_structures

ATOMS_PER_PART = 65_536
"""A job travels in parts of about so many atoms: each is on the server's disk before the next one leaves."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is to be submitted.

    Attributes:
        id: of it.
        label: any text to know it by.
        items: its structures, as they were given.
        wish: what is asked of the model.
        share: times the bytes of its positions alone that a structure takes, at most.
        add: writes what is to be done with a part that begins there.
    """

    id: str
    label: str
    items: Sequence[Any]
    wish: Wish
    share: float
    add: Callable[[jpb.SubmitJobRequest, Part, int], None]

    def requests(self, limits: Limits, settings: Settings) -> Iterator[tuple[jpb.SubmitJobRequest, int]]:
        """Part by part, each with how many structures the server has when it has that."""
        parts = cut(
            self.items,
            limits,
            atoms_per_request=min(limits.max_atoms_per_request or ATOMS_PER_PART, ATOMS_PER_PART),
            max_message_bytes=int(limits.message_bytes(settings.max_message_bytes) / self.share),
        )
        start = 0
        # An empty job is one, too.
        for part, following in (
            itertools.pairwise(itertools.chain(parts, (None,))) if self.items else ((Part(), None),)
        ):
            assert part is not None
            request = jpb.SubmitJobRequest(
                id=self.id,
                label=self.label,
                start=start,
                last=following is None,
                refused=encode_failures(part.failures),
            )
            self.add(request, part, start)
            start += len(part.n_atoms)
            yield request, start


def relaxing(
    own: Settings,
    structures: StructuresLike,
    asked: Asked,
    how: RelaxWords,
    *,
    id: str,
    label: str,
    priority: Priority,
) -> Submission:
    """A job of relaxations.

    Raises:
        InvalidRequest: a setting out of its range.
    """
    settings = RelaxSettings(**how)
    asked["stress"] = settings.cell != "fixed"
    wish = replace(own.wish(asked), priority=priority)
    items = list(each_structure(structures))

    def add(request: jpb.SubmitJobRequest, part: Part, start: int) -> None:
        relax = settings.request(wish, part.structures, fixed_of(items, part, start))
        relax.priority = _explicit(priority)
        relax.structures.CopyFrom(_with_refused(relax.structures, part))
        request.relax.CopyFrom(relax)

    return Submission(id or _new("relax"), label, items, wish, PLAIN_SHARE, add)


def simulating(
    own: Settings,
    structures: StructuresLike,
    asked: Asked,
    how: SimulateWords,
    *,
    steps: int,
    id: str,
    label: str,
    priority: Priority,
) -> Submission:
    """A job of dynamics.

    Raises:
        InvalidRequest: a setting out of its range.
    """
    settings, id = SimulateSettings(steps=steps, **how), id or _new("simulate")
    if settings.seed is None:
        # Not drawn: what is submitted once more must be the same.
        first = int.from_bytes(sha256(id.encode()).digest()[:6], "little")
        settings = replace(settings, seed=first)
    asked["stress"] = settings.stress
    wish = replace(own.wish(asked), priority=priority)
    items = list(each_structure(structures))
    seeds = settings.seeds(len(items))

    def add(request: jpb.SubmitJobRequest, part: Part, start: int) -> None:
        simulate, sent = settings.request(wish), [items[start + place] for place in part.places]
        simulate.priority = _explicit(priority)
        packed = encode_structures(pack(part.structures))
        simulate.structures.CopyFrom(_with_refused(packed, part))
        simulate.fixed = flags(fixed_of(items, part, start))
        put_start(
            simulate,
            [velocities_of(item) for item in sent],
            masses_of(sent, [structure.atomic_numbers for structure in part.structures]),
            [len(structure) for structure in part.structures],
        )
        if simulate.drawn:
            drawn = np.ones(len(part.n_atoms), dtype=np.uint8)
            drawn[part.places] = np.frombuffer(simulate.drawn, dtype=np.uint8)
            simulate.drawn = drawn.tobytes()
        simulate.seeds.extend(seeds[start : start + len(part.n_atoms)])
        request.simulate.CopyFrom(simulate)

    return Submission(id, label, items, wish, share_of(items), add)


def _explicit(priority: Priority) -> pb.Priority.ValueType:
    """On the wire; a job's unspecified one is low."""
    return pb.PRIORITY_NORMAL if priority == "normal" else PRIORITIES[priority]


def _new(kind: str) -> str:
    return f"{kind}-{uuid4().hex[:12]}"


def _with_refused(structures: pb.Structures, part: Part) -> pb.Structures:
    """A part's structures with those of it that are refused, which have no atoms."""
    if len(part.places) == len(part.n_atoms):
        return structures
    return encode_structures(_spaced(decode_structures(structures), part.places, len(part.n_atoms)))


def _spaced(arrays: StructureArrays, places: Sequence[int], count: int) -> StructureArrays:
    """The structures at these places of so many, and nothing at the others."""

    def spaced(values: Any) -> Any:  # noqa: ANN401  # any of the arrays by structure
        wide = np.zeros((count, *values.shape[1:]), dtype=values.dtype)
        wide[places] = values
        return wide

    return replace(
        arrays,
        n_atoms=spaced(arrays.n_atoms),
        cell=spaced(arrays.cell),
        pbc=spaced(arrays.pbc),
        charge=spaced(arrays.charge),
        spin_multiplicity=spaced(arrays.spin_multiplicity),
    )
