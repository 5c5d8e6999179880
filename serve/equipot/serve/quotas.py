"""How much each identity may ask for. Pure bookkeeping: no gRPC, no clock, no file.

Rates are buckets that fill at the rate and hold some seconds of it. Whoever has anything left may ask, and is
charged what the request turns out to hold, even if that is more: the next one waits until the debt is paid.
So no request is impossible by its size, and over time nobody gets more than the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from equipot.serve.errors import OverLimit, OverQuota
from equipot.serve.shares import Priority, Share

RETRY_BUSY = 0.25
"""Seconds after which one of an identity's own running requests may be done; nobody knows better."""

RETRY_STREAM = 5.0
"""As `RETRY_BUSY`, of what may be open for hours."""

MOST_IDLE = 4096
"""Identities that are remembered while they ask for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What one identity may ask for; None is as much as it likes.

    Attributes:
        atoms_per_second: on the long run.
        edges_per_second: on the long run; of structures that were prepared, computed or not.
        requests_per_second: on the long run.
        burst_seconds: of these rates that may be saved up and spent at once.
        concurrent_requests: under way at the same time, beside sessions and relaxations.
        concurrent_streams: sessions and relaxations that are open at the same time.
        request_atoms: in one request.
        request_edges: in one request.
        weight: of the engine's time, while others want it, too.
        priority: the highest that it may ask for.
    """

    atoms_per_second: float | None = None
    edges_per_second: float | None = None
    requests_per_second: float | None = None
    burst_seconds: float = 10.0
    concurrent_requests: int | None = None
    concurrent_streams: int | None = None
    request_atoms: int | None = None
    request_edges: int | None = None
    weight: float = 1.0
    priority: Literal["low", "normal", "high"] = "normal"


UNLIMITED = Allowance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowances:
    """What everybody may ask for.

    Attributes:
        default: of each identity that is not named, the anonymous one included.
        named: of the others.
    """

    default: Allowance = UNLIMITED
    named: Mapping[str, Allowance] = field(default_factory=dict)

    def of(self, identity: str) -> Allowance:
        """What this identity may ask for."""
        return self.named.get(identity, self.default)


class Bucket:
    """Fills at `rate` a second up to `capacity`; full at first. Its level may go below zero."""

    __slots__ = ("_at", "_capacity", "_level", "_rate")

    def __init__(self, rate: float, capacity: float, *, now: float) -> None:
        self._rate, self._capacity = rate, capacity
        self._level, self._at = capacity, now

    def seconds_until(self, amount: float, *, now: float) -> float:
        """How long until it holds so much; 0 if it does."""
        self._fill(now)
        return max(0.0, (min(amount, self._capacity) - self._level) / self._rate)

    def take(self, amount: float, *, now: float) -> None:
        """Takes so much, whether it is there or not."""
        self._fill(now)
        self._level -= amount

    def is_full(self, *, now: float) -> bool:
        """Whether it holds as much as it can."""
        self._fill(now)
        return self._level >= self._capacity

    def reshaped(self, rate: float, capacity: float, *, now: float) -> Bucket:
        """Another rate and capacity; what is spent or owed now stays so."""
        self._fill(now)
        bucket = Bucket(rate, capacity, now=now)
        bucket._level = capacity - (self._capacity - self._level)
        return bucket

    def _fill(self, now: float) -> None:
        # A clock that steps back fills nothing, and nothing twice.
        if now > self._at:
            self._level = min(self._capacity, self._level + self._rate * (now - self._at))
            self._at = now


_RATES = ("requests", "atoms", "edges")


