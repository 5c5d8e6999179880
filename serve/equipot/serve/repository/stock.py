"""The versions of a repository that are in memory: brought in beside what answers, and let go when idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from equipot.model.errors import BundleError
from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.memory import give_back
from equipot.serve.model_metrics import ModelMetrics
from equipot.serve.models import ServedModel, load_bundle
from equipot.serve.registry import Family, Registry, Slot
from equipot.serve.repository.settings import Preload, RepositorySettings
from equipot.serve.repository.source import Place, Source, SourceError

LOAD_GUESS = 3.0
"""Seconds that a first load is thought to take."""

LAST_CALL_SECONDS = 0.1
"""Time for the call that used a model last to let go of it."""

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Stock:
    """Works in the event loop; storage and loading wait in one thread, so one model is loaded at a time.

    Attributes:
        held: models and versions that an operator loaded: they stay until somebody unloads them.
        load_seconds: that the last load took.
    """

    def __init__(
        self,
        source: Source,
        settings: RepositorySettings,
        config: ServeConfig,
        registry: Registry,
        metrics: ModelMetrics,
        has_role: Callable[[Slot], bool],
        replaced_by: Callable[[Slot], set[str]],
    ) -> None:
        """Holds nothing yet.

        Args:
            source: where bundles come from.
            settings: how many may be in memory, and for how long.
            config: how to load them.
            registry: gets what is brought; what it holds now is none of ours.
            metrics: counts loads.
            has_role: whether a plain name or a label means a version, or is about to.
            replaced_by: versions of the same model in whose place one is to answer.
        """
        self.held: set[tuple[str, str]] = set()
        self.load_seconds = LOAD_GUESS
        self._source = source
        self._settings = settings
        self._config = config
        self._registry = registry
        self._metrics = metrics
        self._has_role = has_role
        self._replaced_by = replaced_by
        self._others = frozenset(registry.families)
        self._failed: dict[tuple[str, str], str] = {}
        self._thread = ThreadPoolExecutor(1, "equipot-load")
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: set[ServedModel] = set()

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Waits for storage."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets something go on beside, until it ends or `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends what goes on beside; a load under way goes on in its thread and is dropped."""
        for task in self._tasks:
            task.cancel()
        for model in self._leaving:
            model.engine.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def still_failed(self, slot: Slot, place: Place) -> bool:
        """Whether the very files that are there now are at fault, so that trying again does not help."""
        return self._failed.get((slot.name, slot.version)) == place.stamp

    async def bring(self, slot: Slot, place: Place) -> None:
        """Loads a version beside what answers; then it answers, or its `reason` says why it cannot.

        Neither is so if there is no room, or if it was closed meanwhile.
        """
        if not self._make_room(slot):
            logger.warning("no room for %s@%s: raise --max-loaded", slot.name, slot.version)
            return
        key = (slot.name, slot.version)
        slot.loading = True
        begun = time.monotonic()
        try:
            model = await self.in_thread(lambda: self._load(place, slot))
        except Exception as error:
            if not isinstance(error, BundleError | ServeError | SourceError):
                logger.exception("%s@%s: loading failed", *key)
            slot.reason = " ".join(str(error).split())[:600] or type(error).__name__
            if _by_its_files(error):
                self._failed[key] = place.stamp
            self._metrics.load_failed(slot.name)
            logger.error("%s@%s is not served from %s: %s", *key, self._source.where(place), slot.reason)
            return
        finally:
            slot.loading = False
        self._failed.pop(key, None)
        self.load_seconds = time.monotonic() - begun
        self._metrics.loaded(model, self.load_seconds)
        slot.reason = ""
        family = self._registry.families.get(slot.name)
        if slot.closed or family is None or family.slots.get(slot.version) is not slot:
            self._retire(model)
            return
        old, slot.model, slot.card = slot.model, model, model.card
        if old is not None:
            old.used = time.monotonic()
            family.former.append(old)

    def let_go(self, slot: Slot) -> None:
        """A version answers no longer, and leaves memory when its last request is done."""
        model, slot.model = slot.model, None
        self.held.discard((slot.name, slot.version))
        if model is not None:
            self._retire(model)

    def let_go_former(self, family: Family, version: str | None = None) -> None:
        """As `let_go`, for what answered before a version got another content; None: of all versions."""
        for model in [one for one in family.former if version in (None, one.version)]:
            family.former.remove(model)
            self._retire(model)

    def reap(self) -> None:
        """Lets go of what neither a plain name nor a label means, once nobody has used it for a while."""
        now = time.monotonic()
        for model in self._ours():
            if not model.users and now - model.used >= self._settings.unload_after and self._spare(model):
                self._drop(model)

    def _load(self, place: Place, slot: Slot) -> ServedModel:
        """In the thread."""
        folder = self._source.fetch(place)
        try:
            return load_bundle(folder, self._config, name=slot.name, version=slot.version)
        except BundleError as error:
            if not self._source.forget(folder):
                raise
            logger.warning("%s: fetched again, as it was damaged in the cache (%s)", slot.name, error)
            return load_bundle(self._source.fetch(place), self._config, name=slot.name, version=slot.version)

    def _ours(self) -> list[ServedModel]:
        return [model for model in self._registry if model.name not in self._others]

    def _make_room(self, slot: Slot) -> bool:
        """Lets the longest unused go, if there are as many as may be; False if that is not enough.

        What it is to replace answers until it has proved sound: it stands beside that for a moment.
        """
        most, ours = self._settings.max_loaded, self._ours()
        if most is None:
            return True
        lazy, replaced = self._settings.preload is Preload.NONE, self._replaced(slot)
        idle = [
            one
            for one in ours
            if not one.users and one not in replaced and self._spare(one, whatever_its_role=lazy)
        ]
        surplus = len(ours) + 1 - most
        for model in sorted(idle, key=lambda one: one.used)[: max(0, surplus)]:
            logger.info("%s goes, to make room for %s@%s", model.full_name, slot.name, slot.version)
            self._drop(model)
            surplus -= 1
        return surplus <= 0 or (surplus == 1 and (bool(replaced) or self._has_role(slot)))

    def _replaced(self, slot: Slot) -> list[ServedModel]:
        """What answers until this version does."""
        slots = self._registry.families[slot.name].slots
        versions = {slot.version} | self._replaced_by(slot)
        return [
            model
            for version in versions
            if (one := slots.get(version)) is not None and (model := one.model) is not None
        ]

    def _spare(self, model: ServedModel, *, whatever_its_role: bool = False) -> bool:
        slot = self._registry.families[model.name].slots.get(model.version)
        if slot is None or slot.model is not model:
            return True
        if (slot.name, slot.version) in self.held or self._settings.preload is Preload.ALL:
            return False
        return whatever_its_role or not self._has_role(slot)

    def _drop(self, model: ServedModel) -> None:
        family = self._registry.families[model.name]
        slot = family.slots.get(model.version)
        if slot is not None and slot.model is model:
            self.let_go(slot)
        else:
            family.former.remove(model)
            self._retire(model)

    def _retire(self, model: ServedModel) -> None:
        # The registry knows it no longer, and who uses it may outlast the server.
        self._leaving.add(model)
        model.retire(lambda: self._gone(model))

    def _gone(self, model: ServedModel) -> None:
        """Nobody uses it any more."""
        logger.info("unloaded %s (%s)", model.full_name, model.card.digest)
        self.spawn(self._finish(model))

    async def _finish(self, model: ServedModel) -> None:
        # Ranks take a moment to leave, and memory to be given back.
        await asyncio.to_thread(model.engine.close)
        self._leaving.discard(model)
        await asyncio.sleep(LAST_CALL_SECONDS)
        version = (model.name, model.version)
        if not any((one.name, one.version) == version for one in (*self._registry, *self._leaving)):
            self._metrics.gone(model)
        del model
        await asyncio.to_thread(give_back)


def _by_its_files(error: Exception) -> bool:
    """Whether a bundle is at fault, and not the storage, a disk or the memory."""
    cause = error.__cause__
    unread = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return isinstance(error, BundleError) and not unread
