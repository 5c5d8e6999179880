"""The server as a Ray Serve application, on a real Ray with HAProxy: answers, statuses, changing replicas."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from equipot.client import Client
from equipot.serve.config import ServeConfig
from equipot.serve.free import free_port
from equipot.serve.ray_app import local
from equipot.serve.ray_app.settings import RaySettings, split
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, Process, ask, crystal, launch, molecule, running, write_tiny
from .test_sessions import moved, opening, refused, stepping

SYSTEMS = [molecule(1), crystal(2), molecule(3, 9), crystal(4, 12)]
LIMITS = {
    "structure_atoms": 200,
    "structure_edges": 20_000,
    "request_structures": 300,
    "request_atoms": 5_000,
    "message_bytes": 2**20,
}


class Cluster:
    """A Ray of our own whose port serves whatever was deployed last."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def deploy(self, *bundles: Path, ray: Mapping[str, object] | None = None, **config: object) -> None:
        """Returns when calls are answered by it."""
        from ray import serve

        from equipot.serve.ray_app import build

        mapping = {"bundles": [str(path) for path in bundles], "metrics_port": False, "threads": 1, **config}
        # Each takes a tenth of a core for Ray's part, so that several find room on a small machine.
        serve.run(build({**mapping, "ray": {"cpus": 0.1, **(ray or {})}}), name="equipot")

    def replicas(self) -> list[psutil.Process]:
        """The processes that serve."""
        mine = psutil.Process().children(recursive=True)
        return [child for child in mine if "ServeReplica" in "".join(child.cmdline()[:1])]

    def running(self) -> int:
        from ray import serve

        (deployment,) = serve.status().applications["equipot"].deployments.values()
        return int(deployment.replica_states.get("RUNNING", 0))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from ray import serve

    before = dict(os.environ)
    port = free_port()
    os.environ["OMP_NUM_THREADS"] = "1"
    config = ServeConfig(bundles=(Path("none"),), limits=ServeConfig(bundles=(Path("none"),)).limits)
    try:
        with local.ray_cluster(config, RaySettings(replicas=4), print):
            local.start_serve("127.0.0.1", port)
            yield Cluster(port)
            serve.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def like_standalone(cluster: Cluster, bundles: Bundles) -> Cluster:
    """Deployed as the fixture `server` is launched."""
    cluster.deploy(bundles.tiny, bundles.direct, dtype="float64", limits=LIMITS)
    return cluster


