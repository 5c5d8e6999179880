"""Values that the chart must take, and values that it must refuse, with what it says of them."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

SHA = "0123456789abcdef" * 4
BAKED: Values = {"models": [{"name": "baked", "path": "/opt/models/baked"}], "storage": {"kind": "none"}}
FETCHED: Values = {"models": [{"name": "far", "url": "https://models.example/far.tar.gz", "sha256": SHA}]}
TLS: Values = {"tls": {"enabled": True, "existingSecret": "equipot-cert"}}


def merged(*parts: Values) -> Values:
    """Later values win; maps are merged."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


GROUPS: Values = {
    "mode": "leaderWorkerSet",
    "leaderWorkerSet": {"size": 2, "keySecret": "group-key"},
    "server": {"tensorParallel": 4},
}
RAY: Values = {"mode": "rayService", "autoscaling": {"kind": "serve", "minReplicas": 2, "maxReplicas": 6}}

EVERYTHING: Values = merged(
    FETCHED,
    TLS,
    {
        "replicaCount": 3,
        "image": {"registry": "registry.example", "digest": f"sha256:{SHA}", "pullSecrets": ["pull"]},
        "models": [
            *FETCHED["models"],
            {"name": "near", "url": "oci://registry.example/near:1", "sha256": SHA},
            {"name": "there", "path": "folder/there"},
        ],
        "storage": {"kind": "newClaim", "storageClass": "shared", "keep": False},
        "fetch": {
            "tokenSecret": "fetch-token",
            "registrySecret": "registry-login",
            "env": [{"name": "AWS_REGION", "value": "eu"}],
            "envFrom": [{"secretRef": {"name": "s3"}}],
        },
        "server": {
            "device": "cuda",
            "tensorParallel": 2,
            "dtype": "float32",
            "threads": 3,
            "deterministic": True,
            "maxAtoms": 1000,
            "maxEdges": 50_000_000,
            "maxBatchEdges": 100_000,
            "maxQueueEdges": 40_000_000,
            "maxMessageMb": 128,
            "reflection": False,
            "extraArgs": ["--log-structures"],
        },
        "tls": {"mutual": True, "clientCaSecret": "callers"},
        "auth": {"tokensSecret": "tokens", "identityLimits": "[default]\nrequests_per_second = 5\n"},
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"team": "chemistry"}}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "operators"}}}],
            "extraEgress": [{"ports": [{"port": 4317, "protocol": "TCP"}]}],
        },
        "ingress": {"enabled": True, "host": "potentials.example", "tlsSecret": "public"},
        "grpcRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gateway", "namespace": "infra"}],
            "hostnames": ["potentials.example"],
        },
        "monitoring": {
            "kind": "serviceMonitor",
            "rules": True,
            "dashboard": True,
            "labels": {"release": "p"},
        },
        "commonLabels": {"team": "chemistry"},
        "commonAnnotations": {"owner": "chemistry"},
        "podLabels": {"billing": "x"},
        "podAnnotations": {"note": "x"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
                }
            }
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "zone",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": "{{ .Release.Name }}"}},
            }
        ],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel:4317"}],
        "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "extraInitContainers": [{"name": "first", "image": "busybox", "command": ["true"]}],
        "extraContainers": [{"name": "beside", "image": "busybox", "command": ["sleep", "inf"]}],
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "b"}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: '{{ .Release.Name }}-y'\n",
        ],
        "test": {"tokenSecret": "caller-token"},
    },
)

JOBS: Values = {"replicaCount": 1, "recreate": True, "jobs": {"enabled": True}}

