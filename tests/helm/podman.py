"""podman for the tests of pods: images, networks, pods from rendered manifests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, Object

BASE = "localhost/equipot-base:bookworm"
BUILD_SECONDS = 3600
CONFIG = (
    '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n[engine]\nruntime = "runc"\n'
)
"""Nested in a container podman may not raise limits, and Debian's crun does not run."""


@dataclass(frozen=True)
class Podman:
    """Runs podman with a configuration of its own."""

    config: Path

    def __call__(self, *words: str, check: bool = True, timeout: float = 120, text: str = "") -> str:
        done = subprocess.run(
            ["podman", *words],
            capture_output=True,
            text=True,
            input=text,
            timeout=timeout,
            env={**os.environ, "CONTAINERS_CONF": str(self.config)},
        )
        assert not check or done.returncode == 0, f"podman {' '.join(words)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def exists(self, image: str) -> bool:
        done = subprocess.run(["podman", "image", "exists", image], check=False)
        return done.returncode == 0

    def base_image(self, scratch: Path) -> str:
        """EQUIPOT_BASE_IMAGE, or a Debian made with debootstrap: image registries need not be in reach."""
        named = os.environ.get("EQUIPOT_BASE_IMAGE")
        if named:
            return named
        if not self.exists(BASE):
            if shutil.which("debootstrap") is None:
                pytest.skip("no EQUIPOT_BASE_IMAGE, and debootstrap is not installed to make one")
            root = scratch / "root"
            packages = "--include=python3,python3-venv,python3-dev,ca-certificates"
            words = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if done.returncode:
                pytest.skip(f"debootstrap: {done.stdout.strip().splitlines()[-1]}")
            tarball = scratch / "root.tar"
            subprocess.run(["tar", "-C", str(root), "-cf", str(tarball), "."], check=True)
            self("import", str(tarball), BASE, timeout=BUILD_SECONDS)
            shutil.rmtree(root)
            tarball.unlink()
        return BASE

    def build(self, containerfile: str, name: str, scratch: Path) -> str:
        """EQUIPOT_TEST_IMAGE, or one of the tree as it is, built with this machine's ways to pip's index."""
        if named := os.environ.get("EQUIPOT_TEST_IMAGE"):
            return named
        image = f"localhost/{name}:{_tree_hash()}"
        if self.exists(image):
            return image
        words = ["build", "--network", "host", "-f", str(ROOT / containerfile), "-t", image]
        words += ["--build-arg", f"BASE_IMAGE={self.base_image(scratch)}"]
        for host, inside in _pip_files().items():
            words += ["-v", f"{host}:{inside}:ro"]
        if "PIP_CERT" in os.environ:
            words += ["--env", f"PIP_CERT={os.environ['PIP_CERT']}"]
        self(*words, str(ROOT), timeout=BUILD_SECONDS)
        return image

    def address(self, pod: str) -> str:
        """A pod's address on its network."""
        infra = self("pod", "inspect", pod, "--format", "{{.InfraContainerID}}")
        networks = json.loads(self("inspect", infra, "--format", "{{json .NetworkSettings.Networks}}"))
        return str(next(iter(networks.values()))["IPAddress"])

    def play(self, pod: Object, network: str, alias: str) -> None:
        """Starts one pod, which its alias leads to, beside others."""
        self("kube", "play", "--network", f"{network}:alias={alias}", "-", text=yaml.safe_dump(pod))


def _pip_files() -> dict[str, str]:
    """What pip needs here: its configuration, the wheels it names, certificates."""
    wanted = {"/etc/pip.conf": "/etc/pip.conf"}
    own = Path.home() / ".config/pip/pip.conf"
    wanted[str(own)] = str(Path("/root") / ".config/pip/pip.conf")  # where a build's root has it
    for folder in ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates"):
        wanted[folder] = folder
    for path in (Path("/etc/pip.conf"), own):
        for word in path.read_text().split() if path.exists() else []:
            named = Path(word.removeprefix("file://"))
            if named.is_absolute() and named.is_dir():
                # An index of links leads to files that lie beside it.
                held = named.parent if word.startswith("file://") else named
                wanted[str(held)] = str(held)
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        wanted[folder] = folder
    return {host: inside for host, inside in wanted.items() if Path(host).exists()}


def _tree_hash() -> str:
    words = ["git", "ls-files", "-co", "--exclude-standard", "protos", "model", "train", "serve", "client"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes())
    for name in sorted(names):
        if (ROOT / name).is_file():
            digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def pod_of(workload: Object, name: str, **changes: Any) -> Object:
    """A pod as the controller would make it of a Deployment's template."""
    template = workload["spec"]["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name, **changes},
        "spec": template["spec"],
    }


def until(condition: Any, what: str, seconds: float = 120.0) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds:g} s")
