"""A job's results into a file, in the frames' order and each once, however often their reader ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ase import Atoms
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from equipot.client.cli import Interruption
from equipot.client.errors import ClientError, FileError, JobNotFound
from equipot.client.frames import UnorderedWriter, with_relaxed
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.outcome import Outcome
from equipot.client.sync import Client


@dataclass(frozen=True, slots=True)
class Slip:
    """Which job fills a file; kept beside it until it is full.

    Attributes:
        job: its id.
        address: of its server.
        after: the number of the last result that is in files of trajectories.
        steps: of the last frame there, by the structure's index.
        rows: steps of the last observation there, by the structure's index.
        failures: why structures went no further, by index.
        asked: the words of the command line that submitted it; empty if that is not known.
    """

    job: str
    address: str
    after: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    asked: str = ""

    @staticmethod
    def path(target: Path) -> Path:
        """Where the slip of a file is kept."""
        return target.with_name(target.name + ".job")

    @classmethod
    def read(cls, target: Path) -> Slip | None:
        """The slip of a file; None if there is none.

        Raises:
            FileError: it is not what `write` wrote.
        """
        path = cls.path(target)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise FileError(f"{path} is no slip of a job ({error}): take it away to begin anew") from error

    def write(self, target: Path) -> None:
        """Keeps it beside a file.

        Raises:
            FileError: it cannot be written.
        """
        path = self.path(target)
        beside = path.with_name(path.name + ".new")
        try:
            beside.write_text(json.dumps(asdict(self)), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from error


def fetch(
    client: Client, slip: Slip, target: Path, frames: Sequence[Atoms] | None, writer: UnorderedWriter
) -> tuple[JobInfo, Outcome]:
    """Adds the results that the file lacks until the job has ended.

    Args:
        client: of the job's server.
        slip: of the job.
        target: the file.
        frames: that the job was made of, which carry on what the job does not know; None: only what it knows.
        writer: of the file; what it has kept are the job's first results.

    Raises:
        ClientError: the frames are not those of the job, or it is gone.
        KeyboardInterrupt: whoever waits has enough; the job goes on.
    """
    outcome = Outcome()
    for comment in writer.kept.values():
        outcome.recall(comment)
    last: list[JobInfo] = []
    following = follow(client, slip, target, len(writer.kept), f"in {writer.partial}", last.append)
    with closing(following) as results:
        for result in results:
            frame = _frame_of(result) if frames is None else same_frame(frames, result, slip.job)
            outcome.add(result.index, result.relaxed)
            writer.add(result.index, with_relaxed(frame, result.relaxed))
    return last[-1], outcome


def follow(
    client: Client, slip: Slip, target: Path, after: int, where: str, on_progress: Callable[[JobInfo], None]
) -> Generator[JobResult, None, None]:
    """A job's results behind this number until it has ended, with a bar of how far it is.

    Args:
        client: of the job's server.
        slip: of the job.
        target: what it is for.
        after: the number of the last result that is there.
        where: what was fetched before is, in words.
        on_progress: told how far it is.

    Raises:
        ClientError: it is gone.
        KeyboardInterrupt: whoever waits has enough; the job goes on, and how to come back was said.
    """
    errors = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    with (
        Interruption(errors) as interruption,
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
    ):
        task = bar.add_task("", total=None, eta="")

        def told(info: JobInfo) -> None:
            on_progress(info)
            steps = info.n_steps_asked
            bar.update(
                task,
                description=f"{info.state}: {info.reason}" if info.reason else info.state,
                total=steps or info.n_structures,
                completed=info.n_steps + info.n_steps_moving if steps else info.n_done,
                eta=_eta(info),
            )
            interruption.check()

        try:
            with closing(client.jobs.attach(slip.job, after=after, on_progress=told)) as results:
                for result in results:
                    yield result
                    interruption.check()
        except JobNotFound as error:
            raise JobNotFound(
                f"{error}: it was deleted, or the server forgot it some days after its end. What was fetched"
                f" before is {where}"
            ) from error
        except KeyboardInterrupt:
            again = f"equipot jobs --address {slip.address} attach {slip.job} --out {target} --resume"
            errors.print(
                f"detached: job {slip.job} goes on. To fetch the rest: the same with --resume, or {again}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            raise


def say_end(console: Console, info: JobInfo, outcome: Outcome, n_written: int, target: Path) -> None:
    """Says what a job came to, and where it is."""
    if info.state != "done":
        why = f": {info.reason}" if info.reason else ""
        missing = info.n_structures - n_written
        console.print(
            f"job {info.id} {info.state}{why}; {missing} of its structures have no result",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    outcome.print(console, n_written, target)


def _eta(info: JobInfo) -> str:
    if info.remaining_seconds is None or info.has_ended:
        return f"behind {info.n_ahead} jobs" if info.n_ahead and info.state == "queued" else ""
    minutes, seconds = divmod(round(info.remaining_seconds), 60)
    return f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} more"


def _frame_of(result: JobResult) -> Atoms:
    relaxed = result.relaxed
    return Atoms(result.atomic_numbers, relaxed.positions, cell=relaxed.cell, pbc=result.pbc)


def same_frame(frames: Sequence[Atoms], result: JobResult, job: str) -> Atoms:
    """The frame of a result.

    Raises:
        ClientError: it is another structure.
    """
    numbers = result.atomic_numbers
    if result.index < len(frames):
        frame = frames[result.index]
        # What its sender refused has no atoms there.
        if not len(numbers) or (len(numbers) == len(frame) and (frame.numbers == numbers).all()):
            return frame
    raise ClientError(f"job {job} was not made of these frames: its structure {result.index} is another one")
