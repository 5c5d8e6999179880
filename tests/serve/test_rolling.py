"""Clients that never stop asking, and a model that is replaced under them again and again."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from tests.serve.conftest import Process, running, write_tiny
from tests.serve.repository_helpers import label, put

from equipot.cli.main import main
from equipot.client import Client, EquipotCalculator, ModelChanged


class Load(threading.Thread):
    """Asks without pause until told to stop; notes which version answered, and what went wrong."""

    def __init__(self, address: str, n_structures: int) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.frames = [molecule("CH3OH") for _ in range(n_structures)]
        for seed, frame in enumerate(self.frames):
            frame.rattle(0.02, seed=seed)
        self.stopping = threading.Event()
        self.versions: Counter[str] = Counter()
        self.energies: dict[str, float] = {}
        self.wrong: list[str] = []

    def run(self) -> None:
        with Client(self.address, model="tiny", timeout=60.0, atoms_per_request=12) as client:
            while not self.stopping.is_set():
                try:
                    answer = client.predict(self.frames)
                    answer.raise_for_failures()
                    assert answer.model is not None
                    version, energy = answer.model.version, float(answer.energy[-1])
                    if abs(self.energies.setdefault(version, energy) - energy) > 1e-9:
                        self.wrong.append(f"version {version} gave {energy}")
                    self.versions[version] += 1
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_no_call_fails_while_versions_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "tiny"
    bundles = [write_tiny(tmp_path / f"bundle{seed}", "tiny", seed=seed) for seed in range(4)]
    put(bundles[0], folder / "1")
    words = ["--repository", folder.parent, "--repository-poll", 0.2, "--unload-after", 2]
    with running(*words, "--dtype", "float64", "--threads", 1, stderr=tmp_path / "log") as process:
        # One asks for single molecules, one for batches that are sent in many parts.
        loads = [Load(process.address, n_structures) for n_structures in (1, 1, 40)]
        for load in loads:
            load.start()

        def until_all_got(version: str) -> None:
            seen = [load.versions[version] for load in loads]
            deadline = time.monotonic() + 60
            while not all(load.versions[version] > was for load, was in zip(loads, seen, strict=True)):
                assert time.monotonic() < deadline, (process.log(), [load.wrong for load in loads])
                time.sleep(0.02)

        until_all_got("1")
        put(bundles[1], folder / "2")
        until_all_got("2")
        (folder / "3").mkdir()  # half a bundle, and a broken one: nobody notices
        shutil.copy(bundles[2] / "model.json", folder / "3")
        time.sleep(0.5)
        shutil.rmtree(folder / "1")
        put(bundles[3], folder / "4")
        until_all_got("4")
        label(folder, "stable = 2")
        until_all_got("2")
        label(folder, 'stable = 4\n[canary]\nversion = "2"\nweight = 0.5')
        time.sleep(0.5)
        label(folder, "stable = 4")
        until_all_got("4")
        for load in loads:
            load.stopping.set()
        for load in loads:
            load.join(60)
            assert load.wrong == []
            assert set(load.versions) == {"1", "2", "4"}
        assert "tiny: label" not in process.log()
        assert process.sample("equipot_requests_total", outcome="not_served") == 0
        assert process.sample("equipot_model_state", model="tiny", version="3", state="failed") == 1
        versions = {load.energies[version] for load in loads[:1] for version in load.energies}
        assert len(versions) == 3


@pytest.mark.slow
def test_a_calculator_stays_with_its_digest_or_says_that_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "tiny"
    bundles = [write_tiny(tmp_path / f"bundle{seed}", "tiny", seed=seed) for seed in range(2)]
    put(bundles[0], folder / "1")
    words = ["--repository", folder.parent, "--repository-poll", 0.2, "--unload-after", 0]
    with (
        running(*words, "--dtype", "float64", "--threads", 1, stderr=tmp_path / "log") as process,
        EquipotCalculator(process.address, model="tiny") as calculator,
        EquipotCalculator(process.address, model="tiny") as another,
        Client(process.address, model="tiny") as client,
    ):
        atoms = molecule("CH3OH")
        atoms.calc = calculator
        before = atoms.get_potential_energy()
        assert calculator.model_reference is not None
        assert calculator.model_reference.version == "1"
        elsewhere = atoms.copy()
        elsewhere.calc = another
        elsewhere.get_potential_energy()
        put(bundles[1], folder / "2")
        while (reference := client.predict(atoms).model) is None or reference.version != "2":
            time.sleep(0.05)
        # Version 1 has left memory by now, or is about to: it is brought back for who began with it.
        time.sleep(1.5)
        assert process.sample("equipot_model_state", model="tiny", version="1", state="available") == 1
        calculator.reset()
        assert atoms.get_potential_energy() == pytest.approx(before, abs=1e-12)
        shutil.rmtree(folder / "1")
        while process.sample("equipot_model_state", model="tiny", version="1"):
            time.sleep(0.05)
        # One has a session open, which keeps what it began with; the other comes anew.
        for moving in (atoms, elsewhere):
            moving.positions[0] += np.array([0.01, 0.0, 0.0])
        atoms.get_potential_energy()
        assert calculator.model_reference.version == "1"
        with pytest.raises(ModelChanged, match="no longer serves tiny@sha256"):
            elsewhere.get_potential_energy()


def test_the_command_line_does_what_an_operator_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "repository" / "tiny"
    for seed in (1, 2):
        put(write_tiny(tmp_path / f"bundle{seed}", "tiny", seed=seed), folder / str(seed))
    tokens, ann, bob = tmp_path / "tokens", tmp_path / "ann", tmp_path / "bob"
    tokens.write_text("ann: " + "a" * 40 + "\nbob: " + "b" * 40 + "\n")
    ann.write_text("a" * 40)
    bob.write_text("b" * 40)
    words = ["--repository", folder.parent, "--repository-poll", 0, "--tokens", tokens, "--admin", "ann"]

    with running(*words, "--threads", 1, stderr=tmp_path / "log") as process:

        def admin(*words: str, token: Path = ann) -> tuple[int, str, str]:
            capfd.readouterr()
            code = main(["admin", "--address", process.address, "--token-file", str(token), *words])
            out, errors = capfd.readouterr()
            return code, " ".join(out.split()), " ".join(errors.split())

        code, out, _ = admin("load", "tiny@1")
        assert (code, out.startswith("tiny@1 answers (sha256:")) == (0, True)
        assert admin("label", "tiny@1", "stable")[0] == 0
        assert admin("label", "tiny@2", "canary", "--weight", "0.25")[0] == 0
        code, out, _ = admin("status")
        assert code == 0
        assert "canary 0.25" in out
        assert "stable, plain name" in out
        code, _, errors = admin("unload", "tiny", token=bob)
        assert code == 2
        assert "'bob' is not among those whom this server's --admin names" in errors
        assert main(["models", "--address", process.address, "--token-file", str(bob)]) == 0
        assert "tiny@1 (stable, default)" in " ".join(capfd.readouterr().out.split())
        code, _, errors = admin("unload", "tiny@1")
        assert code == 2
        assert "tiny@1 is stable: let the label name another version first" in errors
        assert admin("unlabel", "tiny", "stable")[0] == admin("unlabel", "tiny", "canary")[0] == 0
        assert admin("unload", "tiny@1")[:2] == (0, "unloaded: tiny@1")
        code, _, errors = admin("load", "tiny@7")
        assert (code, "no version '7'" in errors) == (2, True)
        assert admin("refresh")[0] == 0


def test_without_being_told_who_may_nobody_administers(
    server: Process, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["admin", "--address", server.address, "status"]) == 2
    assert "UNIMPLEMENTED" in capfd.readouterr().err