@contextlib.contextmanager
def stub(address: str) -> Iterator[PotentialServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield PotentialServiceStub(channel)


def eventually(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestAsStandalone:
    @pytest.mark.parametrize("model", ["tiny", "direct"])
    def test_answers_are_the_same_to_the_last_bit(
        self, server: Process, like_standalone: Cluster, model: str
    ) -> None:
        wanted = [pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES, *[pb.PROPERTY_STRESS] * (model == "tiny")]
        request = ask(SYSTEMS, *wanted, model=model, level_of_theory="PBE")
        answers = []
        for address in (server.address, like_standalone.address):
            with stub(address) as service:
                answers.append(service.Predict(request, timeout=60))
        here, there = answers
        assert there.energy == here.energy
        assert there.forces == here.forces
        assert there.stress == here.stress
        assert there.model == here.model

    def test_models_are_described_alike(self, server: Process, like_standalone: Cluster) -> None:
        with stub(server.address) as here, stub(like_standalone.address) as there:
            assert there.ListModels(pb.ListModelsRequest()) == here.ListModels(pb.ListModelsRequest())
            named = pb.GetModelRequest(model="direct")
            assert there.GetModel(named) == here.GetModel(named)
            estimate = there.Explain(ask(SYSTEMS, model="tiny"), timeout=20)
            assert list(estimate.n_edges) == list(here.Explain(ask(SYSTEMS, model="tiny")).n_edges)

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\xff\xff\xff",
            b"",
            ask(SYSTEMS, model="none").SerializeToString(),
            ask(SYSTEMS, model="tiny@sha256:xyz").SerializeToString(),
            ask(SYSTEMS, model="direct").SerializeToString(),
            ask(SYSTEMS, model="direct", level_of_theory="HF").SerializeToString(),
            ask(SYSTEMS, pb.PROPERTY_STRESS, model="direct", level_of_theory="PBE").SerializeToString(),
            pb.PredictRequest(structures=pb.Structures(n_atoms=[1], positions=b"x")).SerializeToString(),
            ask([molecule(1, 2)] * 301).SerializeToString(),
            ask([molecule(1, 100)] * 60).SerializeToString(),
        ],
        ids=lambda raw: f"{len(raw)}-bytes",
    )
    def test_refusals_are_alike_to_the_last_detail(
        self, server: Process, like_standalone: Cluster, request_bytes: bytes
    ) -> None:
        here, there = (
            refusal(address, "/equipot.wire.v1.PotentialService/Predict", request_bytes)
            for address in (server.address, like_standalone.address)
        )
        assert there == here

    @pytest.mark.parametrize("method", ["/equipot.wire.v1.PotentialService/Nothing", "/no.Such/Service"])
    def test_methods_that_are_none(self, server: Process, like_standalone: Cluster, method: str) -> None:
        assert refusal(like_standalone.address, method, b"")[0] is grpc.StatusCode.UNIMPLEMENTED

    def test_a_bad_structure_is_answered_alone(self, server: Process, like_standalone: Cluster) -> None:
        systems = [molecule(1), molecule(2, elements=(79,)), molecule(3, 201)]
        failures = []
        for address in (server.address, like_standalone.address):
            with stub(address) as service:
                failures.append(list(service.Predict(ask(systems, model="tiny"), timeout=20).failures))
        assert failures[0] == failures[1]
        assert [failure.index for failure in failures[1]] == [1, 2]

    def test_a_message_over_the_limit(self, like_standalone: Cluster) -> None:
        code = refusal(
            like_standalone.address, "/equipot.wire.v1.PotentialService/Predict", bytes(2**20 + 1000)
        )[0]
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_health_and_the_inference_protocol(self, like_standalone: Cluster) -> None:
        from equipot.wire.inference import open_inference_pb2 as oip
        from equipot.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

        with grpc.insecure_channel(like_standalone.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            for service in ("", "equipot.wire.v1.PotentialService", "equipot.readiness"):
                reply = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            assert GRPCInferenceServiceStub(channel).ServerReady(oip.ServerReadyRequest(), timeout=10).ready

    def test_sessions_step_and_are_refused_alike(self, server: Process, like_standalone: Cluster) -> None:
        said = []
        for address in (server.address, like_standalone.address):
            with stub(address) as service:
                steps = [stepping(moved(SYSTEMS, seed, 0.05), seed) for seed in (1, 2)]
                replies = list(service.Session(iter([opening(SYSTEMS), *steps]), timeout=60))
                said.append(
                    ([(reply.number, reply.answer.energy) for reply in replies], refused(service, steps[0]))
                )
        assert said[0] == said[1]
        assert [number for number, _ in said[1][0]] == [1, 2]

    def test_deadlines_and_cancelled_calls_reach_the_queue(self, like_standalone: Cluster) -> None:
        long = ask([molecule(seed, 60) for seed in range(80)], model="tiny")
        with stub(like_standalone.address) as service:
            with pytest.raises(grpc.RpcError) as caught:
                service.Predict(long, timeout=0.05)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() in (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,  # refused at the door: it could not be met
            )
            pending = [service.Predict.future(long, timeout=120) for _ in range(20)]
            eventually(lambda: service.Explain(ask(SYSTEMS[:1], model="tiny")).queue_seconds > 0, 20)
            for call in pending:
                call.cancel()
            eventually(lambda: service.Explain(ask(SYSTEMS[:1], model="tiny")).queue_seconds == 0, 5)


Refusal = tuple[grpc.StatusCode, str, list[Any]]


def refusal(address: str, method: str, raw: bytes) -> Refusal:
    """How a call is refused: code, message and details, but for the id of the call."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
        with pytest.raises(grpc.RpcError) as caught:
            call(raw, timeout=30)
    error = caught.value
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    details = [] if status is None else list(status.details)
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    told = []
    for detail in details:
        for kind in kinds:
            if detail.Is(kind.DESCRIPTOR):
                told.append(kind.FromString(detail.value))
    return error.code(), error.details() or "", told


class Load:
    """Clients that ask one thing after the other, and note every answer and every failure."""

    def __init__(self, address: str, n_clients: int, n_structures: int = 1) -> None:
        self.digests: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._systems = [molecule(seed, 12, elements=(1, 6)) for seed in range(n_structures)]
        self._threads = [threading.Thread(target=self._run, args=(address,)) for _ in range(n_clients)]

    def _run(self, address: str) -> None:
        from ase import Atoms

        atoms = [Atoms(system.atomic_numbers, positions=system.positions) for system in self._systems]
        with Client(address, timeout=120) as client:
            while not self._stop.is_set():
                try:
                    answer = client.predict(atoms, model="tiny")
                    assert np.isfinite(answer.energy).all()
                    assert answer.model is not None
                    self.digests[answer.model.digest] += 1
                except BaseException as error:
                    self.failures.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestReplicas:
    def test_another_bundle_takes_over_and_no_call_fails(
        self, cluster: Cluster, bundles: Bundles, tmp_path: Path
    ) -> None:
        cluster.deploy(bundles.tiny, ray={"replicas": 2})
        after = write_tiny(tmp_path / "other", "tiny", forces="conservative", levels=("PBE",), poison=8)
        with Load(cluster.address, 4) as load:
            eventually(lambda: load.digests.total() > 50, 60)
            (before,) = load.digests
            cluster.deploy(after, ray={"replicas": 2})
            eventually(lambda: len(load.digests) == 2, 60)
            # Those who answered before are leaving meanwhile.
            eventually(lambda: len(cluster.replicas()) == 2, 90)
            seen = load.digests[before]
            time.sleep(3.0)
            assert load.digests[before] == seen
        assert load.failures == []

    def test_a_killed_replica_costs_no_call(self, cluster: Cluster, bundles: Bundles) -> None:
        cluster.deploy(bundles.tiny, ray={"replicas": 2})
        eventually(lambda: len(cluster.replicas()) == 2, 90)
        with Load(cluster.address, 4) as load:
            eventually(lambda: load.digests.total() > 50, 60)
            victim = cluster.replicas()[0]
            victim.send_signal(signal.SIGKILL)
            now = load.digests.total()
            eventually(lambda: load.digests.total() > now + 200, 60)
            eventually(lambda: len(cluster.replicas()) == 2 and victim not in cluster.replicas(), 90)
        assert load.failures == []

    def test_work_makes_replicas_and_idleness_takes_them_away(
        self, cluster: Cluster, bundles: Bundles
    ) -> None:
        cluster.deploy(
            bundles.tiny,
            ray={"max_replicas": 2, "open_edges": 2_000, "upscale_seconds": 1, "downscale_seconds": 3},
        )
        eventually(lambda: cluster.running() == 1, 90)
        with Load(cluster.address, 6, n_structures=100) as load:
            eventually(lambda: cluster.running() == 2, 90)
        assert load.failures == []
        eventually(lambda: cluster.running() == 1, 90)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_replica_may_be_several_ranks_that_ray_knows_of(
        self, cluster: Cluster, bundles: Bundles, server: Process, tmp_path: Path, workers: int
    ) -> None:
        import ray

        elsewhere: dict[str, Any] = {}
        if workers:
            (tmp_path / "key").write_text("a key of some length that nobody guesses")
            elsewhere = {"worker_hosts": workers, "worker_key": str(tmp_path / "key")}
        cluster.deploy(bundles.tiny, dtype="float64", tensor_parallel=2, **elsewhere)
        request = ask(SYSTEMS, model="tiny")
        with stub(server.address) as here, stub(cluster.address) as there:
            one, two = here.Predict(request, timeout=60), there.Predict(request, timeout=60)
        assert two.model.tensor_parallel == 2
        energies = [np.frombuffer(answer.energy) for answer in (one, two)]
        np.testing.assert_allclose(energies[1], energies[0], rtol=1e-10)
        # One for the replica; the one that it took the place of may be leaving still.
        groups = ray.util.placement_group_table().values()
        made = [group for group in groups if group["state"] == "CREATED"]
        group = next(group for group in made if len(group["bundles"]) == 1 + workers)
        assert sum(bundle["CPU"] for bundle in group["bundles"].values()) == pytest.approx(0.2)

    def test_tokens_are_asked_for(self, cluster: Cluster, bundles: Bundles, tmp_path: Path) -> None:
        (tmp_path / "tokens").write_text("alice: secret-secret-secret-secret\n")
        cluster.deploy(bundles.tiny, tokens=str(tmp_path / "tokens"))
        method = "/equipot.wire.v1.PotentialService/ListModels"
        assert refusal(cluster.address, method, b"")[0] is grpc.StatusCode.UNAUTHENTICATED
        with stub(cluster.address) as service:
            shown = (("authorization", "Bearer secret-secret-secret-secret"),)
            assert service.ListModels(pb.ListModelsRequest(), metadata=shown, timeout=10).models


def test_the_recipe_for_a_cluster_is_understood() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with Ray")
    recipe = yaml.safe_load((Path(__file__).parents[2] / "serve" / "recipes" / "ray.yaml").read_text())
    (application,) = recipe["applications"]
    config, settings = split(application["args"], base=Path("/"))
    assert config.bundles == (Path("/models/alcohols"),)
    assert settings.max_replicas == 8


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands do not inherit what the cluster of this file was started with: its ports are taken."""
    for name in local.environment(tmp_path, ServeConfig(bundles=(Path("none"),))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestCommandLine:
    @pytest.mark.usefixtures("afresh")
    def test_it_starts_answers_and_lets_accepted_calls_finish(self, bundles: Bundles, tmp_path: Path) -> None:
        # Longer than Ray waits by itself.
        calculator = Path(__file__).parent / "odd_calculators.py"
        said = f'calculator = "{calculator}:Slow"\ntime_limit = 100\n[arguments]\nseconds = 70\n'
        (tmp_path / "slow.toml").write_text(said)
        words = [bundles.tiny, "--ray", "--calculator", tmp_path / "slow.toml", "--drain-seconds", 100]
        with running(*words, stderr=tmp_path / "log", port=free_port()) as process:
            (folder,) = [Path(line.split()[-1]) for line in process.lines if line.startswith("starting Ray")]
            started = psutil.Process(process.popen.pid).children(recursive=True)
            with stub(process.address) as service:
                request = ask([molecule(1)], model="slow")
                request.properties[:] = [pb.PROPERTY_ENERGY]
                pending = service.Predict.future(request, timeout=120)
                time.sleep(2.0)
                assert not pending.done()
                process.popen.send_signal(signal.SIGTERM)
                assert np.frombuffer(pending.result(timeout=120).energy) == [1.0]
            assert process.popen.wait(timeout=90) == 0
        eventually(lambda: not any(child.is_running() for child in started), 20)
        assert not folder.exists()

    @pytest.mark.usefixtures("afresh")
    def test_a_bundle_that_is_none_is_named(self, tmp_path: Path) -> None:
        process = launch(tmp_path / "none", "--ray", "--port", free_port(), stderr=tmp_path / "log")
        assert process.wait(timeout=240) == 2
        assert process.stdout is not None
        process.stdout.close()
        assert f"{tmp_path / 'none'}" in (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()

    def test_several_share_a_ray_and_who_leaves_takes_along_no_other(
        self, cluster: Cluster, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        for name in ("one", "two"):
            (tmp_path / name).write_text(f'[ray]\nname = "{name}"\ncpus = 0.1\n')
        port = free_port()
        with running(
            bundles.tiny, "--ray", "--config", tmp_path / "one", stderr=tmp_path / "1", port=port
        ) as first:
            other = [bundles.direct, "--ray", "--config", tmp_path / "two"]
            wrong = launch(*other, "--port", free_port(), stderr=tmp_path / "wrong")
            assert wrong.wait(timeout=100) == 2
            assert wrong.stdout is not None
            wrong.stdout.close()
            assert f"choose --port {port}" in (tmp_path / "wrong").read_text()
            with running(*other, stderr=tmp_path / "2", port=port) as second:
                assert "serving direct" in second.lines[-1]
                first.popen.send_signal(signal.SIGTERM)
                assert first.popen.wait(timeout=90) == 0
                with stub(second.address) as service:
                    ours = (("application", "two"),)
                    (model,) = service.ListModels(pb.ListModelsRequest(), metadata=ours, timeout=10).models
                assert model.name == "direct"
                second.popen.send_signal(signal.SIGTERM)
                assert second.popen.wait(timeout=90) == 0

    def test_who_was_replaced_leaves_the_application_to_the_other(
        self, cluster: Cluster, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        (tmp_path / "both").write_text("[ray]\ncpus = 0.1\n")
        words, port = ["--ray", "--config", tmp_path / "both"], free_port()
        with (
            running(bundles.tiny, *words, stderr=tmp_path / "1", port=port) as first,
            running(bundles.direct, *words, stderr=tmp_path / "2", port=port) as second,
        ):
            assert any("replacing the application equipot" in line for line in second.lines)
            assert "serving direct" in second.lines[-1]
            first.popen.send_signal(signal.SIGTERM)
            assert first.popen.wait(timeout=90) == 0
            with stub(second.address) as service:
                (model,) = service.ListModels(pb.ListModelsRequest(), timeout=10).models
            assert model.name == "direct"
            second.popen.send_signal(signal.SIGTERM)
            assert second.popen.wait(timeout=90) == 0
            assert "equipot" not in serve.status().applications
