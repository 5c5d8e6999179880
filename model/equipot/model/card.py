"""model.json: the card of a bundle, its canonical form and its digest. Knows nothing of tensors."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from equipot.model.config import ModelConfig
from equipot.model.errors import BundleError, ModelError
from equipot.model.references import References
from equipot.model.uncertainty import UncertaintyCard
from equipot.model.upgrades import upgrade_card

BUNDLE_VERSION = 2
FORMAT = "equipot-bundle"
CARD_FILE = "model.json"
UNITS = {
    "length": "angstrom",
    "energy": "eV",
    "forces": "eV/angstrom",
    "stress": "eV/angstrom^3, positive in tension",
    "charge": "e",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BundleCard:
    """Everything about a bundle but its weights."""

    name: str
    """What the service calls the model."""
    format_version: int
    """Version of the bundle's format."""
    equipot_version: str
    """Release that wrote it."""
    created: str
    """ISO 8601, UTC."""
    config: ModelConfig
    references: References
    dtype: str
    """Of the stored weights: ``float32``, ``bfloat16`` …"""
    provenance: dict[str, Any]
    """Data digests, recipe, checkpoint: whatever training recorded, as JSON."""
    metrics: dict[str, Any]
    """Test errors, as JSON."""
    units: dict[str, str]
    n_parameters: int
    digest: str
    """``sha256:…`` over the canonical card, the shards' checksums included."""
    shards: tuple[Shard, ...]
    """Files of weights, and of the domain if there is one."""
    members: int = 1
    """Potentials of an ensemble, all of this configuration; their mean is the prediction."""
    uncertainty: UncertaintyCard | None = None
    """How sure its answers are; None if that was not measured."""

    def to_json(self) -> dict[str, Any]:
        """The card as JSON types, as model.json holds it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "format": FORMAT,
            "config": self.config.to_json(),
            "references": self.references.to_json(),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "uncertainty": None if self.uncertainty is None else self.uncertainty.to_json(),
        }

    def with_digest(self) -> Self:
        """The same card with its digest filled in."""
        return dataclasses.replace(self, digest=digest_of(self.to_json()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The card of a model.json of the present version.

        Raises:
            ModelError: keys are missing or unknown, or the config or references are malformed.
            TypeError: a value has the wrong JSON type.
        """
        expected = {field.name for field in dataclasses.fields(cls)} | {"format"}
        if drift := sorted(set(data) ^ expected):
            kind = "missing" if drift[0] in expected else "unknown"
            raise BundleError(f"key {drift[0]!r} is {kind}")
        fields = {key: value for key, value in data.items() if key != "format"}
        members = data["members"]
        if not isinstance(members, int) or isinstance(members, bool) or members < 1:
            raise BundleError(f"members is {members!r}, not a number of potentials")
        uncertainty = data["uncertainty"]
        return cls(
            **fields
            | {
                "config": ModelConfig.from_json(data["config"]),
                "references": References.from_json(data["references"]),
                "shards": tuple(Shard(**shard) for shard in data["shards"]),
                "uncertainty": None if uncertainty is None else UncertaintyCard.from_json(uncertainty),
            }
        )


def canonical_json(data: Mapping[str, Any]) -> str:
    """One text per content: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no JSON form.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(card: Mapping[str, Any]) -> str:
    """``sha256:…`` over the canonical card without its own digest."""
    body = {key: value for key, value in card.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(canonical_json(body).encode()).hexdigest()


def read_card(path: str | Path) -> BundleCard:
    """Reads and checks the card of a bundle; its weights are not touched.

    Raises:
        BundleError: not a bundle, a newer format, or a card that was altered.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / CARD_FILE}: not JSON ({error}); export the model again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{path}: not an equipot bundle; give a folder written by `equipot export`")
    version = data.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{path / CARD_FILE}: format_version is {version!r}; export the model again")
    if version > BUNDLE_VERSION:
        raise BundleError(
            f"{path}: written by format version {version}, this equipot reads up to {BUNDLE_VERSION}: "
            "upgrade equipot"
        )
    if data.get("digest") != digest_of(data):
        raise BundleError(
            f"{path / CARD_FILE}: its digest does not match its content, so it was altered or damaged; "
            "copy or export the bundle again"
        )
    try:
        return BundleCard.from_json(upgrade_card(data, to_version=BUNDLE_VERSION))
    except (ModelError, TypeError, KeyError) as error:
        raise BundleError(f"{path / CARD_FILE}: malformed ({error}); export the model again") from error


def _read_text(path: Path) -> str:
    try:
        return (path / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = "has no model.json, so it is no bundle" if path.is_dir() else "does not exist"
        raise BundleError(f"{path}: {what}; give a folder written by `equipot export`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path}: not a readable bundle ({error}); give a folder of `equipot export`"
        ) from error
