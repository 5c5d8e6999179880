"""Reads a repository of bundles through fsspec, and keeps remote bundles on disk by digest. Serves nothing.

The only room of fsspec.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from equipot.model.card import CARD_FILE, Shard, read_card
from equipot.model.errors import BundleError
from equipot.model.shard_files import AGAIN, Readable, copy_shard
from equipot.serve.errors import ServeError
from equipot.serve.repository import labels
from equipot.serve.repository.versions import NAME, is_version, order

STALE_SECONDS = 86_400.0
"""A half-fetched bundle this old belongs to a process that died."""

Key = tuple[str, str]
"""A model's name and version."""

_USER = re.compile(r"//[^/\s]*@")
"""Who asks, and by which password, within a URL."""

_VOLATILE = ("name", "islink", "nlink", "atime", "mode", "uid", "gid")

logger = logging.getLogger(__name__)


class SourceError(Exception):
    """The repository, or a part of it, cannot be read now; the message says what and why."""


class GoneError(SourceError):
    """It could be read that it is not there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a version lies, and how its files looked.

    Attributes:
        path: as fsspec calls it.
        card_stamp: of its model.json; empty if there is none.
        stamp: of all its files.
    """

    path: str
    card_stamp: str
    stamp: str


@dataclass(slots=True)
class Unread:
    """What is there and could not be read, so that nothing is known of it now.

    Attributes:
        names: of models whose folder could not be listed.
        versions: that could not be listed, or whose card could not be read.
        labels: why, by the model whose labels file could not be read.
    """

    names: set[str] = field(default_factory=set)
    versions: set[Key] = field(default_factory=set)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a repository holds.

    Attributes:
        places: by model and version, the oldest first; a model without versions is there, too.
        labels: stamps of the labels files, by model.
        unread: what is missing from both, though it is there.
        problems: what is wrong, one sentence each.
    """

    places: Mapping[str, Mapping[str, Place]]
    labels: Mapping[str, str]
    unread: Unread
    problems: tuple[str, ...]


class _Remote:
    """A file of a storage, whose errors in reading are told from those in writing what is read."""

    def __init__(self, file: Readable, fault: Callable[[Exception], Exception]) -> None:
        self._file, self._fault = file, fault

    def read(self, amount: int, /) -> bytes:
        try:
            return self._file.read(amount)
        except Exception as error:
            raise self._fault(error) from error


class Source:
    """One repository; its methods wait for storage, so call them in a thread.

    Attributes:
        shown: its URL without what may be secret.

    Raises:
        ServeError: fsspec does not know such a URL, or lacks the package for it.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self.shown = without_secrets(url)
        self._cache = cache
        try:
            self._fs, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ServeError(f"repository {self.shown}: {error}") from error
        self._local = isinstance(self._fs, LocalFileSystem)

    def contents(self) -> Contents:
        """What there is now.

        Raises:
            SourceError: the repository does not exist, cannot be read, or is a bundle itself.
        """
        self._fs.invalidate_cache()
        places: dict[str, Mapping[str, Place]] = {}
        stamps: dict[str, str] = {}
        problems: list[str] = []
        unread = Unread()
        entries = self._entries(self._root)
        if CARD_FILE in entries:
            raise SourceError(
                f"repository {self.shown} is a bundle itself: serve it as such, or move it to NAME/VERSION"
            )
        for name, entry in entries.items():
            if entry["type"] != "directory":
                problems += _astray(name, entry)
                continue
            if not NAME.fullmatch(name):
                problems.append(f"{name!r} is no name for a model, so its folder is left out")
                continue
            try:
                within = self._entries(entry["name"])
            except SourceError as error:
                problems.append(str(error))
                if not isinstance(error, GoneError):
                    unread.names.add(name)
                continue
            places[name] = self._versions(name, within, problems, unread)
            try:
                if stamp := self._stamps(within, labels.FILE).get(labels.FILE):
                    stamps[name] = stamp
            except SourceError as error:
                unread.labels[name] = str(error)
        return Contents(places, stamps, unread, tuple(problems))

    def labels_bytes(self, name: str) -> bytes:
        """A model's labels file.

        Raises:
            SourceError: it cannot be read.
        """
        return self._bytes(f"{self._root.rstrip('/')}/{name}/{labels.FILE}")

    def card_bytes(self, place: Place) -> bytes:
        """A version's model.json.

        Raises:
            SourceError: it cannot be read.
        """
        return self._bytes(f"{place.path}/{CARD_FILE}")

    def where(self, place: Place) -> str:
        """A version's path without what may be secret."""
        return without_secrets(place.path)

    def fetch(self, place: Place) -> Path:
        """A local folder with the bundle, whose shards have the size and sum that its card states.

        A remote bundle is fetched once: it is kept by its digest, whatever it is called.

        Raises:
            BundleError: it is damaged.
            SourceError: it cannot be read.
        """
        if self._local:
            return Path(place.path)
        try:
            return self._kept(place)
        except OSError as error:  # what befalls the storage is no longer one
            raise SourceError(f"cannot keep bundles in {self._cache}: {error.strerror or error}") from error

    def _kept(self, place: Place) -> Path:
        """As `fetch`, of a remote bundle; an OSError is of this machine's disk."""
        self._cache.mkdir(parents=True, exist_ok=True)
        self._drop_stale()
        aside = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._cache))
        try:
            (aside / CARD_FILE).write_bytes(self.card_bytes(place))
            card = read_card(aside)
            target = self._cache / card.digest.replace(":", "-")
            if not target.exists():
                for shard in card.shards:
                    self._fetch_shard(place.path, shard, aside)
                aside.chmod(0o755)
                self._name(aside, target)
            return target
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def forget(self, folder: Path) -> bool:
        """Removes a bundle from the cache, as it is damaged there; False if it never was in it."""
        if folder.parent != self._cache:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True

    def _versions(
        self, name: str, within: Mapping[str, Any], problems: list[str], unread: Unread
    ) -> dict[str, Place]:
        if CARD_FILE in within:
            problems.append(f"{name} holds a bundle itself: move it to {name}/1")
        found = {}
        for version, entry in within.items():
            if entry["type"] != "directory":
                problems += _astray(f"{name}/{version}", entry)
                continue
            if not is_version(version):
                problems.append(
                    f"{name}/{version} is no version, so it is left out: use integers, or numbers with dots"
                )
                continue
            path = entry["name"].rstrip("/")
            try:
                files = {file: info for file, info in self._entries(path).items() if info["type"] == "file"}
                stamps = self._stamps(files, *files)
            except SourceError as error:
                problems.append(str(error))
                if not isinstance(error, GoneError):
                    unread.versions.add((name, version))
                continue
            found[version] = Place(path, stamps.get(CARD_FILE, ""), repr(sorted(stamps.items())))
        return {version: found[version] for version in sorted(found, key=order)}

    def _entries(self, path: str) -> dict[str, Any]:
        """What lies in a folder, by its last name; hidden and private things are left out."""
        try:
            listed = self._fs.ls(path, detail=True)
        except Exception as error:  # every storage raises what its own library does
            raise self._fault(path, error) from error
        inside = path.rstrip("/") + "/"
        entries = {}
        for info in listed:
            full = str(info["name"]).rstrip("/")
            name = full.rsplit("/", 1)[-1]
            if full + "/" == inside and info["type"] != "directory":
                raise SourceError(f"repository {self.shown}: {self._relative(path)} is a file, not a folder")
            if f"{inside}{name}" == full and re.match(r"[^._?]", name):
                entries[name] = self._followed(info)
        return entries

    def _followed(self, info: dict[str, Any]) -> dict[str, Any]:
        """What a local link leads to, under its own name; itself if that is nowhere."""
        if not info.get("islink"):
            return info
        path = str(info["name"])
        try:
            return {**self._fs.info(os.path.realpath(path)), "name": path}
        except FileNotFoundError:
            return info
        except OSError as error:
            raise self._fault(path, error) from error

    def _stamps(self, entries: Mapping[str, Any], *files: str) -> dict[str, str]:
        """Of those files that are there."""
        stamps = {}
        for file in files:
            if file in entries:
                with contextlib.suppress(GoneError):
                    stamps[file] = self._stamp(entries[file])
        return stamps

    def _stamp(self, info: Mapping[str, Any]) -> str:
        """Changes when the file does, as far as the storage can tell."""
        try:
            # A folder over HTTP lists names alone.
            known = info if info.get("size") is not None else self._fs.info(info["name"])
        except Exception as error:
            raise self._fault(str(info["name"]), error) from error
        return repr(sorted((key, str(value)) for key, value in known.items() if key not in _VOLATILE))

    def _bytes(self, path: str) -> bytes:
        try:
            raw: bytes = self._fs.cat_file(path)
        except Exception as error:
            raise self._fault(path, error) from error
        return raw

    def _fetch_shard(self, folder: str, shard: Shard, into: Path) -> None:
        def fault(error: Exception) -> Exception:
            if _is_gone(error):
                return BundleError(f"{shard.file}: shard is missing; {AGAIN}")
            return self._fault(f"{folder}/{shard.file}", error)

        try:
            remote = self._fs.open(f"{folder}/{shard.file}", "rb")
        except Exception as error:
            raise fault(error) from error
        with remote:
            copy_shard(_Remote(remote, fault), shard, into)

    def _name(self, aside: Path, target: Path) -> None:
        try:
            aside.rename(target)
        except OSError:
            # Another server fetched the same meanwhile, unless the disk is at fault.
            if not (target / CARD_FILE).is_file():
                raise

    def _drop_stale(self) -> None:
        for folder in self._cache.glob(".fetch-*"):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._root).strip("/") or "it"

    def _fault(self, path: str, error: Exception) -> SourceError:
        where = f"repository {self.shown}: {self._relative(path)}"
        if _is_gone(error):
            return GoneError(f"{where} does not exist")
        shown = error.__cause__ if isinstance(error, FileNotFoundError) else error
        what = _USER.sub("//", " ".join(f"{type(shown).__name__}: {shown}".split()))[:300]
        return SourceError(f"{where} cannot be read ({what})")


def _is_gone(error: Exception) -> bool:
    """Whether a storage says that something is not there, and not only that it could not look."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    # fsspec calls a file not found whatever befalls its `info` over HTTP: 503, or no connection.
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in (404, 410)
    return not isinstance(cause, OSError) and not type(cause).__module__.startswith("aiohttp")


def _astray(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [f"{name} is a link that leads nowhere, so it is left out"] if entry.get("islink") else []


def without_secrets(url: str) -> str:
    """Of each part of a chain of URLs, as in simplecache::https://…"""
    return "::".join(_part(part) for part in url.split("::"))


def _part(url: str) -> str:
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))
