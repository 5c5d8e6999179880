"""The reference server: a real gRPC server on a real port, analytic, and erring on demand."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from equipot.cli.main import main
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1 import potential_pb2_grpc
from equipot.wire.v1.codec import (
    Failure,
    FailureReason,
    PredictionArrays,
    StructureArrays,
    decode_structures,
    encode_failures,
    encode_predictions,
)

LENNARD_JONES = {"sigma": 3.4, "epsilon": 0.0104, "rc": 8.0, "ro": 6.0, "smooth": True}
UNSUPPORTED = 2
"""Helium: the one element that the reference server does not know."""
CHARGE_SHIFT, SPIN_SHIFT = 1.0, 0.125
"""eV per charge and per unit of multiplicity, so that what was sent shows in the energy."""


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Seen:
    """One Predict as the server saw it."""

    model: str
    n_atoms: list[int]
    properties: list[int]
    level_of_theory: str
    time_left: float


@dataclass
class ReferenceServer(potential_pb2_grpc.PotentialServiceServicer):
    """Its fields may be changed while it serves."""

    port: int
    digest: str = "sha256:" + "ab" * 32
    has_stress: bool = True
    delay: float = 0.0
    limits: pb.Limits = field(
        default_factory=lambda: pb.Limits(
            max_atoms_per_structure=500,
            max_structures_per_request=100,
            max_atoms_per_request=2000,
            max_message_bytes=4 * 2**20,
        )
    )
    faults: list[tuple[grpc.StatusCode, list[Any]]] = field(default_factory=list)
    tamper: Callable[[pb.PredictResponse], None] = lambda response: None
    seen: list[Seen] = field(default_factory=list)
    skip_number: int = 0
    refuse_after: int = 0
    relaxed: list[pb.RelaxRequest] = field(default_factory=list)
    simulated: list[pb.SimulateRequest] = field(default_factory=list)
    interruptions: list[int] = field(default_factory=list)
    fatal: bool = False
    faults_after: list[tuple[grpc.StatusCode, list[Any]]] = field(default_factory=list)
    opened: list[pb.SessionOpen] = field(default_factory=list)
    model_calls: int = 0
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pinned(self) -> str:
        return f"lennard-jones@{self.digest}"

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        potential_pb2_grpc.add_PotentialServiceServicer_to_server(self, self._server)
        checks = health.HealthServicer()
        checks.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checks, self._server)
        assert self._server.add_insecure_port(self.address) == self.port
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def fail(self, code: grpc.StatusCode, *details: Any, times: int = 1) -> None:
        """The next calls of Predict fail so."""
        self.faults += [(code, list(details))] * times

    def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        arrays = decode_structures(request.structures)
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.seen.append(
                Seen(request.model, arrays.n_atoms.tolist(), list(request.properties),
                     request.level_of_theory, context.time_remaining())
            )  # fmt: skip
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.delay)
            if fault is not None:
                abort(context, *fault)
            self._find(request.model, context)
            response = pb.PredictResponse(
                model=pb.ModelReference(
                    name="lennard-jones", digest=self.digest, level_of_theory="LJ", dtype="float64"
                )
            )
            encode_predictions(self._compute(arrays, list(request.properties)), response)
            self.tamper(response)
            return response
        finally:
            with self._lock:
                self._at_once -= 1

    def Session(self, requests: Iterator[pb.SessionRequest], context: Any) -> Iterator[pb.SessionReply]:
        """As the real one, without keeping anything but the structures."""
        opened = next(requests).open
        self.opened.append(opened)
        asked = pb.PredictRequest(
            model=opened.model, structures=opened.structures, level_of_theory=opened.level_of_theory
        )
        for request in requests:
            step = request.step
            asked.structures.positions = step.positions
            if step.cell:
                asked.structures.cell = step.cell
            del asked.properties[:]
            asked.properties.extend(step.properties or opened.properties)
            yield pb.SessionReply(number=step.number + self.skip_number, answer=self.Predict(asked, context))

    def Relax(self, request: pb.RelaxRequest, context: Any) -> Iterator[pb.RelaxReply]:
        """Moves nothing: each structure is answered where it is, the last one first, as ordered."""
        self.relaxed.append(request)
        arrays = decode_structures(request.structures)
        offsets = arrays.offsets
        predicted = self._compute(arrays, [pb.PROPERTY_FORCES])
        failures = {failure.index: failure for failure in encode_failures(predicted.failures)}
        reference = pb.ModelReference(name="lennard-jones", digest=self.digest, level_of_theory="LJ")
        assert predicted.forces is not None
        for index in reversed(range(len(arrays))):
            if self.faults:
                abort(context, *self.faults.pop(0))
            part = slice(offsets[index], offsets[index + 1])
            if request.progress_every:
                yield pb.RelaxReply(progress=pb.RelaxProgress(index=index, step=1, energy=-1.0))
            self._interrupt(1, context)
            result = pb.RelaxResult(
                index=index, converged=True, steps=3, positions=arrays.positions[part].tobytes(),
                cell=arrays.cell[index].tobytes(), energy=predicted.energy[index],
                forces=predicted.forces[part].tobytes(), model=reference,
            )  # fmt: skip
            if index in failures:
                result.failure.CopyFrom(failures[index])
            yield pb.RelaxReply(result=result)
            self.refuse_after -= 1
            if not self.refuse_after:
                abort(context, grpc.StatusCode.INTERNAL, [])
            self.faults += self.faults_after[:1]
            del self.faults_after[:1]

    def Simulate(self, request: pb.SimulateRequest, context: Any) -> Iterator[pb.SimulateReply]:
        """Every atom flies on along x, 0.01 Å a step; a token is the number of its step."""
        self.simulated.append(request)
        arrays = decode_structures(request.structures)
        offsets = arrays.offsets
        reference = pb.ModelReference(name="lennard-jones", digest=self.digest, level_of_theory="LJ")
        yield pb.SimulateReply(begun=pb.MotionBegun(model=reference, warnings=["it flies"]))
        for index in range(len(arrays)):
            first = int(request.tokens[index] or b"-1") if request.tokens else -1
            for step in range(first + 1, request.steps + 1):
                if self.faults:
                    abort(context, *self.faults.pop(0))
                if step == request.steps or (request.frame_every and step % request.frame_every == 0):
                    positions = arrays.positions[offsets[index] : offsets[index + 1]].copy()
                    positions[:, 0] += 0.01 * step
                    yield pb.SimulateReply(
                        frame=pb.MotionFrame(
                            index=index, step=step, positions=positions.tobytes(), energy=-1.0 * step,
                            velocities=np.ones_like(positions).tobytes(), cell=arrays.cell[index].tobytes(),
                            kinetic_energy=0.5, temperature=300.0,
                        )
                    )  # fmt: skip
                if request.observe_every and step % request.observe_every == 0:
                    seen = pb.MotionObservation(
                        index=index, step=step, energy=-1.0 * step, kinetic_energy=0.5, temperature=300.0
                    )
                    yield pb.SimulateReply(observation=seen)
                if request.token_every and step and step % request.token_every == 0:
                    token = pb.MotionToken(index=index, step=step, token=str(step).encode())
                    yield pb.SimulateReply(token=token)
                self._interrupt(step, context)
            result = pb.SimulateResult(index=index, steps=request.steps, model=reference)
            if 2 in arrays.atomic_numbers[offsets[index] : offsets[index + 1]]:
                result.failure.message = "helium flew off"
                result.failure.index = index
            yield pb.SimulateReply(result=result)

    def _interrupt(self, step: int, context: Any) -> None:
        if step in self.interruptions:
            self.interruptions.remove(step)
            abort(context, grpc.StatusCode.INTERNAL if self.fatal else grpc.StatusCode.UNAVAILABLE, [])

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._model()])

    def Explain(self, request: pb.PredictRequest, context: Any) -> pb.ExplainResponse:
        n_atoms = request.structures.n_atoms
        return pb.ExplainResponse(
            n_edges=[2 * count for count in n_atoms],
            total_atoms=sum(n_atoms),
            total_edges=2 * sum(n_atoms),
            n_batches=1,
            memory_bytes=1000 * sum(n_atoms),
            prepare_seconds=0.01,
            queue_seconds=0.25,
            compute_seconds=0.5,
            total_seconds=0.76,
            priority=request.priority,
        )

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        self.model_calls += 1
        self._find(request.model, context)
        return self._model()

    def _find(self, name: str, context: Any) -> None:
        if name not in ("", "lennard-jones", self.pinned):
            abort(context, grpc.StatusCode.NOT_FOUND, [], f"no model {name!r}: this server has {self.pinned}")

    def _model(self) -> pb.Model:
        return pb.Model(
            name="lennard-jones", digest=self.digest, levels_of_theory=["LJ"], elements=[1, 6, 18],
            charges=[-1, 0, 1], cutoff=8.0, force_mode="conservative" if self.has_stress else "direct",
            has_stress=self.has_stress, dtype="float64", n_parameters=2, is_default=True, limits=self.limits,
            card_json='{"sigma": 3.4}',
        )  # fmt: skip

    def _compute(self, arrays: StructureArrays, properties: list[int]) -> PredictionArrays:
        offsets = arrays.offsets
        energy = np.full(len(arrays), np.nan)
        forces = np.full((len(arrays.positions), 3), np.nan)
        stress = np.full((len(arrays), 3, 3), np.nan)
        failures = []
        for i in range(len(arrays)):
            part = slice(offsets[i], offsets[i + 1])
            numbers = arrays.atomic_numbers[part]
            if UNSUPPORTED in numbers:
                failures.append(
                    Failure(i, FailureReason.UNSUPPORTED, "atomic_numbers", "helium (2) is unknown",
                            "leave it out")
                )  # fmt: skip
                continue
            atoms = Atoms(
                numbers, arrays.positions[part], cell=arrays.cell[i], pbc=arrays.pbc[i],
                calculator=LennardJones(**LENNARD_JONES),
            )  # fmt: skip
            shift = CHARGE_SHIFT * arrays.charge[i] + SPIN_SHIFT * arrays.spin_multiplicity[i]
            energy[i] = atoms.get_potential_energy() + shift
            forces[part] = atoms.get_forces()
            if atoms.pbc.all():
                stress[i] = atoms.get_stress(voigt=False)
        return PredictionArrays(
            energy=energy,
            forces=forces if pb.PROPERTY_FORCES in properties else None,
            stress=stress if pb.PROPERTY_STRESS in properties else None,
            failures=tuple(failures),
        )


def abort(context: Any, code: grpc.StatusCode, details: list[Any], message: str = "as ordered") -> None:
    """Ends a call with a rich status."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def retry_info(seconds: float) -> Any:
    detail = error_details_pb2.RetryInfo()
    detail.retry_delay.FromMilliseconds(round(1000 * seconds))
    return detail


