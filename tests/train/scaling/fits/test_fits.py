"""A whole study of known laws: what is read, fitted, compared and foretold is what was put in."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from equipot.train.scaling.better import ALL, contests, papers_family
from equipot.train.scaling.compare import compare_families
from equipot.train.scaling.figures_depth import depth_series
from equipot.train.scaling.fit import COMPUTE, DATA, SIZE, SIZE_AND_SEEN, Fits, fit_study
from equipot.train.scaling.optimal import Costs
from equipot.train.scaling.rows import ResultError, StudyResults, read_study, write_results
from equipot.train.scaling.slices import Family
from equipot.train.scaling.verdicts import of_data_against_size, of_depth, steps_against_epochs

from .synthetic import BATCH, TRAIN, Synthetic, Truth, flops_of, parameters_of


def inside(interval: object, value: float) -> bool:
    low = min(interval.low, interval.low_by_pairs)  # type: ignore[attr-defined]
    high = max(interval.high, interval.high_by_pairs)  # type: ignore[attr-defined]
    return bool(low <= value <= high)


def test_laws_of_each_kind_are_those_that_were_put_in(fits: Fits, truth: Truth) -> None:
    size = fits.of(SIZE)[0]
    assert size.fit is not None
    assert dict(size.slice.fixed) == {
        "layers": "3",
        "data fraction": "1",
        "batch": "8",
        "steps": "1000",
    }
    found = size.fit.intervals(["N"])
    assert inside(found["exponent"], truth.alpha)
    seen, data = 1000 * BATCH, TRAIN
    floor = truth.offset + truth.b * seen**-truth.beta + truth.g * data**-truth.gamma
    assert inside(found["E"], floor)
    units = {next(reversed(dict(law.slice.fixed))): law for law in fits.of(DATA)}
    assert set(units) == {"steps", "epochs"}
    at_steps = units["steps"].fit
    assert at_steps is not None
    assert inside(at_steps.intervals(["D"])["exponent"], truth.gamma)
    joint = fits.of(SIZE_AND_SEEN)[0].fit
    assert joint is not None
    parameters = joint.intervals(["N", "S"])
    assert inside(parameters["exponent_N"], truth.alpha)
    assert inside(parameters["exponent_S"], truth.beta)
    assert fits.of(COMPUTE)[0].fit is not None
    assert size.fit.seed_spread == pytest.approx(truth.noise, rel=0.6)


def test_the_best_use_of_a_budget_is_that_of_the_true_law(fits: Fits, truth: Truth) -> None:
    widths = np.arange(8, 512)
    for optimum in fits.optima:
        seen = optimum.budget / np.array([flops_of(int(w), 3) for w in widths])
        losses = [truth.loss(parameters_of(int(w), 3), s, TRAIN) for w, s in zip(widths, seen, strict=True)]
        best = int(widths[int(np.argmin(losses))])
        assert optimum.width == pytest.approx(best, rel=0.2)
        assert optimum.band.run_low[0] < min(losses) < optimum.band.run_high[0]
        cost = flops_of(optimum.width, 3) * optimum.structures
        assert cost == pytest.approx(optimum.budget, rel=1e-3)
    assert fits.growth() == pytest.approx(truth.beta / (truth.alpha + truth.beta), abs=0.12)


def test_costs_by_width_are_exact(results: StudyResults) -> None:
    rows = [row for row in results.usable if row.layers == 3 and row.architecture == "egnn"]
    costs = Costs.of(rows)
    assert costs.parameters_at(np.array([300.0]))[0] == pytest.approx(parameters_of(300, 3), rel=1e-6)
    assert costs.flops_at(np.array([300.0]))[0] == pytest.approx(flops_of(300, 3), rel=1e-6)


def test_points_held_out_are_not_fitted_and_are_foretold(fits: Fits) -> None:
    fitted = {row.name for law in fits.laws for row in law.slice.rows}
    assert not any("holdout" in name or "w256" in name for name in fitted)
    foretold = [(law, each) for law, each in fits.foretold if law.metric == "loss"]
    assert {each.row.width for _, each in foretold} == {256, 64}
    assert {law.slice.variables for law, _ in foretold} >= {SIZE, DATA, SIZE_AND_SEEN}
    for _, each in foretold:
        assert each.fitted == pytest.approx(each.observed, rel=0.08)
    body = fits.to_json()
    assert body["held_out"] == len(foretold)
    assert body["held_out_inside"] == sum(each.inside for _, each in foretold)


def test_each_confound_has_the_effect_that_was_put_in(
    results: StudyResults, fits: Fits, truth: Truth
) -> None:
    found = {each.label: each for each in compare_families(results.rows, fits)}
    direct = found["direct forces"]
    assert direct.how == "same width, depth, data, steps and seed"
    assert all(base.seed == other.seed and base.width == other.width for base, other in direct.pairs)
    assert direct.effects["loss"].ratio == pytest.approx(1.1, rel=0.02)
    assert direct.effects["forces"].significant
    assert not found["no normalisation"].effects["loss"].probability < 1e-3
    [shift] = found["shared references"].shifts
    assert shift.exponent[1] <= 0 <= shift.exponent[2]  # a factor moves no exponent
    assert shift.offset_ratio[0] == pytest.approx(1.3, rel=0.15)
    assert found["gcn"].effects["loss"].ratio == pytest.approx(2.0, rel=0.05)
    epochs = steps_against_epochs(fits)
    assert epochs is not None
    assert epochs.exponent_significant
    assert "data beat parameters" in next(of_data_against_size(fits))


def test_the_better_architecture_meets_the_base_at_four_times_its_compute(
    results: StudyResults, fits: Fits
) -> None:
    found = {(each.family.architecture, each.share): each for each in contests(results.rows, fits.base)}
    quarter = found[("fast-egnn", 0.25)]
    for rival, candidate in quarter.pairs:
        assert candidate.flops / rival.flops == pytest.approx(0.25, rel=0.35)
        assert candidate.seed == rival.seed
    assert set(quarter.by_source) == {ALL, "molecules", "crystals"}
    assert found[("fast-egnn", 1.0)].reached == ["crystals", "molecules"]
    assert not found[("gcn", 1.0)].reached


def test_the_papers_network_is_a_rival_where_it_was_trained(tmp_path: Path) -> None:
    made = Synthetic(tmp_path)
    paper = {"inputs": "raw", "residual": False, "normalisation": "none"}
    for seed in range(3):
        made.point("size", 32, steps=400, seed=seed)
        made.point("paper", 32, steps=400, seed=seed, **paper)
        made.point("paper", 32, steps=400, seed=seed, **paper, forces="invariant")
    rows = read_study(tmp_path).usable
    family = papers_family(rows)
    assert family is not None
    assert family.forces == "invariant"
    base = next(Family.of(row) for row in rows if "size" in row.group)
    [equal] = contests(rows, family, candidates=[base])
    assert equal.share == 1.0
    assert len(equal.pairs) == 3
    assert equal.surely_reached == ["crystals", "molecules"]
    assert equal.by_source[ALL].ratio == pytest.approx(1 / (1.4 * 1.25 * 1.8), rel=0.05)
    assert papers_family([row for row in rows if Family.of(row) == base]) is None


def test_depth_is_compared_at_equal_size_and_its_verdict_follows_the_numbers(
    results: StudyResults, fits: Fits
) -> None:
    series = {each.family.residual: each for each in depth_series(results.rows, fits.base)}
    for each in series.values():
        assert each.depths == [2, 3, 6, 8, 12]
        sizes = [row.parameters for row in each.rows]
        assert max(sizes) / min(sizes) < 1.25
    words = list(of_depth(list(series.values()), fits))
    assert any("no residuals" in line and "12 layers are worse than 3" in line for line in words)
    assert any("egnn" in line and "12 layers are not told apart from 3" in line for line in words)
    assert any(line.endswith("Width wins between 2 and 12 layers.") for line in words)


def test_the_table_has_every_point_and_the_tests_errors(results: StudyResults) -> None:
    with write_results(results).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.rows)
    first = results.rows[0]
    assert float(lines[0]["test_loss"]) == first.test["loss"]
    assert float(lines[0]["test_molecules_force_mae"]) == first.of_source("molecules", "force_mae")
    assert float(lines[0]["unseen_aspirin_force_mae"]) == first.unseen["aspirin"]["force_mae"]


def test_a_small_study_says_what_is_missing(tmp_path: Path) -> None:
    few = Synthetic(tmp_path)
    for width in (8, 16, 32):
        few.point("size", width, steps=100)
    name = few.point("size", 64, steps=100)
    path = tmp_path / "points" / name / "result.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"stopped": "diverged", "test": None}))
    (tmp_path / "points" / "begun").mkdir()
    later = tmp_path / "points" / "size_w8_n100_s0" / "point.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"group": ["size", "added"]}))
    results = read_study(tmp_path)
    assert results.unfinished == ("begun",)
    assert len(results.rows) == 4
    assert [row.group for row in results.rows if row.width == 8] == [("size", "added")]
    assert len(results.usable) == 3
    fits = fit_study(results, replicates=50)
    assert "3 different setting(s), and a law of 3 parameters needs at least 4" in fits.of(SIZE)[0].refused
    assert not fits.optima
    assert "train models of several sizes" in fits.no_optimum
    json.dumps(fits.to_json(), allow_nan=False)


def test_damaged_and_strange_folders_are_named(tmp_path: Path, study: Path) -> None:
    with pytest.raises(ResultError, match="is no study's directory"):
        read_study(tmp_path)
    source = next((study / "points").iterdir())
    shutil.copytree(source, tmp_path / "points" / source.name)
    result = tmp_path / "points" / source.name / "result.json"
    result.write_text(result.read_text()[:100])
    with pytest.raises(ResultError, match=r"result\.json: is damaged"):
        read_study(tmp_path)
