"""Checkpoints that are whole or absent: written aside, checked, then named. Knows no model and no data.

``checkpoints/step-00000120/`` holds DeepSpeed's files (``deepspeed/``), every rank's share of the fp32
weights and of their moving average (``weights-0000k-of-0000n.safetensors``), the trainer's state
(``trainer.json``) and, written last, ``COMMITTED.json`` with size and SHA-256 of each file. Whatever
interrupts a save, no directory of that name exists. Resuming reads DeepSpeed's files with ``torch.load``,
so resume only runs you trust; export reads safetensors alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from equipot.train.errors import TrainError
from equipot.train.state import TrainerState
from equipot.train.world import World

if TYPE_CHECKING:  # export reads checkpoints and needs no DeepSpeed, which takes seconds to import
    from equipot.train.ema import Ema
    from equipot.train.engine import Engine

_COMMITTED = "COMMITTED.json"
_STATE = "trainer.json"
_DEEPSPEED = "deepspeed"
_ASIDE = ".partial-"
_REPLACED = ".replaced-"
_VERSION = 1


class CheckpointError(TrainError):
    """A checkpoint could not be written, found or trusted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """What must be the same for an exact resume."""

    ranks: int
    zero_stage: int
    precision: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    path: Path
    state: TrainerState
    parallelism: Parallelism

    @property
    def name(self) -> str:
        """As ``step-00000120``."""
        return self.path.name


