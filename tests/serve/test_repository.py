"""Versions come and go while a server runs: the newest answers, a broken one never does, the old goes."""

from __future__ import annotations

import asyncio
import functools
import http.server
import random
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import grpc
import pytest
from tests.serve.conftest import ask, molecule, run
from tests.serve.repository_helpers import put, serving

from equipot.serve.errors import ServeError
from equipot.serve.repository.settings import Preload, RepositorySettings
from equipot.serve.repository.source import without_secrets
from equipot.serve.repository.versions import is_version, order
from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from equipot.wire.v1 import potential_pb2 as pb

NOT_FOUND = grpc.StatusCode.NOT_FOUND


def test_versions_are_ordered_as_numbers_and_what_comes_before_a_release_before_it() -> None:
    ordered = ["0.9", "v1", "1.2.0-alpha.1", "1.2.0-alpha.10", "1.2.0-rc1", "1.2.0", "1.10", "2", "20260101"]
    assert all(is_version(version) for version in ordered)
    assert sorted(random.sample(ordered, len(ordered)), key=order) == ordered
    assert not any(is_version(text) for text in ("", "latest", "1.", "-1", "1..2", "1/2", "sha256:ab", "1 2"))


class TestStart:
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("{}/nowhere", "does not exist"),
            ("nonsense://bucket", "Protocol not known"),
            ("{}/bundle", "is a bundle itself"),
            ("{}/bundle/model.json", "is a file"),
            ("memory://nothing-here", "does not exist"),
        ],
    )
    def test_what_is_no_repository(
        self, three: tuple[Path, ...], tmp_path: Path, url: str, message: str
    ) -> None:
        shutil.copytree(three[0], tmp_path / "bundle")

        async def test() -> None:
            with pytest.raises(ServeError, match=message):
                async with serving(url.format(tmp_path)):
                    pytest.fail("it was served")

        run(test())

    def test_a_password_in_the_url_is_not_told(self) -> None:
        async def test() -> None:
            with pytest.raises(ServeError) as caught:
                async with serving("http://user:secret@127.0.0.1:9/repository?sig=hidden"):
                    pytest.fail("it was served")
            assert "127.0.0.1:9/repository" in str(caught.value)
            assert "secret" not in str(caught.value)
            assert "hidden" not in str(caught.value)

        run(test())

    @pytest.mark.parametrize(
        "values",
        [
            {"url": ""},
            {"url": "x", "poll": -1.0},
            {"url": "x", "max_loaded": 0},
            {"url": "x", "unload_after": -1},
        ],
    )
    def test_settings_out_of_range(self, values: dict[str, object]) -> None:
        with pytest.raises(ServeError):
            RepositorySettings(**values)  # type: ignore[arg-type]

    def test_an_empty_one_is_waited_for(self, tmp_path: Path, three: tuple[Path, ...]) -> None:
        repository = tmp_path / "repository"
        repository.mkdir()

        async def test() -> None:
            async with serving(repository, poll=0.1) as there:
                assert (await there.refused("tiny"))[0] is NOT_FOUND
                put(three[0], repository / "tiny" / "1")
                await there.inside.until(
                    lambda: there.inside.value("model_loads_total", model="tiny", outcome="ok") == 1
                )
                assert await there.version("") == "1"

        run(test())

    def test_a_model_must_be_named_where_there_are_several_unless_one_is_the_default(
        self, tmp_path: Path, three: tuple[Path, ...]
    ) -> None:
        for name in ("one", "two"):
            put(three[0], tmp_path / "repository" / name / "1")

        async def test() -> None:
            async with serving(tmp_path / "repository") as there:
                code, message = await there.refused("")
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert "name a model: one@1 (sha256:" in message
            async with serving(tmp_path / "repository", default="two") as there:
                assert (await there.energy(""))[1].name == "two"
                assert (await there.listed())["two@1"].is_default
            async with serving(tmp_path / "repository", default="three") as there:
                code, message = await there.refused("")
                assert code is NOT_FOUND
                assert "no model of the default name three" in message

        run(test())


