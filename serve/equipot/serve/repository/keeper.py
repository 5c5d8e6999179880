"""Keeps what is served in step with a repository and with what operators say: decides, and swaps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.model_metrics import ModelMetrics
from equipot.serve.registry import STABLE, Family, Label, Registry, Slot
from equipot.serve.repository.observe import Observed, Observer, completed
from equipot.serve.repository.settings import Preload, RepositorySettings
from equipot.serve.repository.source import Key, Place, Source, SourceError
from equipot.serve.repository.stock import Stock
from equipot.serve.repository.wishes import Wishes

REAP_SECONDS = 0.5
"""How often versions that nobody wants are looked for."""

RETRY_NO_ROOM = 5.0
"""Seconds after which a model may have become idle, where all that may be loaded are in use."""

RETURN_SECONDS = 10.0
"""A version that was brought for somebody waits so long for them, whatever else is said of unused ones."""

logger = logging.getLogger(__name__)


class UnknownModelError(LookupError):
    """There is no such model, version or label; the message says which."""


class Keeper:
    """All changes are made in the event loop, one after the other.

    Attributes:
        registry: what is served.
    """

    def __init__(
        self, settings: RepositorySettings, registry: Registry, config: ServeConfig, metrics: ModelMetrics
    ) -> None:
        self.registry = registry
        self._settings = settings
        self._source = Source(settings.url, settings.cache)
        self._observer = Observer(self._source)
        self._stock = Stock(
            self._source, settings, config, registry, metrics, self._has_role, self._replaced_by
        )
        self._wishes = Wishes()
        self._observed = Observed()
        self._places: dict[Key, Place] = {}
        self._others = frozenset(registry.families)
        self._changing = asyncio.Lock()
        self._wanted: set[Key] = set()
        self._seen: tuple[str, ...] = ()
        self._unmet: dict[str, list[str]] = {}
        registry.want = self._want

    @property
    def shown(self) -> str:
        """The repository's URL without what may be secret."""
        return self._source.shown

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong in the repository now, one sentence each."""
        unmet = [problem for problems in self._unmet.values() for problem in problems]
        return (*self._seen, *self._wishes.problems.values(), *unmet)

    @property
    def busy(self) -> bool:
        """Whether something is being read or loaded, which cannot be interrupted."""
        return self._changing.locked()

    async def start(self) -> None:
        """Looks for the first time and loads what is to be there at once; then goes on by itself.

        Raises:
            ServeError: the repository cannot be read.
        """
        async with self._changing:
            try:
                observed = await self._stock.in_thread(self._observer.look)
            except SourceError as error:
                raise ServeError(f"{error}; give a folder or URL that holds NAME/VERSION/ bundles") from error
            if self._others and self._settings.default:
                raise ServeError("--default-model is for a repository alone: the first bundle is the default")
            if clash := sorted(self._others & {*observed.places, *observed.unread.names}):
                raise ServeError(f"{clash[0]!r} is in the repository and given beside it, too: rename one")
            await self._follow(observed)
        self._stock.spawn(self._reap())
        if self._settings.poll:
            self._stock.spawn(self._poll())

    def close(self) -> None:
        """Ends what goes on by itself."""
        self._stock.close()

    async def refresh(self) -> None:
        """Looks again, and returns when all that follows is done.

        A repository that cannot be read changes nothing; nor does a part of it for what it held.
        """
        async with self._changing:
            try:
                observed = await self._stock.in_thread(self._observer.look)
            except SourceError as error:
                self._tell((str(error),))
                return
            observed = completed(observed, self._observed)
            if not observed.places and self._places:
                # A volume that is not mounted looks so; whoever means it can unload.
                empty = f"repository {self.shown} is empty now: what it held goes on being served"
                self._tell((*observed.problems, empty))
                return
            await self._follow(observed)

    async def load(self, name: str, version: str) -> Slot:
        """Loads a version, or loads it again if its folder has changed; empty is the newest.

        Raises:
            UnknownModelError: there is none.
            ServeError: it cannot be loaded; what answered before still does.
        """
        await self.refresh()
        async with self._changing:
            family = self._family(name)
            slot = self._slot(family, version or next(reversed(family.slots)))
            slot.closed = False
            await self._must_bring(slot)
            self._stock.held.add((name, slot.version))
            await self._settle(family)
            return slot

    async def unload(self, name: str, version: str) -> list[str]:
        """Ends a version, or all; requests under way finish. Returns those that answered.

        Where the plain name meant it, the next newest is loaded first.

        Raises:
            UnknownModelError: there is none.
            ServeError: a label names it.
        """
        async with self._changing:
            family = self._family(name)
            slots = [self._slot(family, version)] if version else list(family.slots.values())
            if version and (labels := family.labels_of(version)):
                raise ServeError(
                    f"{name}@{version} is {' and '.join(labels)}: let the label name another version first"
                )
            for slot in slots:
                slot.closed = True
            await self._settle(family)
            ended = [slot.version for slot in slots if slot.model is not None]
            for slot in slots:
                self._stock.let_go(slot)
                self._stock.let_go_former(family, slot.version)
            self._point(family)
            return ended

    async def set_label(self, name: str, label: str, target: Label) -> Slot:
        """Lets a label name a version, loaded first; until the labels file changes.

        Raises:
            UnknownModelError: there is no such model or version.
            ServeError: the version cannot be loaded.
        """
        async with self._changing:
            family = self._family(name)
            slot = self._slot(family, target.version)
            slot.closed = False
            await self._must_bring(slot)
            self._wishes.set(name, label, target)
            await self._settle(family)
            return slot

    async def remove_label(self, name: str, label: str) -> None:
        """Takes a label away; until the labels file changes.

        Raises:
            UnknownModelError: there is no such model or label.
        """
        async with self._changing:
            family = self._family(name)
            try:
                self._wishes.remove(name, label)
            except KeyError:
                raise UnknownModelError(f"{name} has no label {label[:100]!r}") from None
            await self._settle(family)

    async def _follow(self, observed: Observed) -> None:
        """Does what the repository says now."""
        self._observed = observed
        self._wishes.adopt(observed)
        self._places = {
            (name, version): place
            for name, places in observed.places.items()
            for version, place in places.items()
        }
        for name, places in observed.places.items():
            self._adopt(self.registry.families.setdefault(name, Family(name)), places, observed)
        self._tell(observed.problems)
        self._set_default()
        for family in [one for one in self.registry.families.values() if one.name not in self._others]:
            await self._settle(family)
        self._set_default()

    def _adopt(self, family: Family, places: Mapping[str, Place], observed: Observed) -> None:
        slots = {}
        for version, place in places.items():
            key = (family.name, version)
            slot = slots[version] = family.slots.get(version) or Slot(*key)
            slot.card = observed.cards.get(key)
            if not self._stock.still_failed(slot, place):
                slot.reason = observed.reasons.get(key, "")
        # What is no longer there answers until others stand in its place.
        family.slots = {
            version: slot for version, slot in family.slots.items() if version not in slots
        } | slots

    async def _settle(self, family: Family) -> None:
        """Loads what is to be in memory, swaps, then lets go of what is no longer there."""
        for slot in self._targets(family):
            if slot.eligible and not slot.reason and (slot.model is None or _changed(slot)):
                await self._bring(slot)
        lazy = self._settings.preload is Preload.NONE
        # A newest version that proves broken leaves its place to the one before.
        while (newest := self._newest(family)) is not None and newest.model is None:
            if lazy and not _answers(family, family.current):
                break
            await self._bring(newest)
            if newest.model is None and not newest.reason:
                break
        self._point(family)
        gone = [version for version in family.slots if (family.name, version) not in self._places]
        for version in gone:
            self._stock.let_go(family.slots.pop(version))
            self._stock.let_go_former(family, version)
        if gone:
            self._point(family)
        if not family.slots:
            del self.registry.families[family.name]
            self._unmet.pop(family.name, None)

    def _targets(self, family: Family) -> list[Slot]:
        """What is to be in memory and up to date, besides what the plain name means."""
        there = [slot for slot in family.slots.values() if self._there(slot)]
        if self._settings.preload is Preload.ALL:
            return there
        labelled = {
            label.version
            for name, label in self._wishes.labels(family.name).items()
            # Of what is loaded when it is asked for, a label moves from memory only to memory.
            if self._settings.preload is Preload.DEFAULT
            or ((old := family.labels.get(name)) and _answers(family, old.version))
        }
        return [slot for slot in there if slot.model is not None or slot.version in labelled]

    def _newest(self, family: Family) -> Slot | None:
        """What the plain name means without a stable label: the newest that is not on trial."""
        if self._wishes.stable(family.name):
            return None
        eligible = [slot for slot in family.slots.values() if slot.eligible and self._there(slot)]
        on_trial = self._wishes.on_trial(family.name)
        return next(reversed([slot for slot in eligible if slot.version not in on_trial] or eligible), None)

    def _point(self, family: Family) -> None:
        """Lets plain name and labels mean what answers now."""
        lazy = self._settings.preload is Preload.NONE
        in_force, unmet = {}, []
        for name, label in self._wishes.labels(family.name).items():
            slot = family.slots.get(label.version)
            if slot is not None and slot.eligible and (slot.model is not None or lazy):
                in_force[name] = label
                continue
            why = (
                "is not there"
                if slot is None
                else "was unloaded"
                if slot.closed
                else f"failed: {slot.reason}"
            )
            unmet.append(f"{family.name}: label {name} names version {label.version}, which {why}")
            before = family.labels.get(name)
            if before is not None and _answers(family, before.version):
                in_force[name] = before
        newest = self._newest(family)
        if newest is not None and (newest.model is not None or lazy):
            family.current = newest.version
        elif STABLE in in_force or not _answers(family, family.current):
            family.current = None
        family.labels = in_force
        stable = [problem for problem in unmet if f": label {STABLE} " in problem]
        family.blocked = self._wishes.blocked(family.name) or " ".join(stable)
        for problem in unmet:
            if problem not in self._unmet.get(family.name, ()):
                logger.warning("%s", problem)
        self._unmet[family.name] = unmet

    def _has_role(self, slot: Slot) -> bool:
        """Whether a plain name or a label means it, or is about to."""
        family = self.registry.families[slot.name]
        labels = (*family.labels.values(), *self._wishes.labels(slot.name).values())
        meant = {label.version for label in labels} | {family.current}
        return slot.version in meant or slot is self._newest(family)

    def _replaced_by(self, slot: Slot) -> set[str]:
        """Versions that plain name or labels mean until they can mean this one."""
        family = self.registry.families[slot.name]
        wished = self._wishes.labels(slot.name).items()
        names = {name for name, label in wished if label.version == slot.version}
        before = {label.version for name, label in family.labels.items() if name in names}
        if family.current is not None and slot is self._newest(family):
            before.add(family.current)
        return before

    async def _bring(self, slot: Slot) -> None:
        await self._stock.bring(slot, self._places[slot.name, slot.version])

    async def _must_bring(self, slot: Slot) -> None:
        if slot.model is None or _changed(slot) or slot.reason:
            slot.reason = ""
            await self._bring(slot)
        if slot.reason or slot.model is None:
            why = slot.reason or "as many models as may be are in use: raise --max-loaded"
            raise ServeError(f"{slot.name}@{slot.version} cannot be loaded: {why}")

    def _want(self, slot: Slot) -> float:
        """Somebody asks for a version that is not in memory; returns when to come again."""
        key = (slot.name, slot.version)
        if key not in self._wanted:
            self._wanted.add(key)
            self._stock.spawn(self._bring_wanted(slot))
        return self._stock.load_seconds + 0.5

    async def _bring_wanted(self, slot: Slot) -> None:
        try:
            async with self._changing:
                family = self.registry.families.get(slot.name)
                if family is None or family.slots.get(slot.version) is not slot or slot.model is not None:
                    return
                await self._bring(slot)
                if slot.model is not None:
                    # Whoever asked was told when to come again, and may be late.
                    slot.model.used += RETURN_SECONDS + self._stock.load_seconds
                self._point(family)
            if slot.model is None and not slot.reason:
                await asyncio.sleep(RETRY_NO_ROOM)
        finally:
            self._wanted.discard((slot.name, slot.version))

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            if not self.busy:
                self._stock.reap()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll)
            try:
                await self.refresh()
            except Exception:
                logger.exception("looking at %s failed; another look follows", self.shown)

    def _there(self, slot: Slot) -> bool:
        return (slot.name, slot.version) in self._places

    def _family(self, name: str) -> Family:
        family = self.registry.families.get(name)
        if family is None:
            raise UnknownModelError(f"there is no model {name[:200]!r} in {self.shown}")
        if name in self._others:
            raise ServeError(f"{name} comes from no repository: it stays as long as the server")
        return family

    def _slot(self, family: Family, version: str) -> Slot:
        slot = family.slots.get(version)
        if slot is None or not self._there(slot):
            raise UnknownModelError(
                f"there is no version {version[:100]!r} of {family.name}; there are {', '.join(family.slots)}"
            )
        return slot

    def _set_default(self) -> None:
        if not self._others:
            names, asked = list(self.registry.families), self._settings.default
            self.registry.default = asked or (names[0] if len(names) == 1 else None)

    def _tell(self, problems: tuple[str, ...]) -> None:
        """Notes what is wrong, and writes into the log what was not wrong before."""
        for problem in problems:
            if problem not in self._seen:
                logger.warning("%s", problem)
        self._seen = problems


def _answers(family: Family, version: str | None) -> bool:
    slot = family.slots.get(version or "")
    return slot is not None and slot.model is not None


def _changed(slot: Slot) -> bool:
    """Whether the folder holds another bundle than the one that answers."""
    model, card = slot.model, slot.card
    return model is not None and card is not None and model.card.digest != card.digest