class Checkpoints:
    """The checkpoints of one run; :meth:`save` and :meth:`restore` are collective."""

    def __init__(self, directory: Path, world: World, *, keep: int, parallelism: Parallelism) -> None:
        self._directory = directory
        self._world = world
        self._keep = keep
        self._parallelism = parallelism

    def tidy(self) -> None:
        """Remove what an interrupted save left behind (rank 0)."""
        if self._world.is_first:
            for prefix in (_ASIDE, _REPLACED):
                for leftover in self._directory.glob(f"{prefix}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        self._world.barrier()

    def save(self, state: TrainerState, engine: Engine, ema: Ema) -> Path:
        """Write and commit a checkpoint, then drop those no longer kept.

        Raises:
            CheckpointError: on all ranks alike; nothing partial remains, earlier checkpoints are untouched.
        """
        name = step_name(state.step)
        aside = self._directory / f"{_ASIDE}{name}"
        try:
            self._together(lambda: _make_directories(aside) if self._world.is_first else None)
            self._together(lambda: engine.save(aside / _DEEPSPEED))
            self._together(lambda: self._write_own(aside, state, engine, ema))
            self._commit(aside, self._directory / name)
        except CheckpointError as error:
            if self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            self._world.barrier()
            raise CheckpointError(f"checkpoint {name} could not be written: {error}") from None
        if self._world.is_first:
            self._prune(state)
        return self._directory / name

    def restore(self, checkpoint: Checkpoint, engine: Engine, ema: Ema) -> bool:
        """Take up a checkpoint; exactly if the run is divided as it was, else from its weights alone.

        What was offloaded to files, DeepSpeed does not save: such a run goes on from its weights, too.

        Returns:
            Whether it was exact. If not, the optimizer's moments begin anew.
        """
        if checkpoint.parallelism == self._parallelism and self._can_be_loaded(checkpoint, engine):
            engine.load(checkpoint.path / _DEEPSPEED)
            share = checkpoint.path / _share_name(self._world.rank, self._world.size)
            with safe_open(share, framework="pt") as file:
                ema.load_parts(file.get_tensor(f"ema/{part.name}") for part in engine.fragments())
                torch.set_rng_state(file.get_tensor("rng/cpu"))
            return True
        engine.load_weights(dict(read_weights(checkpoint.path, "weights")))
        ema.load_whole(dict(read_weights(checkpoint.path, "ema")))
        return False

    def _can_be_loaded(self, checkpoint: Checkpoint, engine: Engine) -> bool:
        # A run that kept its optimizer in files wrote nothing for DeepSpeed to read.
        return engine.resumes_exactly and any((checkpoint.path / _DEEPSPEED).iterdir())

    def _together(self, action: Callable[[], object]) -> None:
        problem: str | None = None
        try:
            action()
        except (OSError, SafetensorError) as error:
            problem = f"{error} (rank {self._world.rank})"
        agreed = self._world.agree(problem)
        if agreed is not None:
            raise CheckpointError(agreed)

    def _write_own(self, aside: Path, state: TrainerState, engine: Engine, ema: Ema) -> None:
        tensors = {"rng/cpu": torch.get_rng_state()}
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        for fragment, average in zip(engine.fragments(), ema.parts, strict=True):
            # clone: a fragment is a view, and safetensors refuses tensors that share memory
            tensors[f"weights/{fragment.name}"] = fragment.values.detach().clone().cpu()
            tensors[f"ema/{fragment.name}"] = average.cpu()
            places[fragment.name] = (fragment.offset, fragment.shape)
        share = aside / _share_name(self._world.rank, self._world.size)
        save_file(tensors, share, metadata={"places": json.dumps(places)})
        if self._world.is_first:
            body = {"state": asdict(state), "parallelism": asdict(self._parallelism)}
            (aside / _STATE).write_text(json.dumps(body, indent=1))

    def _commit(self, aside: Path, final: Path) -> None:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        entries: dict[str, dict[str, object]] = {}

        def check_in() -> None:
            for path in files[self._world.rank :: self._world.size]:
                _sync(path)
                entries[str(path.relative_to(aside))] = _fingerprint(path)

        self._together(check_in)
        gathered = self._world.gather(entries)

        def name_it() -> None:
            if not self._world.is_first:
                return
            listed = {
                name: entry for part in gathered if isinstance(part, dict) for name, entry in part.items()
            }
            manifest = aside / _COMMITTED
            manifest.write_text(
                json.dumps({"version": _VERSION, "files": dict(sorted(listed.items()))}, indent=1)
            )
            _sync(manifest)
            _sync(aside)
            if final.exists():
                # A damaged checkpoint of the same step, which training has now reached again.
                final.rename(final.with_name(_REPLACED + final.name))
            aside.rename(final)
            _sync(self._directory)
            shutil.rmtree(final.with_name(_REPLACED + final.name), ignore_errors=True)

        self._together(name_it)

    def _prune(self, state: TrainerState) -> None:
        paths = committed_paths(self._directory)
        kept = {path.name for path in paths[: self._keep]} | {step_name(state.best_step)}
        for path in paths:
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def step_name(step: int) -> str:
    """Directory name of the checkpoint after that many steps."""
    return f"step-{step:08d}"


def committed_paths(directory: Path) -> list[Path]:
    """Directories of committed checkpoints, the newest first; their content is not looked at."""
    return sorted((path for path in directory.glob("step-*") if (path / _COMMITTED).exists()), reverse=True)


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
        manifest = json.loads((path / _COMMITTED).read_text())
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.exists():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            if _fingerprint(file) != entry:
                raise CheckpointError(f"{file} was altered: its SHA-256 is not the recorded one")
        body = json.loads((path / _STATE).read_text())
        return Checkpoint(path, TrainerState(**body["state"]), Parallelism(**body["parallelism"]))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error.filename} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def read_weights(path: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole fp32 tensors by name, put together from all ranks' shares one at a time; nothing is unpickled.

    Args:
        path: a committed checkpoint.
        kind: ``weights`` or ``ema``.
    """
    shares = sorted(path.glob("weights-*-of-*.safetensors"))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(share, framework="pt")) for share in shares]
        places = [json.loads(file.metadata()["places"]) for file in files]
        for name, (_, shape) in places[0].items():
            whole = torch.empty(torch.Size(shape).numel())
            for file, place in zip(files, places, strict=True):
                part = file.get_tensor(f"{kind}/{name}")
                offset = place[name][0]
                whole[offset : offset + part.numel()] = part
            yield name, whole.view(shape)


def _share_name(rank: int, ranks: int) -> str:
    return f"weights-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _make_directories(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / _DEEPSPEED).mkdir(parents=True)


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
