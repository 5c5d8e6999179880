"""Finds the real samples, and splits what a reader yields."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from equipot.train.sources.base import Frame, Reader, Rejected

SHARED = Path(__file__).parents[3].parent / "shared" / "data"


@pytest.fixture
def sample() -> Callable[[str], Path]:
    """A real file by its path under the shared data; skips where that is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"shared data absent: {name}")
        return SHARED / name

    return find


@pytest.fixture
def read() -> Callable[..., tuple[list[Frame], list[Rejected]]]:
    """(kept, left out) of a reader; every index comes once and in order, from wherever it starts."""

    def split(reader: Reader, start: int = 0) -> tuple[list[Frame], list[Rejected]]:
        items = list(reader.frames(start))
        assert [item.index for item in items] == list(range(start, start + len(items)))
        _same_from_the_middle(reader, items, start)
        return [i for i in items if isinstance(i, Frame)], [i for i in items if isinstance(i, Rejected)]

    return split


def _same_from_the_middle(reader: Reader, items: Sequence[Frame | Rejected], start: int) -> None:
    middle = len(items) // 2
    later = list(reader.frames(start + middle))
    assert [_essence(item) for item in later] == [_essence(item) for item in items[middle:]]


def _essence(item: Frame | Rejected) -> tuple[object, ...]:
    if isinstance(item, Rejected):
        return item.index, item.reason, item.detail
    forces = None if item.forces is None else item.forces.tobytes()
    return item.index, item.energy, item.positions.tobytes(), forces, item.group, item.name
