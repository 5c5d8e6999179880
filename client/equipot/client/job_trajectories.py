"""A dynamics job's frames into trajectories, each once, however often their reader ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from ase import Atoms
from rich.console import Console

from equipot.client.dynamics import Ended, MotionFrame
from equipot.client.errors import ClientError, describe
from equipot.client.job_files import Slip, follow, same_frame
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.sync import Client
from equipot.client.trajectory_file import TrajectoryFile

SAVE_SECONDS = 2.0
"""Between two times that is kept how much is in the files: what came since is fetched again after a crash."""


def trajectory_paths(out: Path, count: int) -> Sequence[Path]:
    """A file for each of so many structures."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{place}{out.suffix}") for place in range(count)]


def fetch_trajectories(
    client: Client, slip: Slip, target: Path, frames: Sequence[Atoms] | None, *, resume: bool
) -> tuple[JobInfo, list[str]]:
    """Adds the frames that the files lack until the job has ended; returns it and what failed.

    Args:
        client: of the job's server.
        slip: of the job.
        target: the file, or what the names of several are made of.
        frames: that the job was made of, which carry on what the job does not know; None: only what it knows.
        resume: whether to go on with files that are there; else they are written over.

    Raises:
        ClientError: the frames are not those of the job, or it is gone, or not all of it was submitted.
        KeyboardInterrupt: whoever waits has enough; the job goes on.
    """
    info = client.jobs.get(slip.job)
    if info.state == "receiving":
        raise ClientError(f"job {slip.job} is not complete: submit the rest first, by the same with --resume")
    last = [info]
    with ExitStack() as stack:
        keeper = _Keeper(slip, target, trajectory_paths(target, info.n_structures), stack, resume=resume)
        following = follow(
            client,
            slip,
            target,
            keeper.begin(),
            f"in {keeper.paths[0].parent}" if keeper.paths else "nothing",
            last.append,
        )
        stack.callback(keeper.save)
        for result in stack.enter_context(closing(following)):
            frame = _frame_of(result) if frames is None else same_frame(frames, result, slip.job)
            keeper.take(frame, result, info.model.pinned)
    return last[-1], keeper.failures


class _Keeper:
    """The files of one job, and the slip that says how much is in them."""

    def __init__(
        self, slip: Slip, target: Path, paths: Sequence[Path], stack: ExitStack, *, resume: bool
    ) -> None:
        self.paths = paths
        self.failures = list(slip.failures)
        self._slip = slip
        self._target = target
        self._stack = stack
        self._resume = resume
        self._files: dict[int, TrajectoryFile] = {}
        self._after = slip.after
        self._save_at = time.monotonic() + SAVE_SECONDS

    def begin(self) -> int:
        """The number of the last result that need not be fetched."""
        whole = all(self._file(int(place)).reached >= step for place, step in self._slip.steps.items())
        if not (whole and self._resume):
            # Somebody took frames away; those that are there are not written twice.
            self._after = 0
            self.failures.clear()
        return self._after

    def take(self, frame: Atoms, result: JobResult, model: str) -> None:
        """Writes what came of the structure that was this frame."""
        match result.found:
            case MotionFrame() as found:
                file = self._file(result.index)
                if found.step > file.reached:
                    file.write(frame, found, model)
            case Ended(failure=failure) if failure is not None:
                self.failures.append(describe(failure))
        self._after = result.number
        if time.monotonic() >= self._save_at:
            self.save()
            self._save_at = time.monotonic() + SAVE_SECONDS

    def save(self) -> None:
        """Keeps how much is in the files."""
        steps = self._slip.steps | {str(place): file.reached for place, file in self._files.items()}
        Slip(self._slip.job, self._slip.address, self._after, steps, self.failures).write(self._target)

    def _file(self, place: int) -> TrajectoryFile:
        if place not in self._files:
            file = TrajectoryFile(self.paths[place], resume=self._resume)
            self._files[place] = self._stack.enter_context(file)
        return self._files[place]


def say_trajectories(console: Console, info: JobInfo, failures: Sequence[str], target: Path) -> bool:
    """Says what a job came to, and where it is; returns whether all of it went well."""
    lines = [f"failed: {failure}" for failure in failures]
    if info.state != "done":
        lines.append(f"job {info.id} {info.state}{': ' if info.reason else ''}{info.reason}")
    paths = trajectory_paths(target, info.n_structures)
    lines.append(f"{info.n_done - info.n_failed} of {info.n_structures} moved to their end")
    if paths:
        lines.append(f"results: {paths[0]}" if len(paths) == 1 else f"results: {paths[0]} … {paths[-1]}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return info.state == "done" and not failures


def _frame_of(result: JobResult) -> Atoms:
    """What the job knows of a structure beside what moves."""
    return Atoms(numbers=result.atomic_numbers, pbc=result.pbc)
