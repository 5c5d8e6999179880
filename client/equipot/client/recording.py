"""The files of a run of dynamics: for each structure its trajectory, its observations, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ase import Atoms

from equipot.client.certainty import Tally
from equipot.client.dynamics import Begun, Ended, MotionFrame, Observation, Restart, Resumed, Told
from equipot.client.errors import ClientError, describe
from equipot.client.observation_file import ObservationFile, summary_of
from equipot.client.open_files import OpenFiles
from equipot.client.trajectory_file import TrajectoryFile
from equipot.wire.v1.codec import Failure, FailureReason

MOST_SUMMARIES = 20
"""That are said; the files of observations have them all."""


class Recording:
    """Writes what comes of structures, each into files of its own.

    Args:
        paths: of the trajectories; observations go beside them.
        files: by which they are opened.
        timestep: fs; None if it is not known.
        resume: whether to go on with what is there.

    Attributes:
        certainty: how sure the frames of this run are.
        failed: why structures went no further, by place.
    """

    def __init__(
        self, paths: Sequence[Path], files: OpenFiles, *, timestep: float | None, resume: bool
    ) -> None:
        self.paths = paths
        self.certainty = Tally()
        self.failed: dict[int, str] = {}
        self._files = files
        self._timestep = timestep
        self._resume = resume
        self._trajectories: dict[int, TrajectoryFile] = {}
        self._tables: dict[int, ObservationFile] = {}
        self._n_atoms: dict[int, int] = {}

    def trajectory(self, place: int) -> TrajectoryFile:
        """That of a structure.

        Raises:
            FileError: see `TrajectoryFile`.
        """
        if place not in self._trajectories:
            path = self.paths[place]
            found = self._trajectories[place] = TrajectoryFile(path, self._files, resume=self._resume)
            if found.failure:
                self.failed[place] = found.failure
        return self._trajectories[place]

    def table(self, place: int) -> ObservationFile:
        """The observations of a structure.

        Raises:
            FileError: see `ObservationFile`.
        """
        if place not in self._tables:
            # Without a frame or a token the trajectory begins anew.
            trajectory = self.trajectory(place)
            self._tables[place] = ObservationFile(
                table_path(trajectory.path),
                self._files,
                timestep=self._timestep,
                resume=self._resume and (trajectory.reached >= 0 or bool(trajectory.restart)),
            )
        return self._tables[place]

    def resumed(self, place: int) -> Resumed | None:
        """Where a structure goes on; None if it begins.

        Raises:
            ClientError: nothing says how.
        """
        trajectory = self.trajectory(place)
        if not trajectory.can_go_on:
            raise ClientError(
                f"{trajectory.path} has frames up to step {trajectory.reached} and nothing to go on from:"
                " take it away to begin anew"
            )
        there = table_path(trajectory.path).exists()
        rows = self.table(place).reached if self._resume and there else -1
        reached = Resumed(trajectory.restart, frames=trajectory.reached, observations=rows)
        return None if reached == Resumed(b"") else reached

    def take(self, place: int, frame: Atoms, told: Told, model: str, seed: int | None = None) -> None:
        """Writes what came of the structure that was this frame, unless it is there.

        Raises:
            ClientError: it cannot be written, or does not fit what is there.
        """
        if len(frame):
            self._n_atoms[place] = len(frame)
        match told:
            case Begun():
                # What has a token is held by that to its bundle.
                former = self.trajectory(place).model
                if former and former != told.model.pinned and not self.trajectory(place).restart:
                    raise ClientError(
                        f"{self.paths[place]} was begun by {former}, and {told.model.pinned} answers:"
                        f" give --model {former}, or take it away to begin anew"
                    )
            case MotionFrame():
                if told.step > self.trajectory(place).reached:
                    self.trajectory(place).write(frame, told, model, seed)
                    self.certainty.add(told.uncertainty)
            case Observation():
                if told.step > self.table(place).reached:
                    self.table(place).write(told)
            case Restart():
                self.trajectory(place).keep(told, seed)
            case Ended():
                trajectory = self.trajectory(place)
                if told.failure is not None:
                    failure = replace(told.failure, index=place)
                    self.failed[place] = describe(failure)
                    trajectory.fail(frame, replace(told, failure=failure))
                if told.failure is None or _is_its_own(told, told.failure):
                    trajectory.finish()

    def reached(self) -> dict[str, int]:
        """The last steps of trajectories, by place."""
        return {str(place): one.reached for place, one in self._trajectories.items()}

    def rows(self) -> dict[str, int]:
        """The last steps of observations, by place."""
        return {str(place): one.reached for place, one in self._tables.items()}

    def summaries(self) -> Iterator[str]:
        """What observations come to, for the first of those that were observed now."""
        for place in sorted(self._tables)[:MOST_SUMMARIES]:
            summary = summary_of(self._tables[place].path)
            if summary is not None:
                which = f"structure {place}: " if len(self.paths) > 1 else ""
                yield which + summary.words(self._n_atoms.get(place, 1))
        if len(self._tables) > MOST_SUMMARIES:
            yield f"… and {len(self._tables) - MOST_SUMMARIES} more: see their .csv"

    def to_go_on(self) -> Iterator[str]:
        """Which of those that failed have a token still."""
        kept = [self.trajectory(place).token for place in sorted(self.failed)]
        kept = [token for token in kept if token.exists()]
        if kept:
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            yield f"what failed can go on from {kept[0]}{more}: give --resume once nothing stands in its way"

    def where(self) -> Iterator[str]:
        """Where all of it is."""
        if not self.paths:
            return
        ends = [self.paths[0]] if len(self.paths) == 1 else [self.paths[0], self.paths[-1]]
        yield "results: " + " … ".join(map(str, ends))
        if self._tables:
            yield "observations: " + " … ".join(str(table_path(path)) for path in ends)


def _is_its_own(ended: Ended, failure: Failure) -> bool:
    """Whether a trajectory led to its failure by itself, so that going on would lead there again.

    Else it is a matter of how and of whom it was asked: the token was refused, the model was not there or ran
    out of memory, a limit of the server's was in the way or one that the caller chose.
    """
    by_itself = (FailureReason.UNSTABLE, FailureReason.NOT_FINITE, FailureReason.INVALID_STRUCTURE)
    return ended.model is not None and failure.field != "tokens" and failure.reason in by_itself


def table_path(trajectory: Path) -> Path:
    """Where the observations of a trajectory are."""
    return trajectory.with_name(trajectory.name + ".csv")