class TestVersions:
    def test_the_newest_answers_and_others_when_they_are_asked_for(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        async def test() -> None:
            async with serving(model.parent, unload_after=60.0) as there:
                energy, reference = await there.energy()
                assert reference.version == "2"
                listed = await there.listed()
                assert listed["tiny@2"].state == pb.MODEL_STATE_READY
                assert listed["tiny@2"].is_current
                assert listed["tiny@1"].state == pb.MODEL_STATE_AVAILABLE
                digest = listed["tiny@1"].digest
                # Not in memory: told to come again, and then there.
                code, message = await there.refused("tiny@1")
                assert code is grpc.StatusCode.UNAVAILABLE
                assert "tiny@1 is being loaded" in message
                await there.inside.until(
                    lambda: there.inside.value("model_state", model="tiny", version="1", state="ready") == 1
                )
                older, reference = await there.energy("tiny@1")
                assert (reference.version, reference.digest) == ("1", digest)
                assert older != energy
                assert (await there.energy(f"tiny@{digest[:20]}"))[0] == older
                assert (await there.energy("tiny@2"))[0] == energy

        run(test())

    @pytest.mark.parametrize("wanted", ["tiny@3", "tiny@stable", "tiny@sha256:00000000", "other"])
    def test_what_is_not_there_is_answered_by_what_is(self, model: Path, wanted: str) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                code, message = await there.refused(wanted)
                assert code is NOT_FOUND
                assert "tiny@2 (sha256:" in message
                assert "tiny@1 (sha256:" in message

        run(test())

    def test_a_new_version_takes_over_and_the_old_leaves_memory_after_its_last_request(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                registry = there.inside.server._gate.registry()
                engine = weakref.ref(registry.find("tiny").engine)
                digest = registry.find("tiny").card.digest
                many = [molecule(seed, 40) for seed in range(60)]
                before = there.inside.value("batches_total", model="tiny")
                running = asyncio.ensure_future(there.inside.stub.Predict(ask(many, model="tiny")))
                await there.inside.until(lambda: there.inside.value("batches_total", model="tiny") > before)
                put(three[2], model / "3")
                await there.refresh()
                assert await there.version() == "3"
                answer = await running
                assert (answer.model.version, answer.model.digest) == ("2", digest)
                assert not answer.failures
                await there.inside.until(lambda: engine() is None)
                # What was counted of it goes with it: labels must not pile up over a server's months.
                counted = there.inside.value
                await there.inside.until(lambda: not counted("structures_total", model="tiny", version="2"))
                assert not counted("request_seconds_count", model="tiny", version="2")
                assert (await there.listed())["tiny@2"].state == pb.MODEL_STATE_AVAILABLE

        run(test())

    def test_a_removed_version_leaves_its_place_to_the_one_before(self, model: Path) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                digest = (await there.energy())[1].digest
                shutil.rmtree(model / "2")
                await there.refresh()
                assert await there.version() == "1"
                # Whoever began with it is told, and not answered by another.
                code, message = await there.refused(f"tiny@{digest}")
                assert code is NOT_FOUND
                assert "tiny@1" in message

        run(test())

    def test_another_content_under_one_version_is_loaded_beside_it(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        async def test() -> None:
            async with serving(model.parent, unload_after=60.0) as there:
                energy, old = await there.energy()
                shutil.rmtree(model / "2")
                put(three[2], model / "2")
                await there.refresh()
                newer, new = await there.energy()
                assert (new.version, new.digest != old.digest) == ("2", True)
                assert newer != energy
                # Whoever named the digest goes on with it.
                assert await there.energy(f"tiny@{old.digest}") == (energy, old)
                described = await there.inside.stub.GetModel(pb.GetModelRequest(model=f"tiny@{old.digest}"))
                assert (described.digest, described.is_current) == (old.digest, False)

        run(test())

    def test_links_are_followed_and_it_is_seen_where_they_lead(
        self, tmp_path: Path, three: tuple[Path, ...]
    ) -> None:
        """As Kubernetes mounts files, and as caches of models keep them."""
        model = tmp_path / "elsewhere" / "tiny"
        model.mkdir(parents=True)
        (tmp_path / "repository").mkdir()
        (tmp_path / "repository" / "tiny").symlink_to(model)

        def lead(link: str, target: Path) -> None:
            (model / ".link").symlink_to(target)
            (model / ".link").rename(model / link)

        for number in (1, 2):
            lead(str(number), three[number - 1])
            (model / f"..{number}").mkdir()
            (model / f"..{number}" / "labels.toml").write_text(f'stable = "{number}"\n')
        lead("..data", model / "..1")
        lead("labels.toml", Path("..data/labels.toml"))
        lead("3", tmp_path / "nowhere")

        async def test() -> None:
            async with serving(tmp_path / "repository") as there:
                assert await there.version() == "1"
                lead("..data", model / "..2")
                problems = (await there.refresh()).problems
                assert any("tiny/3 is a link that leads nowhere" in problem for problem in problems)
                energy, old = await there.energy()
                lead("2", three[2])
                await there.refresh()
                newer, new = await there.energy()
                assert (old.version, new.version, new.digest != old.digest) == ("2", "2", True)
                assert newer != energy

        run(test())

    def test_a_half_copied_version_is_refused_with_the_reason_until_it_is_whole(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        (shard,) = (file.name for file in three[2].glob("*.safetensors"))

        async def test() -> None:
            async with serving(model.parent) as there:
                (model / "3").mkdir()
                shutil.copy(three[2] / shard, model / "3")
                await there.refresh()
                assert "has no model.json" in (await there.listed())["tiny@3"].reason
                shutil.copy(three[2] / "model.json", model / "3")
                whole = (model / "3" / shard).read_bytes()
                for part, reason in (
                    (whole[:-9], "bytes, the card says"),
                    (whole[:-9] + bytes(9), "sha256 differs"),
                ):
                    (model / "3" / shard).write_bytes(part)
                    await there.refresh()
                    broken = (await there.listed())["tiny@3"]
                    assert broken.state == pb.MODEL_STATE_FAILED
                    assert reason in broken.reason
                    assert await there.version() == "2"
                code, message = await there.refused("tiny@3")
                assert code is NOT_FOUND
                assert "sha256 differs" in message
                (model / "3" / shard).write_bytes(whole)
                await there.refresh()
                assert await there.version() == "3"

        run(test())

    def test_a_wrong_layout_is_named_and_the_rest_is_served(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        repository = model.parent
        shutil.copytree(three[0], repository / "flat")
        put(three[0], repository / "wordy" / "latest")
        put(three[1], model / "2.0.1")
        (repository / "notes.txt").write_text("not a model")
        (repository / ".hidden").mkdir()
        (repository / "a b").mkdir()

        async def test() -> None:
            async with serving(repository) as there:
                problems = "\n".join((await there.refresh()).problems)
                assert "flat holds a bundle itself: move it to flat/1" in problems
                assert "wordy/latest is no version" in problems
                assert "'a b' is no name for a model" in problems
                assert "tiny 2 and 2.0.1 are the same bundle" in problems
                assert "hidden" not in problems
                assert await there.version() == "2.0.1"
                assert {name.split("@")[0] for name in await there.listed()} == {"tiny"}

        run(test())

    def test_a_repository_that_goes_away_takes_nothing_with_it(self, model: Path) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                model.rename(model.parent.parent / "aside")
                assert "empty now" in "".join((await there.refresh()).problems)
                assert await there.version() == "2"
                model.parent.rmdir()
                assert "does not exist" in "".join((await there.refresh()).problems)
                assert await there.version() == "2"

        run(test())


class TestMemory:
    def test_nothing_is_loaded_before_it_is_asked_for_and_then_the_longest_unused_goes(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        put(three[2], model / "3")

        async def test() -> None:
            async with serving(model.parent, preload=Preload.NONE, max_loaded=2, unload_after=60.0) as there:

                async def version(wanted: str) -> str:
                    return (await there.once_loaded(wanted))[1].version

                async def in_memory() -> set[str]:
                    listed = await there.listed()
                    return {m.version for m in listed.values() if m.state == pb.MODEL_STATE_READY}

                assert await in_memory() == set()
                assert await version("tiny") == "3"
                assert await version("tiny@1") == "1"
                assert await in_memory() == {"1", "3"}
                assert await version("tiny") == "3"
                assert await version("tiny@2") == "2"
                assert await in_memory() == {"2", "3"}

        run(test())

    def test_whoever_waits_by_the_inference_protocol_has_it_loaded(self, model: Path) -> None:
        async def test() -> None:
            async with (
                serving(model.parent, preload=Preload.NONE) as there,
                grpc.aio.insecure_channel(there.inside.address) as channel,
            ):
                stub: Any = GRPCInferenceServiceStub(channel)
                asked, polls = oip.ModelReadyRequest(name="tiny", version="1"), 1
                while not (await stub.ModelReady(asked)).ready:
                    polls += 1
                    await asyncio.sleep(0.02)
                assert polls > 1
                assert await there.version("tiny@1") == "1"
                metadata = await stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))
                assert set(metadata.versions) == {"1", "2"}

        run(test())

    def test_all_are_loaded_when_told(self, model: Path) -> None:
        async def test() -> None:
            async with serving(model.parent, preload=Preload.ALL) as there:
                assert await there.version("tiny@1") == "1"
                assert await there.version("tiny@2") == "2"

        run(test())

    def test_the_old_leaves_even_where_one_alone_may_be_in_memory(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        async def test() -> None:
            async with serving(model.parent, max_loaded=1) as there:
                put(three[2], model / "3")
                await there.refresh()
                assert await there.version() == "3"
                await there.inside.until(
                    lambda: not there.inside.value("model_state", model="tiny", version="2", state="ready")
                )

        run(test())


@pytest.fixture
def over_http(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and where it is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class TestRemote:
    def test_bundles_over_http_are_kept_by_digest(
        self, over_http: tuple[Path, str], three: tuple[Path, ...], tmp_path: Path
    ) -> None:
        folder, url = over_http
        cache = tmp_path / "cache"
        put(three[0], folder / "tiny" / "1")

        async def test() -> None:
            async with serving(url, cache=cache) as there:
                energy, reference = await there.energy()
                (kept,) = cache.iterdir()
                assert kept.name == reference.digest.replace(":", "-")
                put(three[1], folder / "tiny" / "2")
                await there.refresh()
                assert await there.version() == "2"
                assert len(list(cache.iterdir())) == 2
            # Damaged on disk: fetched again.
            (shard,) = kept.glob("*.safetensors")
            shard.write_bytes(bytes(shard.stat().st_size))
            shutil.rmtree(folder / "tiny" / "2")
            async with serving(url, cache=cache) as there:
                assert await there.energy() == (energy, reference)

        run(test())

    def test_no_password_is_told_of_a_version_that_cannot_be_loaded(
        self,
        over_http: tuple[Path, str],
        three: tuple[Path, ...],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder, url = over_http
        put(three[0], folder / "tiny" / "1")
        put(three[1], folder / "tiny" / "2")
        (shard,) = (folder / "tiny" / "2").glob("*.safetensors")
        shard.write_bytes(bytes(shard.stat().st_size))

        async def test() -> None:
            async with serving(url.replace("//", "//user:secret@"), cache=tmp_path / "cache") as there:
                assert await there.version() == "1"

        run(test())
        assert f"tiny@2 is not served from {url}tiny/2" in caplog.text
        assert "secret" not in caplog.text

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("simplecache::https://user:secret@host/models?sig=secret", "simplecache::https://host/models"),
            ("zip://models::s3://key:secret@host/all.zip", "zip://models::s3://host/all.zip"),
            ("memory://models", "memory://models"),
            ("/models", "/models"),
        ],
    )
    def test_a_chain_of_urls_is_told_without_secrets(self, url: str, shown: str) -> None:
        assert without_secrets(url) == shown

    def test_a_damaged_remote_bundle_is_refused_and_becomes_whole(
        self, three: tuple[Path, ...], tmp_path: Path
    ) -> None:
        memory = fsspec.filesystem("memory")
        root = f"/{tmp_path.name}"
        memory.put(str(three[0]), f"{root}/tiny/1", recursive=True)
        memory.put(str(three[1]), f"{root}/tiny/2", recursive=True)
        (name,) = (file.name for file in three[1].glob("*.safetensors"))
        shard = f"{root}/tiny/2/{name}"
        whole = memory.cat_file(shard)
        memory.pipe_file(shard, whole[:-4] + b"oops")

        async def test() -> None:
            async with serving(f"memory:/{root}", cache=tmp_path / "cache") as there:
                assert await there.version() == "1"
                assert "sha256 differs" in (await there.listed())["tiny@2"].reason
                memory.pipe_file(shard, whole + b"more")
                await there.refresh()
                assert "more than" in (await there.listed())["tiny@2"].reason
                memory.pipe_file(shard, whole)
                await there.refresh()
                assert await there.version() == "2"
                assert not [
                    folder for folder in (tmp_path / "cache").iterdir() if folder.name.startswith(".")
                ]

        try:
            run(test())
        finally:
            memory.rm(root, recursive=True)