class Account:
    """One identity's use of what it may ask for. Times are seconds of any monotonic clock, passed in."""

    def __init__(self, identity: str, allowance: Allowance, *, now: float) -> None:
        self.identity = identity
        self._running = 0
        self._streams = 0
        self._buckets: dict[str, Bucket] = {}
        self.change(allowance, now=now)

    def change(self, allowance: Allowance, *, now: float) -> None:
        """From now on it may ask for this much."""
        self._allowance = allowance
        buckets = {}
        for name in _RATES:
            rate: float | None = getattr(allowance, f"{name}_per_second")
            if rate is not None:
                # One request must fit: a rate of one a minute would never let any in.
                capacity = max(1.0, rate * allowance.burst_seconds)
                old = self._buckets.get(name)
                buckets[name] = (
                    old.reshaped(rate, capacity, now=now) if old else Bucket(rate, capacity, now=now)
                )
        self._buckets = buckets

    def begin(self, *, now: float, of_many: bool = False) -> None:
        """Lets one request in; `end` must follow, of as many.

        Args:
            now: the time.
            of_many: whether it is a stream, whose requests come one by one and are taken by `again`. Opening
                it takes none: else whoever is let in when one is there could open it and ask nothing.

        Raises:
            OverQuota: too many are under way, or a rate is used up; nothing was taken then.
        """
        if of_many:
            most = self._allowance.concurrent_streams
            if most is not None and self._streams >= most:
                raise self._over("concurrent_streams", most, RETRY_STREAM)
            self._check_rates(now)
            self._streams += 1
            return
        most = self._allowance.concurrent_requests
        if most is not None and self._running >= most:
            raise self._over("concurrent_requests", most, RETRY_BUSY)
        self._check_rates(now)
        self._take_request(now)
        self._running += 1

    def again(self, *, now: float) -> None:
        """Lets the next request of a stream in.

        Raises:
            OverQuota: a rate is used up; nothing was taken then.
        """
        self._check_rates(now)
        self._take_request(now)

    def _check_rates(self, now: float) -> None:
        for name, bucket in self._buckets.items():
            # A whole request must be there, and anything at all of atoms and edges.
            wait = bucket.seconds_until(1.0 if name == "requests" else math.ulp(1.0), now=now)
            if wait > 0:
                limit = getattr(self._allowance, f"{name}_per_second")
                raise self._over(f"{name}_per_second", limit, wait)

    def _take_request(self, now: float) -> None:
        if "requests" in self._buckets:
            self._buckets["requests"].take(1.0, now=now)

    def end(self, *, of_many: bool = False) -> None:
        """One request, or a stream of them, is done."""
        if of_many:
            self._streams -= 1
        else:
            self._running -= 1

    def allows(self, atoms: int, edges: float) -> bool:
        """Whether one request may have so many; infinite where the number is not known."""
        allowance = self._allowance
        most_atoms, most_edges = allowance.request_atoms, allowance.request_edges
        return (most_atoms is None or atoms <= most_atoms) and (most_edges is None or edges <= most_edges)

    def charge(self, name: Literal["atoms", "edges"], amount: int, in_request: int, *, now: float) -> None:
        """Takes atoms or edges of a request, which has so many in all by now.

        Raises:
            OverLimit: more than one request may have.
        """
        most: int | None = getattr(self._allowance, f"request_{name}")
        if most is not None and in_request > most:
            raise OverLimit(
                f"the request has {in_request} {name}{' or more' if name == 'edges' else ''}, the limit of"
                f" {_named(self.identity)} is {most}: send less at once",
                field="structures.n_atoms",
                facts={"identity": self.identity, name: str(in_request), f"request_{name}": str(most)},
            )
        if name in self._buckets:
            self._buckets[name].take(amount, now=now)

    def is_idle(self, *, now: float) -> bool:
        """Whether forgetting it would change nothing."""
        return (
            not self._running
            and not self._streams
            and all(bucket.is_full(now=now) for bucket in self._buckets.values())
        )

    def _over(self, name: str, limit: float, wait: float) -> OverQuota:
        return OverQuota(
            f"{_named(self.identity)} may have {limit:g} {name.replace('_', ' ')}, and that is used up",
            retry_after=wait,
            facts={"identity": self.identity, "limit": name, name: f"{limit:g}"},
        )


class Quotas:
    """The accounts of all identities."""

    def __init__(self, allowances: Allowances) -> None:
        self._allowances = allowances
        self._accounts: dict[str, Account] = {}

    def change(self, allowances: Allowances, *, now: float) -> None:
        """From now on these hold; what is under way or owed stays so."""
        self._allowances = allowances
        for identity, account in self._accounts.items():
            account.change(allowances.of(identity), now=now)

    def allowance(self, identity: str) -> Allowance:
        """What an identity may ask for."""
        return self._allowances.of(identity)

    def share_of(self, identity: str) -> Share:
        """What an identity may have of the engine."""
        allowance = self._allowances.of(identity)
        return Share(weight=allowance.weight, highest=Priority[allowance.priority.upper()])

    def account(self, identity: str, *, now: float) -> Account:
        """An identity's account."""
        account = self._accounts.get(identity)
        if account is None:
            if len(self._accounts) >= MOST_IDLE:
                self._forget_idle(now)
            account = self._accounts[identity] = Account(identity, self._allowances.of(identity), now=now)
        return account

    def _forget_idle(self, now: float) -> None:
        self._accounts = {
            identity: account for identity, account in self._accounts.items() if not account.is_idle(now=now)
        }


def _named(identity: str) -> str:
    return identity or "whoever gives no name"
