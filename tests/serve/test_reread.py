"""Files that change while a server runs: what is bad now may be good later, and nothing ends the looking."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from equipot.serve import reread
from equipot.serve.errors import ServeError
from equipot.serve.quota_file import read_allowances
from equipot.serve.reread import Reread, keep_current


@pytest.mark.parametrize("problem", [ServeError("not yet valid"), OSError("no descriptors left")])
def test_what_could_not_be_read_is_tried_again_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, problem: Exception
) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    failing: list[Exception] = []

    def read() -> str:
        if failing:
            raise failing[0]
        return file.read_text()

    value = Reread("words", [file], read)
    file.write_text("newer")
    failing.append(problem)
    assert [value.refresh() for _ in range(3)] == [False] * 3
    assert value.value == "old"
    (told,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert str(problem) in told.getMessage()
    failing.clear()
    assert value.refresh()
    assert value.value == "newer"
    assert not value.refresh()


def test_the_looking_goes_on_after_what_nobody_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reread, "POLL_SECONDS", 0.001)
    looked = []

    class Failing:
        def refresh(self) -> bool:
            raise RuntimeError("nobody expected this")

    class Next:
        def refresh(self) -> bool:
            looked.append(True)
            return False

    async def test() -> None:
        keeping = asyncio.create_task(keep_current([Failing(), Next()]))
        async with asyncio.timeout(10):
            while len(looked) < 3:
                await asyncio.sleep(0.001)
        keeping.cancel()

    asyncio.run(test())


def test_a_file_that_is_none_of_ours_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reread, "MOST_BYTES", 100)
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    assert len(reread.read_bytes(file, "--tokens")) == 100
    file.write_bytes(bytes(101))
    with pytest.raises(ServeError, match=r"--tokens .* has more than 100 bytes: name the right file"):
        reread.read_bytes(file, "--tokens")
    with pytest.raises(ServeError, match="has more than 100 bytes"):
        reread.read_bytes(Path("/dev/zero"), "--tokens")


def test_a_number_beyond_all_numbers_is_a_mistake_like_others(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(f"[default]\nrequests_per_second = {10**400}\n")
    with pytest.raises(ServeError, match="requests_per_second"):
        read_allowances(file)
