"""What a Ray is told before there is one, and what is left of it: words, hosts, files, signals, scaling."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.ray_app import local
from equipot.serve.ray_app.scaling import ByOpenEdges
from equipot.serve.ray_app.settings import RaySettings, split


class TestSettings:
    def test_the_table_is_about_replicas_and_the_rest_about_each(self, tmp_path: Path) -> None:
        config, settings = split({"bundles": ["a"], "ray": {"replicas": 2, "max_replicas": 3}}, base=tmp_path)
        assert config.bundles == (tmp_path / "a",)
        assert (settings.replicas, settings.max_replicas) == (2, 3)

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ({"ray": {"replica": 2}}, "ray.replica is no setting; do you mean replicas?"),
            ({"ray": {"replicas": 0}}, "replicas is 0, allowed are 1 to 1000"),
            ({"ray": {"replicas": 3, "max_replicas": 2}}, "max-replicas is 2, allowed are 3"),
            ({"ray": 3}, "ray is 3; it takes a table"),
            ({"ray": {"name": ""}}, "ray.name is ''; it takes letters"),
            ({"ray": {"name": 'a"b'}}, "ray.name is 'a\"b'; it takes letters"),
            ({"ray": {"name": "ü"}}, "ray.name is 'ü'; it takes letters"),
            ({"tls_cert": "c", "tls_key": "k"}, "Ray's proxy listens without TLS"),
            ({"jobs": {"folder": "j"}}, "--jobs needs one server"),
            ({"ui": True}, "--ui is a page of one server"),
            (
                {"admins": ["*"], "repository": {"url": "m"}, "ray": {"replicas": 2}},
                "--admin would reach one of several replicas",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, mapping: Mapping[str, object], message: str) -> None:
        with pytest.raises(ServeError) as caught:
            split({"bundles": ["a"], **mapping}, base=Path())
        assert message in str(caught.value)


class Reports:
    """Ray's context of an autoscaling policy, made by hand."""

    def __init__(self, running: int, *edges: float) -> None:
        self.current_num_replicas = self.target_num_replicas = running
        self.aggregated_metrics: Mapping[str, Mapping[object, float]] | None = (
            {"open_edges": dict(enumerate(edges))} if edges else {}
        )


@pytest.mark.parametrize(
    ("running", "edges", "wanted"),
    [
        (1, [0.0], 1),
        (1, [100.0], 1),
        (1, [101.0], 2),
        (1, [1000.0], 10),
        (3, [0.0, 0.0, 0.0], 1),
        (2, [150.0, 150.0], 3),
        (2, [150.0], 3),  # one has not reported yet
        (2, [], 2),  # nobody has
    ],
)
def test_as_many_replicas_as_open_edges_ask_for(running: int, edges: list[float], wanted: int) -> None:
    assert ByOpenEdges(open_edges=100)(Reports(running, *edges))[0] == wanted


def test_a_ray_that_cannot_be_joined_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", refuse)
    config = ServeConfig(bundles=(Path("none"),))
    with (
        pytest.raises(
            ServeError, match=r"cannot join the Ray of RAY_ADDRESS=127\.0\.0\.1:1: nobody is there"
        ),
        local.ray_cluster(config, RaySettings(), print),
    ):
        pass


def test_hosts_that_rays_proxy_does_not_answer_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ServeError, match=r"host is ::1, and Ray's proxy answers on IPv4 alone"):
        local.run({"bundles": ["none"], "host": "::1"}, base=Path(), announce=print)


def test_every_file_of_haproxy_lies_in_the_folder(tmp_path: Path) -> None:
    # Read, not imported: Ray Serve looks at its environment then, which the cluster below sets first.
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "serve" / "_private" / "constants.py").read_text()
    names = re.findall(r'"(RAY_SERVE_HAPROXY_\w+)",\s*"/tmp/', text)
    assert len(names) >= 5
    said = local.environment(tmp_path, ServeConfig(bundles=(Path("none"),)))
    assert [name for name in names if not said.get(name, "").startswith(str(tmp_path))] == []


def test_a_second_signal_leaves_no_folder_and_no_proxy(tmp_path: Path) -> None:
    (tmp_path / "ray" / "session").mkdir(parents=True)
    stands_in = ["/opt/bin/haproxy", "-c", "import time; time.sleep(100)", f"{tmp_path}/ray/haproxy.cfg"]
    proxy = subprocess.Popen(stands_in, executable=sys.executable)
    code = (
        "import os, signal, sys, threading, pathlib\n"
        "from equipot.serve.ray_app.local import on_signals\n"
        "on_signals(threading.Event(), pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert os.path.exists(sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "ray"], timeout=120, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "ray").exists()
    assert proxy.wait(timeout=20) == -signal.SIGKILL
