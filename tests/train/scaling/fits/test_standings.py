"""Verdicts are those of the numbers: trends of frontiers, exponents, rivals by source, equal weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from equipot.train.scaling.better import contests, papers_family
from equipot.train.scaling.compare import compare
from equipot.train.scaling.fit import Fits
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import Family, base_family, frontier, trend_of_frontier
from equipot.train.scaling.standings import ENERGY, FORCES, LOSS, balanced, places, standings, verdict
from equipot.train.scaling.tables import standings as table_of
from equipot.train.scaling.verdicts import of_comparisons, of_quarter

TRIVIAL = {"molecules": 0.01, "crystals": 1.0}


def row(loss: float, *, width: int = 16, seed: int = 0, flops: float = 1e9, **values: Any) -> Row:
    """A finished point whose energies are a hundred times as large on crystals as on molecules."""
    factors = values.pop("by_source", {"molecules": 1.0, "crystals": 1.0})
    by_source = {
        name: {LOSS: loss * factor, ENERGY: loss * factor * TRIVIAL[name], FORCES: loss * factor * 0.5}
        for name, factor in factors.items()
    }
    mean = {key: float(np.mean([each[key] for each in by_source.values()])) for key in (LOSS, ENERGY, FORCES)}
    references = {name: {LOSS: 2.0, ENERGY: TRIVIAL[name]} for name in TRIVIAL}
    zero = {name: {FORCES: 1.0} for name in TRIVIAL}
    return Row(
        **{
            "name": f"w{width}-s{seed}-{flops:g}-{values}",
            "group": ("made",),
            "architecture": "egnn",
            "layers": 3,
            "train_structures": 100,
            "parameters": width**2,
            "steps": 10,
            "structures": 160,
            "epochs": 1.6,
            "seconds": flops / 1e9,
            **values,
        },
        width=width,
        seed=seed,
        flops=flops,
        validation_loss=loss,
        test={**mean, LOSS: loss, "by_source": by_source},
        baselines={
            "references": {LOSS: 2.0, ENERGY: 0.5, "by_source": references},
            "zero_forces": {FORCES: 1.0, "by_source": zero},
        },
        unseen={
            "far": {
                LOSS: loss * 2,
                ENERGY: 0.3,
                FORCES: loss,
                "baseline": {LOSS: 2.0, ENERGY: 0.2, FORCES: 1.0},
            }
        },
    )


def test_a_frontier_of_losses_without_a_trend_is_told_from_one_with() -> None:
    found = []
    for seed in range(40):
        losses = np.exp(np.random.default_rng(seed).normal(scale=0.3, size=14))
        rows = [row(float(loss), flops=1e9 * 2**k, steps=k + 1) for k, loss in enumerate(losses)]
        assert [each.test[LOSS] for each in frontier(rows)] == sorted(
            {each.test[LOSS] for each in frontier(rows)}, reverse=True
        )
        found.append(trend_of_frontier(rows, shuffles=199))
    # a true test says so falsely once in twenty: six of forty or more are less likely than 1 in 70
    assert sum(p <= 0.05 for p in found) <= 5
    assert np.mean(found) == pytest.approx(0.5, abs=0.17)
    falling = [row(float(np.exp(np.sin(k) / 10 - 0.3 * k)), flops=1e9 * 2**k, steps=k + 1) for k in range(10)]
    assert trend_of_frontier(falling) < 0.01


def test_no_point_of_another_architecture_or_of_the_base_counts_as_two_seeds() -> None:
    rows = []
    for seed in range(2):
        for width, loss in ((8, 1.0), (16, 0.8), (32, 1.2)):
            rows.append(row(loss, width=width, seed=seed, flops=1e9))
        for width, loss in ((64, 0.4), (128, 0.6)):
            rows.append(row(loss, width=width, seed=seed, flops=1.02e9, architecture="other"))
    base = base_family(rows)
    family = next(Family.of(each) for each in rows if each.architecture == "other")
    found = compare(rows, nothing_fitted(base), family)
    assert [(one.width, one.seed, two.width, two.seed) for one, two in found.pairs] == [
        (16, 0, 64, 0),
        (16, 1, 64, 1),
    ]
    assert found.effects["loss"].ratio == pytest.approx(0.5)


def nothing_fitted(base: Family) -> Fits:
    return Fits(base, (), (), (), "", 100, 1.0, 3, {})


def over_sizes(exponent: float) -> Iterator[Row]:
    random = np.random.default_rng(0)
    for width in (8, 24, 96):
        for seed in range(2):
            loss = float(width**-0.6 * np.exp(random.normal(scale=0.01)))
            yield row(loss, width=width, seed=seed)
            yield row(loss, width=width, seed=10 + seed)  # more of the base than of any other
            worse = 1.3 * (width / 24) ** (2 * exponent) * float(np.exp(random.normal(scale=0.01)))
            yield row(loss * worse, width=width, seed=seed, forces="direct")


@pytest.mark.parametrize(
    ("exponent", "said"), [(0.1, "is smaller by 0."), (-0.1, "is greater by 0."), (0.0, "not told apart")]
)
def test_fewer_sizes_than_a_law_needs_still_tell_how_a_lead_changes_with_size(
    exponent: float, said: str
) -> None:
    rows = list(over_sizes(exponent))
    base = base_family(rows)
    family = next(Family.of(each) for each in rows if each.forces == "direct")
    found = compare(rows, nothing_fitted(base), family)
    [tilt] = found.tilts
    assert (tilt.variable, tilt.values, tilt.pairs) == ("parameters", 3, 6)
    assert tilt.low < -exponent < tilt.high
    assert tilt.significant == bool(exponent)
    [words] = of_comparisons([found])
    assert "3 different parameters, and a law needs 4: no exponent of its own" in words
    assert said in words


def quarter_of(*factors: float, seeds: int = 3) -> tuple[Family, list[Row]]:
    random = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        near = {name: float(np.exp(random.normal(scale=0.01))) for name in TRIVIAL}
        rows += [row(1.0, seed=seed, flops=4e9), row(1.0, width=9, seed=seed, flops=9e10)]
        by_source = {name: factor * near[name] for name, factor in zip(TRIVIAL, factors, strict=True)}
        rows.append(row(0.9, seed=seed, architecture="better", by_source=by_source, seconds=2.0))
    return base_family(rows), rows


@pytest.mark.parametrize(
    ("factors", "seeds", "said"),
    [
        ((0.8, 0.8), 3, "holds beyond the seeds' doubt: 2 of 2 (crystals, molecules)"),
        ((0.8, 1.105), 3, "holds by the means of the seeds, not beyond their doubt: 2 of 2"),
        ((0.8, 1.3), 3, "does not hold: 1 of 2 (molecules), beyond doubt 1 (molecules)"),
        ((0.8, 0.8), 1, "holds in the one pair of seeds there is, which is no verdict yet: 2 of 2"),
    ],
)
def test_the_verdict_on_a_quarter_of_the_compute_counts_sources_with_their_seeds(
    factors: tuple[float, float], seeds: int, said: str
) -> None:
    base, rows = quarter_of(*factors, seeds=seeds)
    first, clock = of_quarter(contests(rows, base), base)
    assert said in first
    assert "at most 25.0% of the model FLOPs" in first
    assert "a hint, not a measurement" in clock
    assert next(of_quarter([], base)).endswith("no verdict.")


def test_no_source_weighs_more_than_another_in_the_mean_of_shares() -> None:
    one = row(0.5, by_source={"molecules": 1.0, "crystals": 0.2})
    assert one.test[ENERGY] == pytest.approx((0.005 + 0.1) / 2)  # as good as that of the crystals alone
    assert balanced(one, ENERGY) == pytest.approx((0.5 + 0.1) / 2)
    assert balanced(one, LOSS) == pytest.approx((0.25 + 0.05) / 2)
    bare = Row(**{name: getattr(one, name) for name in Row.__slots__ if name != "baselines"})
    assert balanced(bare, ENERGY) is None


def test_the_papers_network_stands_beside_ours_with_baselines_and_a_verdict() -> None:
    rows = []
    paper: dict[str, Any] = {"inputs": "raw", "residual": "false", "normalisation": "none"}
    for seed in range(3):
        rows += [row(0.4 + 0.01 * seed, seed=seed), row(0.45, width=9, seed=seed)]
        rows.append(row(0.8 + 0.01 * seed, seed=seed, **paper))
    base, family = base_family(rows), papers_family(rows)
    assert family is not None
    found = standings(contests(rows, family, {base}), "the paper's", base)
    assert [each.label for each in found] == ["the paper's", "egnn"]
    assert [each.name for each in places(rows)] == [
        "mean of sources, each ÷ trivial",
        "crystals",
        "molecules",
        "far (never seen)",
        "all structures alike",
    ]
    table = table_of(found)
    cells = {(line[0], line[1]): line[2:] for line in table.rows}
    theirs, ours, trivial = cells["molecules", "force MAE, meV/Å"]
    assert theirs == "405 ± 5"
    assert ours.startswith("205 ± 5 (× 0.51, 0.49")
    assert trivial == "1000"
    assert cells["mean of sources, each ÷ trivial", "energy MAE ÷ trivial"][2] == "1"
    seen, unseen = verdict(found[1], "the paper's")
    assert "loss below on 2 of 2; energy MAE below on 2 of 2; force MAE below on 2 of 2" in seen
    assert "loss below on 1 of 1; energy MAE below on 0 of 1, not told apart" in unseen
    assert "No better than the trivial baseline: energies of far" in unseen
    assert standings([], "the paper's", base) == []