def bad_request(name: str) -> Any:
    violation = error_details_pb2.BadRequest.FieldViolation(field=name, description="wrong")
    return error_details_pb2.BadRequest(field_violations=[violation])


@pytest.fixture
def server() -> Iterator[ReferenceServer]:
    server = ReferenceServer(free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def make_retry_info() -> Callable[[float], Any]:
    return retry_info


@pytest.fixture(scope="session")
def make_bad_request() -> Callable[[str], Any]:
    return bad_request


@pytest.fixture(scope="session")
def unused_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def make_local() -> Callable[[], Any]:
    """The reference server's potential as an ordinary ASE calculator."""
    return lambda: LennardJones(**LENNARD_JONES)


@pytest.fixture
def cluster() -> Callable[..., Atoms]:
    return make_cluster


@pytest.fixture
def crystal() -> Atoms:
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    return atoms


def make_cluster(n_atoms: int = 4, seed: int = 0) -> Atoms:
    """Argon atoms on a rattled cubic grid, none too close."""
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n_atoms]
    positions = 3.9 * grid + np.random.default_rng(seed).uniform(-0.2, 0.2, (n_atoms, 3))
    return Atoms(f"Ar{n_atoms}", positions)


@pytest.fixture
def run_equipot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """Runs one `equipot` command in the test's own folder; the interpreter's start is saved."""

    def run(*arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Done(code, written.out, written.err)

    return run
