"""Labels, operators' calls, and versions on trial: who gets which version, and what is said of it."""

from __future__ import annotations

import asyncio
import functools
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.serve.conftest import ask, molecule, run, write_tiny
from tests.serve.repository_helpers import MOLECULE, label, put, serving

from equipot.client import Client, Structure
from equipot.serve import shadow
from equipot.serve.job import Answer, Work
from equipot.serve.registry import share
from equipot.serve.repository.labels import LabelError, parse
from equipot.wire.v1 import admin_pb2
from equipot.wire.v1 import potential_pb2 as pb

NOT_FOUND = grpc.StatusCode.NOT_FOUND


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
        ("a = " + 5_000 * "[", "no TOML"),
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

    def test_a_client_gets_the_same_version_whichever_way_it_asks(self, model: Path) -> None:
        label(model, "stable = 1\n[canary]\nversion = 2\nweight = 0.5")
        system = molecule(1)
        structure = Structure(system.atomic_numbers, system.positions)

        def versions(address: str) -> list[str]:
            with Client(address, model="tiny") as client, client.session(structure) as session:
                (relaxed,) = client.relax([structure], steps=1)
                answered = (client.predict(structure).model, session.predict(system.positions).model)
                return [one.version for one in (*answered, relaxed.model) if one is not None]

        async def test() -> None:
            async with serving(model.parent) as there:
                got = [await asyncio.to_thread(versions, there.inside.address) for _ in range(10)]
                assert all(len(one) == 3 for one in got)
                assert all(len(set(one)) == 1 for one in got)

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

    def test_labels_go_with_their_model_lest_another_of_its_name_has_them(
        self, model: Path, three: tuple[Path, ...]
    ) -> None:
        put(three[2], model.parent / "other" / "1")

        async def test() -> None:
            async with serving(model.parent) as there:
                named = admin_pb2.Label(model="tiny", label="stable", version="1", weight=1)
                await there.admin.SetLabel(admin_pb2.SetLabelRequest(label=named))
                shutil.rmtree(model)
                await there.refresh()
                assert (await there.refused("tiny"))[0] is NOT_FOUND
                put(three[1], model / "1")
                put(three[2], model / "2")
                assert not (await there.refresh()).labels
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

    def test_each_version_that_answers_gives_the_share_of_its_own_requests(self, model: Path) -> None:
        shutil.copytree(model, other := model.parent / "other")
        label(other, "stable = 1\n[shadow]\nversion = 2\nweight = 0.5")
        put(model / "1", model / "3")
        label(model, "stable = 1\n[canary]\nversion = 2\nweight = 0.5\n[shadow]\nversion = 3\nweight = 0.5")
        sessions = [f"run-{number}" for number in range(20)]
        stable = next(one for one in sessions if share("tiny", one) >= 0.5)
        canary = next(one for one in sessions if share("tiny", one) < 0.5)

        async def test() -> None:
            async with serving(model.parent) as there:
                # Two by turns: one counter of all would count each second of them.
                for _ in range(6):
                    assert await there.version("tiny", session=stable) == "1"
                    assert await there.version("tiny", session=canary) == "2"
                for _ in range(6):
                    assert await there.version("other") == "1"
                    assert await there.version("tiny", session=canary) == "2"
                value = functools.partial(there.inside.value, "shadow_requests_total", outcome="ok")
                await there.inside.until(lambda: value() == 12)
                shares = [("tiny", "1", 3), ("tiny", "2", 6), ("other", "1", 3)]
                for name, version, taken in shares:
                    assert value(model=name, version=version) == taken

        run(test())

    @pytest.mark.parametrize(("bound", "most"), [("MOST_WAITING", 2), ("MOST_BYTES", 1_000)])
    def test_a_shadow_that_fails_or_lags_behind_harms_nobody(
        self,
        model: Path,
        three: tuple[Path, ...],
        monkeypatch: pytest.MonkeyPatch,
        bound: str,
        most: int,
    ) -> None:
        put(write_tiny(model.parent.parent / "sick", "tiny", poison=8, seed=2), model / "3")
        label(model, "stable = 1\n[shadow]\nversion = 3")
        monkeypatch.setattr(shadow, bound, most)
        names = {"model": "tiny", "version": "1", "shadow": "3"}
        oxygen = molecule(1, elements=(8,))

        async def test() -> None:
            # In float32 the weights of version 3 overflow for oxygen.
            async with serving(model.parent, dtype="float32") as there:
                on_trial = there.inside.server._gate.registry().find("tiny@3")
                offer, taken = shadow.Shadow.offer, []

                def watched(self: shadow.Shadow, work: Work, answer: Answer) -> None:
                    before = on_trial.users
                    offer(self, work, answer)
                    taken.append(on_trial.users - before)

                monkeypatch.setattr(shadow.Shadow, "offer", watched)
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
                # It is in use from the moment it is asked, lest it be closed below its computation.
                assert sum(taken) == value(outcome="ok")
                await there.inside.until(lambda: on_trial.users == 0)

        run(test())
