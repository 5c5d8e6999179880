"""A study's data: sources imported into its own stores, one mix of them, and what a point will see of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from equipot.train.dataset import Sizes
from equipot.train.errors import DataError, ImportStopped
from equipot.train.importer import ImportOptions, Progress, import_files
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import MixRequest, SourceRequest
from equipot.train.places import in_blocks
from equipot.train.reader_pool import default_workers
from equipot.train.scaling.claims import Claim, claim
from equipot.train.scaling.declaration import SourceSection, Study, StudyError, folders_in
from equipot.train.scaling.folder import StudyFolder
from equipot.train.sources.registry import RELEASES, choose_level, find_files, split_source

Tell = Callable[[str, float], None]
"""Told what is being done, and which share of everything is done."""

_WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Sight:
    """What a subset of the training split holds on average."""

    structures: int
    """That are trained on."""
    draws: int
    """That an epoch takes of them."""
    atoms: float
    """Of one that is drawn."""
    edges: float


class StudyData:
    """The mix that all points of a study share, open, and its unseen sources.

    Args:
        mix: what is trained, validated and tested on.
        unseen: stores of sources never trained on, by name.
    """

    def __init__(self, mix: Mix, unseen: Mapping[str, Path]) -> None:
        self.mix = mix
        self.unseen = unseen
        self.sight = cache(self._sight)

    def _sight(self, fraction: float, cutoff: float) -> Sight:
        once, draws = self.mix.training(fraction)
        sizes = Sizes.of(self.mix.stores, cutoff, progress=True)
        total = sum((sizes.rows(keys).sum(axis=0) for keys in in_blocks(draws)), np.zeros(2, np.int64))
        atoms, edges = (total / max(1, len(draws))).tolist()
        return Sight(len(once), len(draws), atoms, edges)


def prepare_data(study: Study, folder: StudyFolder, tell: Tell, stopped: Callable[[], bool]) -> StudyData:
    """Import what is not there yet, and make the mix; of several processes one does it, the others wait.

    Raises:
        StudyError: a folder of a source is not given.
        DataError: files that cannot be imported, or sources that cannot be mixed.
        ImportStopped: asked to stop.
    """
    sources = {name: source for name, source in study.sources.items() if _is_there(study, name, source)}
    trained = {name: source for name, source in sources.items() if source.role == "train"}
    if not trained and study.data.mix is None:
        raise StudyError(
            f"{study.name}: no source to train on is left; give the folders of the others, as "
            + " ".join(f"--folder {name}=PATH" for name, path in study.folders.items() if not path)
        )
    places = {name: _place(study, folder, name, source) for name, source in sources.items()}
    request = MixRequest(
        seed=study.data.seed,
        fractions=study.data.fractions,
        sources={name: _request(places[name], source) for name, source in trained.items()},
    ) if trained else None  # fmt: skip
    path = folder.mix if study.data.mix is None else study.data.mix
    if not all((place / "manifest.json").exists() for place in places.values()) or not path.exists():
        _make(study, folder, sources, places, request, tell, stopped)
    mix = Mix.open(path)
    mix.verify()
    mixed = [source.name for source in mix.card.sources]
    if trained and mixed != list(trained):
        raise StudyError(
            f"{path} is of the sources {', '.join(mixed)}, and now there are {', '.join(trained)}; give the "
            "same folders as before, or another --out"
        )
    return StudyData(mix, {name: places[name] for name in sources if name not in trained})


def left_out(study: Study) -> list[str]:
    """Optional sources whose folder is not given."""
    return [name for name, source in study.sources.items() if not _is_there(study, name, source)]


def _make(
    study: Study,
    folder: StudyFolder,
    sources: Mapping[str, SourceSection],
    places: Mapping[str, Path],
    request: MixRequest | None,
    tell: Tell,
    stopped: Callable[[], bool],
) -> None:
    with _alone(folder, tell, stopped):
        for number, (name, source) in enumerate(sources.items()):
            if source.store is None:

                def show(at: Progress, name: str = name, number: int = number) -> None:
                    tell(f"importing {name}", (number + at.fraction) / len(sources))

                _import(study, source, places[name], name, show, stopped)
        if request is not None and not folder.mix.exists():
            build_mix(request, folder.mix, on_progress=tell)


def _alone(folder: StudyFolder, tell: Tell, stopped: Callable[[], bool]) -> Claim:
    while (mine := claim(folder.stores)) is None:
        tell("another process imports the data", 0.0)
        if stopped():
            raise StudyError("stopped while another process imported the data")
        time.sleep(_WAIT_SECONDS)
    return mine


def _import(
    study: Study,
    source: SourceSection,
    out: Path,
    name: str,
    show: Callable[[Progress], None],
    stopped: Callable[[], bool],
) -> None:
    files = [Path(resolved(study, path)) for path in source.files]
    level, licence = source.level_of_theory, source.licence
    if source.release:
        release, _ = split_source([Path(source.release)])
        if release is None:
            raise StudyError(
                f"sources.{name}.release = {source.release!r} is none; one of {', '.join(RELEASES)}"
            )
        files = find_files(files, release)
        level = level or release.levels[choose_level(release, "", files)]
        licence = licence or release.licence
    options = ImportOptions(
        level_of_theory=level,
        licence=licence,
        name=name,
        group_by=source.group_by,
        source=source.release,
        max_force=source.max_force,
    )
    try:
        import_files(
            files, out, options, workers=default_workers(files), on_progress=show, should_stop=stopped
        )
    except ImportStopped:
        raise
    except DataError as error:
        raise DataError(f"sources.{name}: {error}") from None


def resolved(study: Study, path: str) -> str:
    """A source's path with the folders that it names."""
    for name in folders_in(path):
        path = path.replace("{" + name + "}", study.folders[name])
    return path


def _is_there(study: Study, name: str, source: SourceSection) -> bool:
    missing = [
        folder
        for path in (*source.files, source.store or "")
        for folder in folders_in(path)
        if not study.folders[folder]
    ]
    if missing and not source.optional:
        raise StudyError(f"sources.{name} lies in a folder that is not given: --folder {missing[0]}=PATH")
    return not missing


def _place(study: Study, folder: StudyFolder, name: str, source: SourceSection) -> Path:
    return folder.stores / name if source.store is None else Path(resolved(study, source.store))


def _request(place: Path, source: SourceSection) -> SourceRequest:
    return SourceRequest(
        store=place,
        weight=source.weight,
        max_structures=source.max_structures,
        max_per_group=source.max_per_group,
        max_atoms=source.max_atoms,
    )
