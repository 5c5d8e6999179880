"""Plans: what is proposed fits and can be trained; more ranks never take more; mistakes are named."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from equipot.train.launch import launch
from equipot.train.memory.machine import Baseline, Rates
from equipot.train.memory.plan import Candidate, PlanError, apply, as_toml, candidates, propose
from equipot.train.memory.planning import opened
from equipot.train.memory.predict import Machine, Prediction, predict
from equipot.train.memory.profile import profile
from equipot.train.memory.trace import Tracker
from equipot.train.memory.workload import Data
from equipot.train.recipe import Recipe, check_combination, load_recipe

MACHINE = Machine(Baseline(200_000_000, 100_000_000), Rates(5e10, 1e10, 5e-6), compiled=True)
EMPTY = Tracker("meta").timeline()
Equipot = Callable[..., subprocess.Popen[str]]


def predictor(data: Data, ranks: int) -> Callable[[Recipe], Prediction]:
    known: dict[str, Prediction] = {}

    def of(recipe: Recipe) -> Prediction:
        key = recipe.model_dump_json()
        if key not in known:
            known[key] = predict(
                recipe, data.card_for(recipe), ranks, data.workload(recipe, ranks, 2), MACHINE
            )
        return known[key]

    return of


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_take_no_more_of_each(recipe: Callable[..., Recipe], stage: int) -> None:
    settings = recipe(f"zero.stage={stage}", "model.width=256")
    with opened(settings) as (_, data):
        sizes = [predictor(data, ranks)(settings).per_rank for ranks in (1, 2, 4, 8)]
    if stage == 3:
        sizes = sizes[1:]  # alone, nothing has to be gathered
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_what_is_in_files_is_planned_for(recipe: Callable[..., Recipe]) -> None:
    settings = recipe(
        "model.width=1024",
        "zero.stage=3",
        "zero.offload_optimizer=nvme",
        "zero.nvme_path=x",
        "zero.offload_parameters=cpu",
        "ema.decay=0",
        "checkpoint.asynchronous=false",
    )
    with opened(settings) as (_, data):
        found = candidates(settings, 2, 2**40, predictor(data, 2), sharing=2, offload=False)
        kept = predictor(data, 2)(apply(settings, [("zero.offload_optimizer", "none")]))
    in_files = [each for each in found if each.recipe.zero.offload_optimizer == "nvme"]
    assert {each.recipe.zero.stage for each in in_files} == {3}
    assert {each.recipe.zero.stage for each in found} == {0, 1, 2, 3}
    as_it_is = next(each for each in in_files if each.recipe == settings).prediction
    assert {"optimizer", "master weights"} <= kept.parts.keys()
    assert not {"optimizer", "master weights", "moving average", "checkpoint"} & as_it_is.parts.keys()
    saved = kept.parts["optimizer"] + kept.parts["master weights"] - as_it_is.parts["offloading"]
    assert kept.per_rank - as_it_is.per_rank >= 0.9 * saved > 0


def test_plans_can_be_trained_and_the_quickest_is_proposed(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe("model.width=128", "model.messages=plain", "batch.structures=8")
    with opened(settings) as (_, data):
        found = candidates(settings, 2, 2**40, predictor(data, 2), sharing=2, offload=False)
    for each in found:
        check_combination(each.recipe, 2)
        assert each.recipe == apply(settings, each.changes)
    quickest = propose(found, 2**40)
    assert quickest.prediction.seconds <= 1.03 * min(each.prediction.seconds for each in found)
    least = min(found, key=lambda each: each.total)
    assert propose(found, least.total) is least
    path = tmp_path / "planned.toml"
    path.write_text(as_toml(least.recipe))
    assert load_recipe(path) == least.recipe


def test_micro_batches_are_the_last_resort_and_too_little_memory_says_what_is_needed(
    recipe: Callable[..., Recipe],
) -> None:
    settings = recipe("model.messages=lean", "batch.structures=8")

    def of(changed: Recipe) -> Prediction:
        n = changed.batch.accumulation
        parts = {"activations": 2**30 // n, "weights": 2**20 * (4 - changed.zero.stage)}
        return Prediction(parts, 0, "backward", 1.0 + 0.1 * n + 0.01 * changed.zero.stage, EMPTY)

    def totals(memory: int) -> Candidate:
        return propose(candidates(settings, 2, memory, of, sharing=2, offload=False), memory)

    assert totals(3 * 2**30).recipe == apply(settings, totals(3 * 2**30).changes)
    assert totals(3 * 2**30).recipe.batch.accumulation == 1
    assert totals(2**30 + 2**24).recipe.batch.accumulation == 2
    with pytest.raises(PlanError, match=r"the least is 514 MiB, with zero.stage = 3, batch.accumulation = 4"):
        totals(2**20)


def test_a_profile_measures_what_was_predicted(recipe: Callable[..., Recipe]) -> None:
    settings = recipe("model.width=512", "model.messages=fast", "zero.stage=2")
    found = profile(settings, 1, name="tiny", steps=2, say=lambda text: None)
    assert found.memory_error == pytest.approx(0, abs=0.15)
    assert found.measured.seconds > 0
    assert found.measured.pss <= found.measured.peak
    parts = found.prediction.parts
    assert parts["optimizer"] == 2 * parts["weights"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "lots"], "--memory lots"),
        pytest.param(["--memory", "1MiB"], "the least is", marks=pytest.mark.slow),
        (["--ranks", "9"], "batch.structures = 8 cannot be divided"),
        (["--set", "zero.stage=7"], "zero.stage"),
        (["--set", 'data.stores=["nowhere"]'], "nowhere"),
    ],
)
def test_mistakes_are_named_in_one_line(
    equipot: Equipot, recipe_file: Path, arguments: list[str], says: str
) -> None:
    command = equipot("memory", "plan", recipe_file, *arguments)
    out, _ = command.communicate(timeout=250)
    assert command.returncode == 2, out
    (line,) = [line for line in out.splitlines() if "error:" in line]
    assert says in line
    assert "Traceback" not in out


def test_a_rank_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="recipe"):
        launch("equipot.train.memory.rank", ['{"scratch": "' + str(tmp_path) + '"}'], ranks=1, logs=tmp_path)
