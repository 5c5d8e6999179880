"""Ranks of other machines that fall silent or hang up are noticed in bounded time, and named to all."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from equipot.train.heartbeat import Heartbeat
from equipot.train.interfaces import address_towards, interface_towards
from equipot.train.world import World


@dataclass
class Meeting:
    """What ranks tell each other, for ranks that are threads: each on a machine of its own by name."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def of(self, rank: int) -> World:
        return ThreadWorld(self, rank)  # type: ignore[return-value]


class ThreadWorld:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size, self.is_first = meeting, rank, meeting.size, rank == 0

    def gather(self, value: tuple[str, str]) -> list[Any]:
        self.meeting.values[self.rank] = (f"host{self.rank}", "127.0.0.1")
        self.meeting.barrier.wait()
        return [self.meeting.values[rank] for rank in range(self.size)]

    def from_first(self, value: int) -> int:
        if self.is_first:
            self.meeting.values["port"] = value  # type: ignore[index]
        self.meeting.barrier.wait()
        return int(self.meeting.values["port"])  # type: ignore[index]


def heartbeats(size: int, timeout: float, ended: dict[int, float]) -> list[Heartbeat]:
    meeting, made = Meeting(size), {}

    def make(rank: int) -> None:
        made[rank] = Heartbeat(
            meeting.of(rank), timeout, lambda code: ended.setdefault(rank, time.monotonic())
        )

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [made[rank] for rank in range(size)]


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("how", ["hangs up", "falls silent"])
def test_a_lost_rank_is_named_to_all_and_ends_them(lost: int, how: str) -> None:
    ended: dict[int, float] = {}
    beats = heartbeats(3, 2.0, ended)
    started = time.monotonic()
    if how == "falls silent":
        beats[lost]._over.set()  # it beats no more, and says no farewell
    else:
        beats[lost]._over.set()
        for connection in beats[lost]._connections.values():
            connection.shutdown(2)
    others = [beat for rank, beat in enumerate(beats) if rank != lost]
    deadline = started + 15
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sorted(ended) == [rank for rank in range(3) if rank != lost]
    for beat in others:
        assert f"rank {lost} on host{lost} (127.0.0.1) was lost" in (beat.reason() or "")
    if how == "falls silent":
        assert min(ended.values()) - started > 1.5


def test_who_says_farewell_is_not_lost() -> None:
    ended: dict[int, float] = {}
    beats = heartbeats(2, 1.0, ended)
    time.sleep(1.5)  # longer than silence may last: they beat
    with beats[1]:
        pass
    time.sleep(1.5)
    assert not ended
    with beats[0]:
        assert beats[0]._lost is None
    time.sleep(0.5)
    assert not ended


def test_interfaces() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no.such.host.invalid") is None
    loopback = interface_towards("127.0.0.1", beyond=False)
    assert loopback is not None
    assert loopback.startswith("lo")
    assert interface_towards("127.0.0.1", beyond=True) != loopback
