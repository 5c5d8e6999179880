"""What a study's folder remembers of its declaration, and which changes of it are fine when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equipot.train.scaling.declaration import Study, StudyError, parse_study
from equipot.train.scaling.folder import StudyFolder, read_json, write_json
from equipot.train.scaling.grid import Wish, wishes

_FREE = ("name", "question", "folders", "experiments", "keep_checkpoints")


def check_grown(study: Study, folder: StudyFolder) -> None:
    """Refuse a declaration that does more than add points to the one that a folder has results of.

    Raises:
        StudyError: what was declared before is another study; the message names what differs.
    """
    kept = read_json(folder.resolved)
    if kept is not None:
        _check(study, parse_study(kept, str(folder.resolved)), folder)


def remember(study: Study, source: Path, folder: StudyFolder) -> None:
    """Keep a study's declaration, which has passed every check, with its results."""
    folder.declaration.write_bytes(source.read_bytes())
    write_json(folder.resolved, study.model_dump(mode="json", exclude_none=True))


def _check(study: Study, before: Study, folder: StudyFolder) -> None:
    for name in Study.model_fields:
        if name not in _FREE and getattr(study, name) != getattr(before, name):
            raise StudyError(
                f"{folder.path} holds results of a study with another {name}: it was "
                f"{_show(getattr(before, name))}, now it is {_show(getattr(study, name))}. Points "
                "may be added to a study; give another --out for another one"
            )
    now = {_identity(wish) for wish in wishes(study)}
    gone = [wish for wish in wishes(before) if _identity(wish) not in now]
    if gone:
        raise StudyError(
            f"{folder.path} holds results of a study with {len(gone)} point(s) that this one has not, as of "
            f"experiments.{gone[0].experiment} {dict(gone[0].axes)}. Points may be added, not taken away: "
            "choose some with --only, or give another --out"
        )


def _identity(wish: Wish) -> str:
    length = wish.length.model_dump(exclude_none=True)
    body: list[Any] = [dict(wish.axes), length, wish.ranks, dict(wish.recipe)]
    return json.dumps(body, sort_keys=True)


def _show(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
