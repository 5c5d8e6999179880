"""The forecast of a batch's seconds against made-up engines whose time is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipot.serve.pace import NOTHING, Pace, Size


def batch(structures: int, atoms_each: int, edges_each: int) -> Size:
    return Size(structures, structures * atoms_each, structures * edges_each)


def test_nothing_is_foretold_before_anything_was_seen() -> None:
    pace = Pace()
    assert not pace
    with pytest.raises(ValueError, match="no batch"):
        pace.seconds(batch(1, 1, 1))


def test_one_batch_tells_of_others_in_proportion_to_their_edges() -> None:
    pace = Pace()
    pace.learn(batch(1, 64, 2_000), 0.02)
    assert pace.seconds(batch(1, 64, 2_000)) == pytest.approx(0.02)
    assert pace.seconds(batch(4, 64, 2_000)) == pytest.approx(0.08)


@settings(max_examples=50, deadline=None)
@given(
    fixed=st.floats(0, 5e-3),
    per_structure=st.floats(0, 1e-4),
    per_atom=st.floats(0, 1e-5),
    per_edge=st.floats(1e-7, 1e-5),
    n_structures=st.integers(1, 200),
    atoms=st.integers(2, 200),
)
def test_sizes_never_seen_are_foretold_within_a_fifth(
    fixed: float, per_structure: float, per_atom: float, per_edge: float, n_structures: int, atoms: int
) -> None:
    def truth(size: Size) -> float:
        parts = (fixed, per_structure, per_atom, per_edge)
        return sum(part * term for part, term in zip(parts, size.terms, strict=True))

    pace = Pace()
    for structures in (1, 4, 16, 64, 256):
        for each, neighbours in ((8, 12), (64, 28), (200, 50)):
            size = batch(structures, each, each * neighbours)
            pace.learn(size, truth(size))
    size = batch(n_structures, atoms, atoms * 20)
    assert pace.seconds(size) == pytest.approx(truth(size), rel=0.2)


def test_a_bend_in_the_line_is_kept_where_it_was_seen() -> None:
    pace = Pace()
    # With more threads from some size on, large batches take half of what small ones promise.
    for edges in (1_000, 2_000, 4_000):
        pace.learn(batch(1, edges // 20, edges), edges * 1e-5)
    for edges in (16_000, 32_000):
        pace.learn(batch(1, edges // 20, edges), edges * 0.5e-5)
    assert pace.seconds(batch(1, 50, 1_000)) == pytest.approx(0.01, rel=0.01)
    assert pace.seconds(batch(1, 1_600, 32_000)) == pytest.approx(0.16, rel=0.01)


def test_a_machine_that_slows_down_is_followed_and_one_hiccup_is_not() -> None:
    pace = Pace()
    size = batch(1, 64, 2_000)
    for _ in range(30):
        pace.learn(size, 0.01)
    pace.learn(size, 5.0)
    assert pace.seconds(size) < 0.02
    for _ in range(30):
        pace.learn(size, 0.03)
    assert pace.seconds(size) == pytest.approx(0.03, rel=0.05)


def test_what_one_size_says_of_a_machine_under_load_holds_for_others() -> None:
    pace = Pace()
    small, large = batch(1, 20, 400), batch(8, 64, 16_000)
    quick = batch(1, 5, 20)
    for _ in range(20):
        pace.learn(quick, 0.0005)
        pace.learn(small, 0.02)
        pace.learn(large, 0.8)
    for _ in range(20):
        pace.learn(large, 1.6)
    assert 0.026 < pace.seconds(small) < 0.042
    assert pace.seconds(large) == pytest.approx(1.6, rel=0.05)
    # What is over before the scheduler looks round is as fast as ever.
    assert pace.seconds(quick) == pytest.approx(0.0005, rel=0.05)


def test_sizes_add_up() -> None:
    assert NOTHING + Size(1, 2, 3) + Size(4, 5, 6) == Size(5, 7, 9)
