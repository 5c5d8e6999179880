"""The chart rendered by both Helms, once per session and case, and the tools that check what comes out."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from equipot.cli.main import VERBS

from .cases import GOOD, Values

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "equipot"
HELMS = ("helm3", "helm4")

Object = dict[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(text: str) -> list[Object]:
    return [document for document in yaml.load_all(text, Loader=LOADER) if document]


@functools.cache
def tools() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "chart_tools.py"], capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a tool; skips with the reason where it cannot be had."""

    def find(name: str) -> str:
        found = tools()[name]
        if not isinstance(found, str):
            pytest.skip(f"{name} cannot be had here: {found['missing']}")
        return found

    return find


@dataclass(frozen=True)
class Done:
    """How a Helm command ended."""

    code: int
    out: str
    err: str


Helm = Callable[..., Done]
Render = Callable[[str, str], list[Object]]


@pytest.fixture(scope="session")
def helm(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs a Helm with some values, in a home of its own."""
    home = tmp_path_factory.mktemp("helm-home")

    def run(name: str, *words: str, values: Values | None = None) -> Done:
        command = [tool(name), *words]
        if values is not None:
            file = home / "values.json"
            file.write_text(json.dumps(values))
            command += ["--values", str(file)]
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The objects of a good case, tests' hooks included."""

    @functools.cache
    def objects(name: str, case: str) -> list[Object]:
        words = ("template", "lab", str(CHART), "--namespace", "science")
        done = helm(name, *words, values=GOOD[case])
        assert done.code == 0, done.err
        return load(done.out)

    return objects


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The only object of a kind, and name."""
    (found,) = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    return found


def pods(objects: list[Object]) -> dict[str, Object]:
    """Every pod template (metadata and spec), by what it belongs to."""
    found = {}
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "Deployment":
            found["server"] = spec["template"]
        elif item["kind"] == "LeaderWorkerSet":
            found["server"] = spec["leaderWorkerTemplate"]["leaderTemplate"]
            found["worker"] = spec["leaderWorkerTemplate"]["workerTemplate"]
        elif item["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            found["head"] = cluster["headGroupSpec"]["template"]
            found["server"] = cluster["workerGroupSpecs"][0]["template"]
        elif item["kind"] == "Pod":
            found["test"] = item
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that the command line makes of words; nothing is run."""
    verb = VERBS[words[0]]
    app = getattr(importlib.import_module(verb.module), verb.app)
    command = typer.main.get_command(app)
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    return dict(context.params)
