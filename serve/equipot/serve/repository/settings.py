"""What the operator decides about a repository. Knows nothing of gRPC or torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from equipot.serve.errors import ServeError


class Preload(StrEnum):
    """What is in memory before anybody asks for it."""

    DEFAULT = "default"
    """Of each model what its plain name and its labels mean."""
    ALL = "all"
    """Every version."""
    NONE = "none"
    """Nothing: a version is loaded when it is first asked for."""


def default_cache() -> Path:
    """Where remote bundles are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "equipot" / "bundles"


def anchored(url: str, folder: Path) -> str:
    """A path of this machine as it is from `folder` on; any other URL as it is."""
    return url if not url or re.match(r"\w[\w+.-]*:", url) else str(folder / Path(url).expanduser())


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositorySettings:
    """How a repository is served.

    Attributes:
        url: a folder, or any URL that fsspec opens.
        poll: seconds between two looks at it; 0: only when an operator asks.
        preload: what is loaded at the start and when versions come.
        max_loaded: most models in memory; beyond it the one that was longest unused goes. A version that
            takes another's place is loaded beside it, so for that while there is one more.
        unload_after: seconds after its last request when a version goes that neither a plain name nor a label
            means any more; those who named its digest go on meanwhile.
        cache: where remote bundles are kept, by digest.
        default: the model that an empty name means; empty: the only one, if there is only one.

    Raises:
        ServeError: a value out of range, with its bounds.
    """

    url: str
    poll: float = 30.0
    preload: Preload = Preload.DEFAULT
    max_loaded: int | None = None
    unload_after: float = 10.0
    cache: Path = field(default_factory=default_cache)
    default: str = ""

    def __post_init__(self) -> None:
        if not self.url:
            raise ServeError("repository is empty: give a folder or a URL")
        if self.poll and not 0.1 <= self.poll <= 86_400:
            raise ServeError(
                f"repository-poll is {self.poll}, allowed are 0 (never) and 0.1 to 86400 seconds"
            )
        if self.max_loaded is not None and self.max_loaded < 1:
            raise ServeError(f"max-loaded is {self.max_loaded}, allowed are 1 or more")
        if not 0 <= self.unload_after <= 86_400:
            raise ServeError(f"unload-after is {self.unload_after}, allowed are 0 to 86400 seconds")
