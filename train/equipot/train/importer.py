"""Files in, store out: the order of things. Knows readers and the writer; does not know the command line."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.audit.labels import audit_energies
from equipot.train.block import BLOCK_FRAMES, Block, BlockOptions
from equipot.train.errors import DataError, ImportStopped
from equipot.train.grouping import GroupRule
from equipot.train.manifest import Manifest, SourceEntry
from equipot.train.reader_pool import ReaderPool
from equipot.train.reading import (
    Hashed,
    Hashing,
    Message,
    Opened,
    Reading,
    ReadingOptions,
    Task,
    checksum_of,
)
from equipot.train.seen import Seen
from equipot.train.sources.base import ReadOptions, Reason, Rejected
from equipot.train.sources.lmdb_file import data_file
from equipot.train.sources.registry import RELEASES, find_container
from equipot.train.store import Store
from equipot.train.store_writer import StoreWriter

_HASH_SHARE = 0.1
"""Of the work on a file that making its checksum is, for the progress shown."""
_NAMED = 8
_AUDITS = 32


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
    """How far an import is.

    Attributes:
        source: number of the file, from 0, whose frames are being stored.
        fraction: share of all the work, by bytes.
        read: frames read, in all calls of the same import.
        kept, rejected: of these.
        doing: what is waited for, if that is not frames.
    """

    source: int
    fraction: float
    read: int
    kept: int
    rejected: int
    doing: str = ""


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


def import_files(
    files: Sequence[Path],
    out: Path,
    options: ImportOptions,
    *,
    workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    commit_structures: int | None = None,
) -> ImportReport:
    """Imports files into a new store, into an existing one, or goes on with a killed import.

    The store's bytes do not depend on the number of processes, nor on where an import was interrupted.

    Args:
        files: of any format ASE reads. One that the store has already, by checksum, is skipped.
        out: folder of the store.
        options: what the data are and how to read them.
        workers: processes that read; 1: this one, no other is started. With more, the calling program's main
            module has to be one that can be imported, as with any use of `multiprocessing`.
        on_progress: called after every block of frames, and now and then.
        should_stop: asked as often; True commits and raises ImportStopped.
        commit_structures: frames between two commits; by default they go by the clock.

    Raises:
        DataError: before anything is written: missing files, an unknown group rule, a store of another level
            of theory. Later: no frame could be kept, the disk is full, a file was changed meanwhile, or the
            processes that read a file died.
        ImportStopped: asked to stop.
    """
    rule = GroupRule.parse(options.group_by)
    for what, text in (("level-of-theory", options.level_of_theory), ("licence", options.licence)):
        if not text.strip():
            raise DataError(f"--{what} is empty; say what the data are")
    _check_there(files)
    fresh = Manifest(
        name=options.name,
        level_of_theory=options.level_of_theory,
        licence=options.licence,
        columns=_columns(files, options),
    )
    try:
        with StoreWriter(out, fresh, commit_structures=commit_structures) as writer:
            writer.start(_plan(files, options), asdict(_Cursor()))
            reading = ReadingOptions(
                read=ReadOptions(**{**asdict(options.read), "group_keys": rule.keys}),
                source=options.source,
                block=BlockOptions(
                    columns=tuple(writer.manifest.columns),
                    rule=rule,
                    max_force=options.max_force,
                    frames=min(BLOCK_FRAMES, -(-(commit_structures or 2**20) // 8)),
                ),
                known=_known(writer),
            )
            run = _Run(writer, options, files, on_progress, should_stop)
            run.check_read()
            if workers == 1:
                run.take_all(_in_this_process(files, reading, run.start))
            else:
                with ReaderPool(files, reading, workers=workers, start=run.start) as pool:
                    run.take_all(pool.messages())
            first = len(writer.committed.sources) if writer.committed is not None else 0
            added = tuple(range(first, len(writer.manifest.sources)))
            skipped = tuple(run.cursor.skipped)
            if not added:
                writer.abandon()
                return ImportReport(out, writer.committed or fresh, (), skipped, False)
            _check_kept(writer, added, run.faults)
            _audit(writer, added)
            manifest = writer.finish()
            return ImportReport(out, manifest, added, skipped, writer.resumed)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); what is committed stays: mend "
            "that, and run the same command again"
        ) from error


def _check_there(files: Sequence[Path]) -> None:
    """Names all that are missing at once, before anything is begun."""
    faults = []
    for path in files:
        if not data_file(path).is_file():
            faults.append(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise DataError("; ".join(faults[:_NAMED]) + more)


def _columns(files: Sequence[Path], options: ImportOptions) -> list[str]:
    """Optional arrays of a new store: what its sources' frames have."""
    if options.source:
        named = [RELEASES[options.source]]
    else:
        containers = (find_container(path, options.read) for path in files)
        named = [source for source in containers if source is not None]
    extras = sorted({extra for each in named for extra in each.extras})
    return ["fingerprint", *(["name"] if named else []), *extras]


