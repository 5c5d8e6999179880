"""MPtrj: streamed, both energies by name, VASP's stress to ASE's, moments kept, damage named."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipot.train.errors import DataError
from equipot.train.sources.base import ReadOptions, Reason
from equipot.train.sources.json_stream import JsonDamage, JsonStream
from equipot.train.sources.mptrj import open_mptrj

Sample = Callable[[str], Path]
Read = Callable[..., Any]


def open_level(path: Path, level: str = "uncorrected") -> Any:
    return open_mptrj(path, ReadOptions(level=level))


@pytest.mark.parametrize("level", ["uncorrected", "corrected"])
def test_the_sample_against_json(sample: Sample, read: Read, level: str) -> None:
    path = sample("mptrj/MPtrj_2022.9_sample.json")
    kept, left_out = read(open_level(path, level))
    whole = [
        (material, name, body)
        for material, frames in json.loads(path.read_text()).items()
        for name, body in frames.items()
    ]
    assert (len(kept), len(left_out), len(whole)) == (719, 0, 719)
    for frame, (material, name, body) in zip(kept, whole, strict=True):
        assert (frame.group, frame.name) == (("mp_id", material), name)
        assert frame.energy == body[f"{level}_total_energy"]
        np.testing.assert_array_equal(frame.forces, body["force"])
        stress = np.array(body["stress"]) / -1602.1766208
        np.testing.assert_allclose(frame.stress, 0.5 * (stress + stress.T), atol=1e-12)
        cartesian = [site["xyz"] for site in body["structure"]["sites"]]
        off = (frame.positions - cartesian) @ np.linalg.inv(frame.cell)
        assert np.abs(off - np.round(off)).max() < 1e-4
        if body["magmom"] is not None:
            np.testing.assert_array_equal(frame.extras["magmoms"], body["magmom"])
    assert any("magmoms" in frame.extras for frame in kept) == any(b["magmom"] is not None for *_, b in whole)


def test_energies_differ_by_the_corrections_alone(sample: Sample) -> None:
    path = sample("mptrj/MPtrj_2022.9_sample.json")
    pairs = zip(open_level(path).frames(), open_level(path, "corrected").frames(), strict=True)
    shifts = np.array([b.energy - a.energy for a, b in pairs])
    assert (shifts != 0).any()
    assert shifts.max() < 30


def entry(**changes: Any) -> dict[str, Any]:
    """Two Fe in a cubic cell, as in the release."""
    body: dict[str, Any] = {
        "structure": {
            "@class": "Structure",
            "charge": 0.0,
            "lattice": {"matrix": [[2.8, 0, 0], [0, 2.8, 0], [0, 0, 2.8]], "pbc": [True, True, True]},
            "sites": [
                {"species": [{"element": "Fe", "occu": 1}], "abc": abc, "xyz": [2.8 * x for x in abc]}
                for abc in ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5])
            ],
        },
        "uncorrected_total_energy": -16.5,
        "corrected_total_energy": -17.0,
        "force": [[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]],
        "stress": [[10.0, 1.0, 0.0], [1.0, 20.0, 0.0], [0.0, 0.0, 30.0]],
        "magmom": [2.2, 2.3],
        "mp_id": "mp-1",
    }
    return {**body, **changes}


def write_release(path: Path, *entries: dict[str, Any]) -> Path:
    body = {f"mp-{k}": {f"mp-{k}-0-{k}": each} for k, each in enumerate(entries)}
    path.write_text(json.dumps(body))
    return path


def test_compression_is_negative_in_ev_per_cubic_angstrom(tmp_path: Path, read: Read) -> None:
    (frame,), _ = read(open_level(write_release(tmp_path / "a.json", entry())))
    np.testing.assert_allclose(np.diag(frame.stress), np.array([-10, -20, -30]) / 1602.1766208)
    np.testing.assert_allclose(frame.extras["magmoms"], [2.2, 2.3])
    assert frame.energy == -16.5


def disordered() -> dict[str, Any]:
    body = entry()
    body["structure"]["sites"][0]["species"] = [
        {"element": "Fe", "occu": 0.5},
        {"element": "Co", "occu": 0.5},
    ]
    return body


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry(uncorrected_total_energy=None), Reason.NO_LABEL),
        (entry(uncorrected_total_energy=float("nan")), Reason.NON_FINITE_LABEL),
        (entry(force=[[0.0, 0.0, 0.0]]), Reason.WRONG_SHAPE),
        (entry(force=[[0.0, 0.0, 0.0], [0.0, float("inf"), 0.0]]), Reason.NON_FINITE_LABEL),
        (entry(stress=[1.0, 2.0]), Reason.WRONG_SHAPE),
        (entry(magmom=[1.0]), Reason.WRONG_SHAPE),
        (entry(magmom=["a", "b"]), Reason.WRONG_SHAPE),
        (entry(structure=None), Reason.INVALID),
        (entry(structure={"sites": []}), Reason.INVALID),
        (disordered(), Reason.INVALID),
    ],
)
def test_bad_entries_are_left_out_by_reason(
    tmp_path: Path, read: Read, bad: dict[str, Any], reason: Reason
) -> None:
    path = write_release(tmp_path / "a.json", entry(), bad, entry(corrected_total_energy=-1.0))
    kept, left_out = read(open_level(path))
    assert [frame.index for frame in kept] == [0, 2]
    assert [item.reason for item in left_out] == [reason]
    assert left_out[0].detail.startswith("mp-1-0-1: ")


def test_labels_that_are_absent_are_absent(tmp_path: Path, read: Read) -> None:
    path = write_release(tmp_path / "a.json", entry(magmom=None, stress=None, force=None))
    (frame,), _ = read(open_level(path))
    assert frame.stress is None
    assert frame.forces is None
    assert frame.extras == {}


def test_a_truncated_file_keeps_what_is_whole(sample: Sample, tmp_path: Path, read: Read) -> None:
    whole = sample("mptrj/MPtrj_2022.9_sample.json").read_bytes()
    path = tmp_path / "cut.json"
    path.write_bytes(whole[: len(whole) // 2])
    kept, left_out = read(open_level(path))
    assert 200 < len(kept) < 719
    assert [item.index for item in left_out] == [len(kept)]
    assert "the file ends" in left_out[0].detail
    at = whole.index(b'"force"', len(whole) // 3)
    path.write_bytes(whole[:at] + b"\xff\xfe" + whole[at + 2 :])
    kept, left_out = read(open_level(path))
    assert 100 < len(kept) < 719
    assert left_out[-1].reason is Reason.UNREADABLE


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"mp-1": []}', '{"mp-1": {"a": 1}}', "not JSON", "[" * 100000]
)
def test_what_is_not_the_release_is_refused(tmp_path: Path, body: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(body)
    with pytest.raises(DataError, match=r"other\.json"):
        open_level(path)
    with pytest.raises(DataError, match="no such file"):
        open_level(tmp_path / "none.json")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (8000, 40000):
        path = tmp_path / f"{count}.json"
        with path.open("w") as file:
            file.write("{")
            one = json.dumps(entry())
            file.write(",".join(f'"mp-{k}": {{"mp-{k}-0": {one}}}' for k in range(count)) + "}")
        tracemalloc.start()
        with JsonStream(path) as stream:
            entries = 0
            for _ in stream.entries():
                stream.key()
                stream.value()
                entries += 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert entries == count
    assert path.stat().st_size > 20e6
    assert peaks[1] < 1.2 * peaks[0] + 1e5
    assert peaks[1] < 8e6


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_values_may_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("equipot.train.sources.json_stream._PIECE", piece)
    values = [1, -2.5e-10, 'å\\u00e9"', None, True, [], {}, [1, [2]], {"a": "b" * 50}, 12345678901]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    with JsonStream(path) as stream:
        assert [stream.value() for _ in stream.entries()] == values
    path.write_text(json.dumps(values)[:-3])
    with pytest.raises(JsonDamage):
        _read_all(path)


def _read_all(path: Path) -> None:
    with JsonStream(path) as stream:
        for _ in stream.entries():
            stream.value()
