"""A bundle holds several members, its calibration and its domain, and refuses what is damaged of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.model.batch import Graph, collate
from equipot.model.bundle import (
    load_potential,
    load_uncertainty,
    member_prefix,
    read_card,
    tensor_reader,
    write_bundle,
)
from equipot.model.card import digest_of
from equipot.model.conformal import Calibration, LevelCalibration, quantiles_of
from equipot.model.domain import DOMAIN_FILE
from equipot.model.errors import BundleError
from equipot.model.potential import Potential, count_parameters
from equipot.model.uncertainty import DomainFacts, Uncertainty
from equipot.train.uncertainty.domain_fit import DomainFit

MakeModel = Callable[..., Potential]


@pytest.fixture
def members(make_model: MakeModel) -> list[Potential]:
    return [make_model(seed=seed, dtype=torch.float32) for seed in range(3)]


@pytest.fixture
def uncertainty(members: list[Potential], structures: dict[str, list[Graph]]) -> Uncertainty:
    config = members[0].config
    fit = DomainFit(config.elements, config.cutoff)
    fit.add(collate(structures["mixed"], dtype=torch.float64))
    errors = np.random.default_rng(0).random(50)
    level = LevelCalibration(quantiles_of(errors, errors, np.arange(50)), None)
    return Uncertainty(
        members=3,
        calibration=Calibration("sha256:m", 50, 50, {"PBE": level}),
        domain=fit.finish(),
        facts=DomainFacts("sha256:m", 5, 30, 50, 0.99),
    )


def write(path: Path, members: list[Potential], uncertainty: Uncertainty, drop: str = "") -> Path:
    tensors = {
        member_prefix(k) + name: value
        for k, one in enumerate(members)
        for name, value in one.state_dict().items()
    }
    tensors.pop(drop, None)
    write_bundle(
        path,
        name="three",
        config=members[0].config,
        references=members[0].references,
        tensors=tensors.items(),
        provenance={},
        metrics={},
        max_shard_bytes=20_000,
        uncertainty=uncertainty,
    )
    return path


def test_it_comes_back_as_it_went_in(
    tmp_path: Path, members: list[Potential], uncertainty: Uncertainty
) -> None:
    bundle = write(tmp_path / "bundle", members, uncertainty)
    card = read_card(bundle)
    assert card.members == 3
    assert card.n_parameters == 3 * count_parameters(members[0])
    for k, member in enumerate(members):
        loaded, _ = load_potential(bundle, member=k)
        assert loaded.state_dict().keys() == member.state_dict().keys()
        for name, value in member.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    name = next(iter(members[0].state_dict()))
    assert torch.equal(tensor_reader(bundle, card)(name), members[0].state_dict()[name])
    found = load_uncertainty(bundle, card)
    assert found.calibration == uncertainty.calibration
    assert found.facts == uncertainty.facts
    assert found.domain is not None
    assert uncertainty.domain is not None
    for name, values in uncertainty.domain.tensors().items():
        assert np.array_equal(found.domain.tensors()[name], values)
    assert (bundle / DOMAIN_FILE).stat().st_mode & 0o777 == 0o644


def test_a_member_that_lacks_a_tensor_is_not_written(
    tmp_path: Path, members: list[Potential], uncertainty: Uncertainty
) -> None:
    with pytest.raises(BundleError, match=r"'members\.1\.energy_head\.up\.bias' is missing"):
        write(tmp_path / "bundle", members, uncertainty, drop="members.1.energy_head.up.bias")
    assert not (tmp_path / "bundle").exists()


def test_a_damaged_domain_is_refused(
    tmp_path: Path, members: list[Potential], uncertainty: Uncertainty
) -> None:
    bundle = write(tmp_path / "bundle", members, uncertainty)
    file = bundle / DOMAIN_FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(BundleError, match=f"{DOMAIN_FILE}: shard's sha256 differs"):
        load_uncertainty(bundle, read_card(bundle))
    with pytest.raises(BundleError, match=f"{DOMAIN_FILE}: shard's sha256 differs"):
        load_potential(bundle)
    file.unlink()
    with pytest.raises(BundleError, match=f"{DOMAIN_FILE}: shard is missing"):
        load_uncertainty(bundle, read_card(bundle))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("calibration", "by_level_of_theory", "PBE", "energy", "values"), [1.0], "quantiles"),
        (("calibration", "by_level_of_theory", "PBE", "energy", "offset"), "wide", "could not convert"),
        (("calibration", "by_level_of_theory"), None, "uncertainty: .*items"),
        (("domain", "strange"), 1, "strange"),
        (("calibration",), {}, "mix"),
    ],
)
def test_a_malformed_card_is_refused(
    tmp_path: Path,
    members: list[Potential],
    uncertainty: Uncertainty,
    place: tuple[str, ...],
    value: object,
    says: str,
) -> None:
    bundle = write(tmp_path / "bundle", members, uncertainty)
    card = json.loads((bundle / "model.json").read_text())
    inner = card["uncertainty"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    card["digest"] = digest_of(card)
    (bundle / "model.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match=says):
        read_card(bundle)


@pytest.mark.parametrize("members_count", [0, True, "3"])
def test_a_wrong_number_of_members_is_refused(
    tmp_path: Path, members: list[Potential], uncertainty: Uncertainty, members_count: object
) -> None:
    bundle = write(tmp_path / "bundle", members, uncertainty)
    card = json.loads((bundle / "model.json").read_text()) | {"members": members_count}
    card["digest"] = digest_of(card)
    (bundle / "model.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match="members is"):
        read_card(bundle)
