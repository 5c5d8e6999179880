"""Tiny bundles with random weights, real servers on real ports, and plain calls to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import numpy as np
import pytest
import torch

from equipot.model.batch import System, SystemBatch, build_graphs, collate
from equipot.model.bundle import member_prefix, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.conformal import Calibration, LevelCalibration, quantiles_of
from equipot.model.domain import Neighborhoods
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.model.uncertainty import DomainFacts, Uncertainty
from equipot.serve.config import ServeConfig
from equipot.serve.metrics import Metrics
from equipot.serve.opening import open_models
from equipot.serve.server import GrpcServer
from equipot.train.uncertainty.domain_fit import DomainFit, with_border
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import (
    PredictionArrays,
    StructureArrays,
    decode_predictions,
    encode_structures,
)
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

if TYPE_CHECKING:
    # In the generated stubs alone: at run time one class serves both.
    from equipot.wire.v1.potential_pb2_grpc import PotentialServiceAsyncStub

ELEMENTS = (1, 6, 8)


def write_tiny(
    path: Path,
    name: str,
    *,
    forces: str = "conservative",
    levels: tuple[str, ...] = ("PBE",),
    poison: int | None = None,
    seed: int = 7,
    more_seeds: Sequence[int] = (),
    uncertain: bool = False,
    width: int = 16,
) -> Path:
    """A bundle of random weights, which the seed decides; with more seeds an ensemble.

    If uncertain, it knows its domain, which is `molecule`'s, and is calibrated by made-up errors.
    """
    config = ModelConfig.from_json(
        {
            **ModelConfig(elements=ELEMENTS, levels_of_theory=levels).to_json(),
            "width": width,
            "layers": 2,
            "radial": 6,
            "cutoff": 4.0,
            "forces": forces,
            "mean_neighbors": 8.0,
        }
    )
    energies = np.arange(1.0, 1.0 + len(levels) * len(ELEMENTS)).reshape(len(levels), -1)
    references = References(energy=-10.0 * energies, scale=np.linspace(1.0, 2.0, len(levels)))
    tensors: dict[str, torch.Tensor] = {}
    for member, its_seed in enumerate((seed, *more_seeds)):
        torch.manual_seed(its_seed)
        potential = Potential(config, references)
        if poison is not None:
            with torch.no_grad():
                potential.embedding.element.weight[ELEMENTS.index(poison)] = 1e38
        tensors |= {member_prefix(member) + key: value for key, value in potential.state_dict().items()}
    members = 1 + len(more_seeds)
    write_bundle(
        path,
        name=name,
        config=config,
        references=references,
        tensors=tensors.items(),
        provenance={"data": "none"},
        metrics={},
        uncertainty=_made_up(config, members) if uncertain else Uncertainty(members),
    )
    return path


def _made_up(config: ModelConfig, members: int) -> Uncertainty:
    def batch(first: int) -> SystemBatch:
        systems = [molecule(seed, 4 + seed % 6) for seed in range(first, first + 200)]
        return collate(build_graphs(systems, config.cutoff), dtype=torch.float64)

    fit = DomainFit(config.elements, config.cutoff)
    fit.add(batch(1000))
    hood = Neighborhoods.of(batch(2000), config.elements)
    rough = fit.finish()
    domain = with_border(rough, rough.scores(hood), hood.element_idx, hood.system_idx, np.arange(200))
    errors = np.random.default_rng(0).random(200)
    spreads = np.zeros(200) if members == 1 else np.full(200, 0.5)
    quantiles = quantiles_of(errors, spreads, np.arange(200))
    return Uncertainty(
        members=members,
        calibration=Calibration(
            "sha256:0", 200, 200, {config.levels_of_theory[0]: LevelCalibration(quantiles, quantiles)}
        ),
        domain=domain,
        facts=DomainFacts("sha256:0", 200, int(domain.seen.sum()), 200, 0.99),
    )


@dataclass(frozen=True)
class Bundles:
    """The bundles that tests serve.

    Attributes:
        tiny: conservative forces, one level of theory.
        direct: direct forces, two levels of theory.
        poisoned: as tiny, but its answers overflow for any structure with oxygen.
    """

    tiny: Path
    direct: Path
    poisoned: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models compute no faster with more, and wait for cores that others use."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    return Bundles(
        tiny=write_tiny(folder / "tiny", "tiny"),
        direct=write_tiny(folder / "direct", "direct", forces="direct", levels=("PBE", "B3LYP")),
        poisoned=write_tiny(
            folder / "poisoned", "poisoned", forces="conservative", levels=("PBE",), poison=8
        ),
    )


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Bundles of one name with other weights."""
    folder = tmp_path_factory.mktemp("three")
    one, two, three = (write_tiny(folder / str(seed), "tiny", seed=seed) for seed in (1, 2, 3))
    return one, two, three


@pytest.fixture
def model(tmp_path: Path, three: tuple[Path, Path, Path]) -> Path:
    """A model's folder in a repository, with versions 1 and 2."""
    folder = tmp_path / "repository" / "tiny"
    for version, bundle in zip(("1", "2"), three, strict=False):
        shutil.copytree(bundle, folder / version)
    return folder


def molecule(seed: int, n_atoms: int = 6, *, elements: Sequence[int] = ELEMENTS) -> System:
    """Atoms on a shaken grid, no two of them close."""
    random = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    return System(
        atomic_numbers=random.choice(np.array(elements), n_atoms),
        positions=1.6 * grid + random.uniform(-0.3, 0.3, (n_atoms, 3)),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, dtype=bool),
    )


