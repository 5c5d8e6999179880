"""Fetches a bundle from a URL into a folder, whole and by checksum. Knows no tensors.

http(s), local files and OCI registries are read here; every other scheme (s3, gs, abfs, hf, …) is fsspec's,
whose drivers are packages of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from equipot.model import oci
from equipot.model.card import read_card
from equipot.model.errors import BundleError
from equipot.model.shard_files import Readable, check_shards, chunks

ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz|tar\.xz|tar\.bz2)$")
ATTEMPTS = 5
"""Of a download, each going on where the one before it ended."""

TIMEOUT = 60.0
"""Seconds without a byte after which a download is tried again."""

_SHA256 = re.compile(r"(sha256:)?([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

logger = logging.getLogger(__name__)


def fetch(url: str, *, out: Path, name: str, sha256: str, token: str = "") -> Path:
    """A bundle at ``out/name``, complete and checked; one that is there already is not fetched again.

    Several processes may fetch into one folder at once: each works aside, the last to finish names its copy.

    Args:
        url: of an archive (.tar, .tar.gz, …), of a bundle's folder, or oci://REGISTRY/REPOSITORY:TAG.
        out: folder that takes it.
        name: of the folder within `out`.
        sha256: of the archive, or the bundle's digest; the latter also for what is no archive.
        token: a bearer token for http(s), and for registries.

    Raises:
        BundleError: it cannot be reached, is no bundle, or is another one than `sha256` says.
    """
    match = _SHA256.fullmatch(sha256.lower())
    if match is None:
        raise BundleError(
            f"sha256 is {sha256!r}: give 64 hexadecimal digits, of the archive or the bundle's digest"
        )
    wanted = match[2]
    if not _NAME.fullmatch(name):
        raise BundleError(f"name is {name!r}: letters, digits, dots, dashes and underscores are allowed")
    target, note = out / name, out / f".{name}.fetched"
    if _is_there(target, note, wanted):
        logger.info("%s is there already", target)
        return target
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
    except OSError as error:
        raise BundleError(f"cannot write into {out}: {error.strerror}") from error
    try:
        unpacked = aside / "unpacked"
        unpacked.mkdir()
        archive_sha256 = _get(url, unpacked, aside / "download", token)
        bundle = _bundle_in(unpacked, url)
        digest = check(bundle)
        if wanted not in (archive_sha256, digest):
            found = f"its archive has {archive_sha256}, " if archive_sha256 else ""
            raise BundleError(f"{url} is not what sha256 {wanted} says: {found}the bundle in it {digest}")
        _put(bundle, target, aside / "before")
        _write_note(note, {"sha256": wanted, "digest": digest, "url": url})
    except OSError as error:
        raise BundleError(f"cannot fetch {url}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def check(bundle: Path) -> str:
    """The digest of a bundle, once card and every shard are what they say.

    Raises:
        BundleError: not a bundle, or a damaged one.
    """
    card = read_card(bundle)
    check_shards(bundle, card)
    return card.digest.removeprefix("sha256:")


def _is_there(target: Path, note: Path, wanted: str) -> bool:
    """Whether an earlier fetch ended well; shards are checked again when the bundle is loaded."""
    try:
        known = json.loads(note.read_text())
        return known["sha256"] == wanted and read_card(target).digest == f"sha256:{known['digest']}"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _get(url: str, unpacked: Path, download: Path, token: str) -> str:
    """Fills `unpacked`; returns the archive's checksum, "" if there is no archive."""
    scheme, _, rest = url.rpartition("://")
    scheme = scheme.lower()
    if scheme == "oci":
        oci.pull(rest, unpacked, token=token, unpack=unpack)
        return ""
    archive = ARCHIVE.search(rest.split("?")[0].split("#")[0])
    if scheme in ("http", "https"):
        if archive is None:
            raise BundleError(f"{url} is no archive by its name: give a .tar, .tar.gz, .tar.xz or .tar.bz2")
        checksum = _download(url, download, token)
    elif scheme in ("", "file"):
        source = Path(rest)
        if source.is_dir():
            shutil.copytree(source, unpacked / "bundle")
            return ""
        if archive is None or not source.is_file():
            raise BundleError(f"{source} is neither a folder nor an archive")
        with source.open("rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        download = source
    else:
        checksum = _through_fsspec(url, unpacked, download, archive=archive is not None)
        if archive is None:
            return ""
    with download.open("rb") as stream:
        unpack(stream, unpacked)
    return checksum


def _download(url: str, file: Path, token: str) -> str:
    """The checksum of what was downloaded, over as many connections as it takes."""
    file.touch()
    for attempt in range(1, ATTEMPTS + 1):
        have = file.stat().st_size
        request = urllib.request.Request(url)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                goes_on = have and reply.status == 206
                expected = int(reply.headers.get("Content-Length") or -1)
                with file.open("ab" if goes_on else "wb") as stream:
                    copied = _copy(reply, stream)
            if expected >= 0 and copied != expected:
                raise ConnectionError(f"ended after {copied} of {expected} bytes")
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise BundleError(f"cannot fetch {url}: {error.code} {error.reason}") from error
            if error.code == 416:
                file.write_bytes(b"")
            problem: Exception = error
        except (OSError, ValueError) as error:
            problem = error
        if attempt == ATTEMPTS:
            raise BundleError(f"cannot fetch {url} in {ATTEMPTS} attempts: {problem}") from problem
        logger.warning("%s: %s; going on at %d bytes", url, problem, file.stat().st_size)
        time.sleep(min(2.0 ** (attempt - 1), 10.0))
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _copy(source: Readable, target: BinaryIO) -> int:
    copied = 0
    for chunk in chunks(source):
        target.write(chunk)
        copied += len(chunk)
    return copied


def _through_fsspec(url: str, unpacked: Path, download: Path, *, archive: bool) -> str:
    try:
        fsspec = importlib.import_module("fsspec")
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise BundleError(f"{url}: {error}; pip install it beside equipot") from error
    except ValueError as error:
        raise BundleError(f"{url}: {error}") from error
    try:
        if not archive:
            files.get(path.rstrip("/") + "/", str(unpacked / "bundle") + "/", recursive=True)
            return ""
        files.get_file(path, str(download))
    except Exception as error:  # each driver has errors of its own
        raise BundleError(f"cannot fetch {url}: {error!r}") from error
    with download.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unpack(stream: BinaryIO, folder: Path) -> None:
    """Takes the regular files out of an archive, and nothing that lies or leads out of the folder.

    Raises:
        BundleError: no archive, or a damaged one.
    """
    try:
        with tarfile.open(fileobj=stream) as archive:
            for member in archive:
                if member.isreg() or member.isdir():
                    archive.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BundleError(f"the archive cannot be unpacked: {error}") from error


def _bundle_in(folder: Path, url: str) -> Path:
    cards = [path for path in folder.rglob("model.json") if len(path.relative_to(folder).parts) <= 3]
    if len(cards) != 1:
        found = ", ".join(str(PurePosixPath(card.relative_to(folder))) for card in cards) or "none"
        raise BundleError(f"{url} should hold one bundle, with one model.json; found {found}")
    return cards[0].parent


def _put(bundle: Path, target: Path, before: Path) -> None:
    """Names the bundle. What was there stays readable to whoever has it open."""
    for _ in range(10):
        if target.exists():
            with contextlib.suppress(FileNotFoundError):
                target.rename(before)
        try:
            bundle.rename(target)
        except OSError:
            # Another process named its own copy in between.
            shutil.rmtree(before, ignore_errors=True)
            continue
        # The server may run as another user than who fetched.
        target.chmod(0o755)
        return
    raise BundleError(f"{target} is being written by others all the time")


def _write_note(note: Path, content: dict[str, str]) -> None:
    with _aside(note) as file:
        file.write_text(json.dumps(content))


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    file = path.with_name(f"{path.name}-{time.monotonic_ns()}")
    yield file
    file.replace(path)
