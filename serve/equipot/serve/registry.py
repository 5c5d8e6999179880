"""Which version answers a request: names, versions, digests, labels. Bookkeeping of one event loop alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from equipot.serve.card import ModelCard, read_model_card
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.errors import InvalidRequest, NotReady, NotServed, ServeError
from equipot.serve.models import ServedModel, describe, load_bundle, load_calculator
from equipot.wire.v1 import potential_pb2 as pb

SHORTEST_DIGEST = 8
"""Hexadecimal digits of a digest that a caller must give at least."""

STABLE, CANARY, SHADOW = "stable", "canary", "shadow"
"""Labels with a meaning of their own; any other is a name for a version."""

MOST_NAMED = 20
"""How many versions an error names: it travels in a header."""

_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{SHORTEST_DIGEST},64}}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class State(StrEnum):
    """Of one version."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


_STATES: Mapping[State, pb.ModelState.ValueType] = {
    State.AVAILABLE: pb.MODEL_STATE_AVAILABLE,
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.READY: pb.MODEL_STATE_READY,
    State.FAILED: pb.MODEL_STATE_FAILED,
}


@dataclass(frozen=True, slots=True)
class Label:
    """What a label names, and the share of sessions (canary) or of requests (shadow) that it gets."""

    version: str
    weight: float = 1.0


@dataclass(slots=True, eq=False)
class Slot:
    """One version of a model, in memory or not.

    Attributes:
        name: of the model.
        version: of the model.
        card: of what the repository holds now; None if it cannot be read.
        model: what answers.
        loading: whether another content, or the first, is being loaded.
        reason: why what the repository holds now cannot be loaded.
        closed: whether an operator unloaded it.
    """

    name: str
    version: str
    card: ModelCard | None = None
    model: ServedModel | None = None
    loading: bool = False
    reason: str = ""
    closed: bool = False

    @property
    def state(self) -> State:
        """What a caller may expect of it."""
        if self.model is not None:
            return State.READY
        if self.loading:
            return State.LOADING
        return State.FAILED if self.reason else State.AVAILABLE

    @property
    def eligible(self) -> bool:
        """Whether it may be meant: it answers, or would once it is loaded."""
        return not self.closed and (self.model is not None or not self.reason)


@dataclass(slots=True, eq=False)
class Family:
    """All versions of one model.

    Attributes:
        name: what callers ask for.
        slots: by version, the oldest first.
        labels: in force, by label.
        current: the version that the plain name means without labels; None if there is none yet.
        blocked: why the plain name means nothing; empty if it does.
        former: what answered until its folder got another content, for those who named its digest.
    """

    name: str
    slots: dict[str, Slot] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)
    current: str | None = None
    blocked: str = ""
    former: list[ServedModel] = field(default_factory=list)

    def labels_of(self, version: str) -> list[str]:
        """Labels that name a version."""
        return sorted(label for label, target in self.labels.items() if target.version == version)

    @property
    def plain(self) -> str | None:
        """The version that the plain name means for sessions that do not get the canary."""
        stable = self.labels.get(STABLE)
        return stable.version if stable is not None else self.current

    def meant(self, session: str) -> str | None:
        """The version that the plain name means for a session."""
        canary = self.labels.get(CANARY)
        if canary is not None and share(self.name, session) < canary.weight:
            return canary.version
        return self.plain


