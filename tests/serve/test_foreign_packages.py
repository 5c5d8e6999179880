"""CHGNet and MACE behind the service: equal to their own calculators."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk, molecule

from equipot.serve.engine import Result
from equipot.serve.errors import Fault, ServeError
from equipot.serve.foreign.spec import CalculatorSpec

from .test_foreign import HERE, answers, engine, near, parse, system


def needs(package: str, distribution: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{distribution} is not installed here"
    )


@pytest.mark.slow
@needs("chgnet", "chgnet")
class TestChgnet:
    def test_together_equals_alone_and_its_own_calculator(self) -> None:
        from chgnet.model.dynamics import CHGNetCalculator

        frames = [bulk("NaCl", "rocksalt", a=5.6), bulk("MgO", "rocksalt", a=4.2, cubic=True), bulk("Si")]
        for seed, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=seed)
        systems = [system(atoms) for atoms in frames]
        there = engine(CalculatorSpec(calculator="chgnet"))
        try:
            assert there.card.cutoff == 6.0
            assert there.card.n_parameters == 412_525
            together = answers(there, systems, stress=True)
            alone = [answers(there, [one], stress=True)[0] for one in systems]
            own = CHGNetCalculator(use_device="cpu")
            for atoms, one, other in zip(frames, together, alone, strict=True):
                assert isinstance(one, Result)
                assert isinstance(other, Result)
                assert one.energy == pytest.approx(other.energy, abs=1e-4)
                near(one.forces, other.forces, 1e-4)
                atoms.calc = own
                assert one.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
                near(one.forces, atoms.get_forces(), 1e-4)
                near(one.stress, atoms.get_stress(voigt=False), 1e-5)
            lone = bulk("NaCl", "rocksalt", a=30.0)
            crowd = answers(there, [systems[0], system(molecule("H2O")), system(lone), systems[2]])
            assert [isinstance(one, Result) for one in crowd] == [True, False, False, True]
            assert "crystals alone" in crowd[1].message  # type: ignore[union-attr]
        finally:
            there.close()


@pytest.mark.slow
@needs("mace", "mace-torch")
class TestMace:
    """With a small untrained model: mace-torch ships no weights."""

    def test_together_equals_alone_and_its_own_calculator(self, tmp_path: Path) -> None:
        from mace.calculators import MACECalculator

        model = tmp_path / "small.model"
        subprocess.run([sys.executable, HERE / "small_mace.py", model], check=True, timeout=280)
        frames = [molecule("CH3OH"), bulk("C", "diamond", a=3.6), molecule("H2O")]
        for seed, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=seed)
        systems = [system(atoms) for atoms in frames]
        with pytest.raises(ServeError, match="level of theory"):
            engine(parse(f"mace:{model}"))
        there = engine(parse(f"mace:{model}", level_of_theory="none"))
        try:
            assert (there.card.elements, there.card.cutoff) == ((1, 6, 8), 4.0)
            assert (there.card.name, there.dtype) == ("small", "float64")
            together = answers(there, systems, stress=True)
            own = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float64")
            for atoms, one, alone in zip(
                frames, together, [answers(there, [s], stress=True)[0] for s in systems], strict=True
            ):
                assert isinstance(one, Result)
                assert isinstance(alone, Result)
                assert one.energy == pytest.approx(alone.energy, abs=1e-8)
                near(one.forces, alone.forces, 1e-8)
                atoms.calc = own
                assert one.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
                near(one.forces, atoms.get_forces(), 1e-8)
                if atoms.pbc.all():
                    here = atoms.get_stress(voigt=False)
                    near(one.stress, here, 1e-8)
            (fault,) = answers(there, [system(bulk("Si"))])
            assert isinstance(fault, Fault)
            assert fault.reason == "unsupported"
        finally:
            there.close()
