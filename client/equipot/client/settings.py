"""What a client is made with, checked once and shared by both kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict, get_args
from uuid import uuid4

from equipot.client.batches import Priority, Wish
from equipot.client.certainty import Uncertainty, wanted
from equipot.client.channel import check_address
from equipot.client.credentials import Credentials
from equipot.client.diagnosis import explained
from equipot.client.errors import ClientError
from equipot.client.retry import RetryPolicy, seconds_of

DEFAULT_TIMEOUT = 60.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024**2
DEFAULT_ATOMS_PER_REQUEST = 4_096
DEFAULT_IN_FLIGHT = 4


class Asked(TypedDict, total=False):
    """What a call asks of a model for every structure.

    Keys:
        forces: whether forces are wanted; True if left out.
        stress: whether stress is wanted; False if left out.
        level_of_theory: one of the model's; empty or left out: its only one.
        model: another than the client's.
        uncertainty: True, or `Uncertainty` with a coverage of its own: whether the answer is to say how sure
            it is; False if left out.
    """

    forces: bool
    stress: bool
    level_of_theory: str
    model: str | None
    uncertainty: bool | Uncertainty


@dataclass(frozen=True, slots=True)
class Settings:
    """A client's arguments; see `equipot.client.Client`.

    Raises:
        ClientError: an address without a port, or a token that would travel there unencrypted.
        ValueError: a number out of its range.
    """

    address: str
    model: str
    timeout: float
    retry: RetryPolicy
    max_message_bytes: int
    atoms_per_request: int
    in_flight: int
    credentials: Credentials
    priority: Priority = "normal"
    session: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        check_address(self.address)
        self.credentials.check_address(self.address)
        for name, least in (("max_message_bytes", 2**16), ("atoms_per_request", 1), ("in_flight", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority is {self.priority!r}; give one of {', '.join(get_args(Priority))}")
        seconds_of(self.timeout)

    def seconds(self, timeout: float | None) -> float:
        """A call's own timeout if it has one, else the client's.

        Raises:
            ValueError: it is not above 0.
        """
        return seconds_of(self.timeout if timeout is None else timeout)

    def explained(self, problem: ClientError) -> ClientError:
        """The same problem, or a lack of trust that is behind it; may take seconds to find out."""
        return explained(problem, self.address, self.credentials.tls)

    def wish(self, asked: Asked) -> Wish:
        """What one call asks for."""
        model = asked.get("model")
        return Wish(
            model=self.model if model is None else model,
            level_of_theory=asked.get("level_of_theory", ""),
            forces=asked.get("forces", True),
            stress=asked.get("stress", False),
            uncertainty=wanted(asked.get("uncertainty", False)),
            priority=self.priority,
            session=self.session,
        )
