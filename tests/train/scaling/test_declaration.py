"""What a study may say, and that what it may not is told by key, value and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipot.train.scaling.declaration import Study, StudyError, load_study, parse_study
from equipot.train.scaling.declared import check_grown, remember
from equipot.train.scaling.folder import StudyFolder
from equipot.train.scaling.grid import wishes

SOURCE = {"files": ["a.xyz"], "level_of_theory": "PBE", "licence": "MIT"}
GOOD: dict[str, Any] = {
    "name": "x",
    "length": {"steps": 10},
    "sources": {"a": SOURCE},
    "experiments": {"size": {"axes": {"width": [4, 8]}}},
}


def experiment(**values: object) -> dict[str, Any]:
    return {**GOOD, "experiments": {"size": values}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (experiment(axes={"widht": [4]}), ["experiments.size", "widht", "did you mean width"]),
        (experiment(axes={"width": []}), ["width is empty"]),
        (experiment(axes={"model.width": [4]}), ["model.width", "call it width"]),
        (experiment(axes={"optimizer.steps": [4]}), ["optimizer.steps"]),
        (experiment(axes={"width": [4], "parameters": [10]}), ["width and parameters"]),
        (experiment(axes={"width": [4]}, points=[{"width": 8}]), ["width is an axis", "points"]),
        (experiment(axes={"width": [4]}, holdout=[{"witdh": 4}]), ["witdh"]),
        (
            experiment(length={"steps": 3, "flops": 1e9}),
            ["one of steps, epochs and flops", "steps and flops"],
        ),
        (experiment(length={}), ["not none"]),
        (experiment(ranks=0), ["experiments.size.ranks = 0"]),
        (experiment(recipe={"optimizer": {"epochs": 3}}), ["optimizer.epochs", "the study's own"]),
        ({**GOOD, "experiments": {}}, ["experiments"]),
        ({**GOOD, "experiments": {"a b": {}}}, ["'a b'", "letters"]),
        ({**GOOD, "lenght": {"steps": 3}}, ["lenght", "did you mean length"]),
        ({**GOOD, "sources": {}}, ["sources to train on", "data.mix"]),
        ({**GOOD, "sources": {"a": {**SOURCE, "role": "unseen"}}}, ["sources to train on"]),
        ({**GOOD, "sources": {"a": {"files": ["a.xyz"]}}}, ["sources.a", "level_of_theory"]),
        ({**GOOD, "sources": {"a": {**SOURCE, "store": "s"}}}, ["sources.a", "either files"]),
        ({**GOOD, "sources": {"a": {**SOURCE, "files": ["{there}/a.xyz"]}}}, ["{there}/a.xyz", "[folders]"]),
        ({key: value for key, value in GOOD.items() if key != "length"}, ["length is missing"]),
    ],
)
def test_mistakes_are_told_with_the_key_and_the_remedy(values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(StudyError) as caught:
        parse_study(values, "study.toml")
    message = str(caught.value)
    assert "\n" not in message
    for words in ["study.toml", *said]:
        assert words in message


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such study"):
        load_study(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(StudyError, match="not valid TOML"):
        load_study(tmp_path / "broken.toml")


def test_folders_and_overrides_reach_the_study(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'name = "x"\nlength.steps = 10\n[folders]\nshared = ""\n'
        '[sources.a]\nfiles = ["{shared}/a.xyz"]\nlevel_of_theory = "PBE"\nlicence = "MIT"\n'
        "[experiments.size]\naxes.width = 4\n"
    )
    study = load_study(path, ["length.steps=7", "experiments.size.axes.seed=[0, 1]"], ["shared=/data"])
    assert study.length.steps == 7
    assert study.folders == {"shared": "/data"}
    assert len(wishes(study)) == 2
    with pytest.raises(StudyError, match=r"--folder other=/x: .*shared"):
        load_study(path, [], ["other=/x"])


def test_a_study_may_grow_and_may_not_become_another(declared: Callable[..., Study], tmp_path: Path) -> None:
    file, folder = tmp_path / "study.toml", StudyFolder(tmp_path)
    file.write_text("the text is kept as it is")
    three = {"axes": {"width": [4, 8, 16]}}
    check_grown(declared(size={"axes": {"width": [4, 8]}}), folder)
    remember(declared(size={"axes": {"width": [4, 8]}}), file, folder)
    grown = declared(width=three, more={"axes": {"seed": [1]}})
    check_grown(grown, folder)
    remember(grown, file, folder)
    assert folder.declaration.read_text() == "the text is kept as it is"
    check_grown(grown, folder)
    other = declared(top={"length": {"steps": 11}}, width=three, more={"axes": {"seed": [1]}})
    with pytest.raises(StudyError, match=r"another length: .*10.*11"):
        check_grown(other, folder)
    with pytest.raises(StudyError, match=r"1 point.* that this one has not, as of experiments.more"):
        check_grown(declared(width=three), folder)
