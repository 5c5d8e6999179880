"""Ray Train's one room: ranks as workers of a Ray cluster, started again by Ray when some have died.

The workers of Ray Train are ranks like those of any launcher: each is told its place and runs the same
:func:`equipot.train.worker.work`. Ray watches them and replaces those that die, on other nodes if need be,
and the run goes on from its last checkpoint, which has to lie where all nodes reach it.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, replace
from types import FrameType

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from equipot.train.errors import TrainError
from equipot.train.launch import STOP_SIGNALS, RankFailed, StopSignals, free_port, wait_policy
from equipot.train.run_directory import RunDirectory
from equipot.train.worker import Job, StopRequest, work

_POLL_SECONDS = 0.5


class _Desk:
    """An actor between the command and its workers: who has begun, whether to stop, what mistake was met."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}
        self._stop = False
        self._mistake: tuple[str, int] | None = None

    def begin(self, rank: int) -> tuple[int, bool]:
        """How often a rank has begun before, and whether there is any use in beginning again."""
        count = self._begun.get(rank, 0)
        self._begun[rank] = count + 1
        return count, self._mistake is None

    def ask_to_stop(self) -> None:
        """Let all ranks save and end."""
        self._stop = True

    def is_to_stop(self) -> bool:
        """Whether they are to."""
        return self._stop

    def report(self, message: str, exit_code: int) -> None:
        """Keep what the user has to mend; the first report counts."""
        self._mistake = self._mistake or (message, exit_code)

    def mistake(self) -> tuple[str, int] | None:
        """What was reported."""
        return self._mistake


@dataclass(frozen=True, slots=True)
class _Told:
    """What every worker is told."""

    job: str
    desk: ray.actor.ActorHandle


def launch_on_ray(job: Job, *, ranks: int, restarts: int) -> None:
    """Train with so many workers on the Ray cluster at RAY_ADDRESS, or on one of this machine alone.

    The signals that mean it save and end the run; Ctrl-C after that ends at once.

    Args:
        job: what is trained; its directory must be the same from all nodes.
        ranks: how many workers, each with a GPU if the cluster has as many, or else with a core.
        restarts: how often Ray begins again from the last checkpoint after workers have died.

    Raises:
        RankFailed: workers died too often, or met what the user has to mend.
        TrainError: the cluster has not so many cores.
    """
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=True, include_dashboard=False, logging_level="ERROR")
    try:
        _launch(job, ranks, restarts)
    finally:
        if started_here:
            ray.shutdown()


def _launch(job: Job, ranks: int, restarts: int) -> None:
    resources = ray.cluster_resources()
    on_gpus = resources.get("GPU", 0) >= ranks
    if not on_gpus and resources.get("CPU", 0) < ranks:
        raise TrainError(
            f"--ranks {ranks}, but the Ray cluster has {resources.get('CPU', 0):g} cores; add nodes, or "
            "lower --ranks"
        )
    job = replace(job, out=job.out.resolve())
    desk = ray.remote(_Desk).options(num_cpus=0, max_concurrency=8).remote()
    trainer = DataParallelTrainer(
        _be_a_rank,
        train_loop_config={"told": _Told(job.to_json(), desk)},
        scaling_config=ray.train.ScalingConfig(num_workers=ranks, use_gpu=on_gpus),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(RunDirectory(job.out).logs),
            failure_config=ray.train.FailureConfig(max_failures=restarts),
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": wait_policy()}},
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failure.append(error)

    # In a thread, as Ray would take Ctrl-C to itself in the main one, and end without saving.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with _Signals(desk):
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
    mistake = ray.get(desk.mistake.remote())
    if mistake is not None:
        raise RankFailed(*mistake)
    if failure:
        raise RankFailed(
            f"Ray gave up after {restarts} restart(s): {failure[0]}; --resume continues the run", 1
        )


class _Signals:
    """Passes requests to stop on to the workers; use as a context manager, in the main thread."""

    def __init__(self, desk: ray.actor.ActorHandle) -> None:
        self._desk = desk
        self._repeated = StopSignals()

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeated.means_now(number):
            raise KeyboardInterrupt
        self._desk.ask_to_stop.remote()


def _be_a_rank(config: dict[str, _Told]) -> None:
    told = config["told"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    begun, useful = ray.get(told.desk.begin.remote(rank))
    address = (ray.util.get_node_ip_address(), free_port()) if rank == 0 else None
    host, port = broadcast_from_rank_zero(address)
    if not broadcast_from_rank_zero(useful):
        return
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    job = Job.from_json(told.job)
    stop, over = StopRequest(), threading.Event()

    def listen() -> None:
        while not over.wait(_POLL_SECONDS):
            stop.requested = stop.requested or ray.get(told.desk.is_to_stop.remote())

    threading.Thread(target=listen, name="stop", daemon=True).start()
    try:
        work(replace(job, resume=job.resume or begun > 0), stop)
    except Exception as error:
        # What the user has to mend is not to be tried again; whatever else it is, Ray is to see it.
        if getattr(error, "exit_code", None) != TrainError.exit_code:
            raise
        ray.get(told.desk.report.remote(str(error), TrainError.exit_code))
    finally:
        over.set()