def crystal(seed: int, n_atoms: int = 8) -> System:
    """A periodic molecule."""
    system = molecule(seed, n_atoms)
    return System(
        atomic_numbers=system.atomic_numbers,
        positions=system.positions,
        cell=(1.6 * np.ceil(n_atoms ** (1 / 3)) + 0.5) * np.eye(3) + 0.1,
        pbc=np.ones(3, dtype=bool),
    )


def arrays(systems: Sequence[System]) -> StructureArrays:
    return StructureArrays(
        n_atoms=np.array([len(system.positions) for system in systems], dtype=np.int64),
        atomic_numbers=np.concatenate([system.atomic_numbers for system in systems]).astype(np.int32),
        positions=np.concatenate([system.positions for system in systems]).reshape(-1, 3),
        cell=np.stack([system.cell for system in systems]),
        pbc=np.stack([system.pbc for system in systems]),
        charge=np.array([system.charge for system in systems], dtype=np.int32),
        spin_multiplicity=np.array([system.spin_multiplicity for system in systems], dtype=np.int32),
    )


def ask(systems: Sequence[System], *properties: pb.Property.ValueType, **fields: Any) -> pb.PredictRequest:
    structures = encode_structures(arrays(systems)) if systems else pb.Structures()
    return pb.PredictRequest(structures=structures, properties=properties, **fields)


def read(response: pb.PredictResponse, systems: Sequence[System]) -> PredictionArrays:
    return decode_predictions(response, [len(system.positions) for system in systems])


@dataclass
class Process:
    """An `equipot serve` in a process of its own."""

    popen: subprocess.Popen[str]
    lines: list[str]
    stderr: Path

    @property
    def address(self) -> str:
        return self.lines[-1].split(" on ")[1].strip()

    def scrape(self) -> str:
        (url,) = [found[0] for line in self.lines if (found := re.findall(r"https?://\S+/metrics", line))]
        # Whether its certificate is the right one is for tests of certificates.
        with urllib.request.urlopen(url, timeout=10, context=ssl._create_unverified_context()) as reply:
            text = reply.read().decode()
        assert isinstance(text, str)
        return text

    @property
    def page(self) -> str:
        """Where its page is."""
        (url,) = [found[0] for line in self.lines if (found := re.findall(r"https?://\S+/ui/", line))]
        return str(url)

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value, summed over the labels that are not given; 0 if it is not there."""
        total = 0.0
        for line in self.scrape().splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                there = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= there.items():
                    total += float(found[3])
        return total

    def log(self) -> str:
        return self.stderr.read_text()

    def tracebacks(self, begin: int = 0) -> list[str]:
        """Those in the log from this character on, each with the line before it."""
        return re.findall(r"(?:.*\n)?.*Traceback.*\n(?: .*\n)*.*", self.log()[begin:])


def launch(*words: object, stderr: Path) -> subprocess.Popen[str]:
    with stderr.open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "equipot.cli", "serve", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@contextlib.contextmanager
def running(*words: object, stderr: Path, port: int = 0) -> Iterator[Process]:
    """A server, on free ports by default, killed at the end unless it has ended by itself."""
    popen = launch(*words, "--port", port, "--metrics-port", 0, stderr=stderr)
    try:
        assert popen.stdout is not None
        lines = []
        for line in popen.stdout:
            lines.append(line)
            if line.startswith("serving "):
                break
        else:
            pytest.fail(f"the server did not start: {stderr.read_text()}")
        yield Process(popen, lines, stderr)
    finally:
        if popen.poll() is None:
            popen.send_signal(signal.SIGKILL)
        popen.wait(timeout=20)
        if popen.stdout:
            popen.stdout.close()


@pytest.fixture(scope="session")
def server(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests that leave it as it was, computing in float64."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = [bundles.tiny, bundles.direct, "--dtype", "float64", "--threads", 1]
    limits = ["--max-atoms", 200, "--max-edges", 20_000, "--max-request-structures", 300]
    with running(*words, *limits, "--max-request-atoms", 5_000, "--max-message-mb", 1, stderr=log) as process:
        yield process


@pytest.fixture(scope="session")
def jobs_server(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server that keeps jobs."""
    folder = tmp_path_factory.mktemp("jobs")
    words = [bundles.tiny, "--dtype", "float64", "--threads", 1, "--jobs", folder / "jobs"]
    with running(*words, "--max-atoms", 200, stderr=folder / "log") as process:
        yield process


@pytest.fixture
def channel(server: Process) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> PotentialServiceStub:
    return PotentialServiceStub(channel)


@dataclass
class Inside:
    """A server in this process's event loop, and a stub to it."""

    server: GrpcServer
    stub: PotentialServiceAsyncStub
    metrics: Metrics
    address: str

    def value(self, name: str, **labels: str) -> float:
        """A metric's value, summed over the labels that are not given; 0 if it is not there."""
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"equipot_{name}" and labels.items() <= sample.labels.items()
        )

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Returns once the condition holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def inside(config: ServeConfig) -> AsyncIterator[Inside]:
    metrics = Metrics()
    server = GrpcServer(config, metrics)
    port = await server.start()
    opened = None
    try:
        opened = await open_models(config, metrics)
        server.open(opened)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Inside(
                server,
                cast("PotentialServiceAsyncStub", PotentialServiceStub(channel)),
                metrics,
                f"127.0.0.1:{port}",
            )
            await server.drain(20.0)
    finally:
        if opened is not None:
            opened.close()
        await server.stop()


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs an asynchronous test."""
    asyncio.run(asyncio.wait_for(test, 60))
