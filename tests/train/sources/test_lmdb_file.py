"""Pages are read as lmdb itself reads them, and no damage does worse than cost a record."""

import random
from pathlib import Path

import lmdb
import pytest

from equipot.train.errors import DataError
from equipot.train.sources.lmdb_file import LmdbDamage, LmdbFile


def write_lmdb(path: Path, records: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), subdir=False, map_size=2**28) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return path


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, bytes]]:
    """A file that grew over several transactions, with deletions, small records and overflow pages."""
    path = tmp_path_factory.mktemp("lmdb") / "grown.lmdb"
    dice = random.Random(0)
    records: dict[bytes, bytes] = {}
    with lmdb.open(str(path), subdir=False, map_size=2**28) as env:
        for _ in range(8):
            with env.begin(write=True) as transaction:
                for _ in range(300):
                    key = b"%d" % dice.randrange(3000)
                    records[key] = dice.randbytes(dice.choice((0, 10, 900, 3000, 9000)))
                    transaction.put(key, records[key])
                for key in dice.sample(sorted(records), 40):
                    transaction.delete(key)
                    del records[key]
    return path, records


def test_every_record_is_read(grown: tuple[Path, dict[bytes, bytes]]) -> None:
    path, records = grown
    file = LmdbFile(path)
    assert file.entries == len(records)
    assert list(file.keys()) == sorted(records)
    assert all(file.get(key) == value for key, value in records.items())
    assert file.get(b"none such") is None
    assert file.missing_bytes == 0
    file.close()


def test_an_empty_database_holds_nothing(tmp_path: Path) -> None:
    file = LmdbFile(write_lmdb(tmp_path / "empty.lmdb", {}))
    assert (file.entries, list(file.keys()), file.get(b"0")) == (0, [], None)


def test_a_truncated_file_costs_the_records_behind_its_end(
    grown: tuple[Path, dict[bytes, bytes]], tmp_path: Path
) -> None:
    path, records = grown
    whole = path.read_bytes()
    cut = tmp_path / "cut.lmdb"
    cut.write_bytes(whole[: len(whole) * 9 // 10])
    file = LmdbFile(cut)
    assert file.missing_bytes == len(whole) - len(whole) * 9 // 10
    lost = 0
    for key, value in records.items():
        try:
            assert file.get(key) == value
        except LmdbDamage:
            lost += 1
    assert 0 < lost < len(records)


def test_random_damage_never_does_worse(grown: tuple[Path, dict[bytes, bytes]], tmp_path: Path) -> None:
    path, records = grown
    whole = path.read_bytes()
    dice = random.Random(1)
    damaged = tmp_path / "damaged.lmdb"
    faults = 0
    for _ in range(25):
        body = bytearray(whole)
        for _ in range(3000):
            body[dice.randrange(len(body))] = dice.randrange(256)
        damaged.write_bytes(body)
        try:
            file = LmdbFile(damaged)
        except DataError:
            faults += 1
            continue
        for key in dice.sample(sorted(records), 40):
            try:
                file.get(key)
            except LmdbDamage:
                faults += 1
        try:
            list(file.keys())
        except LmdbDamage:
            faults += 1
        file.close()
    assert faults


@pytest.mark.parametrize("body", [b"", b"x" * 10, b"x" * 10000])
def test_what_is_no_lmdb_is_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.lmdb"
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"other\.lmdb"):
        LmdbFile(path)
