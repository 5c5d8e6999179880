"""Files in, store out. Knows readers, groups and the writer; does not know the command line."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from equipot.train.audit.labels import audit_energies
from equipot.train.errors import DataError, ImportStopped
from equipot.train.grouping import GroupRule
from equipot.train.manifest import Manifest, SourceEntry, Tally
from equipot.train.seen import Seen
from equipot.train.sources.base import (
    Frame,
    FrameError,
    Reader,
    ReadOptions,
    Reason,
    Rejected,
    Source,
)
from equipot.train.sources.registry import CONTAINERS, RELEASES, open_container
from equipot.train.sources.unreadable import UnreadableFile
from equipot.train.store import Store
from equipot.train.store_writer import COMMIT_STRUCTURES, StoreWriter, fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What to say of the data, and how to read it.

    Attributes:
        level_of_theory: functional and basis, as "PBE/def2-SVP"; stores of one level share references.
        licence: of the data.
        name: of the data set.
        group_by: a rule of `grouping.GroupRule`.
        read: keys and format.
        source: name of the release the files are of, one of `registry.RELEASES`; "" for any other file.
        max_force: eV/Å; frames with an atom that feels more are left out. None: no limit.
        keep_duplicates: keep frames that are the same to the last bit as one before them.
    """

    level_of_theory: str
    licence: str
    name: str
    group_by: str = "auto"
    read: ReadOptions = field(default_factory=ReadOptions)
    source: str = ""
    max_force: float | None = None
    keep_duplicates: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is: file number from 0, share of all bytes, frames kept and left out."""

    source: int
    fraction: float
    kept: int
    rejected: int


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        store: where it lies.
        manifest: of the store afterwards.
        added: positions in `manifest.sources` of the files that were read.
        skipped: file names that were in the store already.
        resumed: a killed import was continued.
    """

    store: Path
    manifest: Manifest
    added: tuple[int, ...]
    skipped: tuple[str, ...]
    resumed: bool


@dataclass(frozen=True, slots=True)
class _Opened:
    reader: Reader
    entry: SourceEntry


def import_files(
    files: Sequence[Path],
    out: Path,
    options: ImportOptions,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    commit_structures: int = COMMIT_STRUCTURES,
) -> ImportReport:
    """Imports files into a new store, into an existing one, or goes on with a killed import.

    Args:
        files: of any format ASE reads. One that the store has already, by checksum, is skipped.
        out: folder of the store.
        options: what the data are and how to read them.
        on_progress: called after every frame.
        should_stop: asked after every frame; True commits and raises ImportStopped.
        commit_structures: frames between two commits.

    Raises:
        DataError: before anything is written: a file that cannot be read, an unknown group rule, a store of
            another level of theory. Later: no frame could be kept, or the disk is full.
        ImportStopped: asked to stop.
    """
    rule = GroupRule.parse(options.group_by)
    for what, text in (("level-of-theory", options.level_of_theory), ("licence", options.licence)):
        if not text.strip():
            raise DataError(f"--{what} is empty; say what the data are")
    read = ReadOptions(**{**asdict(options.read), "group_keys": rule.keys})
    opened = _open_all(files, read, RELEASES.get(options.source))
    fresh = Manifest(
        name=options.name,
        level_of_theory=options.level_of_theory,
        licence=options.licence,
        columns=_columns(options.source, opened),
    )
    try:
        with StoreWriter(out, fresh, commit_structures=commit_structures) as writer:
            new, skipped = _only_new(opened, writer.committed)
            if not new:
                return ImportReport(out, writer.committed or fresh, (), skipped, False)
            described = {key: value for key, value in asdict(options).items() if key != "name"}
            plan = {**described, "sources": [asdict(source.entry) for source in new]}
            writer.start(plan, [source.entry for source in new])
            added = tuple(range(len(writer.manifest.sources) - len(new), len(writer.manifest.sources)))
            _Run(writer, rule, options, new, added[0], on_progress, should_stop).read_all()
            _check_kept(writer, added)
            _audit(writer, added)
            manifest = writer.finish()
            return ImportReport(out, manifest, added, skipped, writer.resumed)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); what is committed stays: mend "
            "that, and run the same command again"
        ) from error


def _columns(source: str, opened: Sequence[_Opened]) -> list[str]:
    """Optional arrays of a new store: what its sources' frames have."""
    known = {**RELEASES, **CONTAINERS}
    kinds = {source} if source else {each.reader.format for each in opened}
    named = [known[kind] for kind in sorted(kinds) if kind in known]
    extras = sorted({extra for each in named for extra in each.extras})
    return ["fingerprint", *(["name"] if named else []), *extras]


def _open_all(files: Sequence[Path], options: ReadOptions, source: Source | None) -> list[_Opened]:
    """Opens all; of a release's many files one that is damaged is reported, not the end of the import."""
    if source is None:
        return [_open(path, open_container(path, options)) for path in files]
    opened: list[_Opened] = []
    faults: list[DataError] = []
    for path in files:
        try:
            reader: Reader = source.open(path, options)
        except DataError as error:
            if not path.is_file():
                raise
            faults.append(error)
            reader = UnreadableFile(path, source.name, str(error))
        opened.append(_open(path, reader))
    if faults and len(faults) == len(files):
        raise faults[0]
    return opened


def _open(path: Path, reader: Reader) -> _Opened:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    entry = SourceEntry(
        file=path.name, sha256=digest.hexdigest(), bytes=path.stat().st_size, format=reader.format
    )
    return _Opened(reader, entry)


