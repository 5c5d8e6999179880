"""What watches the servers: objects for Prometheus and Grafana, over metrics that a server really exports."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from equipot.serve.metrics import Metrics

from .cases import BAKED, merged
from .conftest import CHART, ROOT, Helm, Render, load, one, pods

SERIES = re.compile(r"\bequipot_\w+")


def exported() -> set[str]:
    """Names of what a server exports, with those that appear with its queue."""
    from equipot.serve.batcher import Depth

    async def names() -> set[str]:
        metrics = Metrics()
        metrics.watch_queue(lambda: Depth(0, 0, 0, 0.0))
        found = set()
        for family in metrics.registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            found |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
        return found

    return asyncio.run(names())


def test_autoscalers_scale_by_metrics_that_a_server_exports(render: Render) -> None:
    there = exported()
    used = set(SERIES.findall(str(one(render("helm3", "hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"])))
    used |= set(SERIES.findall(str(one(render("helm3", "keda"), "ScaledObject")["spec"]["triggers"])))
    assert used == {"equipot_queue_edges"}
    assert used <= there
    assert "equipot_in_flight_requests" in there


def test_monitors_find_the_ports_and_services(render: Render) -> None:
    objects = render("helm3", "everything")
    monitor = one(objects, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "p"
    chosen = [
        item
        for item in objects
        if item["kind"] == "Service"
        and monitor["spec"]["selector"]["matchLabels"].items() <= item["metadata"]["labels"].items()
    ]
    # One service alone, or each pod would be counted twice.
    (service,) = chosen
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    # The page makes the metrics' port HTTPS, by a certificate of the service's name.
    (endpoint,) = one(render("helm3", "a page by https"), "ServiceMonitor")["spec"]["endpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]["serverName"]) == (
        "https",
        "lab-equipot.science.svc",
    )
    assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": "equipot-cert", "key": "ca.crt"}
    ray = one(render("helm3", "ray"), "PodMonitor")
    (endpoint,) = ray["spec"]["podMetricsEndpoints"]
    for name, pod in pods(render("helm3", "ray")).items():
        if name != "test":
            assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}


def test_rules_and_dashboard_are_rendered_whole(render: Render) -> None:
    objects = render("helm4", "everything")
    rules = one(objects, "PrometheusRule")["spec"]
    assert rules == yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    dashboard = one(objects, "ConfigMap", "lab-equipot-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["equipot.json"]) == json.loads(
        (CHART / "files" / "dashboard.json").read_text()
    )


def test_the_rendered_rules_pass_their_tests(helm: Helm, tool: Callable[[str], str], tmp_path: Path) -> None:
    done = helm("helm3", "template", "lab", str(CHART), values=merged(BAKED, {"monitoring": {"rules": True}}))
    rules = one(load(done.out), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    tests = ROOT / "serve" / "equipot" / "serve" / "monitoring" / "rules_test.yaml"
    (tmp_path / "rules_test.yaml").write_text(tests.read_text())
    words = [tool("promtool"), "test", "rules", "rules_test.yaml"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "SUCCESS" in run.stdout


@pytest.mark.parametrize("name", ["rules.yaml", "dashboard.json"])
def test_files_of_the_chart_name_series(name: str) -> None:
    """That each is exported is tested where they are made; here that the copies are no empty shells."""
    assert len(set(SERIES.findall((CHART / "files" / name).read_text()))) > 5
