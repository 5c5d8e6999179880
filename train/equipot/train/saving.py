"""Saves a run while it goes on, commits what is whole, keeps what the policy says, and takes a run up again.

Training waits for a copy of the state into host memory. A thread of each rank then writes its share and
takes its checksum; when all ranks have done so, which they tell each other in a group of their own, rank 0
names the checkpoint by one rename. One save is under way at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from equipot.train.checkpoint import (
    COMMITTED,
    STATE,
    VERSION,
    Checkpoint,
    Parallelism,
    Shares,
    committed_paths,
    share_name,
    step_name,
)
from equipot.train.ema import Ema
from equipot.train.engine import Engine
from equipot.train.moments import MOMENTS
from equipot.train.recipe import CheckpointSection
from equipot.train.state import TrainerState
from equipot.train.tensor_stream import Entry, write_stream
from equipot.train.world import World

_ASIDE = ".partial-"
_REPLACED = ".replaced-"


class Checkpoints:
    """The checkpoints of one run. All methods but :attr:`has_failed` and :meth:`wait` are collective."""

    def __init__(
        self, directory: Path, world: World, settings: CheckpointSection, parallelism: Parallelism
    ) -> None:
        self._directory = directory
        self._world = world
        self._settings = settings
        self._parallelism = parallelism
        # A thread of its own must not talk between what training says.
        self._peers = world.apart() if settings.asynchronous else world
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def tidy(self) -> None:
        """Remove what an interrupted save left behind."""
        if self._world.is_first:
            for prefix in (_ASIDE, _REPLACED):
                for leftover in self._directory.glob(f"{prefix}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        self._world.barrier()

    def may_begin(self, state: TrainerState) -> bool:
        """Whether to save now; false while a save is under way, if that is the policy."""
        if self._settings.when_busy == "wait" or state.is_best or self._thread is None:
            return True
        return not self._world.any(self._thread.is_alive())

    def begin(self, state: TrainerState, engine: Engine, ema: Ema) -> None:
        """Begin to save; returns when training may go on. Every save is to be followed by :meth:`settle`."""
        assert self._thread is None
        assert self._problem is None
        updates = engine.updates
        entries, metadata = _layout(engine, ema, updates, self._world)
        tensors = _contents(engine, ema, updates, self._world)
        if not self._settings.asynchronous:
            self._problem = self._save(state, updates, entries, tensors, metadata)
            return
        copies = [self._copy(entry, tensor) for entry, tensor in zip(entries, tensors, strict=True)]
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

        def work() -> None:
            self._problem = self._save(state, updates, entries, iter(copies), metadata)

        # A daemon: a rank whose peers are gone has to end, too.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows already that the save under way has failed."""
        return self._problem is not None

    def settle(self) -> str | None:
        """Wait for the save under way: None, or why it failed.

        Nothing partial remains then, and earlier checkpoints are untouched.
        """
        self.wait()
        problem, self._problem = self._problem, None
        return problem

    def wait(self) -> None:
        """Wait for this rank's part in the save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def restore(self, checkpoint: Checkpoint, engine: Engine, ema: Ema) -> None:
        """Take up a checkpoint of a run divided in whatever way; at the same division bit for bit."""
        with Shares(checkpoint.path) as shares:
            engine.load(shares.read, updates=checkpoint.updates)
            ema.load(shares.read)
            for key in _generators(self._world):
                state = shares.random_state(self._world.rank, key)
                if state is not None:  # else there was no such rank: its generator is the seed's
                    _set_generator(key, state, self._world)

    def _copy(self, entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
        on_host = self._world.device.type == "cpu"
        if entry.key not in self._buffers:
            self._buffers[entry.key] = torch.empty(entry.length, dtype=entry.dtype, pin_memory=not on_host)
        return self._buffers[entry.key].copy_(tensor, non_blocking=not on_host)

    def _save(
        self,
        state: TrainerState,
        updates: int,
        entries: list[Entry],
        tensors: Iterator[torch.Tensor],
        metadata: dict[str, str],
    ) -> str | None:
        name = step_name(state.step)
        aside = self._directory / f"{_ASIDE}{name}"
        share = share_name(self._world.rank, self._world.size)
        written: dict[str, object] = {}
        problem: str | None = None
        try:
            aside.mkdir(parents=True, exist_ok=True)
            written = write_stream(aside / share, entries, tensors, metadata)
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            problem = f"{error or repr(error)} (rank {self._world.rank})"
        try:
            problem = self._peers.agree(problem)
            shares = self._peers.gather((share, written))
            if problem is None and self._world.is_first:
                problem = self._try_to_commit(state, updates, aside, dict(shares))  # type: ignore[arg-type]
            if problem is not None and self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            problem = self._peers.from_first(problem)
        except RuntimeError as error:  # a peer is gone, and training will notice, too
            problem = f"{error} (rank {self._world.rank})"
        return None if problem is None else f"checkpoint {name} could not be written: {problem}"

    def _try_to_commit(
        self, state: TrainerState, updates: int, aside: Path, files: dict[str, object]
    ) -> str | None:
        try:
            self._commit(state, updates, aside, files)
        except OSError as error:
            return str(error)
        self._prune(state)
        return None

    def _commit(self, state: TrainerState, updates: int, aside: Path, files: dict[str, object]) -> None:
        unseen = [name for name in files if not (aside / name).exists()]
        if unseen:
            raise OSError(
                f"rank 0 does not see {', '.join(unseen)} in {aside}: the run's directory has to lie on a "
                "file system that all machines share"
            )
        body = {"state": asdict(state), "parallelism": asdict(self._parallelism), "updates": updates}
        files[STATE] = _write_text(aside / STATE, body)
        _write_text(aside / COMMITTED, {"version": VERSION, "files": dict(sorted(files.items()))})
        _sync(aside)
        final = self._directory / step_name(state.step)
        replaced = final.with_name(_REPLACED + final.name)
        if final.exists():
            # A damaged checkpoint of the same step, which training has now reached again.
            final.rename(replaced)
        aside.rename(final)
        _sync(self._directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, state: TrainerState) -> None:
        paths = committed_paths(self._directory)
        kept = {path.name for path in paths[: self._settings.keep]} | {step_name(state.best_step)}
        every = self._settings.keep_every_steps
        for path in paths:
            for_ever = every is not None and int(path.name.removeprefix("step-")) % every == 0
            if path.name not in kept and not for_ever:
                shutil.rmtree(path, ignore_errors=True)


def _layout(engine: Engine, ema: Ema, updates: int, world: World) -> tuple[list[Entry], dict[str, str]]:
    kinds = ["weights"]
    if ema.is_kept:
        kinds.append("ema")
    if updates:
        kinds += MOMENTS
    places = list(engine.places())
    entries = [
        Entry(f"{kind}/{place.name}", torch.float32, place.length) for place in places for kind in kinds
    ]
    entries += [Entry(key, torch.uint8, len(state)) for key, state in _generators(world).items()]
    where = {place.name: (place.offset, place.length, place.shape) for place in places}
    return entries, {"places": json.dumps(where)}


def _contents(engine: Engine, ema: Ema, updates: int, world: World) -> Iterator[torch.Tensor]:
    averages = iter(ema.parts)
    for state in engine.states():
        yield state["weights"]
        if ema.is_kept:
            yield next(averages)
        yield from (state[name] for name in MOMENTS if updates)
    yield from _generators(world).values()


def _generators(world: World) -> dict[str, torch.Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _set_generator(key: str, state: torch.Tensor, world: World) -> None:
    if key == "rng/cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, world.device)


def _write_text(path: Path, body: dict[str, object]) -> dict[str, object]:
    data = json.dumps(body, indent=1).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
