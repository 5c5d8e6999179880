"""Versions come and go while a server runs: the newest answers, a broken one never does, the old goes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import random
import shutil
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import grpc
import numpy as np
import pytest
from tests.serve.conftest import ask, molecule, run, write_tiny
from tests.serve.repository_helpers import MOLECULE, label, put, serving

from equipot.serve import shadow
from equipot.serve.errors import ServeError
from equipot.serve.registry import share
from equipot.serve.repository.labels import LabelError, parse
from equipot.serve.repository.settings import Preload, RepositorySettings
from equipot.serve.repository.versions import is_version, order
from equipot.wire.v1 import admin_pb2
from equipot.wire.v1 import potential_pb2 as pb

NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Bundles of one name with other weights."""
    folder = tmp_path_factory.mktemp("three")
    one, two, three = (write_tiny(folder / str(seed), "tiny", seed=seed) for seed in (1, 2, 3))
    return one, two, three


@pytest.fixture
def model(tmp_path: Path, three: tuple[Path, Path, Path]) -> Path:
    """A model's folder in a repository, with versions 1 and 2."""
    folder = tmp_path / "repository" / "tiny"
    put(three[0], folder / "1")
    put(three[1], folder / "2")
    return folder


def test_versions_are_ordered_as_numbers_and_what_comes_before_a_release_before_it() -> None:
    ordered = ["0.9", "v1", "1.2.0-alpha.1", "1.2.0-alpha.10", "1.2.0-rc1", "1.2.0", "1.10", "2", "20260101"]
    assert all(is_version(version) for version in ordered)
    assert sorted(random.sample(ordered, len(ordered)), key=order) == ordered
    assert not any(is_version(text) for text in ("", "latest", "1.", "-1", "1..2", "1/2", "sha256:ab", "1 2"))


def test_labels_are_read_in_both_forms() -> None:
    found = parse('stable = 3\nbest = "1.10"\n[canary]\nversion = "4"\nweight = 0.25\n')
    assert {name: (target.version, target.weight) for name, target in found.items()} == {
        "stable": ("3", 1.0),
        "best": ("1.10", 1.0),
        "canary": ("4", 0.25),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stable", "no TOML"),
        ("stable = 1.10", "version is 1.1"),
        ('stable = "newest"', "is no version"),
        ('[canary]\nversion = "4"\nweight = 1.5', "weight is 1.5, allowed are 0 to 1"),
        ('[canary]\nversion = "4"\nweight = nan', "weight is nan"),
        ('[canary]\nversion = "4"\nweight = "half"', "weight is 'half'"),
        ('[stable]\nversion = "4"\nweight = 0.5', "only canary and shadow"),
        ('[canary]\nversion = "4"\nwieght = 0.5', "unknown key 'wieght'"),
        ('"1" = "4"', "label '1'"),
        ("[canary]\nweight = 0.1", "version is None"),
    ],
)
def test_labels_that_cannot_be_are_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        parse(text)


def test_a_session_stays_with_the_canary_while_its_weight_grows() -> None:
    sessions = [f"session-{number}" for number in range(2_000)]
    few = {session for session in sessions if share("tiny", session) < 0.1}
    more = {session for session in sessions if share("tiny", session) < 0.3}
    assert few < more
    assert 140 < len(few) < 260
    assert 500 < len(more) < 700
    assert few != {session for session in sessions if share("other", session) < 0.1}


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

                async def fetch(wanted: str) -> str:
                    while True:
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            return await there.version(wanted)
                        await asyncio.sleep(0.02)

                async def in_memory() -> set[str]:
                    listed = await there.listed()
                    return {m.version for m in listed.values() if m.state == pb.MODEL_STATE_READY}

                assert await in_memory() == set()
                assert await fetch("tiny") == "3"
                assert await fetch("tiny@1") == "1"
                assert await in_memory() == {"1", "3"}
                assert await fetch("tiny") == "3"
                assert await fetch("tiny@2") == "2"
                assert await in_memory() == {"2", "3"}

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