GOOD: dict[str, Values] = {
    "baked": BAKED,
    "fetched": FETCHED,
    "everything": EVERYTHING,
    "existing claim": {
        "models": [{"name": "a", "path": "a"}],
        "storage": {"kind": "existingClaim", "existingClaim": "models", "accessModes": ["ReadOnlyMany"]},
    },
    "own claim of one node": merged(
        FETCHED,
        {
            "replicaCount": 1,
            "recreate": True,
            "storage": {"kind": "newClaim", "accessModes": ["ReadWriteOnce"]},
        },
    ),
    "repository": {"repository": {"url": "s3://models/live", "pollSeconds": 30}, "storage": {"kind": "none"}},
    "hpa": merged(BAKED, {"autoscaling": {"kind": "hpa", "minReplicas": 2, "maxReplicas": 5}}),
    "hpa of calls": merged(
        BAKED,
        {
            "autoscaling": {
                "kind": "hpa",
                "metric": "inFlightRequests",
                "target": 8,
                "extraMetrics": [
                    {
                        "type": "Resource",
                        "resource": {
                            "name": "cpu",
                            "target": {"type": "Utilization", "averageUtilization": 80},
                        },
                    }
                ],
            }
        },
    ),
    "keda": merged(BAKED, {"autoscaling": {"kind": "keda", "minReplicas": 0}}),
    "zero": merged(BAKED, {"replicaCount": 0}),
    "cert-manager": merged(
        BAKED,
        {
            "tls": {
                "enabled": True,
                "mutual": True,
                "certManager": {"issuerName": "ca", "extraDnsNames": ["potentials.example"]},
            }
        },
    ),
    "tokens behind a mesh": merged(BAKED, {"auth": {"tokensSecret": "tokens", "allowPlaintext": True}}),
    "random user": merged(
        BAKED, {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
    ),
    "pod monitor": merged(BAKED, {"monitoring": {"kind": "podMonitor", "dashboard": True}}),
    "a page by https": merged(BAKED, TLS, {"server": {"ui": True}, "monitoring": {"kind": "serviceMonitor"}}),
    "ranks": merged(BAKED, {"server": {"tensorParallel": 2}}),
    "gpus": merged(BAKED, {"server": {"tensorParallel": 4, "device": "cuda"}}),
    "groups": merged(BAKED, GROUPS),
    "groups of gpus": merged(
        FETCHED, TLS, GROUPS, {"replicaCount": 2, "server": {"device": "cuda"}, "tls": {"mutual": True}}
    ),
    "groups by keda": merged(BAKED, GROUPS, {"autoscaling": {"kind": "keda"}}),
    "jobs": merged(
        BAKED,
        JOBS,
        {
            "jobs": {"accessModes": ["ReadWriteOncePod"], "storageClass": "fast", "keepDays": 2.5},
            "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
        },
    ),
    "jobs in the pod": merged(BAKED, JOBS, {"jobs": {"kind": "emptyDir", "sizeGi": 5}}),
    "jobs of a group": merged(
        BAKED,
        GROUPS,
        {
            "replicaCount": 1,
            "maxSurge": 0,
            "maxUnavailable": 1,
            "jobs": {"enabled": True, "kind": "existingClaim", "existingClaim": "runs"},
        },
    ),
    "ray": merged(FETCHED, RAY, {"monitoring": {"kind": "podMonitor"}}),
    "ray fixed": merged(
        BAKED,
        {
            "mode": "rayService",
            "replicaCount": 5,
            "rayService": {"replicasPerNode": 2},
            "server": {
                "device": "cuda",
                "tensorParallel": 2,
                "dtype": "float32",
                "threads": 2,
                "maxAtoms": 5000,
                "maxEdges": 50_000_000,
                "maxBatchEdges": 100_000,
                "maxQueueEdges": 40_000_000,
                "maxMessageMb": 128,
            },
            "auth": {"tokensSecret": "tokens", "allowPlaintext": True, "identityLimits": "[default]\n"},
            "grpcRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        },
    ),
    "ray of a repository": merged(
        RAY, {"repository": {"url": "s3://models/live"}, "storage": {"kind": "none"}}
    ),
    "bare": merged(
        BAKED,
        {
            "serviceAccount": {"create": False},
            "networkPolicy": {"enabled": False},
            "pdb": {"enabled": False},
            "test": {"enabled": False},
            "nameOverride": "potentials",
            "fullnameOverride": "potentials-of-the-lab",
        },
    ),
}

FAST = (
    "baked",
    "everything",
    "repository",
    "hpa",
    "keda",
    "cert-manager",
    "groups of gpus",
    "jobs",
    "a page by https",
    "ray",
    "ray fixed",
)
"""Rendered in the fast suite; the others in the slow one."""

BAD: dict[str, tuple[Values, str]] = {
    "no model": ({}, "models is empty"),
    "two ways": (merged(BAKED, {"repository": {"url": "s3://x/y"}}), "exclude each other"),
    "one name twice": (
        merged(BAKED, {"models": [{"name": "a", "path": "/x/a"}, {"name": "a", "path": "/x/b"}]}),
        "a name of its own",
    ),
    "url and path": (merged(FETCHED, {"models": [{**FETCHED["models"][0], "path": "/a"}]}), "url and path"),
    "nowhere": (merged(BAKED, {"models": [{"name": "a"}]}), "neither url nor path"),
    "no checksum": ({"models": [{"name": "a", "url": "https://x/y.tar"}]}, "without sha256"),
    "bad checksum": ({"models": [{"name": "a", "url": "https://x/y.tar", "sha256": "12"}]}, "sha256"),
    "nowhere to fetch to": (merged(FETCHED, {"storage": {"kind": "none"}}), "storage.kind is none"),
    "no volume": ({"models": [{"name": "a", "path": "a"}]}, "choose existingClaim"),
    "hidden by the volume": ({"models": [{"name": "a", "path": "/models/a"}]}, "hides"),
    "out of the volume": (merged(BAKED, {"models": [{"name": "a", "path": "../a"}]}), "models"),
    "no claim": (
        {"models": [{"name": "a", "path": "a"}], "storage": {"kind": "existingClaim"}},
        "storage.existingClaim",
    ),
    "shared by replicas": (
        merged(
            FETCHED, {"replicaCount": 2, "storage": {"kind": "newClaim", "accessModes": ["ReadWriteOnce"]}}
        ),
        "ReadWriteMany is needed",
    ),
    "shared during updates": (
        merged(
            FETCHED, {"replicaCount": 1, "storage": {"kind": "newClaim", "accessModes": ["ReadWriteOnce"]}}
        ),
        "the new pod of an update",
    ),
    "written by many": (
        merged(FETCHED, {"storage": {"kind": "newClaim", "accessModes": ["ReadOnlyMany"]}}),
        "ReadWriteMany is needed",
    ),
    "two autoscalers": (merged(BAKED, {"autoscaling": {"kind": "hpa,keda"}}), "autoscaling"),
    "hpa of ray": (merged(BAKED, RAY, {"autoscaling": {"kind": "hpa"}}), "Ray Serve scales by itself"),
    "serve of none": (merged(BAKED, {"autoscaling": {"kind": "serve"}}), "choose hpa or keda"),
    "upside down": (
        merged(BAKED, {"autoscaling": {"kind": "hpa", "minReplicas": 9, "maxReplicas": 3}}),
        "above maxReplicas",
    ),
    "hpa to zero": (merged(BAKED, {"autoscaling": {"kind": "hpa", "minReplicas": 0}}), "use keda"),
    "stuck update": (merged(BAKED, {"maxSurge": 0}), "no update could begin"),
    "uneven ranks": (merged(BAKED, GROUPS, {"server": {"tensorParallel": 3}}), "cannot share evenly"),
    "no key": (merged(BAKED, GROUPS, {"leaderWorkerSet": {"keySecret": ""}}), "keySecret is empty"),
    "no certificate": (merged(BAKED, {"tls": {"enabled": True}}), "tls.enabled needs"),
    "mutual nothing": (merged(BAKED, {"tls": {"mutual": True}}), "needs tls.enabled"),
    "tokens in the clear": (merged(BAKED, {"auth": {"tokensSecret": "t"}}), "in the clear"),
    "ingress for nobody": (merged(BAKED, {"ingress": {"enabled": True}}), "needs ingress.host"),
    "ingress in the clear": (
        merged(BAKED, {"ingress": {"enabled": True, "host": "a.example"}}),
        "needs ingress.tlsSecret",
    ),
    "route from nowhere": (merged(BAKED, {"grpcRoute": {"enabled": True}}), "needs grpcRoute.parentRefs"),
    "alerts of ray": (merged(BAKED, RAY, {"monitoring": {"rules": True}}), "on a fixed port"),
    "calls of ray": (
        merged(BAKED, RAY, {"autoscaling": {"metric": "inFlightRequests"}}),
        "are counted by edges",
    ),
    "words for ray": (merged(BAKED, RAY, {"server": {"extraArgs": ["--x"]}}), "rayService.extraConfig"),
    "a group of many": (
        merged(BAKED, GROUPS, {"models": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]}),
        "spreads one model",
    ),
    "a page for certificates": (
        merged(BAKED, TLS, {"server": {"ui": True}, "tls": {"mutual": True}}),
        "tls.mutual asks callers for certificates",
    ),
    "tls of ray": (merged(BAKED, RAY, TLS), "without TLS"),
    "jobs of ray": (merged(BAKED, RAY, JOBS), "mode rayService does not have"),
    "jobs that scale": (
        merged(BAKED, JOBS, {"autoscaling": {"kind": "keda"}}),
        "a release for jobs beside the one that scales",
    ),
    "jobs of several": (merged(BAKED, JOBS, {"replicaCount": 2}), "jobs.enabled needs replicaCount 1"),
    "jobs of who knows how many": (
        merged(BAKED, JOBS, {"replicaCount": None}),
        "jobs.enabled needs replicaCount 1",
    ),
    "jobs handed over too early": (merged(BAKED, JOBS, {"recreate": False}), "jobs.enabled needs recreate"),
    "jobs of two groups": (
        merged(BAKED, GROUPS, JOBS, {"recreate": False}),
        "jobs.enabled needs maxSurge 0",
    ),
    "jobs nowhere": (merged(BAKED, JOBS, {"jobs": {"kind": "existingClaim"}}), "jobs.existingClaim"),
    "jobs twice": (
        merged(BAKED, JOBS, {"server": {"extraArgs": ["--jobs=/x"]}}),
        "which jobs.enabled gives itself",
    ),
    "a typo": (merged(BAKED, {"replicas": 3}), "replicas"),
    "a typo below": (merged(BAKED, {"server": {"tensor_parallel": 3}}), "tensor_parallel"),
    "a wrong mode": (merged(BAKED, {"mode": "statefulset"}), "mode"),
    "a word for a number": (merged(BAKED, {"replicaCount": "three"}), "replicaCount"),
    "too many ranks": (merged(BAKED, {"server": {"tensorParallel": 65}}), "tensorParallel"),
    "a wrong digest": (merged(BAKED, {"image": {"digest": "latest"}}), "digest"),
}
