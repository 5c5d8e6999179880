"""A bundle gives back what went in, is whole or absent, and says what is wrong with a damaged one."""

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from equipot.model import bundle as bundle_module
from equipot.model.batch import Graph, collate
from equipot.model.bundle import load_potential, read_card, write_bundle
from equipot.model.card import BundleCard, digest_of
from equipot.model.errors import BundleError
from equipot.model.potential import Potential, count_parameters
from equipot.model.upgrades import upgrade_card

MakeModel = Callable[..., Potential]
SHARD = 6000


def write(path: Path, model: Potential, **changes: Any) -> BundleCard:
    arguments: dict[str, Any] = {
        "name": "test-model",
        "config": model.config,
        "references": model.references,
        "tensors": model.state_dict().items(),
        "provenance": {"digest": "sha256:abc", "steps": 3},
        "metrics": {"force_mae": 0.1},
        "max_shard_bytes": SHARD,
    }
    return write_bundle(path, **(arguments | changes))


@pytest.fixture
def model(make_model: MakeModel) -> Potential:
    return make_model(dtype=torch.float32)


@pytest.fixture
def bundle(tmp_path: Path, model: Potential) -> Path:
    write(tmp_path / "bundle", model)
    return tmp_path / "bundle"


def edit_card(path: Path, *, sign: bool, **changes: Any) -> None:
    card = json.loads((path / "model.json").read_text())
    card |= changes
    if sign:
        card["digest"] = digest_of(card)
    (path / "model.json").write_text(json.dumps(card))


def test_loaded_predicts_what_was_written(
    bundle: Path, model: Potential, structures: dict[str, list[Graph]]
) -> None:
    loaded, card = load_potential(bundle)
    batch = collate(structures["mixed"], dtype=torch.float32)
    one, other = model(batch), loaded(batch)
    assert torch.equal(one.energy, other.energy)
    assert torch.equal(one.forces, other.forces)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert card.config == model.config
    assert (loaded.references.energy == model.references.energy).all()
    assert card.n_parameters == count_parameters(model)
    assert card.metrics == {"force_mae": 0.1}
    assert card.digest.startswith("sha256:")
    assert len(card.shards) > 2


def test_shards_follow_the_hugging_face_convention(bundle: Path, model: Potential) -> None:
    index = json.loads((bundle / "model.safetensors.index.json").read_text())
    card = read_card(bundle)
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert {shard.file for shard in card.shards} == set(index["weight_map"].values())
    n = len(card.shards)
    assert [shard.file for shard in card.shards] == [
        f"model-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)
    ]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for key, file in index["weight_map"].items():
        assert torch.equal(load_file(bundle / file)[key], model.state_dict()[key])
        assert (bundle / file).stat().st_mode & 0o777 == 0o644
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    header = 2000 + 150 * len(model.state_dict())
    assert all(shard.bytes < max(SHARD, largest) + header for shard in card.shards)


def test_tensors_are_taken_one_at_a_time(tmp_path: Path, model: Potential) -> None:
    given: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in model.state_dict().items():
            assert not any(reference() is not None for reference in given[:-1])
            copy = tensor.clone()
            given.append(weakref.ref(copy))
            yield key, copy

    write(tmp_path / "streamed", model, tensors=stream(), max_shard_bytes=2**30)
    assert len(given) == len(model.state_dict())


def test_dtypes_of_storing_and_loading(tmp_path: Path, model: Potential) -> None:
    card = write(tmp_path / "half", model, dtype=torch.bfloat16)
    assert card.dtype == "bfloat16"
    stored, _ = load_potential(tmp_path / "half")
    assert next(stored.parameters()).dtype == torch.bfloat16
    wide, _ = load_potential(tmp_path / "half", dtype=torch.float64)
    assert next(wide.parameters()).dtype == torch.float64
    assert wide.references.energy.dtype == np.float64
    with pytest.raises(BundleError, match="int64"):
        write(tmp_path / "integers", model, dtype=torch.int64)


