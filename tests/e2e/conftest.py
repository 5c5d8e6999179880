"""The main job, run once as its users run it, for every test that looks at a part of it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data" / "ethanol-methanol.extxyz"

RECIPE = """
seed = 3
[data]
stores = ["{store}"]
[model]
width = 32
layers = 2
[batch]
structures = 32
[optimizer]
learning_rate = 3e-3
steps = 60
[zero]
stage = 1
"""


@dataclass(frozen=True)
class MainJob:
    """Where each step of the main job left its result."""

    store: Path
    run: Path
    bundle: Path
    test_frames: Path


def equipot(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "equipot.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd)


def succeed(*arguments: object, cwd: Path) -> str:
    done = equipot(*arguments, cwd=cwd)
    assert done.returncode == 0, f"equipot {arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def run_equipot() -> Callable[..., subprocess.CompletedProcess[str]]:
    return equipot


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    home = tmp_path_factory.mktemp("main-job")
    job = MainJob(home / "store", home / "run", home / "bundle", home / "test.extxyz")
    level = ("--level-of-theory", "PBE/def2-SVP", "--licence", "MIT", "--group-by", "block:10")
    succeed("data", "import", DATA, "--out", job.store, *level, cwd=home)
    recipe = home / "recipe.toml"
    recipe.write_text(RECIPE.format(store=job.store))
    succeed("train", recipe, "--ranks", 2, "--out", job.run, cwd=home)
    succeed("export", job.run, "--out", job.bundle, "--name", "alcohols", cwd=home)
    succeed("data", "frames", job.run, "--split", "test",
            "--out", job.test_frames, cwd=home)  # fmt: skip
    return job


@pytest.fixture(scope="session")
def address(main_job: MainJob, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "stderr.log"
    words = ["serve", str(main_job.bundle), "--port", "0", "--metrics-port", "0", "--dtype", "float64"]
    command = [sys.executable, "-m", "equipot.cli", *words]
    with log.open("w") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if line.startswith("serving "):
                yield line.split(" on ")[1].split()[0]
                break
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0
