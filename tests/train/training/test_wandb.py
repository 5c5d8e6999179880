"""Weights & Biases, offline and for real: what its own files hold, and that nothing depends on it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equipot.train.metrics import read_rows
from equipot.train.recipe import Recipe, RecipeError, check_combination

pytest.importorskip("wandb", reason='needs the extra: pip install "equipot[wandb]"')


BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = range(1, 5)


def records(path: Path) -> Iterator[bytes]:
    """Of a W&B file: LevelDB's log format after seven bytes; the package has no reader in Python."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little left for a header: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def whole(path: Path) -> list[Any]:
    """The records of a finished run's file; W&B's own process writes the last of them behind `finish`."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 30
    while True:
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(path)]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(run: Path) -> list[dict[str, float]]:
    """The numbers in the run's W&B files."""
    found = []
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in whole(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                names = [item.key or "/".join(item.nested_key) for item in items]
                found.append(
                    {name: json.loads(item.value_json) for name, item in zip(names, items, strict=True)}
                )
    return found


def test_a_run_is_logged_offline_and_continued(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no network is needed: none could be reached
    run = train(tmp_path / "run", "watch.wandb=offline", "optimizer.steps=4")
    train(run, "watch.wandb=offline", "optimizer.steps=6", resume=True)
    ids = {path.name.split("-")[-1] for path in (run / "wandb").glob("offline-run-*")}
    assert ids == {(run / "wandb" / "id").read_text()}
    rows = read_rows(run / "metrics.csv")
    losses = {row["step"]: row["train/loss"] for row in logged(run) if "train/loss" in row}
    assert losses == {row.step: pytest.approx(row.loss, rel=1e-6) for row in rows if row.loss is not None}
    assert any("validation by source/emt/forces_mae_ev_per_angstrom" in row for row in logged(run))


def test_without_the_package_it_is_refused_at_once(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "equipot\[wandb\]"'):
        check_combination(recipe("watch.wandb=offline"), 1)
