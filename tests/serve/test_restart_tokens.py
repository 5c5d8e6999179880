"""Restart tokens: what goes on from one has the bits of what never stopped."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serve.conftest import Bundles, crystal, molecule, running
from tests.serve.test_relax import as_atoms, asked, results

from equipot.client import Client
from equipot.serve.motion.state import BadState, Origin, State, seal, unseal
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ORIGIN = Origin(model="m", level_of_theory="l", algorithm="a", settings="s", structure="x")


def tokens_of(replies: list[Any], index: int = 0) -> dict[int, bytes]:
    return {
        reply.token.step: reply.token.token
        for reply in replies
        if reply.HasField("token") and reply.token.index == index
    }


class TestSealing:
    def test_gives_back_every_bit(self) -> None:
        random = np.random.default_rng(1)
        arrays = {"positions": random.normal(size=(5, 3)), "none": np.zeros((0, 3))}
        words = {"rng": random.bit_generator.state, "energy": 0.1 + 0.2, "vel": None}
        back = unseal(seal(State(step=7, words=words, arrays=arrays), ORIGIN), ORIGIN)
        assert back.step == 7
        assert back.words == words
        for name, array in arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)

    def test_may_hold_a_stress_that_is_not_known(self) -> None:
        """As those of earlier servers do, of what is not periodic in all three directions."""
        unknown = np.full((3, 3), np.nan)
        token = seal(State(step=7, words={}, arrays={"p": np.ones(3), "stress": unknown}), ORIGIN)
        assert list(unseal(token, ORIGIN).arrays) == ["p"]
        with pytest.raises(BadState, match="holds no state"):
            unseal(seal(State(step=7, words={}, arrays={"p": unknown}), ORIGIN), ORIGIN)

    def test_notices_every_damaged_byte(self) -> None:
        whole = seal(State(step=7, words={"a": 1}, arrays={"p": np.ones((2, 3))}), ORIGIN)
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            with pytest.raises(BadState):
                unseal(bytes(damaged), ORIGIN)
        for length in range(len(whole)):
            with pytest.raises(BadState):
                unseal(whole[:length], ORIGIN)

    @pytest.mark.parametrize("field", ["model", "level_of_theory", "algorithm", "settings", "structure"])
    def test_is_bound_to_its_origin(self, field: str) -> None:
        token = seal(State(step=7, words={}, arrays={}), ORIGIN)
        words = {name: getattr(ORIGIN, name) for name in ORIGIN.__slots__} | {field: "another"}
        with pytest.raises(BadState, match=f"another {field.replace('_', ' ')}"):
            unseal(token, Origin(**words))


class TestRelaxations:
    @pytest.mark.parametrize("optimizer", [pb.OPTIMIZER_FIRE, pb.OPTIMIZER_LBFGS])
    @pytest.mark.parametrize("cell", [pb.CELL_MOTION_FIXED, pb.CELL_MOTION_FULL])
    def test_go_on_with_the_same_bits(
        self, stub: PotentialServiceStub, optimizer: pb.Optimizer.ValueType, cell: pb.CellMotion.ValueType
    ) -> None:
        words: dict[str, Any] = {"optimizer": optimizer, "cell": cell, "max_steps": 25, "fmax": 1e-6}
        replies = list(stub.Relax(asked([crystal(3)], token_every=7, **words)))
        tokens = tokens_of(replies)
        assert sorted(tokens) == [7, 14, 21]
        whole = results(replies)[0]
        for step, token in tokens.items():
            # In other company: its batches are others, too.
            rest = results(stub.Relax(asked([crystal(3), crystal(4)], tokens=[token, b""], **words)))[0]
            assert rest.steps == 25, step
            assert (rest.positions, rest.cell, rest.forces) == (whole.positions, whole.cell, whole.forces)

    def test_that_do_not_fit_cost_the_others_nothing(self, stub: PotentialServiceStub) -> None:
        words: dict[str, Any] = {"max_steps": 12, "fmax": 1e-6}
        token = tokens_of(list(stub.Relax(asked([molecule(1)], token_every=5, **words))))[10]
        damaged = token[:-1] + bytes([token[-1] ^ 1])
        systems = [molecule(1), molecule(1), molecule(2, elements=(6,)), molecule(1)]
        tokens = [token, damaged, token, b"anything"]
        found = results(stub.Relax(asked(systems, tokens=tokens, **words)))
        assert [found[index].HasField("failure") for index in range(4)] == [False, True, True, True]
        messages = [found[index].failure.message for index in (1, 2, 3)]
        for part, message in zip(("damaged", "another structure", "no restart token"), messages, strict=True):
            assert part in message
        assert {found[index].failure.field for index in (1, 2, 3)} == {"tokens"}

    def test_are_bound_to_settings_and_bundle(self, stub: PotentialServiceStub) -> None:
        token = tokens_of(list(stub.Relax(asked([molecule(1)], token_every=5, max_steps=6, fmax=1e-6))))[5]
        softer = results(stub.Relax(asked([molecule(1)], tokens=[token], fmax=0.1)))[0]
        assert "another settings" in softer.failure.message
        other = asked([molecule(1)], tokens=[token], model="direct", level_of_theory="PBE", fmax=1e-6)
        assert "another model" in results(stub.Relax(other))[0].failure.message
        longer = results(stub.Relax(asked([molecule(1)], tokens=[token], max_steps=8, fmax=1e-6)))[0]
        assert longer.steps == 8

    @pytest.mark.slow
    def test_of_a_client_carry_it_over_a_lost_connection(self, bundles: Bundles, tmp_path: Path) -> None:
        systems = [as_atoms(molecule(seed, 9)) for seed in range(3)]
        words = [bundles.tiny, "--dtype", "float64", "--threads", 1]
        how: dict[str, Any] = {"fmax": 1e-9, "steps": 300}
        seen: list[int] = []
        with running(*words, stderr=tmp_path / "one") as first, Client(first.address) as client:
            port = int(first.address.rpartition(":")[2])
            expected = client.relax(systems, **how)

            def watch(index: int, step: int, energy: float, force: float) -> None:
                seen.append(step)
                if step == 100 and first.popen.poll() is None:
                    first.popen.kill()
                    first.popen.wait()
                    stack.enter_context(running(*words, port=port, stderr=tmp_path / "two"))

            with contextlib.ExitStack() as stack:
                found = dict(client.relax_iter(systems, on_progress=watch, **how))
        # It did not begin again.
        assert seen.count(1) == len(systems)
        for index, relaxed in found.items():
            np.testing.assert_array_equal(relaxed.positions, expected[index].positions)
