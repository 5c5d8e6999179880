"""What is kept of jobs: each end once, numbers that stay, whatever happens in between; and refusals."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from equipot.serve.errors import ServeError
from equipot.serve.jobs.desk import Desk
from equipot.serve.jobs.file import VERSION
from equipot.serve.jobs.records import (
    JobState,
    Move,
    NoRoom,
    Opening,
    Part,
    Piece,
    Room,
    StoreDamaged,
    StoreFull,
    Unfit,
)
from equipot.serve.jobs.store import Store

OPENING = Opening(label="", kind="relax", request=b"how", model=b"who")
ROOM = Room(identity_jobs=100, identity_bytes=10**9, most_bytes=10**9)


def part(start: int, count: int, *, last: bool, size: int = 10, data: bytes = b"x") -> Part:
    pieces = [Piece(place, 1, 3, b"%d" % place + data) for place in range(start, start + count)]
    return Part(
        start=start,
        n_structures=count,
        n_atoms=3 * count,
        digest=b"%d %d" % (start, count),
        size=size,
        pieces=tuple(pieces),
        moves=(),
        last=last,
    )


def ended(place: int, *, failed: bool = False) -> Move:
    return Move(place=place, results=(b"r%d" % place,), ended=True, failed=failed, steps=2)


class Machine(RuleBasedStateMachine):
    """Against plain lists: jobs of two identities, with every way to end in between."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder / "jobs")
        self.sizes: dict[tuple[str, str], int] = {}
        self.results: dict[tuple[str, str], list[int]] = {}
        self.state: dict[tuple[str, str], JobState] = {}

    @initialize()
    def begin(self) -> None:
        self.add("ann", "a", 3, True)

    @rule(
        identity=st.sampled_from(["ann", "bob"]),
        name=st.sampled_from(["a", "b"]),
        count=st.integers(0, 4),
        last=st.booleans(),
    )
    def add(self, identity: str, name: str, count: int, last: bool) -> None:
        job = (identity, name)
        if self.state.get(job, JobState.RECEIVING) is not JobState.RECEIVING:
            with pytest.raises(Unfit):
                self.store.submit(*job, OPENING, part(999, 1, last=False), ROOM)
            return
        # A part of no structures that does not end the job would be known by the next one's place.
        count = count if last else max(1, count)
        start = self.sizes.get(job, 0)
        for _ in range(2):
            record = self.store.submit(*job, OPENING, part(start, count, last=last), ROOM)
        self.sizes[job] = start + count
        self.results.setdefault(job, [])
        empty = not self.sizes[job]
        self.state[job] = (JobState.DONE if empty else JobState.OPEN) if last else JobState.RECEIVING
        assert record.n_structures == self.sizes[job]

    @precondition(lambda self: JobState.OPEN in self.state.values())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        open_jobs = [job for job, state in self.state.items() if state is JobState.OPEN]
        job = data.draw(st.sampled_from(open_jobs))
        places = data.draw(st.lists(st.integers(0, self.sizes[job] - 1), max_size=3))
        key = self.key(job)
        self.store.advance({key: [ended(place) for place in places]})
        # What comes a second time counts for nothing.
        self.store.advance({key: [ended(place) for place in places]})
        self.results[job] += [place for place in dict.fromkeys(places) if place not in self.results[job]]
        if len(self.results[job]) == self.sizes[job]:
            self.state[job] = JobState.DONE

    @precondition(lambda self: self.state)
    @rule(data=st.data(), state=st.sampled_from([JobState.CANCELLED, JobState.FAILED]))
    def end(self, data: st.DataObject, state: JobState) -> None:
        job = data.draw(st.sampled_from(list(self.state)))
        record = self.store.end(self.key(job), state, "why")
        assert record is not None
        if not self.state[job].ended:
            self.state[job] = state
        assert record.state is self.state[job]

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(list(self.state)))
        key = self.key(job)
        self.store.delete(key)
        for kept in (self.sizes, self.results, self.state):
            del kept[job]
        assert self.store.advance({key: [ended(0)]}) == {}
        assert self.store.results(key, 0, 10) == []

    @rule()
    def be_killed(self) -> None:
        """What a process that is killed leaves: its files as they are, nothing closed."""
        copy = self.folder / "copy"
        shutil.copytree(self.store.path.parent, copy)
        self.store.close()
        shutil.rmtree(self.store.path.parent)
        copy.rename(self.store.path.parent)
        self.store = Store(self.store.path.parent)

    @invariant()
    def is_as_it_should_be(self) -> None:
        assert sum(self.store.counts().values()) == len(self.state)
        for job, state in self.state.items():
            record = self.store.job(*job)
            assert record is not None
            assert record.state is state
            found = self.results[job]
            assert (record.n_structures, record.n_done) == (self.sizes[job], len(found))
            assert self.store.results(record.key, 0, 100) == [
                (number, b"r%d" % place) for number, place in enumerate(found, 1)
            ]
            assert self.store.results(record.key, 1, 100) == self.store.results(record.key, 0, 100)[1:]
            assert [one.id for one in self.store.jobs(job[0])].count(job[1]) == 1
            left = []
            place = 0
            while (piece := self.store.next_piece(record.key, place)) is not None:
                left += [] if self.store.ends(record.key, piece) else [piece.first]
                place = piece.first + 1
            expected = [] if state.ended else sorted(set(range(self.sizes[job])) - set(found))
            assert left == expected

    def key(self, job: tuple[str, str]) -> int:
        record = self.store.job(*job)
        assert record is not None
        return record.key

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = Store(tmp_path / "jobs")
    yield store
    store.close()


