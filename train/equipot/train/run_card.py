"""What a run trains on what: written before its first step, read by resume and export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equipot.model.config import ModelConfig
from equipot.model.references import References
from equipot.train.finetune import ParentRecord
from equipot.train.mix import Mix
from equipot.train.recipe import Recipe, parse_recipe
from equipot.train.run_directory import RunError
from equipot.train.scaling.controls.names import control_of
from equipot.train.splits import NAMES
from equipot.train.store import Store

_FORMAT = "equipot-run"
_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreRecord:
    """What a run remembers of a store."""

    path: str
    name: str
    level_of_theory: str
    licence: str
    digest: str
    structures: int

    @staticmethod
    def of(store: Store) -> StoreRecord:
        """Note a store, by its absolute path."""
        manifest = store.manifest
        return StoreRecord(
            path=str(store.path.resolve()),
            name=manifest.name,
            level_of_theory=manifest.level_of_theory,
            licence=manifest.licence,
            digest=manifest.digest,
            structures=len(store),
        )

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixRecord:
    """What a run remembers of its mix.

    Attributes:
        path: absolute; "" for the one that the run made of its stores and keeps itself.
        digest: of the mix.
        share: of every source's training structures that is trained on, as a fraction in text.
        sources: name and weight of each, in the order of the stores.
        sizes: structures in each split, of the training split those that are trained on.
        draws: structures that an epoch takes of these.
    """

    path: str
    digest: str
    share: str
    sources: tuple[tuple[str, str], ...]
    sizes: Mapping[str, int]
    draws: int

    @staticmethod
    def of(mix: Mix, subset: float | str, *, own: bool) -> MixRecord:
        """Note a mix and the subset of it; `own` if the run keeps it."""
        once, drawn = mix.training(subset)
        sizes = {name: len(once if name == "train" else mix.part(name)) for name in NAMES}
        return MixRecord(
            path="" if own else str(mix.path.resolve()),
            digest=mix.card.digest,
            share=str(mix.share(subset)),
            sources=tuple((source.name, source.weight) for source in mix.card.sources),
            sizes=sizes,
            draws=len(drawn),
        )

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> MixRecord:
        """The inverse of :meth:`to_json`."""
        return MixRecord(**{**values, "sources": tuple((name, weight) for name, weight in values["sources"])})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunCard:
    """What is trained on what; written before the first step and read by resume and export."""

    recipe: Recipe
    config: ModelConfig
    references: References
    stores: tuple[StoreRecord, ...]
    mix: MixRecord
    parent: ParentRecord | None = None
    """Of a run that fine-tunes: the bundle it began from."""

    def __post_init__(self) -> None:
        # Whoever has a run's card is about to make its model; nobody else is to know the controls.
        if control_of(self.config) is not None:
            from equipot.train.scaling.controls.registry import register

            register()

    def write(self, path: Path) -> None:
        """Write it aside, then name it."""
        body = {
            "format": _FORMAT,
            "version": _VERSION,
            "equipot_version": version("equipot"),
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.config.to_json(),
            "references": self.references.to_json(),
            "stores": [store.to_json() for store in self.stores],
            "mix": self.mix.to_json(),
            "parent": None if self.parent is None else self.parent.to_json(),
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(body, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> RunCard:
        """Read what :meth:`write` wrote.

        Raises:
            RunError: absent, of another format, or of a newer version.
        """
        try:
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{path.parent} is not a training run ({path.name} is missing); give the --out directory of "
                "`equipot train`"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if body.get("format") != _FORMAT or body.get("version") != _VERSION:
            raise RunError(f"{path} is of another format or version; use the equipot that wrote it")
        return RunCard(
            recipe=parse_recipe(body["recipe"], str(path)),
            config=ModelConfig.from_json(body["model"]),
            references=References.from_json(body["references"]),
            stores=tuple(StoreRecord(**store) for store in body["stores"]),
            mix=MixRecord.from_json(body["mix"]),
            # Runs that began before there was fine-tuning say nothing of a parent.
            parent=None if body.get("parent") is None else ParentRecord(**body["parent"]),
        )


# What makes a run the run it is. The rest of a recipe may change when it is continued.
_PLACES = (("data", "stores"), ("data", "mix"), ("data", "store_root"))
"""Where the data lie may change; that they are the same is checked by digest."""
_IDENTITY: Sequence[tuple[str, ...]] = (
    ("seed",),
    ("data", "fractions"),
    ("data", "seed"),
    ("data", "subset"),
    ("model",),
    ("finetune",),
    ("batch", "structures"),
)


def changes_on_resume(begun: Recipe, now: Recipe) -> list[str]:
    """What differs between the recipe a run was begun with and the one it is continued with.

    Raises:
        RunError: something differs that would make it another run.
    """
    before, after = _flat(begun.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    changed = []
    for key in sorted(set(before) | set(after)):
        if before.get(key) == after.get(key) or key[:2] in _PLACES:
            continue
        name = ".".join(key)
        if any(key[: len(prefix)] == prefix for prefix in _IDENTITY):
            raise RunError(
                f"--resume with {name} = {after.get(key)!r}, but the run was begun with {before.get(key)!r}; "
                "put it back, or begin another run with another --out"
            )
        changed.append(f"{name}: {before.get(key)!r} → {after.get(key)!r}")
    return changed


def _flat(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    flat: dict[tuple[str, ...], object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, (*prefix, name)))
        else:
            flat[(*prefix, name)] = value
    return flat