def _plan(files: Sequence[Path], options: ImportOptions) -> dict[str, Any]:
    """What only the same command repeats. Files are meant by name; whether they changed is asked later."""
    names = [path.name for path in files]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return {
        **{key: value for key, value in asdict(options).items() if key != "name"},
        "files": ", ".join(names[:_NAMED]) + more,
        "names": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
    }


def _known(writer: StoreWriter) -> frozenset[str]:
    """Checksums of the files that are in the store whole."""
    sources = writer.manifest.sources
    if writer.cursor["frame"]:
        sources = sources[:-1]
    return frozenset(source.sha256 for source in sources)


def _in_this_process(
    files: Sequence[Path], options: ReadingOptions, start: tuple[int, int]
) -> Iterator[tuple[int, Message] | None]:
    """What a `ReaderPool` yields, without one."""
    reading = Reading(files, options, divide=False)
    for k in range(start[0], len(files)):
        for message in reading.run(Task(k, start[1] if k == start[0] else 0)):
            yield k, message


@dataclass(slots=True)
class _Cursor:
    """Where reading stands; what a commit remembers of it.

    Attributes:
        file, frame: what comes next.
        states: [bytes, time of change, place in the manifest or −1] of each file that was begun.
        skipped: names of files that the store had already.
    """

    file: int = 0
    frame: int = 0
    states: list[list[int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class _Run:
    """Takes what is read into the store, in order."""

    def __init__(
        self,
        writer: StoreWriter,
        options: ImportOptions,
        files: Sequence[Path],
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.cursor = _Cursor(**writer.cursor)
        self.start = (self.cursor.file, self.cursor.frame)
        self.faults: list[str] = []
        self._writer = writer
        self._options = options
        self._files = files
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._seen = None if options.keep_duplicates else _seen_before(writer)
        self._sizes = [data_file(path).stat().st_size for path in files]
        self._behind = float(sum(self._sizes[: self.cursor.file]))
        self._fraction = 0.0
        self._hashed: dict[int, float] = {}
        self._total = max(sum(self._sizes), 1)
        self._there = {source.sha256 for source in writer.manifest.sources}
        self._skipping = False
        self._hash: Hashed | None = None
        self._entry: SourceEntry | None = None
        entries = writer.manifest.sources[len(writer.committed.sources) if writer.committed else 0 :]
        self._read = sum(entry.frames_read for entry in entries)
        self._kept = sum(entry.frames_kept for entry in entries)

    def check_read(self) -> None:
        """Raises DataError if a file that was read before the kill is another one now."""
        for path, (size, modified, source) in zip(self._files, self.cursor.states, strict=False):
            file = data_file(path)
            state = file.stat()
            if source < 0 or (state.st_size, state.st_mtime_ns) == (size, modified):
                continue
            *_, (_, checksum) = checksum_of(file) if state.st_size == size else [(0, "")]
            self._check_same(path, checksum, source)

    def _check_same(self, path: Path, checksum: str, source: int) -> None:
        if checksum != self._writer.manifest.sources[source].sha256:
            raise DataError(
                f"{path}: has changed since its import was begun; put the old file back and run the same "
                f"command again, or drop the unfinished import: rm -r {self._writer.dropped}"
            )

    def take_all(self, messages: Iterator[tuple[int, Message] | None]) -> None:
        """Takes all messages, and commits."""
        for each in messages:
            if each is not None:
                self._take(*each)
            if self._should_stop():
                self._stop()
        self._enter()
        self.cursor.file, self.cursor.frame = len(self._files), 0
        self._commit()

    def _take(self, file: int, message: Message) -> None:
        if isinstance(message, Hashing):
            self._hashed[file] = message.done
            self._show("checksums")
        elif isinstance(message, Hashed):
            self._begin(file, message)
        elif isinstance(message, Opened):
            self._open(file, message)
        elif not self._skipping:
            self._add(file, message)

    def _begin(self, file: int, found: Hashed) -> None:
        """The frames of a file come next, and those of the one before are complete."""
        self._enter()
        name = self._files[file].name
        if self.cursor.file < file:
            self._behind += sum(self._sizes[self.cursor.file : file])
            for done in range(self.cursor.file, file):
                self._hashed.pop(done, None)
            self.cursor.file, self.cursor.frame = file, 0
            self._fraction = 0.0
        self._hash = found
        if self.cursor.frame:
            self._check_same(self._files[file], found.sha256, len(self._writer.manifest.sources) - 1)
            return
        self._skipping = found.known or found.sha256 in self._there
        place = -1 if self._skipping else len(self._writer.manifest.sources)
        self.cursor.states[file:] = [[found.bytes, found.modified, place]]
        if self._skipping:
            self.cursor.skipped.append(name)
        self._there.add(found.sha256)

    def _open(self, file: int, opened: Opened) -> None:
        if self._skipping or self.cursor.frame:
            return
        assert self._hash is not None
        if opened.fault:
            self.faults.append(opened.fault)
            if file == 0 and not self._options.source:  # most likely an option that fits none of them
                self._writer.abandon()
                raise DataError(opened.fault)
        self._entry = SourceEntry(
            file=self._files[file].name,
            sha256=self._hash.sha256,
            bytes=self._hash.bytes,
            format=opened.format,
        )

    def _enter(self) -> None:
        """Puts the file into the manifest: with its first frames, so that no commit comes in between."""
        if self._entry is not None:
            self._writer.manifest.sources.append(self._entry)
            self._entry = None

    def _add(self, file: int, block: Block) -> None:
        self._enter()
        source = len(self._writer.manifest.sources) - 1
        block = self._without_duplicates(block)
        self._read += len(block) + len(block.rejected)
        self._kept += len(block)
        self._writer.add(block, source)
        self.cursor.frame = block.stop
        if self._writer.due:
            self._commit()
        self._fraction = max(self._fraction, block.fraction or 0.0)
        self._show("")

    def _commit(self) -> None:
        self._writer.commit(asdict(self.cursor))

    def _stop(self) -> None:
        self._commit()
        at, frame = self.cursor.file, self.cursor.frame
        where = f"after frame {frame - 1}" if frame else "before the first frame"
        raise ImportStopped(
            f"stopped {where} of {self._files[min(at, len(self._files) - 1)].name}; run the same command "
            "again to go on from there"
        )

    def _without_duplicates(self, block: Block) -> Block:
        if self._seen is None:
            return block
        rows, found = [], []
        place = self._writer.manifest.structures
        frames = block.structures["frame"].tolist()
        for row, fingerprint in enumerate(block.structures["fingerprint"].tolist() if frames else ()):
            first = self._seen.add(fingerprint, place)
            if first is None:
                place += 1
                continue
            what = f"to the last bit the same as structure {first} of the store"
            name = block.names[row]
            rows.append(row)
            found.append(Rejected(frames[row], Reason.DUPLICATE, f"{name}: {what}" if name else what))
        return block.without(rows, found)

    def _show(self, doing: str) -> None:
        size = self._sizes[self.cursor.file] if self.cursor.file < len(self._sizes) else 0
        hashed = _HASH_SHARE * sum(self._hashed.values())
        done = self._behind + hashed + (1 - _HASH_SHARE) * self._fraction * size
        self._on_progress(
            Progress(
                self.cursor.file, min(done / self._total, 1.0), self._read, self._kept,
                self._read - self._kept, doing,
            )
        )  # fmt: skip


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


def _check_kept(writer: StoreWriter, added: Sequence[int], faults: Sequence[str]) -> None:
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
    if faults and len(faults) == len(entries):
        raise DataError(faults[0])
    read = sum(entry.frames_read for entry in entries)
    names = [entry.file for entry in entries]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    raise DataError(
        f"none of the {read} frame(s) of {', '.join(names[:_NAMED])}{more} could be imported "
        f"({'; '.join(why)}); --energy-key and --forces-key name keys that are not known by themselves"
    )


def _audit(writer: StoreWriter, added: Sequence[int]) -> None:
    """Puts warnings about the labels of the new sources into the manifest; of many files, some together."""
    store = Store(writer.path, writer.manifest)
    sources = writer.manifest.sources
    ends = np.cumsum([source.frames_kept for source in sources])
    for part in np.array_split(np.array(added), min(len(added), _AUDITS)):
        first, last = int(part[0]), int(part[-1])
        structures = np.arange(ends[first] - sources[first].frames_kept, ends[last])
        name = sources[first].file + (f" to {sources[last].file}" if last > first else "")
        for warning in audit_energies(store, structures):
            writer.manifest.warnings.append(f"{name}: {warning}")
