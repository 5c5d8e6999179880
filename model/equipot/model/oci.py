"""Pulls the files of one artifact or image out of an OCI registry. Knows nothing of bundles.

Files are layers titled as `oras push` titles them, or archives as image builders write them; every blob is
checked against the digest that the manifest gives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from equipot.model.errors import BundleError
from equipot.model.shard_files import chunks

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
LARGEST_MANIFEST = 4 * 2**20
TIMEOUT = 60.0

_REFERENCE = re.compile(
    r"(?P<host>[^/]+)/(?P<name>[a-z0-9._/-]+?)(?:@(?P<digest>sha256:[0-9a-f]{64})|:(?P<tag>[\w.-]+))?"
)
_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")


def pull(reference: str, folder: Path, *, token: str, unpack: Callable[[BinaryIO, Path], None]) -> None:
    """Writes the files of REGISTRY/REPOSITORY:TAG or …@sha256:… into the folder.

    Credentials are those of `$DOCKER_CONFIG/config.json`, if there is one, or the token.

    Raises:
        BundleError: it cannot be pulled, or a blob is not what the manifest says.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BundleError(f"oci://{reference}: give oci://REGISTRY/REPOSITORY:TAG or …@sha256:DIGEST")
    registry = _Registry(match["host"], match["name"], token)
    manifest = registry.manifest(match["digest"] or match["tag"] or "latest")
    if "manifests" in manifest:
        manifest = registry.manifest(_of_linux(manifest["manifests"], reference)["digest"])
    for layer in manifest.get("layers", []):
        annotations = layer.get("annotations") or {}
        with tempfile.TemporaryFile(dir=folder.parent) as blob:
            registry.blob(layer["digest"], blob)
            blob.seek(0)
            if "tar" in layer.get("mediaType", "") or annotations.get(UNPACK) == "true":
                unpack(blob, folder)
            elif title := annotations.get(TITLE):
                _write(blob, folder, title)


class _Registry:
    def __init__(self, host: str, name: str, token: str) -> None:
        # As everywhere: registries on this machine speak http, all others https.
        self._base = f"{'http' if _LOCAL.fullmatch(host) else 'https'}://{host}/v2/{name}"
        self._host, self._name = host, name
        self._authorization = f"Bearer {token}" if token else ""

    def manifest(self, reference: str) -> dict[str, Any]:
        with self._open(f"{self._base}/manifests/{reference}", accept=", ".join(MANIFESTS)) as reply:
            raw = reply.read(LARGEST_MANIFEST)
        if reference.startswith("sha256:") and hashlib.sha256(raw).hexdigest() != reference[7:]:
            raise BundleError(f"the manifest of {self._host}/{self._name}@{reference} is another one")
        try:
            manifest = json.loads(raw)
        except ValueError as error:
            raise BundleError(f"{self._host}/{self._name}: the manifest is no JSON") from error
        if not isinstance(manifest, dict):
            raise BundleError(f"{self._host}/{self._name}: the manifest is no object")
        return manifest

    def blob(self, digest: str, target: BinaryIO) -> None:
        checksum = hashlib.sha256()
        with self._open(f"{self._base}/blobs/{digest}") as reply:
            for chunk in chunks(reply):
                checksum.update(chunk)
                target.write(chunk)
        if f"sha256:{checksum.hexdigest()}" != digest:
            raise BundleError(f"blob {digest} of {self._host}/{self._name} came damaged: fetch it again")

    def _open(self, url: str, *, accept: str = "*/*", again: bool = True) -> Any:  # noqa: ANN401  # urllib's reply
        request = urllib.request.Request(url, headers={"Accept": accept})
        if self._authorization:
            # Unredirected: stores that registries redirect to refuse a foreign authorization.
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code == 401 and again and challenge:
                self._authorization = self._answer(challenge)
                return self._open(url, accept=accept, again=False)
            raise BundleError(f"{url}: {error.code} {error.reason}") from error
        except OSError as error:
            raise BundleError(f"{url}: {error}") from error

    def _answer(self, challenge: str) -> str:
        """What to authorize with, to a Basic or Bearer challenge."""
        basic = _login(self._host)
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            return f"Basic {basic}"
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        query = {"scope": fields.get("scope", f"repository:{self._name}:pull")}
        if "service" in fields:
            query["service"] = fields["service"]
        realm = fields.get("realm", "")
        if not realm.startswith(("https://", "http://")):
            raise BundleError(f"{self._host} asks for a token but does not say where to get it")
        request = urllib.request.Request(f"{realm}?{urllib.parse.urlencode(query)}")
        if basic:
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                answer = json.load(reply)
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(f"{self._host} gives no token for {self._name}: {error}") from error


def _login(host: str) -> str:
    """The base64 of user:password for a registry, "" if none is known."""
    folder = os.environ.get("DOCKER_CONFIG")
    if not folder:
        return ""
    try:
        known = json.loads((Path(folder) / "config.json").read_text())["auths"].get(host, {})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(f"{folder}/config.json cannot be read: {error!r}") from error
    if "auth" in known:
        return str(known["auth"])
    if "username" in known:
        return base64.b64encode(f"{known['username']}:{known.get('password', '')}".encode()).decode()
    return ""


def _of_linux(manifests: list[dict[str, Any]], reference: str) -> dict[str, Any]:
    for manifest in manifests:
        platform = manifest.get("platform") or {}
        if platform.get("os", "linux") == "linux" and platform.get("architecture", "amd64") == "amd64":
            return manifest
    raise BundleError(f"oci://{reference} has nothing for linux/amd64")


def _write(blob: BinaryIO, folder: Path, title: str) -> None:
    target = (folder / title).resolve()
    if not target.is_relative_to(folder.resolve()) or target == folder.resolve():
        raise BundleError(f"a file of the artifact is called {title!r}, which leads out of the folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for chunk in chunks(blob):
            file.write(chunk)
