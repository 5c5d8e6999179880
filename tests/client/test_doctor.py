"""`equipot doctor` on machines and installations of several kinds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from equipot.cli import doctor
from equipot.cli.doctor import Finding, examine
from equipot.cli.main import EXTRAS, main

Disk = namedtuple("Disk", ["total", "used", "free"])


def report(*, build: bool = False) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(build=build)}


def in_a_process(
    *blocked: str, arguments: str = "'--json'", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`equipot doctor` where some packages are not installed."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked)]
    lines += ["from equipot.cli.main import main", f"sys.exit(main(['doctor', {arguments}]))"]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_the_whole_installation_is_described(tmp_path: Path) -> None:
    done = in_a_process(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert {line["section"] for line in lines.values()} == {
        "installation",
        "machine",
        "computing",
        "training",
    }
    assert "deepspeed" in lines["[train]"]["value"]
    assert "gloo" in lines["ranks talk by"]["value"]
    # An empty cache: it says where the kernel would be, and does not build it unasked.
    assert str(tmp_path) in lines["message kernel"]["value"]
    assert "--build" in lines["message kernel"]["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_a_light_installation_says_how_to_get_more() -> None:
    done = in_a_process("torch", "deepspeed", "ase", "vesin")
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert {line["section"] for line in lines.values()} == {"installation", "machine"}
    assert lines["[train]"]["value"].startswith("not installed: torch")
    assert lines["[train]"]["remedy"] == "pip install 'equipot[train]'"
    assert lines["client"]["remedy"] is None


def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "equipot.model.doctor", None)
    finding = report()["equipot.model.doctor"]
    assert finding.section == "computing"
    assert finding.value.startswith("broken: ModuleNotFoundError")
    assert finding.remedy is not None
    assert "equipot[model]" in finding.remedy


def test_a_poor_machine_hears_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(64 << 20, 0, 64 << 20))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = report()
    assert "--shm-size" in str(found["/dev/shm"].remedy)
    assert found["C++ compiler"].value.startswith("none")
    assert "no C++ compiler" in found["message kernel"].value
    assert "no C++ compiler" in found["offload to NVMe"].value


def test_a_taken_port_is_reported() -> None:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", 50051))
            other.listen()
        except OSError:
            pass  # somebody else has taken it: as good
        assert report()["port 50051"].value == "in use"


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", ())
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(f"[{extra}]" in shown for extra in EXTRAS if extra)
    assert "Python" in shown