def _only_new(opened: Sequence[_Opened], committed: Manifest | None) -> tuple[list[_Opened], tuple[str, ...]]:
    there = {source.sha256 for source in committed.sources} if committed else set()
    new: list[_Opened] = []
    skipped: list[str] = []
    for source in opened:
        if source.entry.sha256 in there:
            skipped.append(source.entry.file)
        else:
            there.add(source.entry.sha256)
            new.append(source)
    return new, tuple(skipped)


class _Run:
    """The loop over files and frames."""

    def __init__(
        self,
        writer: StoreWriter,
        rule: GroupRule,
        options: ImportOptions,
        sources: Sequence[_Opened],
        first: int,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._writer = writer
        self._rule = rule
        self._max_force = options.max_force
        self._seen = None if options.keep_duplicates else _seen_before(writer)
        self._sources = sources
        self._first = first
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._total = sum(source.entry.bytes for source in sources)

    def read_all(self) -> None:
        """Reads what is left after the last commit."""
        writer = self._writer
        start = writer.cursor
        for k in range(start["source"], len(self._sources)):
            for item in self._sources[k].reader.frames(start["frame"] if k == start["source"] else 0):
                self._take(item, self._first + k)
                cursor = {"source": k, "frame": item.index + 1}
                if writer.due:
                    writer.commit(cursor)
                self._on_progress(self._progress(k))
                if self._should_stop():
                    writer.commit(cursor)
                    raise ImportStopped(
                        f"stopped after frame {item.index} of {self._sources[k].entry.file}; run the same "
                        "command again to go on from there"
                    )
        writer.commit({"source": len(self._sources), "frame": 0})

    def _take(self, item: Frame | Rejected, source: int) -> None:
        manifest = self._writer.manifest
        entry = manifest.sources[source]
        entry.frames_read += 1
        if isinstance(item, Frame):
            try:
                group, made_from = self._rule.group_of(item, entry.sha256)
                self._check(item)
            except FrameError as error:
                item = Rejected(item.index, error.reason, error.detail)
        if isinstance(item, Rejected):
            _tally(manifest.rejected, item.reason.value, source, item.index, item.detail)
            return
        entry.frames_kept += 1
        manifest.grouped_by[made_from] = manifest.grouped_by.get(made_from, 0) + 1
        for note in item.notes:
            _tally(manifest.notes, note.code, source, item.index, note.detail)
        self._writer.add(item, group, source)

    def _check(self, frame: Frame) -> None:
        """Raises FrameError for a frame that the options leave out."""
        if self._max_force is not None and frame.forces is not None:
            sizes = np.linalg.norm(frame.forces, axis=1)
            atom = int(sizes.argmax())
            if sizes[atom] > self._max_force:
                what = f"atom {atom} feels {sizes[atom]:.6g} eV/Å, the limit is {self._max_force:g}"
                raise FrameError(Reason.LARGE_FORCE, f"{frame.name}: {what}" if frame.name else what)
        if self._seen is not None:
            first = self._seen.add(fingerprint(frame), self._writer.manifest.structures)
            if first is not None:
                what = f"to the last bit the same as structure {first} of the store"
                raise FrameError(Reason.DUPLICATE, f"{frame.name}: {what}" if frame.name else what)

    def _progress(self, k: int) -> Progress:
        done = float(sum(source.entry.bytes for source in self._sources[:k]))
        done += self._sources[k].entry.bytes * (self._sources[k].reader.fraction() or 0.0)
        entries = self._writer.manifest.sources[self._first :]
        read, kept = sum(e.frames_read for e in entries), sum(e.frames_kept for e in entries)
        return Progress(k, done / self._total, kept, read - kept)


def _seen_before(writer: StoreWriter) -> Seen | None:
    """Fingerprints of what is committed; None for a store of before there were any."""
    if "fingerprint" not in writer.manifest.columns:
        return None
    seen = Seen(writer.path)
    place = 0
    for block in Store(writer.path, writer.manifest).blocks("fingerprint"):
        for each in block.tolist():
            seen.add(each, place)
            place += 1
    return seen


def _tally(tallies: dict[str, Tally], what: str, source: int, frame: int, detail: str) -> None:
    tallies.setdefault(what, Tally()).add(source, frame, detail)


def _check_kept(writer: StoreWriter, added: Sequence[int]) -> None:
    entries = [writer.manifest.sources[k] for k in added]
    if any(entry.frames_kept for entry in entries):
        return
    why = []
    for reason, tally in writer.manifest.rejected.items():
        example = next((e for e in tally.examples if e[0] in added), None)
        if example is not None:
            file = writer.manifest.sources[example[0]].file
            why.append(f"{reason}, as in frame {example[1]} of {file}: {example[2]}")
    writer.abandon()
    read = sum(entry.frames_read for entry in entries)
    raise DataError(
        f"none of the {read} frame(s) of {', '.join(entry.file for entry in entries)} could be imported "
        f"({'; '.join(why)}); --energy-key and --forces-key name keys that are not known by themselves"
    )


def _audit(writer: StoreWriter, added: Sequence[int]) -> None:
    """Puts warnings about the labels of the new sources into the manifest."""
    store = Store(writer.path, writer.manifest)
    source_of = store.column("source")
    for k in added:
        for warning in audit_energies(store, np.flatnonzero(source_of == k)):
            writer.manifest.warnings.append(f"{writer.manifest.sources[k].file}: {warning}")