class Registry:
    """What a server serves.

    Attributes:
        families: by name.
        default: the model that an empty name means; None if callers must name one.
        want: told of a version that somebody asks for and that is not in memory; says when to come again.

    Raises:
        ServeError: two models have the same name.
    """

    def __init__(self, models: Sequence[ServedModel] = (), *, default: str | None = None) -> None:
        check_names([model.name for model in models])
        self.families = {
            model.name: Family(
                model.name,
                {model.version: Slot(model.name, model.version, model.card, model)},
                current=model.version,
            )
            for model in models
        }
        self.default = models[0].name if models and default is None else default
        self.want: Callable[[Slot], float] | None = None

    @classmethod
    def load(cls, config: ServeConfig) -> Registry:
        """Loads every bundle and calculator; cards first, so that a wrong name costs no time.

        Raises:
            BundleError: a bundle is missing, damaged, or of a newer version.
            ServeError: two bundles have the same name, or the device cannot be used.
        """
        foreign = [spec.shown_name for spec in config.calculators]
        check_names([*(read_model_card(path).name for path in config.bundles), *foreign])
        bundles = [load_bundle(path, config) for path in config.bundles]
        return cls([*bundles, *(load_calculator(spec, config) for spec in config.calculators)])

    def __iter__(self) -> Iterator[ServedModel]:
        """Everything in memory."""
        for family in self.families.values():
            yield from (slot.model for slot in family.slots.values() if slot.model is not None)
            yield from family.former

    @property
    def ready(self) -> bool:
        """Whether there is anything, and every model in memory that a plain name means can compute now."""
        meant = (
            family.slots[version]
            for family in self.families.values()
            if (version := family.plain) in family.slots
        )
        possible = any(slot.eligible for family in self.families.values() for slot in family.slots.values())
        return possible and all(slot.model is None or slot.model.ready for slot in meant)

    def find(self, wanted: str, *, session: str = "") -> ServedModel:
        """The model that a caller names: "", "name", "name@version", "name@label" or "name@sha256:…".

        Args:
            wanted: the name; a digest may be cut short.
            session: whose calls are to get the same version while labels stay as they are.

        Raises:
            NotServed: nothing of that name, version, label or digest is served.
            NotReady: it is being loaded.
            InvalidRequest: what follows the @ can be none of these, or a model must be named.
        """
        family, slot = self._place(wanted, session)
        if isinstance(slot, ServedModel):
            return slot
        if slot.model is not None:
            return slot.model
        if slot.closed or slot.reason:
            why = "was unloaded" if slot.closed else f"cannot be loaded: {slot.reason}"
            raise self._not_served(f"{family.name}@{slot.version} {why}", family)
        assert self.want is not None, "a version without a model comes from a repository"
        raise NotReady(f"{family.name}@{slot.version} is being loaded", retry_after=self.want(slot))

    def locate(self, wanted: str, session: str) -> tuple[Family, Slot]:
        """The version that a caller names, in memory or not.

        Raises:
            NotServed: as `find`.
            InvalidRequest: as `find`.
        """
        family, slot = self._place(wanted, session)
        if isinstance(slot, ServedModel):
            slot = Slot(family.name, slot.version, slot.card, slot)
        return family, slot

    def describe(self, family: Family, slot: Slot, limits: RequestLimits) -> pb.Model:
        """One version on the wire."""
        model = slot.model
        card = model.card if model is not None else slot.card
        message = describe(card, limits) if card is not None else pb.Model()
        message.name, message.version = family.name, slot.version
        if model is not None:
            message.dtype = model.engine.dtype
        message.state = _STATES[slot.state]
        message.reason = slot.reason or ("unloaded by an operator" if slot.closed else "")
        if family.slots.get(slot.version) is slot:
            message.labels.extend(family.labels_of(slot.version))
            message.is_current = slot.version == family.plain
        message.is_default = message.is_current and family.name == self.default
        return message

    def listing(self, limits: RequestLimits) -> list[pb.Model]:
        """Every version, the newest of each model first."""
        return [
            self.describe(family, slot, limits)
            for family in self.families.values()
            for slot in reversed(family.slots.values())
        ]

    def _place(self, wanted: str, session: str) -> tuple[Family, Slot | ServedModel]:
        name, at, rest = wanted.partition("@")
        if not name:
            if at or self.default is None:
                raise InvalidRequest(f"name a model: {self._served() or 'none is served'}", field="model")
            name = self.default
        family = self.families.get(name)
        if family is None:
            which = f"model {wanted[:200]!r}" if wanted else f"model of the default name {name}"
            raise self._not_served(f"no {which} is served here", None)
        if not at:
            version = family.meant(session)
            if version is None or version not in family.slots:
                why = family.blocked or "no version of it can be"
                raise self._not_served(f"{name} is not served by its name alone: {why}", family)
            return family, family.slots[version]
        if _DIGEST.fullmatch(rest):
            return family, self._by_digest(family, rest, wanted)
        if rest.startswith("sha256:") or not _WORD.fullmatch(rest):
            raise InvalidRequest(
                f"{rest[:100]!r} is no version, label or digest: write name@version, name@label, or"
                f" name@sha256: and at least {SHORTEST_DIGEST} digits of the digest",
                field="model",
            )
        label = family.labels.get(rest)
        slot = family.slots.get(rest if label is None else label.version)
        if slot is None:
            raise self._not_served(f"no model {wanted[:200]!r} is served here", family)
        return family, slot

    def _by_digest(self, family: Family, digest: str, wanted: str) -> Slot | ServedModel:
        newest_first = list(reversed(family.slots.values()))
        for slot in newest_first:
            if slot.model is not None and slot.model.card.digest.startswith(digest):
                return slot
        for model in family.former:
            if model.card.digest.startswith(digest):
                return model
        for slot in newest_first:
            # What is in memory under this version is another content, unless there is none.
            if slot.model is None and slot.card is not None and slot.card.digest.startswith(digest):
                return slot
        raise self._not_served(f"no model {wanted[:200]!r} is served here", family)

    def _not_served(self, what: str, family: Family | None) -> NotServed:
        served = self._served(family)
        return NotServed(
            f"{what}; served are {served or 'none'}", field="model", facts={"served": served[:1000]}
        )

    def _served(self, only: Family | None = None) -> str:
        """What there is, in memory or not: one model's versions, or everything."""
        families = [only] if only is not None else list(self.families.values())
        names = [
            _address(family, slot)
            for family in families
            for slot in reversed(family.slots.values())
            if slot.eligible
        ]
        if not names and only is not None:
            return self._served()
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        return ", ".join(names[:MOST_NAMED]) + more


def share(name: str, session: str) -> float:
    """A number in [0, 1) that is a session's own for each model: a canary of weight w gets those below w.

    A weight that grows thus moves sessions to the canary and none of them back.
    """
    digest = hashlib.sha256(f"{name}\n{session}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def check_names(names: Sequence[str]) -> None:
    """Refuses two models of one name: a caller could not tell them apart.

    Raises:
        ServeError: a name comes twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise ServeError(
                f"two bundles are called {name!r}: export one of them under another --name, or serve one"
            )


def _address(family: Family, slot: Slot) -> str:
    card = slot.model.card if slot.model is not None else slot.card
    if not slot.version:
        return family.name if card is None else f"{family.name}@{card.digest}"
    labels = "".join(f", {label}" for label in family.labels_of(slot.version))
    digest = "" if card is None else f"{card.digest[:19]}"
    return f"{family.name}@{slot.version} ({digest}{labels})"
