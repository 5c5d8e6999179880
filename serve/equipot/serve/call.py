"""What is known of one call on its way: who asks, by which id, what it took. Decides nothing."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

ANONYMOUS = ""
"""The identity of a caller of whom no name is known."""

MOST_PHASES = 64
"""Phases of one call that are kept for its trace: a request of a thousand batches needs no thousand spans."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a call's time, from `start` to `end` in seconds of `time.monotonic`.

    Attributes:
        name: what was done.
        start: when it began.
        end: when it was done.
        edges: of the batch, if it was one.
        structures: of the batch, if it was one.
    """

    name: str
    start: float
    end: float
    edges: int = 0
    structures: int = 0


class Charged(Protocol):
    """Whatever keeps account of what its caller asks for."""

    def again(self, *, now: float) -> None:
        """Lets the next request of a stream in; may raise `CallError`."""

    def allows(self, atoms: int, edges: float) -> bool:
        """Whether one request may have so many; infinite where the number is not known."""

    def charge(self, name: Literal["atoms", "edges"], amount: int, in_request: int, *, now: float) -> None:
        """Takes atoms or edges of a request, which has so many in all by now; may raise `CallError`."""


@dataclass(slots=True, kw_only=True)
class Call:
    """One call; its fields are filled in as they become known.

    Attributes:
        method: its full name on the wire, "/package.Service/Method".
        request_id: by which logs, traces and the caller's errors name it.
        identity: the caller's name, `ANONYMOUS` if none is known.
        traceparent: the caller's place in a W3C trace, as it was sent.
        token: digest of the bearer token by which it was let in; empty if by none.
        model: that answers; empty if none was found.
        version: of that model.
        structures: in the request, or that a stream was opened with.
        atoms: in the request, or that a stream was opened with.
        edges: of the structures that were prepared; over all steps of a stream.
        steps: requests that a stream made of its structures; 0 of a call that is no stream.
        outcome: "ok", or why it was not answered, as in the metric of requests.
        account: of what the caller may ask for; None if nobody keeps one.
        phases: where its time went, the first of them; None if nobody wants to know.
        totals: seconds in all phases, by name; None if nobody wants to know.
        started: seconds of `time.monotonic`.
        seconds: from then until its answer was ready.
        peer: the caller's address, noted if it was turned away.
        contents: of its structures, if the log is to have them.
    """

    method: str = ""
    request_id: str = ""
    identity: str = ANONYMOUS
    traceparent: str = ""
    token: bytes = b""
    model: str = ""
    version: str = ""
    structures: int = 0
    atoms: int = 0
    edges: int = 0
    steps: int = 0
    outcome: str = "ok"
    account: Charged | None = None
    phases: list[Phase] | None = None
    totals: dict[str, float] | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    peer: str = ""
    contents: object = None
    _stream: Call | None = None

    def allows(self, atoms: int, edges: float) -> bool:
        """Whether its caller may ask for so many in one request; infinite where the number is not known."""
        return self.account is None or self.account.allows(atoms, edges)

    def asked(self, structures: int, atoms: int) -> None:
        """Notes what the request holds.

        Raises:
            CallError: it is more than its caller may ask for, at once or now.
        """
        self.structures, self.atoms = structures, atoms
        if self.account is not None:
            self.account.charge("atoms", atoms, atoms, now=time.monotonic())

    def prepared(self, edges: int) -> None:
        """Notes edges of some of its structures.

        Raises:
            CallError: together they are more than its caller may ask for in one request.
        """
        self.edges += edges
        if self._stream is not None:
            self._stream.edges += edges
        if self.account is not None:
            self.account.charge("edges", edges, self.edges, now=time.monotonic())

    def next_request(self) -> Call:
        """The same call with nothing in it, for the next request of a stream.

        Raises:
            CallError: its caller may not ask again now.
        """
        if self.account is not None:
            self.account.again(now=time.monotonic())
        self.steps += 1
        return replace(self, structures=0, atoms=0, edges=0, steps=0, _stream=self)

    def spent(self, name: str, start: float, end: float, *, edges: int = 0, structures: int = 0) -> None:
        """Notes a phase, if anybody wants to know."""
        if self.totals is not None:
            self.totals[name] = self.totals.get(name, 0.0) + end - start
        if self.phases is not None and len(self.phases) < MOST_PHASES:
            self.phases.append(Phase(name, start, end, edges, structures))


_current: ContextVar[Call] = ContextVar("equipot_call")


def current_call() -> Call:
    """The call that this task answers; an anonymous one without limits where no door was passed."""
    call = _current.get(None)
    return Call() if call is None else call


def enter(call: Call) -> None:
    """Makes it the one that this task answers."""
    _current.set(call)