class TestLabels:
    def test_stable_is_what_the_plain_name_means(self, model: Path) -> None:
        label(model, "stable = 1")

        async def test() -> None:
            async with serving(model.parent) as there:
                assert await there.version() == "1"
                assert await there.version("tiny@stable") == "1"
                label(model, "stable = 2\nbest = 1")
                await there.refresh()
                assert await there.version() == "2"
                assert await there.version("tiny@best") == "1"
                listed = await there.listed()
                assert list(listed["tiny@1"].labels) == ["best"]
                assert there.inside.value("model_label", model="tiny", version="2", label="stable") == 1

        run(test())

    def test_sessions_are_divided_by_weight_and_stay_where_they_are(self, model: Path) -> None:
        label(model, "stable = 1\n[canary]\nversion = 2\nweight = 0.4")
        sessions = [f"run-{number}" for number in range(60)]

        async def test() -> None:
            async with serving(model.parent) as there:
                got = [await there.version(session=session) for session in sessions]
                assert got == ["2" if share("tiny", session) < 0.4 else "1" for session in sessions]
                assert {"1", "2"} == set(got)
                assert got == [await there.version(session=session) for session in sessions]
                assert await there.version("tiny@canary") == "2"
                # One connection is one session where none is named.
                assert len({await there.version() for _ in range(5)}) == 1

        run(test())

    def test_a_canary_without_a_stable_leaves_the_plain_name_to_the_newest_besides_it(
        self, model: Path
    ) -> None:
        label(model, "[canary]\nversion = 2\nweight = 0.0")

        async def test() -> None:
            async with serving(model.parent) as there:
                assert await there.version() == "1"

        run(test())

    @pytest.mark.parametrize("text", ["stable = 9", "stable = ", '[canary]\nversion = "1"\nweight = 2'])
    def test_labels_that_lead_nowhere_change_nothing(self, model: Path, text: str) -> None:
        label(model, "stable = 1")

        async def test() -> None:
            async with serving(model.parent) as there:
                label(model, text)
                problems = "".join((await there.refresh()).problems)
                assert "9, which is not there" in problems or "not followed" in problems
                assert await there.version() == "1"
                label(model, "stable = 2")
                assert not (await there.refresh()).problems
                assert await there.version() == "2"

        run(test())

    def test_at_the_start_a_stable_that_leads_nowhere_lets_no_unproved_version_answer(
        self, model: Path
    ) -> None:
        label(model, "stable = 9")

        async def test() -> None:
            async with serving(model.parent) as there:
                code, message = await there.refused("tiny")
                assert code is NOT_FOUND
                assert "label stable names version 9" in message
                code, _ = await there.refused("tiny@2")
                assert code is grpc.StatusCode.UNAVAILABLE

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


