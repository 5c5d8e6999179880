"""Storage that fails for a moment takes no answering model and no label with it, and is asked again."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.serve.conftest import run
from tests.serve.repository_helpers import label, put, serving

from equipot.serve.models import load_bundle
from equipot.serve.repository import stock
from equipot.serve.repository.settings import Preload
from equipot.wire.v1 import admin_pb2
from equipot.wire.v1 import potential_pb2 as pb

EIO = OSError(5, "Input/output error")


class Faults:
    """What the file systems of this process fail at now: the end of a path, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[str, Exception] = {}
        self.met = 0
        for system, method in (
            (LocalFileSystem, "ls"),
            (LocalFileSystem, "cat_file"),
            (MemoryFileSystem, "ls"),
            (MemoryFileSystem, "_open"),
        ):
            monkeypatch.setattr(system, method, self._failing(getattr(system, method)))

    def _failing(self, method: Any) -> Any:
        @functools.wraps(method)
        def call(system: Any, path: str, *arguments: Any, **options: Any) -> Any:
            for end, error in self.at.items():
                if str(path).rstrip("/").endswith(end):
                    self.met += 1
                    raise error
            return method(system, path, *arguments, **options)

        return call

    @contextlib.contextmanager
    def fail(self, end: str, error: Exception = EIO) -> Iterator[None]:
        self.at[end], before = error, self.met
        try:
            yield
        finally:
            del self.at[end]
        assert self.met > before, f"nobody read {end}"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


class TestUnread:
    @pytest.mark.parametrize("end", ["/repository", "/repository/tiny", "/tiny/2"])
    def test_a_listing_that_fails_takes_nothing_with_it(
        self, model: Path, three: tuple[Path, ...], faults: Faults, end: str
    ) -> None:
        put(three[2], model.parent / "other" / "1")
        put(three[0], model.parent / "third" / "1")

        async def test() -> None:
            async with serving(model.parent) as there:
                named = admin_pb2.Label(model="tiny", label="best", version="2", weight=1)
                await there.admin.SetLabel(admin_pb2.SetLabelRequest(label=named))
                before = await there.energy()
                loads = there.inside.value("model_loads_total")
                with faults.fail(end):
                    problems = (await there.refresh()).problems
                    assert "cannot be read (OSError: [Errno 5]" in "".join(problems)
                    assert there.inside.value("repository_problems") == len(problems)
                    assert await there.energy() == await there.energy("tiny@best") == before
                    # What could be read is followed.
                    shutil.rmtree(model.parent / "third")
                    await there.refresh()
                    gone = end != "/repository"
                    assert ("third@1" not in await there.listed()) is gone
                assert not (await there.refresh()).problems
                assert there.inside.value("repository_problems") == 0
                assert await there.energy() == await there.energy("tiny@best") == before
                assert there.inside.value("model_loads_total") == loads
                # And what is not there any more goes, as ever.
                shutil.rmtree(model / "1")
                await there.refresh()
                assert "tiny@1" not in await there.listed()

        run(test())

    @pytest.mark.parametrize("end", ["/repository/tiny", "/tiny/2"])
    def test_what_was_found_not_to_be_there_is_gone(self, model: Path, faults: Faults, end: str) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                put(model / "1", model.parent / "other" / "1")
                await there.refresh()
                with faults.fail(end, FileNotFoundError(2, "No such file")):
                    assert f"{end.removeprefix('/repository').strip('/')} does not exist" in "".join(
                        (await there.refresh()).problems
                    )
                    assert "tiny@2" not in await there.listed()

        run(test())

    def test_a_card_that_cannot_be_read_is_as_it_was(self, model: Path, faults: Faults) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                card = model / "1" / "model.json"
                card.write_bytes(card.read_bytes())
                with faults.fail("/1/model.json"):
                    assert "1/model.json cannot be read" in "".join((await there.refresh()).problems)
                    assert (await there.listed())["tiny@1"].state == pb.MODEL_STATE_AVAILABLE
                assert not (await there.refresh()).problems

        run(test())

    def test_the_start_goes_without_what_cannot_be_read(self, model: Path, faults: Faults) -> None:
        put(model / "1", model.parent / "other" / "1")

        async def test() -> None:
            with faults.fail("/tiny/2"), faults.fail("/other"):
                there = await stack.enter_async_context(serving(model.parent))
                assert await there.version() == "1"
                assert set(await there.listed()) == {"tiny@1"}
            with faults.fail("/tiny/1"), faults.fail("/tiny/2"):
                assert "no version" not in "".join((await there.refresh()).problems)
            await there.refresh()
            assert await there.version() == "2"
            assert (await there.energy("other"))[1].version == "1"

        async def all_of_it() -> None:
            async with stack:
                await test()

        stack = contextlib.AsyncExitStack()
        run(all_of_it())


