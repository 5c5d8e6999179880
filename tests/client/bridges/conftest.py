"""Programs that equipot drives, each in an environment of its own that also sees this one's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Place:
    """An environment: its interpreter, and what its programs must find."""

    bin: Path
    environment: dict[str, str]

    def run(self, *words: object, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "python", *map(str, words)],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def place_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Place]:
    def make(*packages: str, dependencies: bool = False) -> Place:
        """With these packages, and with what else they need and this environment lacks if wanted."""
        home = tmp_path_factory.mktemp("place") / "venv"
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install: list[str | Path] = [
            home / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        (site,) = (home / "lib").glob("python*/site-packages")
        # Everything that this interpreter sees, behind the place's own packages.
        (site / "outer.pth").write_text("\n".join(path for path in sys.path if path), encoding="utf-8")
        wanted: list[str | Path] = ["-c", ROOT / "constraints.txt"] if dependencies else ["--no-deps"]
        installed = subprocess.run(
            [*install, *wanted, *packages], capture_output=True, text=True, timeout=280
        )
        if installed.returncode and "No matching distribution" in installed.stderr + installed.stdout:
            pytest.skip(f"no package index can be reached from here, or it has no {', '.join(packages)}")
        assert installed.returncode == 0, installed.stderr
        libraries = {"LD_LIBRARY_PATH": str(home / "lib"), "OMP_NUM_THREADS": "1"}
        return Place(home / "bin", {**os.environ, **libraries})

    return make
