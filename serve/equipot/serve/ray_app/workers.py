"""Actors that lend their places in a replica's placement group to its ranks. Knows nothing of models.

Each is what `equipot join` is on a machine without Ray: ranks come to the replica that leads, wherever Ray
has put them. They belong to the replica and end with it.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from equipot.serve.config import ServeConfig
from equipot.serve.free import free_port
from equipot.serve.hosts import join

logger = logging.getLogger(__name__)


class Worker:
    """Lends what its actor has reserved to the leader at this address."""

    def __init__(self, leader: str, port: int, key: str) -> None:
        """Comes to the leader again and again, as long as this actor lives."""
        words = {"announce": logger.info, "stop": threading.Event()}
        threading.Thread(target=join, args=(leader, port, Path(key)), kwargs=words, daemon=True).start()


def call_workers(config: ServeConfig) -> tuple[ServeConfig, list[Any]]:
    """Starts a worker in each of the other bundles of this replica's placement group.

    Returns:
        The configuration with which they are waited for, and the actors, to be kept.
    """
    if not config.worker_hosts:
        return config, []
    here, port = get_node_ip_address(), free_port()
    group = get_current_placement_group()
    assert group is not None
    workers = []
    for place in range(1, config.worker_hosts + 1):
        bundle = group.bundle_specs[place]
        actor = ray.remote(Worker).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=place
            ),
        )
        workers.append(actor.remote(here, port, str(config.worker_key)))
    return replace(config, host=here, worker_port=port), workers
