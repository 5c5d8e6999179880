"""What a checkpoint is on disk, and how one is found, checked and read. Knows no model and no data.

``checkpoints/step-00000120/`` holds every rank's share of the fp32 weights, of their moving average if one is
kept and of AdamW's moments (``share-0000k-of-0000n.safetensors``, each part with its place in the whole), the
trainer's state (``trainer.json``) and, written last, ``COMMITTED.json`` with size and SHA-256 of each file. A
directory of that name exists only when all of it does. Shares of n ranks are read by any number of them, at
any ZeRO stage; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from equipot.train.errors import TrainError
from equipot.train.state import TrainerState
from equipot.train.tensor_stream import TensorFile

COMMITTED = "COMMITTED.json"
STATE = "trainer.json"
VERSION = 3


class CheckpointError(TrainError):
    """A checkpoint could not be written, found or trusted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """How a run is divided: what may change when it is resumed, and is told."""

    ranks: int
    zero_stage: int
    precision: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    path: Path
    state: TrainerState
    parallelism: Parallelism
    updates: int
    """What AdamW counts; with 0 there are no moments."""

    @property
    def name(self) -> str:
        """As ``step-00000120``."""
        return self.path.name


def step_name(step: int) -> str:
    """Directory name of the checkpoint after that many steps."""
    return f"step-{step:08d}"


def share_name(rank: int, ranks: int) -> str:
    """File name of a rank's share."""
    return f"share-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def committed_paths(directory: Path) -> list[Path]:
    """Directories of committed checkpoints, the newest first; their content is not looked at."""
    return sorted((path for path in directory.glob("step-*") if (path / COMMITTED).exists()), reverse=True)


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in committed_paths(directory):
        try:
            return read_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state after checking every file's size and SHA-256.

    Raises:
        CheckpointError: not committed, or a file is missing, truncated or altered.
    """
    try:
        manifest = json.loads((path / COMMITTED).read_text())
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path} is of format {manifest['version']}, and this version reads {VERSION}"
            )
        for name, entry in manifest["files"].items():
            _check(path / name, entry)
        body = json.loads((path / STATE).read_text())
        return Checkpoint(
            path, TrainerState.from_json(body["state"]), Parallelism(**body["parallelism"]), body["updates"]
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error.filename} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def _check(file: Path, entry: dict[str, object]) -> None:
    if not file.exists():
        raise CheckpointError(f"{file} is missing")
    if file.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{file} was altered: its SHA-256 is not the recorded one")


class Shares:
    """All ranks' shares of a checkpoint as one; use as a context manager.

    Any part of a tensor is read where it is asked for, and nothing else.

    Raises:
        CheckpointError: not the files of a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        try:
            paths = sorted(path.glob("share-*-of-*.safetensors"))
            self._files = [self._stack.enter_context(TensorFile(share)) for share in paths]
            self._places = [json.loads(file.metadata["places"]) for file in self._files]
            self.shapes = {name: tuple(shape) for name, (_, _, shape) in self._places[0].items()}
            """Of the parameters, in the order of the module's."""
        except (OSError, LookupError, TypeError, ValueError) as error:
            self._stack.close()
            raise CheckpointError(f"{path} is damaged: {error!r}") from None

    def __enter__(self) -> Shares:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, kind: str, name: str, offset: int, length: int) -> torch.Tensor:
        """Flat fp32 values.

        Args:
            kind: ``weights``, ``ema`` (the weights, where no average was kept), ``exp_avg``, ``exp_avg_sq``.
            name: of the parameter.
            offset: into the flattened parameter.
            length: how many.
        """
        values = torch.empty(length)
        found = 0
        if kind == "ema" and not self.has_average:
            kind = "weights"
        for file, places in zip(self._files, self._places, strict=True):
            begin, size, _ = places[name]
            start, stop = max(begin, offset), min(begin + size, offset + length)
            if start < stop:
                part = file.read(f"{kind}/{name}", start - begin, stop - begin)
                values[start - offset : stop - offset] = part
                found += stop - start
        if found != length:
            raise CheckpointError(f"{self._path} holds {found} of {length} numbers of {kind}/{name}")
        return values

    @property
    def has_average(self) -> bool:
        """Whether the run kept a moving average of its weights."""
        return any(f"ema/{name}" in self._files[0] for name in self.shapes)

    def random_state(self, rank: int, key: str) -> torch.Tensor | None:
        """A rank's state of a random number generator, if there was such a rank."""
        if rank >= len(self._files) or key not in self._files[rank]:
            return None
        return self._files[rank].read(key)


def read_weights(path: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole fp32 tensors by name, put together from all ranks' shares one at a time.

    Args:
        path: a committed checkpoint.
        kind: as for :meth:`Shares.read`.
    """
    with Shares(path) as shares:
        for name, shape in shares.shapes.items():
            yield name, shares.read(kind, name, 0, torch.Size(shape).numel()).view(shape)