class TestAdmin:
    def test_versions_are_loaded_and_unloaded_on_command(self, model: Path, three: tuple[Path, ...]) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                loaded = await there.admin.LoadModel(admin_pb2.LoadModelRequest(name="tiny", version="1"))
                assert (loaded.version, loaded.state) == ("1", pb.MODEL_STATE_READY)
                await asyncio.sleep(1.2)  # longer than the time after which what nobody means is let go
                assert await there.version("tiny@1") == "1"
                gone = await there.admin.UnloadModel(admin_pb2.UnloadModelRequest(name="tiny", version="2"))
                assert list(gone.versions) == ["2"]
                assert await there.version() == "1"
                code, message = await there.refused("tiny@2")
                assert code is NOT_FOUND
                assert "tiny@2 was unloaded" in message
                put(three[2], model / "3")
                newest = await there.admin.LoadModel(admin_pb2.LoadModelRequest(name="tiny"))
                assert newest.version == await there.version() == "3"

        run(test())

    def test_labels_are_set_on_command_until_their_file_changes(self, model: Path) -> None:
        async def test() -> None:
            async with serving(model.parent) as there:
                named = admin_pb2.Label(model="tiny", label="stable", version="1", weight=1)
                assert (await there.admin.SetLabel(admin_pb2.SetLabelRequest(label=named))).version == "1"
                assert await there.version() == "1"
                (told,) = (await there.refresh()).labels
                assert told == named
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await there.admin.UnloadModel(admin_pb2.UnloadModelRequest(name="tiny", version="1"))
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert "tiny@1 is stable" in str(caught.value.details())
                await there.admin.RemoveLabel(admin_pb2.RemoveLabelRequest(model="tiny", label="stable"))
                assert await there.version() == "2"
                await there.admin.SetLabel(admin_pb2.SetLabelRequest(label=named))
                label(model, "stable = 2")
                await there.refresh()
                assert await there.version() == "2"

        run(test())

    def test_what_cannot_be_done_says_why_and_changes_nothing(self, model: Path) -> None:
        (model / "3").mkdir()

        async def test() -> None:
            async with serving(model.parent) as there:

                def named(
                    version: str, weight: float = 1.0, name: str = "canary"
                ) -> admin_pb2.SetLabelRequest:
                    return admin_pb2.SetLabelRequest(
                        label=admin_pb2.Label(model="tiny", label=name, version=version, weight=weight)
                    )

                load, label = there.admin.LoadModel, there.admin.SetLabel
                for call, code, message in (
                    (load(admin_pb2.LoadModelRequest(name="none")), NOT_FOUND, "no model 'none'"),
                    (
                        load(admin_pb2.LoadModelRequest(name="tiny", version="9")),
                        NOT_FOUND,
                        "there are 1, 2, 3",
                    ),
                    (
                        load(admin_pb2.LoadModelRequest(name="tiny", version="3")),
                        grpc.StatusCode.FAILED_PRECONDITION,
                        "no model.json",
                    ),
                    (label(named("9")), NOT_FOUND, "no version '9'"),
                    (label(named("3")), grpc.StatusCode.FAILED_PRECONDITION, "no model.json"),
                    (label(named("1", 2.0)), grpc.StatusCode.INVALID_ARGUMENT, "weight is 2.0"),
                    (label(named("1", name="2")), grpc.StatusCode.INVALID_ARGUMENT, "label '2'"),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is code
                    assert message in str(caught.value.details())
                    assert await there.version() == "2"

        run(test())


class TestShadow:
    def test_what_was_answered_is_answered_again_by_the_version_on_trial(
        self, model: Path, three: tuple[Path, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        label(model, "stable = 1\n[shadow]\nversion = 2\nweight = 0.5")
        names = {"model": "tiny", "version": "1", "shadow": "2"}

        async def test() -> None:
            async with serving(model.parent, unload_after=60.0) as there:
                energies = [await there.energy() for _ in range(8)]
                assert {reference.version for _, reference in energies} == {"1"}
                count = "shadow_energy_difference_ev_per_atom_count"
                await there.inside.until(lambda: there.inside.value(count, **names) == 4)
                other, _ = await there.energy("tiny@shadow")
                expected = abs(other - energies[0][0]) / len(MOLECULE.positions)
                total = there.inside.value("shadow_energy_difference_ev_per_atom_sum", **names)
                assert total == pytest.approx(4 * expected, rel=1e-9)
                assert there.inside.value("shadow_force_difference_ev_per_angstrom_count", **names) == 4
                assert there.inside.value("shadow_requests_total", **names, outcome="ok") == 4
                # A structure that the stable version refuses has nothing to be compared with.
                gold = replace(molecule(1), atomic_numbers=np.full(6, 79))
                await there.inside.stub.Predict(ask([gold, MOLECULE], model="tiny"))
                await there.inside.stub.Predict(ask([gold, MOLECULE], model="tiny"))
                await there.inside.until(lambda: there.inside.value(count, **names) == 5)
                assert there.inside.value("shadow_structures_failed_total", **names) == 0

        run(test())
        (line,) = [one.message for one in caplog.records if one.message.startswith("shadow ")]
        assert line.startswith("shadow tiny@2 against tiny@1: 1 structures, energy differs by ")

    def test_a_shadow_that_fails_or_lags_behind_harms_nobody(
        self, model: Path, three: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(write_tiny(model.parent.parent / "sick", "tiny", poison=8, seed=2), model / "3")
        label(model, "stable = 1\n[shadow]\nversion = 3")
        monkeypatch.setattr(shadow, "MOST_WAITING", 2)
        names = {"model": "tiny", "version": "1", "shadow": "3"}
        oxygen = molecule(1, elements=(8,))

        async def test() -> None:
            # In float32 the weights of version 3 overflow for oxygen.
            async with serving(model.parent, dtype="float32") as there:
                answers = await asyncio.gather(
                    *(there.inside.stub.Predict(ask([oxygen], model="tiny")) for _ in range(40))
                )
                assert not any(answer.failures for answer in answers)
                value = functools.partial(there.inside.value, "shadow_requests_total", **names)
                await there.inside.until(lambda: value(outcome="ok") + value(outcome="dropped") == 40)
                assert value(outcome="dropped") > 0
                assert (
                    there.inside.value("shadow_structures_failed_total", **names) == value(outcome="ok") > 0
                )

        run(test())
