"""One owner at a time, whatever happens to owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from equipot.train.scaling import claims
from equipot.train.scaling.claims import claim, forget, holder

DYING = """
import os, sys
from pathlib import Path
from equipot.train.scaling.claims import claim
print(claim(Path(sys.argv[1])) is not None, flush=True)
os._exit(9)
"""


def edit(folder: Path, **values: object) -> Path:
    path = max(folder.glob("claim-*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def test_a_folder_has_one_owner_and_is_given_back(tmp_path: Path) -> None:
    mine = claim(tmp_path, lambda: {"step": 7})
    assert mine is not None
    with mine:
        assert claim(tmp_path) is None
        assert holder(tmp_path) == {}
    assert holder(tmp_path) is None
    again = claim(tmp_path)
    assert again is not None
    forget(tmp_path)
    assert not list(tmp_path.glob("claim*"))


def test_of_many_that_try_at_once_one_has_it(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, folder=folder: claim(folder), range(8)))
        assert sum(each is not None for each in found) == 1


def test_what_a_dead_process_held_is_free_at_once(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], capture_output=True, text=True)
    assert died.stdout.strip() == "True"
    assert holder(tmp_path) is None
    assert claim(tmp_path) is not None


def test_another_machine_is_believed_until_it_falls_silent(tmp_path: Path) -> None:
    assert claim(tmp_path) is not None
    path = edit(tmp_path, machine="another", pid=1)
    assert claim(tmp_path) is None
    silent = time.time() - claims.STALE_SECONDS - 5
    os.utime(path, (silent, silent))
    assert claim(tmp_path) is not None
    assert claim(tmp_path) is None


def test_an_owner_notices_that_it_was_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    mine = claim(tmp_path, lambda: {"step": 7})
    assert mine is not None
    with mine:
        deadline = time.monotonic() + 10
        while holder(tmp_path) != {"step": 7} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(tmp_path) == {"step": 7}
        assert not mine.is_lost
        other = tmp_path / "claim-000009.json"
        other.write_text(json.dumps({"machine": "another", "pid": 1, "released": False}))
        while not mine.is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mine.is_lost
    assert json.loads(other.read_text())["machine"] == "another"
    assert claim(tmp_path) is None
