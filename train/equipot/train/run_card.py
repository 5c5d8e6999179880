"""What a run trains on what: written before its first step, read by resume and export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equipot.model.config import ModelConfig
from equipot.model.references import References
from equipot.train.recipe import Recipe, parse_recipe
from equipot.train.run_directory import RunError
from equipot.train.splits import Splits
from equipot.train.store import Store

_FORMAT = "equipot-run"
_VERSION = 1


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunCard:
    """What is trained on what; written before the first step and read by resume and export."""

    recipe: Recipe
    config: ModelConfig
    references: References
    stores: tuple[StoreRecord, ...]
    splits_digest: str
    split_sizes: Mapping[str, int]

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
            "splits": {"digest": self.splits_digest, **self.split_sizes},
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
        if body.get("format") != _FORMAT or body.get("version", 0) > _VERSION:
            raise RunError(f"{path} is of another format or a newer version; use the equipot that wrote it")
        splits = dict(body["splits"])
        return RunCard(
            recipe=parse_recipe(body["recipe"], str(path)),
            config=ModelConfig.from_json(body["model"]),
            references=References.from_json(body["references"]),
            stores=tuple(StoreRecord(**store) for store in body["stores"]),
            splits_digest=splits.pop("digest"),
            split_sizes=splits,
        )


def digest_of_splits(splits: Splits) -> str:
    """Identity of who is trained on: SHA-256 over the three lists of indices."""
    hasher = hashlib.sha256()
    for name in ("train", "validation", "test"):
        hasher.update(name.encode())
        hasher.update(splits.part(name).astype("<i8").tobytes())
    return f"sha256:{hasher.hexdigest()}"


# What makes a run the run it is. The rest of a recipe may change when it is continued.
_IDENTITY: Sequence[tuple[str, ...]] = (
    ("seed",),
    ("data", "fractions"),
    ("data", "seed"),
    ("model",),
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
        if before.get(key) == after.get(key) or key[:2] == ("data", "stores"):
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
