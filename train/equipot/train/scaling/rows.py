"""Reads a study's directory into typed rows, and writes them as one flat table. Knows no torch.

A point is finished when its ``result.json`` is there. Energies are eV/atom, forces eV/Å per component.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from equipot.train.errors import TrainError
from equipot.train.scaling.folder import PointFolder, StudyFolder, read_json

RESULTS, MEMORY, LATENCY = "results.csv", "memory.json", "latency.json"
METRICS = {"loss": "loss", "energy": "energy_mae_per_atom", "forces": "force_mae"}
"""What laws are fitted to, by the key of a point's test errors."""

SWITCHES = ("forces", "residual", "normalisation", "inputs", "references")


class ResultError(TrainError):
    """A study's directory that cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One finished point: its settings, what it took, and how it did."""

    name: str
    group: tuple[str, ...]
    architecture: str
    width: int
    layers: int
    forces: str = "conservative"
    residual: str = "true"
    normalisation: str = "layer"
    inputs: str = "invariant"
    references: str = "per-level"
    data_fraction: float = 1.0
    train_structures: int
    seed: int
    target_flops: float | None = None
    structures_per_step: int = 0
    learning_rate: float | None = None
    overrides: str = ""
    """Other keys of the recipe that differ, as ``key=value`` in order, joined by spaces."""
    holdout: bool = False
    parameters: int
    flops: float
    steps: int
    structures: int
    atoms: int = 0
    edges: int = 0
    epochs: float
    seconds: float = 0.0
    stopped: str = "finished"
    train_loss: float | None = None
    validation_loss: float | None = None
    test: Mapping[str, Any] = field(default_factory=dict)
    unseen: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    similarity: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None

    @property
    def usable(self) -> bool:
        """Whether it ended as declared, with a loss."""
        return self.stopped == "finished" and self.value("loss") is not None

    def value(self, metric: str) -> float | None:
        """A test error by its word in `METRICS`; None if there is none, or it is not a positive number."""
        found = self.test.get(METRICS[metric])
        return float(found) if found is not None and math.isfinite(found) and found > 0 else None

    def of_source(self, source: str, key: str) -> float | None:
        """A test error on one source."""
        found = self.test.get("by_source", {}).get(source, {}).get(key)
        return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A validation on the way."""

    step: int
    flops: float
    structures: int
    validation_loss: float


@dataclass(frozen=True, slots=True)
class StudyResults:
    """What there is of a study so far."""

    path: Path
    rows: tuple[Row, ...]
    unfinished: tuple[str, ...]
    """Names of points begun or declared and not finished."""
    curves: Mapping[str, tuple[CurvePoint, ...]]

    @property
    def usable(self) -> list[Row]:
        """Points that ended as declared."""
        return [row for row in self.rows if row.usable]

    @property
    def left_out(self) -> dict[str, int]:
        """How many points are not usable, by how they ended, or "unfinished"."""
        ends = ["unfinished"] * len(self.unfinished)
        for row in self.rows:
            if not row.usable:
                ends.append("without a loss" if row.stopped == "finished" else row.stopped)
        return dict(Counter(ends))

    @property
    def sources(self) -> list[str]:
        """Of the test split."""
        return sorted({name for row in self.rows for name in row.test.get("by_source", {})})

    def parity(self, row: Row) -> Path | None:
        """The point's sample for parity plots, if there is one."""
        path = StudyFolder(self.path).point(row.name).parity
        return path if path.is_file() else None


def read_study(path: Path) -> StudyResults:
    """Every finished point of a study, by name.

    Raises:
        ResultError: no study's directory, or a point's file that is damaged.
    """
    study = StudyFolder(path)
    if not study.points.is_dir():
        raise ResultError(
            f"{path}: is no study's directory; run one with: equipot scaling run STUDY --out {path}"
        )
    rows, unfinished, curves = [], [], {}
    for name in sorted(each.name for each in study.points.iterdir() if each.is_dir()):
        point = study.point(name)
        if point.is_finished:
            rows.append(_row(point))
            curves[name] = _curve(point.curve)
        else:
            unfinished.append(name)
    return StudyResults(path, tuple(rows), tuple(unfinished), curves)


def write_results(results: StudyResults) -> Path:
    """One flat row for each finished point as results.csv; returns where."""
    sources = results.sources
    unseen = sorted({name for row in results.rows for name in row.unseen})
    path = results.path / RESULTS
    plain = [each.name for each in fields(Row) if each.name not in ("test", "unseen", "baselines")]
    aside = path.with_suffix(".part")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = (
            "loss",
            "energy_mae_per_atom",
            "energy_rmse_per_atom",
            "force_mae",
            "force_rmse",
            "force_cosine",
        )
        header = [*plain, *(f"test_{key}" for key in keys)]
        header += [f"test_{source}_{key}" for source in sources for key in keys[1:]]
        header += [f"unseen_{source}_{key}" for source in unseen for key in keys[1:]]
        writer.writerow(header)
        for row in results.rows:
            values = [_plain(getattr(row, name)) for name in plain]
            values += [row.test.get(key) for key in keys]
            values += [row.of_source(source, key) for source in sources for key in keys[1:]]
            values += [row.unseen.get(source, {}).get(key) for source in unseen for key in keys[1:]]
            writer.writerow(["" if value is None else value for value in values])
    aside.replace(path)
    return path


def read_memory(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a study's directory holds of memory: predictions, and what ``benchmarks/latency.py`` measured."""
    return read_json(path / MEMORY) or {}, read_json(path / LATENCY) or {}


def _row(folder: PointFolder) -> Row:
    place = folder.result
    try:
        body = json.loads(place.read_text(encoding="utf-8"))
        # a study that was added to may have given a finished point to more experiments, or held it out
        point = {**body["point"], **(read_json(folder.settings) or {})}
        group = point.pop("group", ())
        known = {each.name for each in fields(Row)}
        values = {key: value for key, value in {**point, **body}.items() if key in known}
        values |= {
            "group": (group,) if isinstance(group, str) else tuple(group),
            "residual": str(point.get("residual", True)).lower(),
            "overrides": " ".join(
                f"{key}={value}" for key, value in sorted(point.get("overrides", {}).items())
            ),
            "similarity": tuple(body.get("similarity") or ()),
        }
        for key in ("test", "unseen", "baselines"):
            values[key] = values.get(key) or {}
        return Row(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(
            f"{place}: is damaged ({error}); remove its folder and run the study again, which redoes this "
            "point alone"
        ) from None


def _curve(path: Path) -> tuple[CurvePoint, ...]:
    if not path.is_file():
        return ()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(
                CurvePoint(
                    step=int(line["step"]),
                    flops=float(line["flops"]),
                    structures=int(float(line["structures"])),
                    validation_loss=float(line["validation_loss"]),
                )
                for line in csv.DictReader(file)
                if line.get("validation_loss")
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"{path}: is damaged ({error!r}); remove its folder and run the study again"
        ) from None


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in value)
    return value


def seeds_of(rows: Sequence[Row]) -> int:
    """How many different seeds there are."""
    return len({row.seed for row in rows})
