"""A dynamics job's frames into trajectories, each once, however often their reader ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from ase import Atoms
from rich.console import Console

from equipot.client.dynamics import Observation
from equipot.client.errors import ClientError
from equipot.client.job_files import Slip, follow, same_frame
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.open_files import OpenFiles
from equipot.client.recording import Recording
from equipot.client.relax import Relaxed
from equipot.client.sync import Client

SAVE_SECONDS = 2.0
"""Between two times that is kept how much is in the files: what came since is fetched again after a crash."""


def trajectory_paths(out: Path, count: int) -> Sequence[Path]:
    """A file for each of so many structures."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{place}{out.suffix}") for place in range(count)]


def fetch_trajectories(
    client: Client,
    slip: Slip,
    target: Path,
    frames: Sequence[Atoms] | None,
    *,
    resume: bool,
) -> tuple[JobInfo, Recording]:
    """Adds what the files lack until the job has ended; returns it and the files.

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
        paths = trajectory_paths(target, info.n_structures)
        files = stack.enter_context(OpenFiles())
        recording = Recording(paths, files, timestep=info.timestep, resume=resume)
        keeper = _Keeper(slip, target, recording)
        after = keeper.begin(resume=resume)
        where = f"in {paths[0].parent}" if paths else "nothing"
        following = follow(client, slip, target, after, where, last.append)
        stack.callback(keeper.save)
        kinds: dict[int, Atoms] = {}
        for result in stack.enter_context(closing(following)):
            if frames is not None and not isinstance(result.found, Observation):
                frame = same_frame(frames, result, slip.job)
            elif len(result.atomic_numbers):
                frame = kinds[result.index] = _frame_of(result)
            else:
                frame = kinds.get(result.index) or _frame_of(result)
            keeper.take(frame, result, info.model.pinned)
    return last[-1], recording


class _Keeper:
    """The slip of one job, which says how much is in its files."""

    def __init__(self, slip: Slip, target: Path, recording: Recording) -> None:
        self._slip = slip
        self._target = target
        self._recording = recording
        self._after = slip.after
        self._save_at = time.monotonic() + SAVE_SECONDS

    def begin(self, *, resume: bool) -> int:
        """The number of the last result that need not be fetched."""
        recording = self._recording
        recording.failed |= {int(at): why for at, why in self._slip.failures.items()}
        frames = all(recording.trajectory(int(at)).reached >= step for at, step in self._slip.steps.items())
        rows = all(recording.table(int(at)).reached >= step for at, step in self._slip.rows.items())
        if not (frames and rows and resume):
            # Somebody took frames away; those that are there are not written twice.
            self._after = 0
            recording.failed.clear()
        return self._after

    def take(self, frame: Atoms, result: JobResult, model: str) -> None:
        """Writes what came of the structure that was this frame."""
        if not isinstance(result.found, Relaxed):
            self._recording.take(result.index, frame, result.found, model)
        self._after = result.number
        if time.monotonic() >= self._save_at:
            self.save()
            self._save_at = time.monotonic() + SAVE_SECONDS

    def save(self) -> None:
        """Keeps how much is in the files."""
        recording, slip = self._recording, self._slip
        Slip(
            slip.job,
            slip.address,
            self._after,
            slip.steps | recording.reached(),
            slip.rows | recording.rows(),
            {str(place): why for place, why in recording.failed.items()},
            slip.asked,
        ).write(self._target)


def say_trajectories(console: Console, info: JobInfo, recording: Recording) -> bool:
    """Says what a job came to, and where it is; returns whether all of it went well."""
    lines = [f"failed: {why}" for _, why in sorted(recording.failed.items())]
    if info.state != "done":
        lines.append(f"job {info.id} {info.state}{': ' if info.reason else ''}{info.reason}")
    lines += recording.certainty.lines()
    lines += recording.summaries()
    lines.append(f"{info.n_done - info.n_failed} of {info.n_structures} moved to their end")
    lines += recording.where()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return info.state == "done" and not info.n_failed


def _frame_of(result: JobResult) -> Atoms:
    """What the job knows of a structure beside what moves."""
    return Atoms(numbers=result.atomic_numbers, pbc=result.pbc)