def test_a_way_is_kept_until_its_end(store: Store) -> None:
    key = store.submit("ann", "a", OPENING, part(0, 2, last=True), ROOM).key
    piece = Piece(0, 2, 6, b"")
    store.advance({key: [Move(place=0, walk=b"one"), Move(place=1, walk=b"two")]})
    store.advance({key: [Move(place=0, walk=b"further")]})
    assert store.walks(key, piece) == {0: b"further", 1: b"two"}
    store.advance({key: [ended(0), Move(place=0, walk=b"late")]})
    assert store.walks(key, piece) == {1: b"two"}


def test_room_is_bounded_and_comes_back(store: Store) -> None:
    room = Room(identity_jobs=2, identity_bytes=100, most_bytes=150)
    first = store.submit("ann", "a", OPENING, part(0, 1, last=True, size=80), room)
    with pytest.raises(NoRoom, match="delete some"):
        store.submit("ann", "b", OPENING, part(0, 1, last=True, size=80), room)
    with pytest.raises(NoRoom, match="come later"):
        store.submit("bob", "a", OPENING, part(0, 1, last=True, size=80), room)
    assert [job.id for job in store.jobs("ann")] == ["a"]
    store.advance({first.key: [ended(0)]})
    # Those that have ended make room for all, but not for more of one's own.
    store.submit("bob", "a", OPENING, part(0, 1, last=True, size=80), room)
    gone = store.sweep(keep_seconds=1e6, most_bytes=150)
    assert [(job.identity, job.id) for job in gone] == [("ann", "a")]
    store.submit("ann", "b", OPENING, part(0, 1, last=False), room)
    store.submit("ann", "c", OPENING, part(0, 1, last=False), room)
    with pytest.raises(NoRoom, match="the limit is 2"):
        store.submit("ann", "d", OPENING, part(0, 1, last=False), room)
    # By age even what was never complete; what is open stays.
    assert {job.id for job in store.sweep(keep_seconds=0.0, most_bytes=10**9)} == {"b", "c"}
    assert [job.id for job in store.jobs("bob")] == ["a"]


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs", most_file_bytes=400_000)
    key = store.submit("ann", "a", OPENING, part(0, 50, last=True), ROOM).key
    large = [Move(place=place, results=(bytes(40_000),), ended=True) for place in range(50)]

    async def fill() -> Sequence[tuple[int, bytes]]:
        desk = Desk(store, save_seconds=1.0, on_written=lambda record: None)
        desk.open()
        for move in large:
            await desk.note(key, move)
        while not desk.problem:
            await asyncio.sleep(0.01)
        assert "full" in desk.problem
        assert await desk.do(store.results, key, 0, 100) == []
        # Somebody makes room.
        store._database.execute("PRAGMA max_page_count = 100000")
        while desk.problem:
            await asyncio.sleep(0.01)
        found = await desk.do(store.results, key, 0, 100)
        await desk.close()
        return found

    found = asyncio.run(asyncio.wait_for(fill(), 30))
    assert [number for number, _ in found] == list(range(1, 51))


