"""A client installs in seconds and without torch: proved by installing it into an environment of its own."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "ray",
    "deepspeed",
    "torch-geometric",
    "safetensors",
    "vesin",
    "ase",
    "scipy",
    "prometheus-client",
}


def test_the_client_pulls_nothing_heavy(client_python: Path) -> None:
    listed = subprocess.run(
        [client_python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.split("==")[0].lower().replace("_", "-") for line in listed.stdout.split()}
    assert "equipot" in names
    assert names & HEAVY == set()


def test_the_client_works_without_them(client_python: Path, tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from equipot.client import Client, ServerUnavailable, Structure\n"
        "water = Structure(atomic_numbers=np.array([8, 1, 1]), positions=np.eye(3))\n"
        "try:\n"
        "    Client('127.0.0.1:1', timeout=0.5).predict(water)\n"
        "except ServerUnavailable as error:\n"
        "    print('typed:', error)\n"
    )
    ran = subprocess.run(
        [client_python, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "typed:" in ran.stdout


def test_the_doctor_works_without_them(client_python: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [client_python.parent / "equipot", "doctor"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "pip install 'equipot[train]'" in " ".join(ran.stdout.split())


@pytest.mark.parametrize("verb", ["train", "data", "export", "serve", "predict"])
def test_a_verb_that_is_not_installed_names_its_extra(client_python: Path, verb: str, tmp_path: Path) -> None:
    target = tmp_path / "x.xyz"
    target.touch()
    ran = subprocess.run(
        [client_python.parent / "equipot", verb, target],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "pip install 'equipot[" in ran.stderr
    assert "Traceback" not in ran.stderr
