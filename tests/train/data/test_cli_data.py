"""`equipot data` as it is typed: reports, remedies, exit codes."""

from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest

from equipot.cli.main import main
from equipot.train.store import Store

SAYING = ("--level-of-theory", "PBE/def2-SVP", "--licence", "MIT")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words: object) -> tuple[int, str, str]:
        code = main(["data", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_import_info_frames(alcohols: Path, tmp_path: Path, run: Run) -> None:
    store = tmp_path / "store"
    code, out, _ = run("import", alcohols, "--out", store, *SAYING, "--group-by", "block:10")
    assert code == 0
    assert "1300 structures, 10800 atoms of H C O" in out
    assert "130 groups by block:10 (1300)" in out
    assert str(store) in out
    assert "equipot data info" in out
    code, out, _ = run("info", store, "--verify")
    assert code == 0
    for words in ("PBE/def2-SVP", "MIT", "energy 1300, forces 1300, stress 0", "(verified)", alcohols.name):
        assert words in out
    frames = tmp_path / "test.extxyz"
    code, out, _ = run("frames", store, "--split", "test", "--seed", 4, "--out", frames)
    assert code == 0
    assert out.strip() == f"130 test frames written to {frames}"
    opened = Store.open(store)
    assert run("mix", store, "--seed", 4, "--out", tmp_path / "mix")[0] == 0
    test = np.load(tmp_path / "mix" / "test.npy").tolist()
    written = ase.io.read(frames, ":")
    assert len(written) == len(test) == 130
    for atoms, i in zip(written, test, strict=True):
        assert atoms.info["source_frame"] == opened.origin(i).frame
        assert atoms.get_potential_energy() == opened.labels(i).energy
        np.testing.assert_allclose(atoms.get_forces(), opened.labels(i).forces, atol=1e-8)
        assert not atoms.pbc.any()
    again = tmp_path / "again.extxyz"
    assert run("frames", tmp_path / "mix", "--split", "test", "--out", again)[0] == 0
    assert again.read_bytes() == frames.read_bytes()


def test_a_report_names_files_and_frames(
    tmp_path: Path, run: Run, make_frames: Callable[..., list[ase.Atoms]]
) -> None:
    frames = make_frames(20)
    for k in (3, 11):
        frames[k].calc.results["energy"] = float("nan")
    del frames[5].calc.results["forces"]
    ase.io.write(tmp_path / "labelled.extxyz", frames)
    code, out, _ = run("import", tmp_path / "labelled.extxyz", "--out", tmp_path / "store", *SAYING)
    assert code == 0
    left_out = out[out.index("Left out") : out.index("Kept, but take note")]
    assert "non-finite label" in left_out
    assert "3, 11" in left_out
    assert "labelled.extxyz" in left_out
    assert "forces: absent" in out
    code, out, _ = run("import", tmp_path / "labelled.extxyz", "--out", tmp_path / "store", *SAYING)
    assert code == 0
    assert "skipped, the store holds it already" in out
    assert "nothing new to import" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import", "{dir}/none.xyz", "--out", "{dir}/s", *SAYING), "none.xyz: no such file"),
        (
            ("import", "{data}", "--out", "{dir}/s", *SAYING, "--energy-key", "E0"),
            "has 'E0' (--energy-key); keys there: config_type, energy, forces",
        ),
        (
            ("import", "{data}", "--out", "{dir}/s", *SAYING, "--group-by", "molecule"),
            "give one of auto, frame",
        ),
        (("import", "{data}", "--out", "{data}", *SAYING), "is a file, not a store"),
        (("import", "{data}", "--out", "{dir}/s", "--level-of-theory", " ", "--licence", "MIT"), "is empty"),
        (("info", "{dir}/none"), "no such store"),
        (("frames", "{dir}/none", "--split", "test", "--out", "{dir}/x"), "no such store"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: tuple[str, ...], message: str, alcohols: Path, tmp_path: Path, run: Run
) -> None:
    code, out, err = run(*(word.format(dir=tmp_path, data=alcohols) for word in words))
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_a_mistake_in_the_options_names_the_option(alcohols: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("import", alcohols, "--out", tmp_path / "s")
    assert code == 2
    assert "--level-of-theory" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "holdout"), "no split 'holdout'; one of train, validation, test"),
        (("--split", "test", "--fractions", "0.5,0.5"), "that sum to 1"),
        (("--split", "test", "--fractions", "a,b,c"), "give three numbers"),
        (("--split", "test", "--fractions", "0.9,0.1,0"), "this split is empty"),
    ],
)
def test_mistakes_in_frames(
    words: tuple[str, ...], message: str, tmp_path: Path, run: Run, make_store: Callable[..., Store],
    make_frames: Callable[..., list[ase.Atoms]],
) -> None:  # fmt: skip
    store = make_store(make_frames(12), group_by="frame")
    code, _, err = run("frames", store.path, *words, "--out", tmp_path / "x.extxyz")
    assert code == 2
    assert message in err
    assert not (tmp_path / "x.extxyz").exists()