def test_a_full_disk_refuses_what_is_new(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs", most_file_bytes=300_000)
    with pytest.raises(StoreFull, match="cannot be written"):
        store.submit("ann", "a", OPENING, part(0, 50, last=True, data=bytes(20_000)), ROOM)
    assert store.job("ann", "a") is None
    store.submit("ann", "b", OPENING, part(0, 1, last=True), ROOM)
    store.close()


def test_large_results_are_read_in_portions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = store.submit("ann", "a", OPENING, part(0, 1, last=True), ROOM).key
    store.advance({key: [Move(place=0, results=tuple(bytes(400) for _ in range(6)), walk=b"way")]})
    assert [number for number, _ in store.results(key, 0, 100, 1_000)] == [1, 2, 3]
    assert [number for number, _ in store.results(key, 3, 100, 1)] == [4]
    assert [number for number, _ in store.results(key, 4, 100)] == [5, 6]
    store.close()


class TestDamage:
    def test_of_the_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "jobs.sqlite").write_bytes(b"no database at all" * 300)
        with pytest.raises(ServeError, match=r"jobs\.sqlite is damaged .* move it away"):
            Store(tmp_path)

    def test_of_what_is_in_it_is_found(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        key = store.submit("ann", "a", OPENING, part(0, 2, last=True), ROOM).key
        store.advance({key: [ended(0), Move(place=1, walk=b"way")]})
        store.close()
        with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
            for table in ("results", "pieces", "walks"):
                database.execute(f"UPDATE {table} SET data = CAST(data || 'x' AS BLOB)")
        database.close()
        store = Store(tmp_path)
        with pytest.raises(StoreDamaged, match="result 1 of the job are damaged"):
            store.results(key, 0, 10)
        with pytest.raises(StoreDamaged, match="structures from 1 on"):
            store.next_piece(key, 1)
        # A way can be gone again, unless it brought results.
        assert store.walks(key, Piece(0, 2, 6, b"")) == {}
        with pytest.raises(StoreDamaged, match="steps of structure 1"):
            store.walks(key, Piece(0, 2, 6, b""), needed=True)
        store.close()

    def test_another_version_or_program_is_named(self, tmp_path: Path) -> None:
        Store(tmp_path / "ours").close()
        with sqlite3.connect(tmp_path / "ours" / "jobs.sqlite") as database:
            database.execute(f"PRAGMA user_version = {VERSION + 1}")
        database.close()
        with pytest.raises(ServeError, match=f"is of version {VERSION + 1}, this equipot knows {VERSION}"):
            Store(tmp_path / "ours")
        (tmp_path / "other").mkdir()
        with sqlite3.connect(tmp_path / "other" / "jobs.sqlite") as database:
            database.execute("CREATE TABLE notes (text)")
        database.close()
        with pytest.raises(ServeError, match="is no file of jobs"):
            Store(tmp_path / "other")

    def test_one_folder_is_one_server_s(self, store: Store) -> None:
        with pytest.raises(ServeError, match="belong to a server that runs"):
            Store(store.path.parent)
