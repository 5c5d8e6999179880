"""Writes the chart's values.schema.json and its README's tables from values.yaml; with --check only compares.

The tables are npm's readme-generator's, whose schema is too loose: here keys of our own are closed, and what
is passed through to Kubernetes is open.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "equipot"
RULES = ROOT / "helm" / "tools" / "schema_rules.json"
"""By path: what a type alone cannot say of our own values."""

PARAMETER = re.compile(
    r"^\s*## @param (?P<path>\S+)(?: \[(?P<modifiers>[^\]]*)\])? (?P<text>.+)$", re.MULTILINE
)
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schema(values_text: str, rules: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a values.yaml."""
    values = yaml.safe_load(values_text)
    documented = {match["path"]: match for match in PARAMETER.finditer(values_text)}
    unused = set(rules) - set(documented)
    if unused:
        raise SystemExit(f"{RULES.name} names {sorted(unused)}, which values.yaml does not document")

    def describe(path: str, value: object) -> dict[str, Any]:
        match = documented.get(path)
        if match is None:
            if not isinstance(value, dict):
                raise SystemExit(f"values.yaml: {path} has no ## @param")
            return {
                "type": "object",
                "additionalProperties": False,
                "properties": {key: describe(f"{path}.{key}", inner) for key, inner in value.items()},
            }
        known: dict[str, Any] = {"description": match["text"]}
        modifiers = (match["modifiers"] or "").split(",")
        if "nullable" in modifiers:
            known["type"] = ["integer", "null"]
        else:
            known["type"] = TYPES[type(value)]
        return known | rules.get(path, {})

    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the equipot chart",
        "type": "object",
        "additionalProperties": False,
        "properties": {key: describe(key, value) for key, value in values.items()}
        # Helm adds `global` itself, to every chart that is part of another.
        | {"global": {"type": "object"}},
    }


def readme(generator: str, text: str) -> str:
    """The README with fresh tables."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "README.md"
        copy.write_text(text)
        done = subprocess.run(
            [generator, "-v", str(CHART / "values.yaml"), "-r", str(copy)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"readme-generator: {done.stderr or done.stdout}")
        return copy.read_text()


def main(words: list[str]) -> None:
    """Writes or compares."""
    generator = words[0] if words and not words[0].startswith("-") else None
    if generator is None:
        tools = json.loads(
            subprocess.run(
                [sys.executable, str(ROOT / "scripts" / "chart_tools.py")], check=True, capture_output=True
            ).stdout
        )
        generator = tools["readme-generator"]
        if not isinstance(generator, str):
            raise SystemExit(f"no readme-generator: {generator['missing']}")
    made = {
        CHART / "values.schema.json": json.dumps(
            schema((CHART / "values.yaml").read_text(), json.loads(RULES.read_text())), indent=2
        )
        + "\n",
        CHART / "README.md": readme(generator, (CHART / "README.md").read_text()),
    }
    # Helm reads files of the chart alone, so it has copies of what serving's own room keeps.
    for name in ("rules.yaml", "dashboard.json"):
        source = ROOT / "serve" / "equipot" / "serve" / "monitoring" / name
        if source.exists():
            made[CHART / "files" / name] = source.read_text()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in words:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            raise SystemExit(f"out of date: {names}; run `make chart`")
        return
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
