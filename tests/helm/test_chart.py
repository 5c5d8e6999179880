"""What the rendered objects say: replicas, selectors, ranks, time to start and stop, rights, arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from equipot.serve.cli import configuration
from equipot.serve.config import ServeConfig
from equipot.serve.ray_app.settings import split

from .cases import BAKED, FAST, merged
from .conftest import CHART, HELMS, Helm, Object, Render, load, one, parsed, pods

NAME = "lab-equipot"


@pytest.fixture(params=FAST)
def objects(request: pytest.FixtureRequest, render: Render) -> list[Object]:
    return render("helm4", request.param)


def server_of(objects: list[Object]) -> Object:
    container: Object = pods(objects)["server"]["spec"]["containers"][0]
    return container


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


RUNTIME = {
    "leaderWorkerSet": {"leaderworkerset.sigs.k8s.io/worker-index": "0"},
    "rayService": {"ray.io/serve": "true"},
}
"""Labels that the operators give to the pods that answer."""


def test_selectors_find_the_pods_that_answer_and_no_others(objects: list[Object]) -> None:
    found = pods(objects)
    runtime: dict[str, str] = {}
    for item in objects:
        runtime |= {"LeaderWorkerSet": RUNTIME["leaderWorkerSet"], "RayService": RUNTIME["rayService"]}.get(
            item["kind"], {}
        )
    labels = {name: dict(pod["metadata"]["labels"]) for name, pod in found.items()}
    serving = labels["server"] | runtime
    selectors = [item["spec"]["selector"] for item in objects if item["kind"] == "Service"]
    selectors += [
        item["spec"]["selector"]["matchLabels"] for item in objects if item["kind"] == "PodDisruptionBudget"
    ]
    assert selectors
    for selector in selectors:
        assert matches(selector, serving)
        for other in labels.keys() - {"server"}:
            assert not matches(selector, labels[other])


def test_selectors_of_a_deployment_hold_no_version(render: Render) -> None:
    """They cannot be changed by an upgrade."""
    deployment = one(render("helm3", "everything"), "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert set(selector) == {
        "app.kubernetes.io/name",
        "app.kubernetes.io/instance",
        "app.kubernetes.io/component",
    }
    assert matches(selector, deployment["spec"]["template"]["metadata"]["labels"])


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize(
    ("case", "count"), [("baked", None), ("hpa", None), ("keda", None), ("everything", 3)]
)
def test_without_a_cluster_a_count_is_rendered_only_if_one_is_given(
    name: str, case: str, count: int | None, render: Render
) -> None:
    deployment = one(render(name, case), "Deployment")
    assert deployment["spec"].get("replicas") == count
    mark = deployment["metadata"]["annotations"]["equipot/replica-count"]
    assert mark == ("left to the cluster" if count is None else str(count))


def test_updates_add_before_they_take_away(render: Render) -> None:
    strategy = one(render("helm3", "baked"), "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    rollout = one(render("helm3", "groups of gpus"), "LeaderWorkerSet")["spec"]["rolloutStrategy"]
    assert rollout["rollingUpdateConfiguration"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_autoscalers_look_at_work_and_never_at_the_processor_alone(render: Render) -> None:
    scaler = one(render("helm4", "hpa"), "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "equipot_queue_edges"
    assert scaler["metrics"][0]["pods"]["target"]["averageValue"] == "200000"
    keda = one(render("helm4", "keda"), "ScaledObject")["spec"]
    assert keda["minReplicaCount"] == 0
    query = keda["triggers"][0]["metadata"]["query"]
    assert query == 'sum(equipot_queue_edges{namespace="science",pod=~"lab-equipot-.*"})'


def test_connections_reach_new_pods(objects: list[Object]) -> None:
    headless = one(objects, "Service", f"{NAME}-headless")["spec"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"] is False
    found = pods(objects)
    if "test" in found:
        (address,) = [word for word in found["test"]["spec"]["containers"][0]["args"] if ":///" in word]
        assert address == f"dns:///{NAME}-headless.science.svc:50051"


class TestRights:
    def test_every_pod_keeps_the_restricted_standard(self, objects: list[Object]) -> None:
        for name, pod in pods(objects).items():
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
            for volume in spec["volumes"]:
                assert len(set(volume) & {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}) == 1
            ours = [
                c for c in [*spec.get("initContainers", []), *spec["containers"]] if "equipot" in c["image"]
            ]
            assert ours, name
            for container in ours:
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["readOnlyRootFilesystem"] is True
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert "privileged" not in context
                assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp"}

    def test_nobody_sees_a_token_but_rays_autoscaler(self, objects: list[Object]) -> None:
        for name, pod in pods(objects).items():
            scales = name == "head" and any(
                item["kind"] == "RayService" and item["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
                for item in objects
            )
            assert pod["spec"]["automountServiceAccountToken"] is scales

    def test_traffic_is_bounded_to_ports_and_peers(self, render: Render) -> None:
        policy = one(render("helm3", "everything"), "NetworkPolicy")["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        calls, metrics = policy["ingress"]
        assert [port["port"] for port in calls["ports"]] == [50051]
        assert calls["from"][0] == {"namespaceSelector": {"matchLabels": {"team": "chemistry"}}}
        assert [port["port"] for port in metrics["ports"]] == [9090]
        assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 80, 443, 4317}
        baked = one(render("helm3", "baked"), "NetworkPolicy")["spec"]
        assert {port["port"] for rule in baked["egress"] for port in rule["ports"]} == {53}

    @pytest.mark.slow
    def test_a_platform_may_choose_the_user(self, render: Render) -> None:
        context = pods(render("helm3", "random user"))["server"]["spec"]["securityContext"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(context)
        assert context["runAsNonRoot"] is True


class TestTime:
    def test_a_pod_may_take_half_an_hour_to_load(self, render: Render) -> None:
        for case in ("baked", "everything", "groups of gpus"):
            probe = server_of(render("helm3", case))["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800
        deployment = one(render("helm3", "baked"), "Deployment")["spec"]
        assert deployment["progressDeadlineSeconds"] > 1800

    def test_probes_name_what_they_are_for(self, render: Render) -> None:
        server = server_of(render("helm3", "baked"))
        assert server["livenessProbe"]["grpc"]["service"] == "equipot.liveness"
        assert server["readinessProbe"]["grpc"]["service"] == "equipot.readiness"
        assert server["startupProbe"]["grpc"] == {"port": 50051, "service": "equipot.readiness"}

    def test_with_tls_probes_are_commands_as_kubelets_own_speak_none(self, render: Render) -> None:
        server = server_of(render("helm3", "cert-manager"))
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = server[kind]["exec"]["command"]
            assert command[:3] == ["equipot", "probe", "localhost:50051"]
            assert "--tls-cert=/etc/equipot/tls/tls.crt" in command
            assert server[kind]["timeoutSeconds"] > 5
        names = one(render("helm3", "cert-manager"), "Certificate")["spec"]["dnsNames"]
        (name,) = [word[11:] for word in command if word.startswith("--tls-name=")]
        assert name in names
        assert f"{NAME}-headless.science.svc" in names

    def test_the_grace_is_the_sum_of_what_happens_in_it(self, helm: Helm) -> None:
        times = {"endpointSeconds": 7, "lingerSeconds": 11, "drainSeconds": 300, "marginSeconds": 20}
        done = helm("helm3", "template", "lab", str(CHART), values=merged(BAKED, {"termination": times}))
        pod = pods(load(done.out))["server"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == 7 + 11 + 300 + 20
        server = pod["containers"][0]
        assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
        assert "--linger-seconds=11" in server["args"]
        assert "--drain-seconds=300" in server["args"]


class TestRanks:
    @pytest.mark.slow
    def test_the_ranks_of_a_pod_get_a_gpu_each(self, render: Render) -> None:
        server = server_of(render("helm3", "gpus"))
        assert server["resources"]["limits"]["nvidia.com/gpu"] == 4
        assert {"--device=cuda", "--tensor-parallel=4"} <= set(server["args"])

    def test_ranks_are_divided_among_the_pods_of_a_group(self, render: Render) -> None:
        objects = render("helm3", "groups of gpus")
        group = one(objects, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
        found = pods(objects)
        leader, worker = (found[name]["spec"]["containers"][0] for name in ("server", "worker"))
        assert group["size"] == 2
        for container in (leader, worker):
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert {"--tensor-parallel=4", "--worker-hosts=1", "--worker-port=50052"} <= set(leader["args"])
        assert worker["args"][:2] == ["join", "$(LWS_LEADER_ADDRESS):50052"]

    def test_memory_for_ranks_to_talk_through(self, objects: list[Object]) -> None:
        for name, pod in pods(objects).items():
            if name != "test":
                (shm,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
                assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
                mounts = pod["spec"]["containers"][0]["volumeMounts"]
                assert {"name": "shm", "mountPath": "/dev/shm"} in mounts


class TestModels:
    def test_each_url_has_a_container_that_fetches_and_checks(self, render: Render) -> None:
        pod = pods(render("helm3", "everything"))["server"]["spec"]
        first, *fetchers = pod["initContainers"]
        assert first["name"] == "first"
        assert [container["args"][:2] for container in fetchers] == [
            ["fetch", "https://models.example/far.tar.gz"],
            ["fetch", "oci://registry.example/near:1"],
        ]
        for container in fetchers:
            assert any(word.startswith("--sha256=") for word in container["args"])
        server = pod["containers"][0]
        assert server["args"][1:4] == ["/models/far", "/models/near", "/models/folder/there"]
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in server["volumeMounts"]
        assert server["image"].startswith("registry.example/equipot-serve@sha256:")

    def test_a_claim_of_our_own_goes_with_the_release_only_if_told_to(self, render: Render) -> None:
        claim = one(render("helm3", "everything"), "PersistentVolumeClaim")
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert "helm.sh/resource-policy" not in claim["metadata"].get("annotations", {})

    def test_ray_is_told_what_to_serve(self, render: Render) -> None:
        config = yaml.safe_load(one(render("helm3", "ray"), "RayService")["spec"]["serveConfigV2"])
        (application,) = config["applications"]
        assert application["import_path"] == "equipot.serve.ray_app:build"
        assert application["args"]["bundles"] == ["/models/far"]
        assert application["args"]["ray"] == {"replicas": 2, "max_replicas": 6, "open_edges": 200000}
        assert config["proxy_location"] == "EveryNode"

    @pytest.mark.parametrize("case", ["ray", "ray fixed", "ray of a repository"])
    def test_what_ray_is_told_is_a_configuration(self, case: str, render: Render) -> None:
        told = yaml.safe_load(one(render("helm3", case), "RayService")["spec"]["serveConfigV2"])
        arguments = told["applications"][0]["args"]
        config, spread = split(arguments, base=Path("/"))
        assert config.metrics_port is None
        if case == "ray fixed":
            assert (config.limits.structure_edges, config.limits.message_bytes) == (50_000_000, 128 * 2**20)
            assert (config.budget.batch_edges, config.budget.queue_edges) == (100_000, 40_000_000)
        assert (spread.replicas, spread.max_replicas) == ((5, None) if case == "ray fixed" else (2, 6))

    def test_ray_has_as_many_nodes_as_replicas_need(self, render: Render) -> None:
        (scaled,) = one(render("helm3", "ray"), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        assert (scaled["minReplicas"], scaled["maxReplicas"]) == (2, 6)
        service = one(render("helm3", "ray fixed"), "RayService")["spec"]
        (fixed,) = service["rayClusterConfig"]["workerGroupSpecs"]
        assert fixed["replicas"] == 3  # five replicas, two a node
        assert service["excludeHeadPodFromServeSvc"] is True
        assert service["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for pod in pods(render("helm3", "ray fixed")).values():
            ports = {
                port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0].get("ports", [])
            }
            assert not ports or ports["serve-grpc"] == 9000


class TestJobs:
    def test_one_server_keeps_them_on_a_claim_as_it_reads_its_settings(
        self, render: Render, tmp_path: Path
    ) -> None:
        objects = render("helm3", "jobs")
        deployment = one(objects, "Deployment")["spec"]
        assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
        claim = one(objects, "PersistentVolumeClaim", f"{NAME}-jobs")
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
        server = server_of(objects)
        mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
        assert not mounts["/jobs"].get("readOnly")
        volumes = {volume["name"]: volume for volume in pods(objects)["server"]["spec"]["volumes"]}
        assert volumes["jobs"]["persistentVolumeClaim"]["claimName"] == f"{NAME}-jobs"
        (file,) = [word.removeprefix("--config=") for word in server["args"] if word.startswith("--config=")]
        settings = one(objects, "ConfigMap", volumes["jobs-settings"]["configMap"]["name"])["data"]
        (tmp_path / "jobs.toml").write_text(settings[Path(file).name])
        mapping, base = configuration(tmp_path / "jobs.toml", {"bundles": [Path("x")]})
        jobs = ServeConfig.from_mapping(mapping, base=base).jobs
        assert jobs is not None
        # A folder below the mount, as the mount's own root may belong to another user.
        assert (jobs.folder, jobs.keep_days, jobs.most_bytes) == (Path("/jobs/store"), 2.5, 16 * 2**30)

    @pytest.mark.slow
    def test_workers_of_a_group_do_not_touch_them(self, render: Render) -> None:
        found = pods(render("helm3", "jobs of a group"))
        claims = {
            name: [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod["spec"]["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            for name, pod in found.items()
        }
        assert claims == {"server": ["runs"], "worker": [], "test": []}


def words_of(objects: list[Object]) -> list[list[str]]:
    """The arguments of every container with our image."""
    return [
        container["args"]
        for pod in pods(objects).values()
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        if "equipot" in container["image"] and "args" in container
    ]


@pytest.mark.parametrize("case", FAST)
def test_every_word_that_is_rendered_is_known_to_the_command_line(case: str, render: Render) -> None:
    seen = words_of(render("helm3", case))
    assert seen
    for words in seen:
        assert parsed(words)


def test_a_word_that_is_not_known_is_noticed() -> None:
    with pytest.raises(Exception, match="no-such"):
        parsed(["serve", "/models/x", "--no-such=3"])


def test_the_servers_own_limits_are_the_schemas() -> None:
    """What the schema lets through must not stop the server when it starts."""
    properties = json.loads((CHART / "values.schema.json").read_text())["properties"]
    ranks = properties["server"]["properties"]["tensorParallel"]
    for value in (ranks["minimum"], ranks["maximum"]):
        ServeConfig(bundles=(Path("x"),), tensor_parallel=value)
    linger = properties["termination"]["properties"]["lingerSeconds"]
    ServeConfig(bundles=(Path("x"),), linger_seconds=linger["maximum"])
