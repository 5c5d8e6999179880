"""Bundles: a model as a folder of model.json, safetensors shards and their index. Never unpickles anything.

Shards and ``model.safetensors.index.json`` follow the Hugging Face convention, so other tools can read them.
"""

import datetime
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from equipot.model.card import (
    BUNDLE_VERSION,
    CARD_FILE,
    UNITS,
    BundleCard,
    Shard,
    canonical_json,
    read_card,
)
from equipot.model.config import ModelConfig
from equipot.model.domain import DOMAIN_FILE, Domain
from equipot.model.errors import BundleError
from equipot.model.potential import Potential, count_parameters
from equipot.model.references import References
from equipot.model.shard_files import AGAIN, check_shard
from equipot.model.sharding import Cut, Group, cut_of, parallel_config, spread
from equipot.model.shards import ShardWriter, sha256_of, sync, write_text
from equipot.model.uncertainty import Uncertainty

__all__ = [
    "BUNDLE_VERSION",
    "BundleCard",
    "Shard",
    "load_potential",
    "load_uncertainty",
    "member_prefix",
    "read_card",
    "tensor_reader",
    "write_bundle",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def write_bundle(
    path: str | Path,
    *,
    name: str,
    config: ModelConfig,
    references: References,
    tensors: Iterable[tuple[str, Tensor]],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    max_shard_bytes: int = 2 * 1024**3,
    dtype: torch.dtype = torch.float32,
    uncertainty: Uncertainty | None = None,
) -> BundleCard:
    """Writes a bundle aside, then names it: there is a whole one at the path, or none.

    Args:
        path: where the bundle will be; must not exist, or be an empty folder.
        name: what the service will call the model.
        config: of the model.
        references: of the model.
        tensors: the state dict, taken one tensor at a time, of which no more than one is held in memory; of
            an ensemble those of all members, under the names that `member_prefix` gives.
        provenance: JSON values that say where the weights come from.
        metrics: JSON values of its test errors.
        max_shard_bytes: a new shard begins before this is exceeded; one tensor alone may exceed it.
        dtype: the weights are stored in.
        uncertainty: how many members there are, and how sure they are; None: one, which does not know.

    Returns:
        The card as written.

    Raises:
        BundleError: the path is taken, the name unfit, or the tensors are not those of the config.
    """
    path = Path(path)
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"bundle name {name!r}: use 1 to 128 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleError(f"{path}: already exists; choose another path or remove it first")
    stored_as = _dtype_name(dtype)
    uncertainty = uncertainty or Uncertainty()
    n_members = uncertainty.members
    one = _expected_shapes(config, references)
    expected = {member_prefix(k) + key: shape for k in range(n_members) for key, shape in one.items()}
    with _written_aside(path) as folder:
        writer = ShardWriter(folder, max_shard_bytes, dtype, expected)
        for key, tensor in tensors:
            _check_tensor(key, tuple(tensor.shape), expected, seen=writer.shard_of, where="tensors to write")
            writer.add(key, tensor)
        if missing := sorted(set(expected) - set(writer.shard_of)):
            raise BundleError(f"tensors to write: {missing[0]!r} is missing; export a whole checkpoint")
        shards = writer.finish()
        if uncertainty.domain is not None:
            shards += (_write_domain(folder, uncertainty.domain),)
        card = BundleCard(
            name=name,
            format_version=BUNDLE_VERSION,
            equipot_version=importlib.metadata.version("equipot"),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            config=config,
            references=references,
            dtype=stored_as,
            provenance=_plain_json("provenance", provenance),
            metrics=_plain_json("metrics", metrics),
            units=dict(UNITS),
            n_parameters=n_members * count_parameters(_on_meta(config, references)),
            digest="",
            shards=shards,
            members=n_members,
            uncertainty=uncertainty.card,
        ).with_digest()
        text = json.dumps(card.to_json(), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / CARD_FILE, text + "\n")
    return card


def load_potential(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    group: Group | None = None,
    member: int = 0,
) -> tuple[Potential, BundleCard]:
    """Loads a bundle, or one member of an ensemble, in eval mode and with frozen parameters.

    Args:
        path: the bundle's folder.
        dtype: of the parameters; as stored when None.
        device: of the parameters.
        verify: whether to check each shard's sha256; its size is always checked.
        group: the ranks to spread the potential over; all of them load it at once, each reads its slices
            alone, and they share the checking of sums.
        member: which one of an ensemble.

    Raises:
        BundleError: a shard is missing, truncated or altered, now or while it is read, or the card is not one
            this release reads.
        ModelError: the potential cannot be spread over so many ranks.
    """
    path = Path(path)
    card = read_card(path)
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    before = _stamps(path, card)
    for k, shard in enumerate(card.shards):
        check_shard(path, shard, verify=verify and k % size == rank)
    target = dtype or _DTYPES.get(card.dtype)
    if target is None:
        raise BundleError(f"{path}: stored as {card.dtype!r}; this equipot knows {', '.join(_DTYPES)}")
    expected = _expected_shapes(card.config, card.references)
    potential = _on_meta(card.config if group is None else parallel_config(card.config), card.references)
    if group is not None:
        spread(potential, group)
    prefix = member_prefix(member)
    others = tuple(member_prefix(k) for k in range(1, card.members) if k != member)
    state: dict[str, Tensor] = {}
    for file in _weight_files(path, card):
        for name, shape, read in _shard_tensors(file, whole=group is None):
            if name.startswith(others) or (prefix and not name.startswith(prefix)):
                continue
            key = name.removeprefix(prefix)
            _check_tensor(key, shape, expected, seen=state, where=str(file))
            cut = cut_of(key, shape, rank, size)
            # The copy lets go of the file's pages: a file cut short under a running service would kill it.
            state[key] = read(cut).to(device=device, dtype=target, copy=group is not None)
    if before != _stamps(path, card):
        raise BundleError(
            f"{path}: its shards changed while they were read; copy a bundle aside, then rename it"
        )
    if missing := sorted(set(expected) - set(state)):
        raise BundleError(f"{path}: tensor {missing[0]!r} is in no shard; export the model again")
    potential.load_state_dict(state, assign=True)
    # Moves the lookup tables, which no shard holds; the parameters are there already.
    potential.to(device=device)
    return potential.eval().requires_grad_(False), card


def member_prefix(member: int) -> str:
    """What the names of a member's tensors begin with; nothing for the first one's."""
    return f"members.{member}." if member else ""


def load_uncertainty(path: str | Path, card: BundleCard) -> Uncertainty:
    """What a bundle knows of how sure it is.

    Raises:
        BundleError: its domain is missing or altered.
    """
    if card.uncertainty is None:
        return Uncertainty(members=card.members)
    domain = None
    if card.uncertainty.domain is not None:
        known = [shard for shard in card.shards if shard.file == DOMAIN_FILE]
        if not known:
            raise BundleError(f"{path}: the card lists no {DOMAIN_FILE}; calibrate the bundle again")
        check_shard(Path(path), known[0], verify=True)
        try:
            tensors = load_file(Path(path) / DOMAIN_FILE)
            domain = Domain.from_tensors(tensors, card.config.elements, card.config.cutoff)
        except (SafetensorError, BundleError) as error:
            raise BundleError(f"{path}: {error}") from error
    return Uncertainty(card.members, card.uncertainty.calibration, domain, card.uncertainty.domain)


def tensor_reader(path: str | Path, card: BundleCard) -> Callable[[str], Tensor]:
    """Reads single tensors of a bundle by name, as float32; nothing else is held in memory.

    Args:
        path: the bundle's folder, whose shards are not checked again.
        card: its card.

    Raises:
        BundleError: by the function that is returned: the tensor is in no shard.
    """
    files = {}
    for file in _weight_files(Path(path), card):
        for key, _, _ in _shard_tensors(file):
            files[key] = file

    def read(name: str) -> Tensor:
        if name not in files:
            raise BundleError(f"{path}: tensor {name!r} is in no shard; export the model again")
        with safe_open(files[name], framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(torch.float32)

    return read


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        # mkdtemp makes a folder for its owner alone; a bundle is to be read by whoever serves it.
        folder.chmod(0o755)
        sync(folder)
        folder.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _stamps(path: Path, card: BundleCard) -> list[tuple[int, ...] | None]:
    """How the shards look: the sums that were checked are those of what is read if that stays so."""
    stamps: list[tuple[int, ...] | None] = []
    for file in _weight_files(path, card):
        try:
            state = file.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return stamps


def _weight_files(path: Path, card: BundleCard) -> Iterator[Path]:
    return (path / shard.file for shard in card.shards if shard.file != DOMAIN_FILE)


def _write_domain(folder: Path, domain: Domain) -> Shard:
    file = folder / DOMAIN_FILE
    # Written by ourselves: the library's files are for their owner alone.
    file.write_bytes(save(domain.tensors()))
    sync(file)
    return Shard(file=file.name, bytes=file.stat().st_size, sha256=sha256_of(file))


def _on_meta(config: ModelConfig, references: References) -> Potential:
    with torch.device("meta"):
        return Potential(config, references)


def _expected_shapes(config: ModelConfig, references: References) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in _on_meta(config, references).state_dict().items()}


def _check_tensor(
    key: str,
    shape: tuple[int, ...],
    expected: Mapping[str, tuple[int, ...]],
    *,
    seen: Mapping[str, object],
    where: str,
) -> None:
    if key not in expected:
        raise BundleError(f"{where}: tensor {key!r} is not part of this architecture; export the model again")
    if key in seen:
        raise BundleError(f"{where}: tensor {key!r} comes twice; export the model again")
    if shape != expected[key]:
        raise BundleError(
            f"{where}: tensor {key!r} has shape {shape}, the config asks for {expected[key]}; "
            "export the model again"
        )


class _Tensors(Protocol):
    """The tensors of a file."""

    def get_tensor(self, name: str, /) -> Tensor: ...


class _TensorView(Protocol):
    """A tensor in a file, of which a part is read by indexing."""

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor: ...


def _shard_tensors(
    file: Path, *, whole: bool = True
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Cut], Tensor]]]:
    """Yields name, shape, and how to read each tensor of a shard, or a part of it if not `whole`.

    Whole tensors are read, not mapped: who maps a file that is cut short meanwhile is killed by the system,
    and a service with it. Ranks map it, as they must not hold more than their parts.
    """
    try:
        with safe_open(file, framework="pt", device="cpu", backend="pread" if whole else "mmap") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                view = shard.get_slice(key)
                read = partial(_read_whole, file, shard, key) if whole else partial(_read_part, view)
                yield key, tuple(view.get_shape()), read
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: not a safetensors file ({error}); export the bundle again") from error


def _read_whole(file: Path, shard: _Tensors, key: str, cut: Cut) -> Tensor:
    assert not cut.zero, "a process of its own holds all"
    try:
        return shard.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: tensor {key!r} cannot be read ({error}); {AGAIN}") from error


def _read_part(view: _TensorView, cut: Cut) -> Tensor:
    place: tuple[slice, ...] = (slice(None),)
    if cut.dim is not None:
        place = (*(slice(None),) * cut.dim, slice(cut.start, cut.stop))
    part = view[place]
    return torch.zeros_like(part) if cut.zero else part


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in _DTYPES.items():
        if known == dtype:
            return name
    raise BundleError(f"bundle dtype {dtype}: choose one of {', '.join(_DTYPES)}")


def _plain_json(field: str, data: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(canonical_json(data))
    except (TypeError, ValueError) as error:
        raise BundleError(f"bundle {field}: not JSON ({error}); give finite numbers and strings") from error
    return plain
