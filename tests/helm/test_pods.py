"""Real pods from the rendered manifests: spread, scaled under load, drained, nothing writable.

podman is no cluster: it runs one pod from a manifest at a time and publishes declared ports on the host, so
ports are left out; probes and preStop hooks are not run. What stands in for the controller is in here.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.model.bundle import write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References

from .conftest import CHART, Helm, Object, load, one
from .podman import CONFIG, Podman, pod_of, until

pytestmark = [pytest.mark.pods, pytest.mark.timeout(5400)]

NAME = "equipot-test"
USER = 1_234_567
CALLERS = 4
AGE = 10
"""Seconds a connection lives; the least that the server allows, so that clients soon find new pods."""


def write_tiny(path: Path) -> None:
    config = ModelConfig.from_json(
        {
            **ModelConfig(elements=(1, 6, 8), levels_of_theory=("PBE",)).to_json(),
            "width": 16,
            "layers": 2,
            "radial": 6,
            "cutoff": 4.0,
            "mean_neighbors": 8.0,
        }
    )
    references = References(energy=-10.0 * np.arange(1.0, 4.0).reshape(1, 3), scale=np.ones(1))
    torch.manual_seed(7)
    tensors = Potential(config, references).state_dict().items()
    write_bundle(
        path, name="tiny", config=config, references=references, tensors=tensors, provenance={}, metrics={}
    )


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    if os.geteuid() != 0:
        pytest.skip("networks of pods with addresses that this process reaches need root")
    config = tmp_path_factory.mktemp("podman") / "containers.conf"
    config.write_text(CONFIG)
    podman = Podman(config)
    done = subprocess.run(["podman", "info"], capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        pytest.skip(f"podman does not run here: {done.stderr.strip()[-300:]}")
    return podman


@pytest.fixture(scope="session")
def image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    return podman.build("serve/Containerfile", "equipot-serve", tmp_path_factory.mktemp("base"))


@dataclass
class Cluster:
    """Replicas of one Deployment on one network, under one name."""

    podman: Podman
    image: str
    workload: Object
    pods: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"dns:///{NAME}:50051"

    def start(self, name: str, *, wait: bool = True) -> None:
        pod = copy.deepcopy(pod_of(self.workload, name))
        for container in pod["spec"]["containers"]:
            del container["ports"]
            for mount in container["volumeMounts"]:
                if mount["name"] != "models":
                    mount["name"] = f"{name}-{mount['name']}"
        # podman would have pods share emptyDirs of one name.
        for volume in pod["spec"]["volumes"]:
            if "emptyDir" in volume:
                volume["name"] = f"{name}-{volume['name']}"
        self.podman.play(pod, NAME, NAME)
        self.pods[name] = self.podman.address(name)
        if wait:
            until(lambda: self.ready(name), f"{name} is ready", 300)

    def ready(self, name: str) -> bool:
        """As kubelet would ask."""
        words = ("exec", f"{name}-server", "equipot", "probe", "127.0.0.1:50051")
        return "is serving" in self.podman(*words, check=False)

    def stop(self, name: str) -> float:
        """As kubelet would: SIGTERM, and after the grace SIGKILL. Returns the seconds it took."""
        grace = self.workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        begun = time.monotonic()
        self.podman("stop", "--time", str(grace), f"{name}-server", timeout=grace + 60)
        took = time.monotonic() - begun
        assert self.podman("inspect", f"{name}-server", "--format", "{{.State.ExitCode}}") == "0"
        self.podman("pod", "rm", "--force", name)
        del self.pods[name]
        return took

    def counted(self, name: str) -> float:
        """Requests that a pod has answered."""
        with urllib.request.urlopen(f"http://{self.pods[name]}:9090/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        wanted = [line for line in lines if line.startswith("equipot_requests_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in wanted if 'outcome="ok"' in line)

    def run(self, *words: str, timeout: float = 120) -> str:
        """Runs `equipot` in a pod on the network."""
        return self.podman("run", "--rm", "--network", NAME, self.image, *words, timeout=timeout)


@pytest.fixture(scope="module")
def cluster(
    podman: Podman, image: str, helm: Helm, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    repository, tag = image.rsplit(":", 1)
    values = {
        "models": [{"name": "tiny", "path": "tiny"}],
        "storage": {"kind": "existingClaim", "existingClaim": NAME},
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "containerSecurityContext": {"runAsUser": USER, "runAsGroup": 0},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
        "server": {"threads": 1, "maxConnectionAge": AGE},
        # A busy machine may take minutes for what is tens of seconds of work.
        "termination": {"drainSeconds": 300},
        # Without a compiler pods start in seconds; the kernels have tests of their own.
        "extraEnv": [{"name": "CXX", "value": "none"}],
    }
    done = helm("helm3", "template", "lab", str(CHART), values=values)
    assert done.code == 0, done.err
    tidy(podman)
    podman("network", "create", NAME)
    podman("volume", "create", NAME)
    volume = Path(podman("volume", "inspect", NAME, "--format", "{{.Mountpoint}}"))
    write_tiny(volume / "tiny")
    subprocess.run(["chmod", "-R", "a+rX", str(volume)], check=True)
    try:
        cluster = Cluster(podman, image, one(load(done.out), "Deployment"))
        cluster.start("replica-1")
        cluster.start("replica-2")
        yield cluster
    finally:
        tidy(podman)


def tidy(podman: Podman) -> None:
    for name in (f"replica-{number}" for number in range(1, 4)):
        podman("pod", "rm", "--force", name, check=False)
    podman("rm", "--force", f"{NAME}-load", check=False)
    podman("volume", "rm", "--force", NAME, check=False)
    podman("network", "rm", "--force", NAME, check=False)


@pytest.fixture
def load_on(cluster: Cluster) -> Iterator[Callable[[], Object]]:
    """Calls from another pod; the function ends them and says how they went."""
    script = Path(__file__).with_name("pods_load.py")
    name = f"{NAME}-load"
    words = ["--volume", f"{script}:/load.py:ro", "--entrypoint", "/opt/equipot/bin/python", cluster.image]
    podman = cluster.podman
    podman(
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        NAME,
        *words,
        "/load.py",
        cluster.address,
        str(CALLERS),
    )
    until(lambda: "calling" in podman("logs", name), "the load runs")

    def end() -> Object:
        podman("stop", "--time", "60", name)
        report: Object = json.loads(podman("logs", name).splitlines()[-1])
        return report

    yield end
    podman("rm", "--force", name, check=False)


def shares(cluster: Cluster, seconds: float) -> dict[str, float]:
    """What part of the calls of some seconds each pod answers."""
    before = {name: cluster.counted(name) for name in cluster.pods}
    time.sleep(seconds)
    counts = {name: cluster.counted(name) - before[name] for name in cluster.pods}
    return {name: count / max(1.0, sum(counts.values())) for name, count in counts.items()}


def test_pods_are_as_restricted_as_the_manifest_says(cluster: Cluster) -> None:
    inside = ("exec", "replica-1-server", "sh", "-c")
    podman = cluster.podman
    assert podman(*inside, "id -u") == str(USER)
    for path in ("/x", "/models/x", "/opt/equipot/x", "/usr/bin/x"):
        assert podman(*inside, f"touch {path} 2>/dev/null || echo refused") == "refused"
    for path in ("/tmp/x", "/cache/x"):
        assert podman(*inside, f"touch {path} && rm {path} && echo written") == "written"
    assert podman(*inside, "grep CapEff /proc/1/status").split()[1] == "0" * 16
    assert podman(*inside, "grep NoNewPrivs /proc/1/status").split()[1] == "1"


def test_the_probe_of_helm_test_finds_the_answer_right(cluster: Cluster) -> None:
    said = cluster.run("probe", cluster.address, "--service=", "--structure", "--timeout=60")
    assert "tiny: a cluster" in said


def test_scaling_under_load_costs_no_call(cluster: Cluster, load_on: Callable[[], Object]) -> None:
    """2 → 3 → 1: calls go round over all there are, and not one fails, though none is tried twice."""
    until(lambda: min(shares(cluster, 2.0).values()) > 0.4, "two pods share the calls evenly", 90)
    cluster.start("replica-3")
    until(lambda: min(shares(cluster, 2.0).values()) > 0.25, "three pods share the calls evenly", 120)
    for name in ("replica-2", "replica-1"):
        took = cluster.stop(name)
        # It lingered for callers to look elsewhere, and did not wait for its connections to age.
        assert 5.0 <= took < 30.0
    assert shares(cluster, 2.0) == {"replica-3": 1.0}
    assert cluster.counted("replica-3") > 0
    report = load_on()
    assert report["failures"] == []
    assert report["answered"] > 300
    assert len(report["energies"]) == 1


def test_what_was_accepted_is_answered_before_the_pod_ends(cluster: Cluster) -> None:
    (name,) = cluster.pods
    script = Path(__file__).with_name("pods_large.py")
    mount = ["--volume", f"{script}:/large.py:ro", "--entrypoint", "/opt/equipot/bin/python"]
    words = [*mount, cluster.image, "/large.py", f"{cluster.pods[name]}:50051"]
    load = f"{NAME}-load"
    cluster.podman("run", "--detach", "--name", load, "--network", NAME, *words)
    until(lambda: in_flight(cluster, name) > 0, "the request is under way", 60)
    assert "answered" not in cluster.podman("logs", load)
    cluster.stop(name)
    until(
        lambda: "answered" in cluster.podman("logs", load), f"an answer; {cluster.podman('logs', load)}", 30
    )
    assert cluster.podman("logs", load).splitlines()[-1] == "answered 40"
    cluster.podman("rm", "--force", load)


def in_flight(cluster: Cluster, name: str) -> float:
    with urllib.request.urlopen(f"http://{cluster.pods[name]}:9090/metrics", timeout=10) as reply:
        text = reply.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("equipot_in_flight_requests")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