def test_views_of_larger_tensors_are_stored_as_themselves(tmp_path: Path, model: Potential) -> None:
    state = model.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    pieces = torch.split(flat, [tensor.numel() for tensor in state.values()])
    views = {key: piece.view_as(state[key]) for key, piece in zip(state, pieces, strict=True)}
    write(tmp_path / "views", model, tensors=views.items())
    loaded, _ = load_potential(tmp_path / "views")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_the_same_model_has_the_same_weights_digest(tmp_path: Path, model: Potential) -> None:
    one, other = write(tmp_path / "a", model), write(tmp_path / "b", model)
    assert one.shards == other.shards


def test_an_occupied_path_is_left_alone(bundle: Path, model: Potential) -> None:
    before = (bundle / "model.json").read_bytes()
    with pytest.raises(BundleError, match=r"already exists; choose another path"):
        write(bundle, model)
    assert (bundle / "model.json").read_bytes() == before
    file = bundle.parent / "file"
    file.write_text("mine")
    with pytest.raises(BundleError, match="already exists"):
        write(file, model)
    assert file.read_text() == "mine"


def test_a_failed_write_leaves_nothing(tmp_path: Path, model: Potential) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(model.state_dict().items()))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "bundle", model, tensors=breaks())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled(tmp_path: Path, model: Potential) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", model)
    assert read_card(tmp_path / "empty").name == "test-model"


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "x" * 129, "ü"])
def test_unfit_names(tmp_path: Path, model: Potential, name: str) -> None:
    with pytest.raises(BundleError, match="bundle name"):
        write(tmp_path / "bundle", model, name=name)


def test_wrong_tensors_are_not_written(tmp_path: Path, model: Potential) -> None:
    state = model.state_dict()
    key = "energy_head.up.weight"
    cases = {
        "is missing": {k: v for k, v in state.items() if k != key},
        "not part of this architecture": state | {"extra": torch.zeros(3)},
        "has shape": state | {key: torch.zeros(3, 3)},
    }
    for words, tensors in cases.items():
        with pytest.raises(BundleError, match=words):
            write(tmp_path / "bundle", model, tensors=tensors.items())
    with pytest.raises(BundleError, match="comes twice"):
        write(tmp_path / "bundle", model, tensors=[(key, state[key])] * 2)
    with pytest.raises(BundleError, match="metrics: not JSON"):
        write(tmp_path / "bundle", model, metrics={"force_mae": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        load_potential(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"has no model\.json"):
        load_potential(tmp_path / "empty")
    with pytest.raises(BundleError, match="not a readable bundle"):
        load_potential(bundle / "model.json")
    for text, words in (
        ("{", "not JSON"),
        ('{"a": ' + 100_000 * "[", "not JSON"),
        ("[]", "not an equipot bundle"),
        ('{"format": "x"}', "not an equipot"),
    ):
        (tmp_path / "empty" / "model.json").write_text(text)
        with pytest.raises(BundleError, match=words):
            load_potential(tmp_path / "empty")


def test_missing_shard(bundle: Path) -> None:
    (bundle / read_card(bundle).shards[1].file).unlink()
    with pytest.raises(BundleError, match=r"model-00002-of-\d+\.safetensors: shard is missing"):
        load_potential(bundle)


@pytest.mark.parametrize("place", [0, -1], ids=["open", "next"])
@pytest.mark.parametrize("how", ["cut short", "written over", "gone"])
def test_a_shard_that_changes_while_it_is_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, how: str, place: int
) -> None:
    """As under a service whose repository is copied into without a rename: mapped, it would be killed."""
    file = bundle / read_card(bundle).shards[place].file
    checked: list[str] = []

    def check(key: str, *arguments: Any, **options: Any) -> None:
        if not checked:
            match how:
                case "cut short":
                    os.truncate(file, 10)
                case "written over":
                    os.utime(file, ns=(0, 0))
                case _:
                    file.unlink()
        checked.append(key)

    monkeypatch.setattr(bundle_module, "_check_tensor", check)
    with pytest.raises(BundleError, match=r"copy (or export the|a) bundle|not a safetensors file"):
        load_potential(bundle)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_shard(bundle: Path, verify: bool) -> None:
    file = bundle / read_card(bundle).shards[0].file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"shard has \d+ bytes, the card says \d+"):
        load_potential(bundle, verify=verify)


