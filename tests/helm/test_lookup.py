"""Replicas that live in a cluster, as an install or upgrade sees them; the API server is a stand-in.

`--dry-run=server` renders with `lookup` as a real run does, and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .api_server import ApiServer, serving
from .cases import BAKED, GROUPS, JOBS, Values, merged
from .conftest import CHART, HELMS, Helm, Object, load

NAMESPACE = "science"
LEFT = "left to the cluster"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ApiServer]:
    with serving() as server:
        yield server


def dry_run(name: str, helm: Helm, cluster: ApiServer, tmp_path: Path, values: Values) -> str:
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    words = (
        "install",
        "lab",
        str(CHART),
        "--namespace",
        NAMESPACE,
        "--dry-run=server",
        "--disable-openapi-validation",
    )
    done = helm(name, *words, "--kubeconfig", str(config), values=values)
    assert done.code == 0, done.err
    return done.out


def workload(out: str) -> Object:
    manifest = out.split("MANIFEST:\n")[1].split("\nNOTES:")[0]
    (found,) = [item for item in load(manifest) if item["kind"] in ("Deployment", "LeaderWorkerSet")]
    return found


def live(count: int, mark: str | None, kind: str = "Deployment") -> Object:
    version = {"Deployment": "apps/v1", "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1"}[kind]
    owner = {"meta.helm.sh/release-name": "lab", "meta.helm.sh/release-namespace": NAMESPACE}
    metadata: dict[str, Any] = {
        "name": "lab-equipot",
        "namespace": NAMESPACE,
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": owner if mark is None else owner | {"equipot/replica-count": mark},
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {"replicas": count}}


HPA: Values = {"autoscaling": {"kind": "hpa", "minReplicas": 1, "maxReplicas": 9}}
KEDA: Values = {"autoscaling": {"kind": "keda", "minReplicas": 0, "maxReplicas": 9}}
FIVE: Values = {"replicaCount": 5}


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize(
    ("values", "there", "count", "mark"),
    [
        # Never in a manifest: nothing that Helm does can touch it, rollbacks included.
        pytest.param({}, None, None, LEFT, id="installed without a count"),
        pytest.param({}, (7, LEFT), None, LEFT, id="scaled, then upgraded"),
        pytest.param(HPA, (7, LEFT), None, LEFT, id="scaled, then an autoscaler"),
        pytest.param(KEDA, (0, LEFT), None, LEFT, id="scaled to zero by keda"),
        # In the last manifest: left out it would become 1.
        pytest.param({}, (7, "5"), 7, "kept", id="a count that is no longer given"),
        pytest.param(merged(FIVE, HPA), (7, "5"), 7, "kept", id="a count, then an autoscaler"),
        pytest.param(HPA, (7, "kept"), 7, "kept", id="kept once, kept again"),
        pytest.param({}, (7, None), 7, "kept", id="made by something else"),
        pytest.param({}, (0, "3"), 0, "kept", id="scaled to zero"),
        # A count that is given counts when it is new, and takes nothing back.
        pytest.param(FIVE, None, 5, "5", id="installed with a count"),
        pytest.param(FIVE, (7, "5"), 7, "5", id="scaled above the count"),
        pytest.param(FIVE, (2, "5"), 2, "5", id="scaled below the count"),
        pytest.param(FIVE, (7, "3"), 5, "5", id="another count"),
        pytest.param(FIVE, (7, LEFT), 5, "5", id="a count for the first time"),
        pytest.param({"replicaCount": 0}, (7, "5"), 0, "0", id="a count of zero"),
        # Whoever keeps jobs is alone.
        pytest.param(JOBS, (3, "1"), 1, "1", id="scaled by hand where jobs are kept"),
    ],
)
def test_replicas_are_kept_with_a_stand_in_for_the_api_server(
    name: str,
    values: Values,
    there: tuple[int, str | None] | None,
    count: int | None,
    mark: str,
    helm: Helm,
    cluster: ApiServer,
    tmp_path: Path,
) -> None:
    if there is not None:
        cluster.put(live(*there), NAMESPACE)
    found = workload(dry_run(name, helm, cluster, tmp_path, merged(BAKED, values)))
    assert found["spec"].get("replicas") == count
    assert found["metadata"]["annotations"]["equipot/replica-count"] == mark


@pytest.mark.parametrize("name", HELMS)
def test_groups_are_kept_as_well_with_a_stand_in_for_the_api_server(
    name: str, helm: Helm, cluster: ApiServer, tmp_path: Path
) -> None:
    cluster.put(live(4, "kept", "LeaderWorkerSet"), NAMESPACE)
    assert workload(dry_run(name, helm, cluster, tmp_path, merged(BAKED, GROUPS)))["spec"]["replicas"] == 4


@pytest.mark.parametrize("name", HELMS)
def test_the_notes_say_how_long_to_wait_and_how_to_scale(
    name: str, helm: Helm, cluster: ApiServer, tmp_path: Path
) -> None:
    values = merged(BAKED, {"replicaCount": 3, "startup": {"budgetSeconds": 600}})
    out = dry_run(name, helm, cluster, tmp_path, values)
    (minutes,) = re.findall(r"--wait --timeout (\d+)m", out)
    grace = workload(out)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(minutes) * 60 >= 3 * (600 + grace)
    assert "kubectl scale deployment/lab-equipot -n science --replicas=N" in out


@pytest.mark.parametrize("kind", ["newClaim", "emptyDir"])
def test_the_notes_say_whose_jobs_are_and_when_they_are_lost(
    kind: str, helm: Helm, cluster: ApiServer, tmp_path: Path
) -> None:
    out = dry_run("helm4", helm, cluster, tmp_path, merged(BAKED, JOBS, {"jobs": {"kind": kind}}))
    assert "A second pod (kubectl scale) does not get ready" in out
    assert "for 7 days after" in out
    assert ("WARNING: jobs.kind is emptyDir" in out) == (kind == "emptyDir")
