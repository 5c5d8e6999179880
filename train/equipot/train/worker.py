"""One rank's process: signals, the launcher's death, and how a failure is told. Training is the trainer's.

Run as ``python -m equipot.train.worker`` by the launcher; other launchers (torchrun, deepspeed) reach
:func:`work` through ``equipot train``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from equipot.train.errors import TrainError
from equipot.train.launch import (
    PEER_SECONDS,
    STOP_SIGNALS,
    Failure,
    Stop,
    StopSignals,
    choose_interface,
    free_port,
    in_a_launched_rank,
    rank_environment,
    wait_policy,
)
from equipot.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every rank of a run is told."""

    recipe: Recipe
    out: Path
    resume: bool
    peer_timeout: float = PEER_SECONDS
    """Seconds of silence after which a rank of another machine is lost."""

    def to_json(self) -> str:
        """As one command-line argument."""
        return json.dumps(
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "out": str(self.out),
                "resume": self.resume,
                "peer_timeout": self.peer_timeout,
            }
        )

    @staticmethod
    def from_json(text: str) -> Job:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        return Job(
            recipe=Recipe.model_validate(values["recipe"]),
            out=Path(values["out"]),
            resume=values["resume"],
            peer_timeout=values["peer_timeout"],
        )


class StopRequest:
    """Whether somebody asked this process to save and end; set by the signals that mean it."""

    def __init__(self) -> None:
        self.requested = False
        self._signals = StopSignals()

    def listen(self) -> None:
        """Take the place of the default handlers; a further Ctrl-C interrupts at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signals.means_now(number):
            raise KeyboardInterrupt
        self.requested = True


def work(job: Job, stop: Stop) -> None:
    """Be one rank of the run; alone in the world if no launcher made this process a rank."""
    before = dict(os.environ)
    if in_a_launched_rank():
        choose_interface()
    else:
        os.environ.update(rank_environment(0, 1, free_port()))
    os.environ["OMP_WAIT_POLICY"] = wait_policy()  # read by OpenMP when torch is imported
    try:
        from equipot.train.trainer import train  # torch and deepspeed: seconds, and only where needed

        train(job.recipe, job.out, resume=job.resume, stop=stop, peer_timeout=job.peer_timeout)
    finally:
        # a process that goes on must not look like a rank to what it starts
        for name in set(os.environ) - set(before):
            del os.environ[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry of a rank that our own launcher started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--failure-file", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    stop = StopRequest()
    stop.listen()
    end_with_parent(options.parent)
    try:
        work(Job.from_json(options.job), stop)
    except TrainError as error:
        Failure(time=time.time(), message=str(error), exit_code=error.exit_code).write(options.failure_file)
        return error.exit_code
    except Exception as error:
        code = getattr(error, "exit_code", None)
        message = str(error) if isinstance(code, int) else f"{error}\n{traceback.format_exc()}"
        exit_code = code if isinstance(code, int) else 1
        Failure(time=time.time(), message=message, exit_code=exit_code).write(options.failure_file)
        return exit_code
    return 0


def end_with_parent(parent: int) -> None:
    """End this process once `parent` is no longer its parent, so that no rank outlives a killed launcher."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)  # the main thread may be waiting for a peer that is gone

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
