"""Points and studies that do not end as declared: time is spent, losses diverge, processes die, data lack."""

from __future__ import annotations

import io
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from equipot.train.errors import TrainError
from equipot.train.scaling import session
from equipot.train.scaling.declaration import load_study
from equipot.train.scaling.fit import fit_study
from equipot.train.scaling.folder import StudyFolder
from equipot.train.scaling.rows import read_study
from equipot.train.scaling.runner import _Workers, standing
from equipot.train.scaling.worker import run
from equipot.train.worker import StopRequest

from .conftest import TINY

WILD = (
    TINY
    + "[experiments.size]\naxes.width = [2]\n"
    + '[experiments.wild]\naxes = {width = 2, "loss.forces" = 1e38}\n'
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> session.Begun:
    """A study whose data are imported and whose points are declared; nothing is trained."""
    home = tmp_path_factory.mktemp("endings")
    (home / "study.toml").write_text(WILD)
    study = load_study(home / "study.toml")
    found = session.begin(
        study, StudyFolder(home / "out"), session.Choice(), time.time(), [], Console(quiet=True)
    )
    session.declare(found, study, home / "study.toml")
    return found


def test_when_the_time_is_spent_it_says_so_and_begins_no_point(begun: session.Begun) -> None:
    spent = replace(begun, work=replace(begun.work, deadline=time.time() + 0.01))
    said = io.StringIO()
    console = Console(file=said, width=200)
    end = session.go_on(spent, 1, [], console)
    assert (end.finished, end.failed, end.running) == (0, 0, [])
    assert session.conclude(spent, end, console, stopped=False) == session.PARTLY
    assert "0 of 2 points are finished" in said.getvalue()
    assert "the time is spent, all is saved: the same command continues" in said.getvalue()
    assert not list(begun.work.folder.glob("points/*/run"))


def test_a_point_that_diverges_is_kept_marked_and_left_out_of_fits(begun: session.Begun) -> None:
    assert run(begun.work, StopRequest()) == 0
    found = [json.loads(path.read_text()) for path in begun.work.folder.glob("points/*/result.json")]
    ends = {each["point"]["group"][0]: each for each in found}
    assert ends["size"]["stopped"] == "finished"
    assert ends["wild"]["stopped"] == "diverged"
    assert "lower optimizer.learning_rate" in ends["wild"]["reason"]
    said = io.StringIO()
    console = Console(file=said, width=400)
    assert session.conclude(begun, standing(begun.work), console, stopped=False) == 0
    assert "diverged: " in said.getvalue()
    results = read_study(begun.work.folder)
    assert len(results.rows) == 2
    assert [row.stopped for row in results.usable] == ["finished"]
    assert fit_study(results, replicates=50).to_json()["left_out"] == {"diverged": 1}


def test_a_point_whose_processes_are_killed_is_given_up_with_the_reason(
    begun: session.Begun, tmp_path: Path
) -> None:
    work = replace(begun.work, folder=tmp_path)
    place = StudyFolder(tmp_path).point(work.points[0][0].name)
    place.path.mkdir(parents=True)
    team = _Workers(work)
    for number in range(1, 9):
        process = subprocess.Popen(["sleep", "60"])
        claimed = {"pid": process.pid, "released": False}
        (place.path / f"claim-{number:06d}.json").write_text(json.dumps(claimed))
        process.kill()
        process.wait()
        team.processes.append(process)
        assert not team.tend(again=False)
        if place.failure.exists():
            break
    assert number > 1  # it was tried again
    reason = json.loads(place.failure.read_text())["reason"]
    assert f"was killed by SIGKILL, {number} times" in reason
    assert standing(work).failed == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ethanol-methanol.extxyz", "sources.alcohols: .*absent.extxyz"),
        ("folder", "sources.alcohols lies in a folder that is not given: --folder there=PATH"),
    ],
)
def test_data_that_are_not_there_are_named_before_anything_is_declared(
    tmp_path: Path, change: str, said: str
) -> None:
    text = WILD.replace("ethanol-methanol.extxyz", "absent.extxyz")
    if change == "folder":
        start, end = text.index('files = ["') + 10, text.index('absent.extxyz"')
        text = text[:start] + "{there}/" + text[end:] + '[folders]\nthere = ""\n'
    (tmp_path / "study.toml").write_text(text)
    out = StudyFolder(tmp_path / "out")
    with pytest.raises(TrainError, match=said):
        session.begin(
            load_study(tmp_path / "study.toml"), out, session.Choice(), time.time(), [], Console(quiet=True)
        )
    assert not out.declaration.exists()
