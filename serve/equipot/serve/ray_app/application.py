"""Builds the Ray Serve application: how many replicas, where, and what each is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from equipot.serve.config import ServeConfig
from equipot.serve.ray_app.replica import Replica
from equipot.serve.ray_app.scaling import ByOpenEdges
from equipot.serve.ray_app.settings import STOP_MARGIN, RaySettings, split

MOUNT = "equipot.serve.ray_app.replica.mount"
"""What Serve's gRPC options must name as a servicer function."""

MANY = 1_000_000
"""Calls that a replica may have at once for Ray's part: our own queue knows when it is full, in edges."""

REPORT_SECONDS = 0.5
"""How often replicas say how much they have to do."""

LOOK_BACK_SECONDS = 2.0
"""Over how long that is averaged."""


def application(mapping: Mapping[str, object], *, base: Path) -> Application:
    """An application of this configuration, whose relative paths start from `base`.

    Raises:
        ServeError: something is unknown, of the wrong type, or out of range.
    """
    config, settings = split(mapping, base=base)
    options: dict[str, Any] = {
        "name": "server",
        "max_ongoing_requests": MANY,
        "graceful_shutdown_timeout_s": config.drain_seconds + STOP_MARGIN,
        "health_check_period_s": 5.0,
        **_reserved(config, settings),
        **_number(settings),
    }
    deployment = serve.deployment(Replica).options(**options)
    return deployment.bind(dict(mapping), str(base.absolute()))


def _number(settings: RaySettings) -> dict[str, Any]:
    """How many replicas there are."""
    if settings.max_replicas is None or settings.max_replicas == settings.replicas:
        return {"num_replicas": settings.replicas}
    policy = {
        "policy_function": f"{ByOpenEdges.__module__}:{ByOpenEdges.__name__}",
        "policy_kwargs": {"open_edges": settings.open_edges},
    }
    return {
        "num_replicas": None,
        "autoscaling_config": {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "initial_replicas": settings.replicas,
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
            "metrics_interval_s": REPORT_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "policy": policy,
        },
    }


def _reserved(config: ServeConfig, settings: RaySettings) -> dict[str, Any]:
    """What each replica reserves, and what its process is told by the environment."""
    cpus = float(config.threads or 1) if settings.cpus is None else settings.cpus
    gpus = float(config.device != "cpu") if settings.gpus is None else settings.gpus
    environment = {
        # One loop for Ray's server and for ours, which answers without a hop between threads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.limits.message_bytes),
        # As `heap.share_one`, for which a replica has too many threads by the time that it is ours.
        "MALLOC_ARENA_MAX": "1",
    }
    ranks = config.tensor_parallel
    actor: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
    if ranks == 1:
        return {"ray_actor_options": {**actor, "num_cpus": cpus, "num_gpus": gpus}}
    # The replica has its own share of the ranks as children; workers have the others', one in each bundle.
    each = ranks // (config.worker_hosts + 1)
    bundle = {"CPU": each * cpus, **({"GPU": each * gpus} if gpus else {})}
    return {
        "ray_actor_options": {**actor, "num_cpus": each * cpus, "num_gpus": each * gpus},
        "placement_group_bundles": [bundle] * (config.worker_hosts + 1),
        "placement_group_strategy": "PACK" if config.worker_hosts else "STRICT_PACK",
    }