def test_altered_shard(bundle: Path) -> None:
    file = bundle / read_card(bundle).shards[0].file
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        load_potential(bundle)
    load_potential(bundle, verify=False)


def test_a_pickle_named_as_a_shard_is_never_unpickled(bundle: Path, model: Potential) -> None:
    shard = read_card(bundle).shards[0]
    torch.save(model.state_dict(), bundle / shard.file)
    size = (bundle / shard.file).stat().st_size
    shards = json.loads((bundle / "model.json").read_text())["shards"]
    edit_card(bundle, sign=True, shards=[shards[0] | {"bytes": size}, *shards[1:]])
    with pytest.raises(BundleError, match="not a safetensors file"):
        load_potential(bundle, verify=False)


def test_altered_card(bundle: Path) -> None:
    edit_card(bundle, sign=False, metrics={"force_mae": 0.0001})
    with pytest.raises(BundleError, match="digest does not match"):
        read_card(bundle)


def test_newer_version(bundle: Path) -> None:
    edit_card(bundle, sign=True, format_version=7)
    with pytest.raises(
        BundleError, match="written by format version 7, this equipot reads up to 2: upgrade equipot"
    ):
        load_potential(bundle)


@pytest.mark.parametrize("version", [0, -1, "1", None, True])
def test_version_that_is_none(bundle: Path, version: object) -> None:
    edit_card(bundle, sign=True, format_version=version)
    with pytest.raises(BundleError, match="format_version is"):
        read_card(bundle)


def test_a_signed_card_that_is_malformed(bundle: Path) -> None:
    card = json.loads((bundle / "model.json").read_text())
    for changes, words in (
        ({"surprise": 1}, "key 'surprise' is unknown"),
        ({"config": card["config"] | {"width": 0}}, "width"),
        ({"references": {}}, "references"),
        ({"shards": [{"file": "x"}]}, "malformed"),
        ({"shards": 3}, "malformed"),
        ({"config": 3}, "malformed"),
    ):
        (bundle / "model.json").write_text(json.dumps(card))
        edit_card(bundle, sign=True, **changes)
        with pytest.raises(BundleError, match=words):
            read_card(bundle)


def test_a_shard_outside_the_folder_is_not_read(bundle: Path) -> None:
    outside = bundle.parent / "outside.safetensors"
    shard = read_card(bundle).shards[0]
    shutil.copy(bundle / shard.file, outside)
    moved = {"file": "../outside.safetensors", "bytes": shard.bytes, "sha256": shard.sha256}
    card = json.loads((bundle / "model.json").read_text())
    edit_card(bundle, sign=True, shards=[moved, *card["shards"][1:]])
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        load_potential(bundle)


def test_shards_that_do_not_fit_the_config(bundle: Path) -> None:
    card = json.loads((bundle / "model.json").read_text())
    edit_card(bundle, sign=True, config=card["config"] | {"width": 24})
    with pytest.raises(BundleError, match="the config asks for"):
        load_potential(bundle)
    edit_card(bundle, sign=True, config=card["config"] | {"layers": 3})
    with pytest.raises(BundleError, match="is in no shard"):
        load_potential(bundle)
    edit_card(bundle, sign=True, config=card["config"] | {"layers": 1})
    with pytest.raises(BundleError, match="not part of this architecture"):
        load_potential(bundle)


def test_upgrades_run_one_after_the_other() -> None:
    upgrades = {
        1: lambda card: {**card, "a": card["old"]},
        2: lambda card: {key: value for key, value in card.items() if key != "old"},
    }
    card = upgrade_card({"format_version": 1, "old": 5}, to_version=3, upgrades=upgrades)
    assert card == {"format_version": 3, "a": 5}
    assert upgrade_card(card, to_version=3, upgrades=upgrades) == card
    with pytest.raises(KeyError):
        upgrade_card({"format_version": 3}, to_version=4, upgrades=upgrades)
