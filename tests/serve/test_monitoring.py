"""The dashboard and the alerts read metrics that a running server has; the alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources

import pytest
from prometheus_client import CollectorRegistry
from tests.serve.conftest import Process, ask, molecule

from equipot.serve.jobs.metrics import JobMetrics
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

MONITORING = resources.files("equipot.serve") / "monitoring"
METRIC = re.compile(r"\b((?:equipot|process)_\w+)(?:\{([^}]*)\})?")
NEEDS_TLS = {"equipot_certificate_expires_timestamp_seconds"}
"""Those that only a server with a certificate has."""

TARGET_LABELS = {"instance", "job"}
"""Those that Prometheus adds."""


def expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard and of the alerts."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((\w+), (\w+)\)", r'\1{\2=""}', variable["query"]["query"])
    rules = (MONITORING / "rules.yaml").read_text(encoding="utf-8")
    for alert in re.findall(r"expr:(.*?)\n        (?:for|labels):", rules, flags=re.DOTALL):
        yield " ".join(alert.replace(">-", "").split())


def wanted() -> dict[str, set[str]]:
    """The labels by which each metric is selected or grouped anywhere."""
    found: dict[str, set[str]] = {}
    for expression in expressions():
        groups = {
            label.strip()
            for labels in re.findall(r"by \(([^)]*)\)", expression)
            for label in labels.split(",")
        }
        for name, selector in METRIC.findall(expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            if name.startswith("equipot") and "on (" not in expression:
                labels |= groups
            found.setdefault(name, set()).update(labels - TARGET_LABELS)
    return found


def exported(server: Process) -> dict[str, set[str]]:
    """Names and labels of all samples of a server."""
    found: dict[str, set[str]] = {}
    for line in server.scrape().splitlines():
        sample = re.match(r"(\w+)(?:\{(.*)\})? ", line)
        if sample and not line.startswith("#"):
            labels = set(re.findall(r'(\w+)="', sample[2] or ""))
            found.setdefault(sample[1], set()).update(labels)
    return found


def test_every_metric_and_label_that_is_asked_for_is_there(
    server: Process, stub: PotentialServiceStub
) -> None:
    stub.Predict(ask([molecule(1)]))
    registry = CollectorRegistry()
    JobMetrics(registry)
    of_jobs = {sample.name: set(sample.labels) for family in registry.collect() for sample in family.samples}
    there, asked = exported(server) | of_jobs, wanted()
    assert len(asked) > 20
    for name, labels in asked.items():
        if name not in NEEDS_TLS:
            assert name in there, f"no server exports {name}"
            assert labels <= there[name], f"{name} lacks {labels - there[name]}"


def test_every_metric_of_ours_is_shown_or_alerted_on(server: Process) -> None:
    asked = {re.sub(r"_(bucket|total)$", "", name) for name in wanted()}
    unseen = set()
    for line in server.scrape().splitlines():
        if line.startswith("# TYPE equipot_"):
            name = line.split()[2]
            if not name.endswith("_created") and re.sub(r"_total$", "", name) not in asked:
                unseen.add(name)
    # What describes models is for tables that join by it.
    assert {name for name in unseen if not name.startswith("equipot_model_")} == set()


def test_panels_have_queries_units_and_places_of_their_own() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should() -> None:
    with resources.as_file(MONITORING) as folder:
        for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
            done = subprocess.run(
                ["promtool", *command], cwd=folder, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    rules = (MONITORING / "rules.yaml").read_text(encoding="utf-8")
    tests = (MONITORING / "rules_test.yaml").read_text(encoding="utf-8")
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) == len(set(alerts))
    for alert in alerts:
        fires = re.search(rf"alertname: {alert}\n        exp_alerts:\n", tests)
        assert fires, f"nothing shows that {alert} fires"
