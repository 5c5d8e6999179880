"""Recipes: what is read, and how a wrong one is answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from equipot.train.recipe import Recipe, RecipeError, check_combination, load_recipe


def test_a_recipe_is_read_with_defaults(recipe: Callable[..., Recipe]) -> None:
    settings = recipe()
    assert (settings.seed, settings.model.width, settings.optimizer.steps) == (3, 16, 6)
    assert settings.model.forces == "conservative"
    assert settings.zero.stage == 1


def test_overrides_are_toml_values_or_bare_words(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe(
        "precision=bf16", "batch.structures=16", f'data.stores=["{tmp_path}"]', "optimizer.betas=[0.8, 0.9]"
    )
    assert settings.precision == "bf16"
    assert settings.batch.structures == 16
    assert settings.data.stores == (tmp_path,)
    assert settings.optimizer.betas == (0.8, 0.9)


def test_messages_are_one_word_or_one_for_each_layer(recipe: Callable[..., Recipe]) -> None:
    assert recipe("model.messages=lean").model.messages == "lean"
    layers = 'model.messages=["fast", "lean"]'
    assert recipe("model.layers=2", layers).model.messages == ("fast", "lean")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.widht=8", ["unknown key model.widht", "did you mean model.width?"]),
        ("modle.width=8", ["unknown key modle", "did you mean model?"]),
        ("model.elements=[1]", ["unknown key model.elements", "training split"]),
        ("zero.tensor_parallel=2", ["unknown key zero.tensor_parallel", "zero.stage = 2"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate = -1", "greater than 0", "peak learning"]),
        ("zero.stage=4", ["zero.stage = 4", "0, 1, 2 or 3"]),
        ("data.fractions=[0.5, 0.4, 0.2]", ["fractions = [0.5, 0.4, 0.2]", "add up to 1"]),
        ("loss.kind=l1", ["loss.kind", '"l1"', "huber"]),
        ("model.width=wide", ["model.width", '"wide"', "integer"]),
        ("loss=1", ["loss = 1"]),
        ("ema.decay=nan", ["ema.decay", "finite"]),
        ("model=1", ["model = 1"]),
        ("model.messages=quick", ["messages", "'quick'", "fast, balanced, lean"]),
        ('model.messages=["fast", "lean", "lean"]', ["messages lists 3 words", "one for each"]),
    ],
)
def test_a_wrong_value_is_named_with_a_remedy(
    recipe: Callable[..., Recipe], change: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(change)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\nstores = ['x']\n[optimizer]\n", ["length of training", "epochs"]),
        ("[optimizer]\nsteps = 1\n", ["data is missing"]),
        ("[data]\nstores = []\n[optimizer]\nsteps = 1", ["data.stores"]),
        ("[data\n", ["not valid TOML", "line 1"]),
    ],
)
def test_an_incomplete_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.toml")


def test_an_override_without_a_value_is_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"--set model\.width: write it as section\.key=value"):
        recipe("model.width")


@pytest.mark.parametrize(
    ("changes", "ranks", "nearest"),
    [
        (["zero.stage=0", "zero.offload_optimizer=cpu"], 1, ["silently", "zero.stage = 1"]),
        (
            ["zero.offload_optimizer=nvme"],
            1,
            ["silently", "zero.stage = 3", 'zero.offload_optimizer = "cpu"'],
        ),
        (["zero.stage=2", "zero.offload_parameters=cpu"], 1, ["zero.stage = 3"]),
        (
            ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.nvme_path=/scratch", "model.width=512"],
            2,
            ["stay in memory", "model.width = 725", '"cpu"'],
        ),
        (["zero.stage=0", "precision=bf16"], 1, ["zero.stage = 1"]),
        (["loss.stress=1", 'model.forces="direct"'], 1, ["loss.stress = 0", '"conservative"']),
        (["batch.structures=3", "batch.accumulation=2"], 2, ["batch.structures = 4"]),
    ],
)
def test_impossible_combinations_name_the_nearest_possible_one(
    recipe: Callable[..., Recipe], changes: list[str], ranks: int, nearest: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_combination(recipe(*changes), ranks)
    assert all(word in str(caught.value) for word in ["Nearest", *nearest]), caught.value


def test_offloading_to_files_needs_their_place(recipe: Callable[..., Recipe]) -> None:
    settings = recipe("zero.stage=3", "zero.offload_optimizer=nvme", "model.width=1024")
    with pytest.raises(RecipeError, match=r"zero\.nvme_path is missing.*name a directory"):
        check_combination(settings, 1)


def test_every_field_says_what_it_is() -> None:
    def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += undocumented(inner, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undocumented(Recipe) == []


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "train" / "recipes").glob("*.toml")))
def test_shipped_recipes_are_possible(path: Path) -> None:
    check_combination(load_recipe(path), ranks=2)
