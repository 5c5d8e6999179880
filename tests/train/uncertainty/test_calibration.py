"""Of real data, trained as users do: coverage on structures never seen, the domain, and bundles that tell."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.cli.main import main
from equipot.model.batch import System, build_graphs
from equipot.model.bundle import load_potential, load_uncertainty, read_card
from equipot.model.domain import Neighborhoods
from equipot.train.dataset import Sizes
from equipot.train.mix import Mix
from equipot.train.store import Store
from equipot.train.uncertainty.cases import Cases, Members, look_at
from equipot.train.uncertainty.measure import coverage_of


@pytest.fixture(scope="module")
def bundles(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ensemble exported from the runs, and a bundle of each."""
    home = tmp_path_factory.mktemp("bundles")
    words = {"both": runs[:2], "first": runs[:1], "second": runs[1:2]}
    for name, some in words.items():
        assert main(["export", *map(str, some), "--out", str(home / name)]) == 0
    return {name: home / name for name in words}


def cases(bundle: Path, run: Path) -> Cases:
    card = read_card(bundle)
    members = Members([load_potential(bundle, member=k)[0] for k in range(card.members)])
    mix = Mix.open(run / "mix")
    sizes = Sizes.of(mix.stores, card.config.cutoff, progress=False)
    domain = load_uncertainty(bundle, card).domain
    return look_at(members, domain, mix, sizes, "test", lambda what, share: None)


@pytest.mark.parametrize("name", ["both", "first"])
def test_intervals_hold_the_truth_of_the_test_split_as_often_as_they_say(
    bundles: dict[str, Path], runs: list[Path], name: str
) -> None:
    card = read_card(bundles[name])
    calibration = load_uncertainty(bundles[name], card).calibration
    assert calibration is not None
    found = coverage_of(
        cases(bundles[name], runs[0]), calibration, card.config.levels_of_theory, (50, 80, 90)
    )
    assert found.energy.keys() == found.forces.keys() == {50, 80, 90}
    for quantity in ("energy", "forces"):
        quantiles = getattr(calibration.by_level_of_theory["PBE"], quantity)
        assert 1 <= quantiles.effective <= quantiles.scores
        for percent, share in getattr(found, quantity).items():
            p = percent / 100
            # Both splits are samples of as many effective cases; three standard errors of their difference.
            error = 3 * math.sqrt(2 * p * (1 - p) / quantiles.effective)
            assert share == pytest.approx(p, abs=error + 1 / quantiles.effective), (quantity, percent)
            assert error < 0.3
    told = card.metrics["uncertainty"]
    assert told["energy"]["90"] == pytest.approx(found.energy[90], abs=1e-3)


def test_splits_hold_no_group_in_common(runs: list[Path]) -> None:
    mix = Mix.open(runs[0] / "mix")
    (store,) = mix.stores
    groups = []
    for name in ("train", "validation", "test"):
        places = mix.part(name)
        groups.append(set(store.groups[places[np.arange(len(places))][:, 1]].tolist()))
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]


def test_most_of_the_test_split_is_inside(bundles: dict[str, Path], runs: list[Path]) -> None:
    found = cases(bundles["first"], runs[0])
    assert len(found) > 300
    assert found.outside.mean() <= 0.05


def test_squeezed_and_foreign_structures_are_outside(bundles: dict[str, Path], runs: list[Path]) -> None:
    card = read_card(bundles["first"])
    domain = load_uncertainty(bundles["first"], card).domain
    assert domain is not None
    structure = Store.open(Mix.open(runs[0] / "mix").stores[0].path).read(np.array([0]))
    numbers, positions = structure.atomic_numbers.astype(np.int64), structure.positions.copy()
    squeezed = positions.copy()
    squeezed[1] += 0.4 * (squeezed[0] - squeezed[1])
    nothing = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    systems = [
        System(numbers, positions, *nothing),
        System(numbers, squeezed, *nothing),
        System(np.array([6, 8, 8]), np.array([[0, 0, 0], [0, 0, 1.17], [0, 0, -1.17]]), *nothing),
    ]
    graphs = build_graphs(systems, card.config.cutoff)
    own, close, foreign = domain(Neighborhoods.of_graphs(graphs, card.config.elements))
    assert not own.outside
    assert close.outside
    assert close.atom in (0, 1)
    assert foreign.outside


def test_bundles_join_into_the_ensemble_of_their_runs(
    bundles: dict[str, Path], runs: list[Path], tmp_path: Path
) -> None:
    parts = [str(bundles["first"]), str(bundles["second"])]
    out, data = tmp_path / "joined", ["--data", str(runs[0])]
    assert main(["ensemble", *parts, "--out", str(out), "--name", "both", *data]) == 0
    joined, exported = read_card(out), read_card(bundles["both"])
    assert joined.members == 2
    assert joined.uncertainty == exported.uncertainty
    assert (tmp_path / "joined-reliability.png").stat().st_size > 10_000
    assert (runs[0] / "reliability.png").stat().st_size > 10_000
    for k in range(2):
        one, other = load_potential(out, member=k)[0], load_potential(bundles["both"], member=k)[0]
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])
    plain = tmp_path / "plain"
    assert main(["ensemble", *parts, "--out", str(plain)]) == 0
    assert read_card(plain).uncertainty is None
    again = tmp_path / "again"
    assert main(["calibrate", str(plain), "--out", str(again), *data]) == 0
    assert read_card(again).uncertainty == exported.uncertainty


def test_what_cannot_be_one_ensemble_is_refused(
    bundles: dict[str, Path],
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, out = str(bundles["first"]), str(tmp_path / "no")
    assert main(["export", str(runs[0]), str(runs[2]), "--out", out]) == 2
    assert "was trained on another mix than" in capsys.readouterr().err
    assert main(["export", str(runs[0]), str(runs[0]), "--out", out]) == 2
    assert "comes twice" in capsys.readouterr().err
    assert main(["ensemble", first, first, "--out", out]) == 2
    assert "comes twice" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["export", str(runs[2]), "--out", str(other), "--no-calibrate", "--no-test"]) == 0
    assert read_card(other).uncertainty is None
    assert main(["ensemble", first, str(other), "--out", out]) == 2
    assert "members" in capsys.readouterr().err
    assert not Path(out).exists()
