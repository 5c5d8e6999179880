"""Where a study keeps what. Knows no content."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipot.train.scaling.declaration import StudyError


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where a study keeps what."""

    path: Path

    @property
    def declaration(self) -> Path:
        """The study's file, as it was given."""
        return self.path / "study.toml"

    @property
    def resolved(self) -> Path:
        """The same after overrides, as plain values."""
        return self.path / "study.json"

    @property
    def stores(self) -> Path:
        """One imported store per source."""
        return self.path / "stores"

    @property
    def mix(self) -> Path:
        """What of them is trained, validated and tested on."""
        return self.path / "mix"

    @property
    def points(self) -> Path:
        """One folder per point."""
        return self.path / "points"

    @property
    def logs(self) -> Path:
        """What workers had to say."""
        return self.path / "log"

    def point(self, name: str) -> PointFolder:
        """The folder of a point."""
        return PointFolder(self.points / name)


@dataclass(frozen=True, slots=True)
class PointFolder:
    """Where a point keeps what."""

    path: Path

    @property
    def settings(self) -> Path:
        """What it is; written before it runs."""
        return self.path / "point.json"

    @property
    def run(self) -> Path:
        """An ordinary training run."""
        return self.path / "run"

    @property
    def log(self) -> Path:
        """What the training said."""
        return self.path / "train.log"

    @property
    def curve(self) -> Path:
        """One row per validation."""
        return self.path / "curve.csv"

    @property
    def result(self) -> Path:
        """Written last: its presence means that the point is finished."""
        return self.path / "result.json"

    @property
    def failure(self) -> Path:
        """Why the point could not be trained, the last time that it was tried."""
        return self.path / "failure.json"

    @property
    def parity(self) -> Path:
        """A sample for parity plots."""
        return self.path / "parity.npz"

    @property
    def is_finished(self) -> bool:
        """Whether there is a result."""
        return self.result.exists()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write it aside, then name it: nobody ever reads half of it.

    Raises:
        StudyError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """What was written; None if there is nothing, or no whole JSON object.

    On a file system that machines share, a file may be gone or half there for a moment.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