class TestLabels:
    def test_a_file_of_one_model_that_nobody_can_follow_stops_no_other(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        other = model.parent / "other"
        put(three[0], other / "1")

        async def test() -> None:
            async with serving(model.parent) as there:
                label(other, "a = " + 5_000 * "[")
                (other / "2").mkdir()
                (other / "2" / "model.json").write_text('{"a": ' + 100_000 * "[")
                put(three[0], model / "3")
                assert "other/labels.toml is not followed" in "".join((await there.refresh()).problems)
                assert await there.version() == "3"
                assert await there.version("other") == "1"
                assert "not JSON" in (await there.listed())["other@2"].reason

        run(test())

    def test_a_file_that_cannot_be_read_changes_nothing_and_is_read_again(
        self, model: Path, faults: Faults
    ) -> None:
        label(model, "stable = 1")

        async def test() -> None:
            async with serving(model.parent) as there:
                named = admin_pb2.Label(model="tiny", label="best", version="2", weight=1)
                await there.admin.SetLabel(admin_pb2.SetLabelRequest(label=named))
                label(model, "stable = 2")
                with faults.fail("/labels.toml"):
                    for _ in range(2):
                        assert "labels.toml cannot be read" in "".join((await there.refresh()).problems)
                        assert await there.version() == "1"
                        assert await there.version("tiny@best") == "2"
                # The file is the same one now; it was only not read.
                assert not (await there.refresh()).problems
                assert await there.version() == "2"

        run(test())

    def test_at_the_start_no_unproved_version_answers_until_it_is_read(
        self, model: Path, faults: Faults
    ) -> None:
        label(model, "stable = 1")

        async def test() -> None:
            async with contextlib.AsyncExitStack() as stack:
                with faults.fail("/labels.toml"):
                    there = await stack.enter_async_context(serving(model.parent))
                    code, message = await there.refused("tiny")
                    assert code is grpc.StatusCode.NOT_FOUND
                    assert "labels.toml cannot be read" in message
                await there.refresh()
                assert await there.version() == "1"

        run(test())

    def test_an_empty_file_is_one_that_is_being_written(self, model: Path) -> None:
        label(model, "stable = 1")

        async def test() -> None:
            async with serving(model.parent) as there:
                label(model, "")
                assert "labels.toml is empty" in "".join((await there.refresh()).problems)
                assert await there.version() == "1"
                (model / "labels.toml").unlink()
                assert not (await there.refresh()).problems
                assert await there.version() == "2"

        run(test())


class TestLoading:
    def test_a_fetch_that_failed_for_the_storages_sake_is_tried_again_once_a_look(
        self, three: tuple[Path, ...], tmp_path: Path, faults: Faults
    ) -> None:
        memory, root = MemoryFileSystem(), f"/{tmp_path.name}"
        for version in (1, 2):
            memory.put(str(three[version]), f"{root}/tiny/{version}", recursive=True)
        (shard,) = (file.name for file in three[2].glob("*.safetensors"))

        async def test() -> None:
            async with contextlib.AsyncExitStack() as stack:
                end = f"/tiny/2/{shard}"
                with faults.fail(end, TimeoutError("read timed out")):
                    there = await stack.enter_async_context(
                        serving(f"memory:/{root}", cache=tmp_path / "cache")
                    )
                    for looks in range(1, 4):
                        assert await there.version() == "1"
                        assert "read timed out" in (await there.listed())["tiny@2"].reason
                        assert faults.met == looks
                        await there.refresh()
                await there.refresh()
                assert await there.version() == "2"
                assert not (await there.listed())["tiny@2"].reason

        try:
            run(test())
        finally:
            memory.rm(root, recursive=True)

    @pytest.mark.parametrize("file", ["model.json", ".safetensors"])
    def test_a_disk_of_this_machine_that_is_full_is_named_and_not_the_repository(
        self,
        three: tuple[Path, ...],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        file: str,
    ) -> None:
        memory, root, cache = MemoryFileSystem(), f"/{tmp_path.name}", tmp_path / "cache"
        memory.put(str(three[1]), f"{root}/tiny/1", recursive=True)
        full: list[bool] = []
        whole = Path.open

        class Full(io.BytesIO):
            def write(self, data: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if full and mode == "wb" and cache in path.parents and path.name.endswith(file):
                return Full()
            return whole(path, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", opened)

        async def test() -> None:
            async with serving(f"memory:/{root}", cache=cache) as there:
                memory.put(str(three[2]), f"{root}/tiny/2", recursive=True)
                full.append(True)
                await there.refresh()
                reason = (await there.listed())["tiny@2"].reason
                assert reason == f"cannot keep bundles in {cache}: No space left on device"
                assert await there.version() == "1"
                assert "Traceback" not in caplog.text
                full.clear()
                await there.refresh()
                assert await there.version() == "2"
                assert not list(cache.glob(".*"))

        try:
            run(test())
        finally:
            memory.rm(root, recursive=True)

    def test_what_the_files_say_is_not_asked_again(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried: list[str] = []
        load = load_bundle

        def counted(*arguments: Any, version: str, **options: Any) -> Any:
            tried.append(version)
            if version == "2" and len(tried) == 1:
                raise MemoryError
            return load(*arguments, version=version, **options)

        monkeypatch.setattr(stock, "load_bundle", counted)
        (shard,) = (model / "1").glob("*.safetensors")
        shard.write_bytes(bytes(shard.stat().st_size))

        async def test() -> None:
            async with serving(model.parent) as there:
                assert tried == ["2", "1"]
                assert "sha256 differs" in (await there.listed())["tiny@1"].reason
                await there.refresh()
                assert await there.version() == "2"
                assert "sha256 differs" in (await there.listed())["tiny@1"].reason
                assert tried == ["2", "1", "2"]

        run(test())

    @pytest.mark.parametrize("role", ["content", "version", "label"])
    def test_what_answers_is_not_thrown_out_for_what_proves_broken(
        self, model: Path, three: tuple[Path, ...], tmp_path: Path, role: str
    ) -> None:
        broken, sound = tmp_path / "broken", three[2]
        shutil.copytree(sound, broken)
        weights = next(broken.glob("model-*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        if role == "label":
            label(model, "stable = 2")
        after = model / ("2" if role == "content" else "3")

        def change(bundle: Path) -> None:
            shutil.rmtree(after, ignore_errors=True)
            put(bundle, after)
            if role == "label":
                label(model, "stable = 3")

        async def test() -> None:
            async with serving(model.parent, preload=Preload.NONE, max_loaded=1, unload_after=60.0) as there:
                before = await there.once_loaded()
                change(broken)
                await there.refresh()
                assert there.inside.value("model_loads_total", outcome="failed") == 1
                assert await there.energy() == before
                change(sound)
                await there.refresh()
                assert (await there.energy())[1].version == after.name
                assert (await there.energy())[1].digest != before[1].digest
                # What was replaced goes as soon as there is need.
                put(sound, model.parent / "other" / "1")
                await there.refresh()
                assert (await there.once_loaded("other"))[1].name == "other"
                assert there.inside.value("model_state", state="ready") == 1

        run(test())


def test_a_server_that_is_busy_for_a_moment_is_believed_to_hold_what_it_held(
    tmp_path: Path, three: tuple[Path, ...]
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    folder, busy = tmp_path / "served", set[str]()
    put(three[0], folder / "tiny" / "1")
    put(three[1], folder / "tiny" / "2")
    label(folder / "tiny", "stable = 1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            if any(self.path.rstrip("/").endswith(end) for end in busy):
                return self.send_error(503)
            return super().send_head()

        def log_message(self, *arguments: object) -> None:
            pass

    async def test(url: str) -> None:
        async with serving(url, cache=tmp_path / "cache") as there:
            for end in ("/tiny", "/tiny/1", "/1/model.json", "/tiny/labels.toml"):
                busy.add(end)
                assert "503" in "".join((await there.refresh()).problems)
                assert await there.version() == "1"
                busy.clear()
                assert not (await there.refresh()).problems
                assert await there.version() == "1"

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run(test(f"http://127.0.0.1:{server.server_port}/"))
        server.shutdown()
