"""The layout that makes five folders one package, and the errors of the command line's front door."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "train", "serve", "client", "protos")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_init_file_hides_the_other_packages(folder: str) -> None:
    stray = ROOT / folder / "equipot" / "__init__.py"
    assert not stray.exists(), f"{stray} would hide every other equipot.* package: delete it"


def test_every_package_is_found_and_typed() -> None:
    for name in ("model", "train", "serve", "client", "cli", "wire"):
        module = importlib.import_module(f"equipot.{name}")
        (location,) = list(module.__path__)
        assert (Path(location) / "py.typed").exists(), f"equipot.{name} lacks py.typed"


def test_no_file_is_longer_than_it_should_be() -> None:
    sources = [
        path
        for folder in (*FOLDERS, "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources
        if (count := path.read_text().count("\n")) > 500
    }
    assert {name for name in long if "_pb2" not in name} == set()


def run_equipot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equipot.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_names_every_verb() -> None:
    from equipot.cli.main import VERBS

    shown = run_equipot("--help")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", ["data", "train", "export", "serve", "models", "predict"])
def test_each_verb_explains_itself(verb: str) -> None:
    shown = run_equipot(verb, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"equipot {verb}" in shown.stdout


def test_an_unknown_verb_is_answered_with_the_known_ones() -> None:
    answer = run_equipot("trian")
    assert answer.returncode == 2
    assert "no such command: trian" in answer.stderr
    assert "train" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_users_mistake_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    answer = run_equipot("train", str(tmp_path / "absent.toml"))
    assert answer.returncode == 2
    assert "absent.toml" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_program_of_the_deepspeed_launcher_gets_its_own_arguments() -> None:
    shown = run_equipot("--local_rank=0", "train", "--help")
    assert shown.returncode == 0
    assert "equipot train" in shown.stdout
