"""The command: a page that needs nothing and runs nothing, numbers that stay, exit codes, a clean stop."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import ase
import numpy as np
import pytest

from equipot.cli.main import main
from equipot.train.store import Store

from .conftest import MakeMix, MakeStore, labelled, mix_in, store_in

HOSTILE = "<img src=x onerror=alert(1)>&$x^2$.extxyz"


class Page(HTMLParser):
    """Notes what a browser would load, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def flipped(frames: list[ase.Atoms]) -> list[ase.Atoms]:
    return [
        labelled(a, energy=a.calc.results["energy"], forces=-a.calc.results["forces"], stress=None)
        for a in frames
    ]


@pytest.fixture(scope="module")
def audited(alloy: list[ase.Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    outlier = labelled(alloy[0], energy=500.0, forces=alloy[0].calc.results["forces"])
    stores = [
        store_in(folder, [*flipped(alloy), outlier], "<b>one", file=HOSTILE, level="<script>PBE</script>"),
        store_in(folder, alloy[:40], "two"),
    ]
    mix = mix_in(folder, stores, (0.7, 0.0, 0.3))
    out = folder / "report"
    assert main(["data", "audit", str(mix.path), "--out", str(out), "--sample", "150"]) == 0
    return out


def test_page_and_numbers(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (audited / "audit.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert page.handlers == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert HOSTILE in page.text
    assert "<b>one" in page.text
    assert 'name=viewport content="width=device-width' in text
    assert "wrong sign" in page.text
    assert "150" in page.text

    body = json.loads((audited / "audit.json").read_text(), parse_constant=pytest.fail)
    assert body["format"] == "equipot-audit"
    assert body["version"] == 1
    assert set(body) == {
        *("format", "version", "answer", "findings", "sample", "seed", "tolerance_angstrom", "mix"),
        *(
            "structures",
            "structures_compared",
            "references_ev",
            "stores",
            "exact_duplicates",
            "near_duplicates",
        ),
    }
    for finding in body["findings"]:
        assert set(finding) == {
            *("severity", "code", "stores", "summary", "evidence", "remedy", "places", "count")
        }
    sign = next(finding for finding in body["findings"] if finding["code"] == "forces-sign")
    assert sign["severity"] == "error"
    assert sign["stores"] == ["<b>one"]
    for store in body["stores"]:
        assert set(store) == {
            *("name", "path", "digest", "level_of_theory", "licence", "structures", "atoms", "periodicity"),
            *("charges", "spin_multiplicities", "without_forces", "with_zero_forces", "distributions"),
            *("closest_over_covalent_radii", "cosine_of_forces_with_repulsion", "examined", "elements"),
            *("nearest_distances_angstrom", "consistency"),
        }
    slopes = [store["consistency"]["energy_against_force_work"]["slope"] for store in body["stores"]]
    assert slopes[0] == pytest.approx(-1, abs=0.1)
    assert slopes[1] == pytest.approx(1, abs=0.1)


def test_numbers_are_those_of_the_store(audited: Path, alloy: list[ase.Atoms]) -> None:
    body = json.loads((audited / "audit.json").read_text())
    second = body["stores"][1]
    frames = alloy[:40]
    assert second["structures"] == 40
    assert second["atoms"] == sum(map(len, frames))
    forces = np.concatenate([np.linalg.norm(a.get_forces(), axis=1) for a in frames])
    sizes = second["distributions"]["force_sizes_ev_per_angstrom"]
    assert sizes["max"] == pytest.approx(forces.max())
    assert sizes["mean"] == pytest.approx(forces.mean())
    pressure = [-np.trace(a.get_stress(voigt=False)) / 3 for a in frames]
    distribution = second["distributions"]["pressure_ev_per_cubic_angstrom"]
    assert distribution["mean"] == pytest.approx(np.mean(pressure))
    closest = min(a.get_all_distances(mic=True)[np.triu_indices(len(a), 1)].min() for a in frames)
    nearest = min(pair["min"] for pair in second["nearest_distances_angstrom"].values())
    assert nearest == pytest.approx(closest)
    gold = second["elements"]["Au"]
    assert gold["structures"] == sum(79 in a.numbers for a in frames)
    assert gold["atoms"] == sum((a.numbers == 79).sum() for a in frames)


def test_strict_fails_on_errors_alone(
    alloy: list[ase.Atoms],
    alloy_store: Store,
    make_store: MakeStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right, wrong = alloy_store, make_store(flipped(alloy), "wrong")
    command = ["data", "audit", "--strict", "--sample", "100", "--out"]
    assert main([*command, str(tmp_path / "a"), str(right.path)]) == 0
    assert "consistent as far as could be seen" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b"), str(wrong.path)]) == 1
    said = capsys.readouterr().out
    assert "error: wrong: the forces look like gradients" in said
    assert str(tmp_path / "b" / "audit.html") in said


def test_mistakes_are_one_line(
    alloy: list[ase.Atoms],
    make_store: MakeStore,
    make_mix: MakeMix,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = make_store(alloy[:20], group_by="frame")
    mix = str(make_mix([store]).path)
    file = tmp_path / "file"
    file.write_text("")
    path, out = str(store.path), ["--out", str(tmp_path / "out")]
    for arguments, words in (
        ([str(tmp_path / "nowhere"), *out], "no such store"),
        ([path, path, *out], "named twice"),
        ([path, "--out", str(file)], "is a file"),
        ([mix, path, *out], "none of those that are in the mix"),
        ([mix, mix, *out], "is a second mix"),
        ([mix, "--store-root", str(tmp_path / "nowhere"), *out], "the store of its source store is not at"),
    ):
        assert main(["data", "audit", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_signal_stops_it_and_nothing_is_written(alcohol_store: Store, tmp_path: Path) -> None:
    path, out = str(alcohol_store.path), str(tmp_path / "out")
    script = (
        "import sys, os, signal\n"
        "from equipot.train.audit import run\n"
        "plain = run.read_blocks\n"
        "def slow(store):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    yield from plain(store)\n"
        "run.read_blocks = slow\n"
        "from equipot.cli.main import main\n"
        f"sys.exit(main(['data', 'audit', {path!r}, '--out', {out!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert "the audit was stopped" in done.stderr
    assert not (tmp_path / "out").exists()
