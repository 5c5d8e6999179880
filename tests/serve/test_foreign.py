"""Other people's potentials behind the same service: equal to themselves, and harmless when they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.optimize import FIRE
from tests.serve.conftest import Bundles, Process, inside, run, running

from equipot.client import Client, FailureReason, InvalidRequest
from equipot.model.batch import Graph, System
from equipot.serve.config import DEFAULT_LIMITS, ServeConfig
from equipot.serve.engine import Result
from equipot.serve.errors import Fault, NotReady, ServeError
from equipot.serve.foreign import process as foreign_process
from equipot.serve.foreign.engine import ForeignEngine
from equipot.serve.foreign.spec import CalculatorSpec, calculators
from equipot.serve.foreign.words import Answered
from equipot.serve.mapping import read

HERE = Path(__file__).parent
ODD = str(HERE / "odd_calculators.py")


def parse(word: str, **words: str) -> CalculatorSpec:
    (table,) = calculators([word], **words)
    return read(CalculatorSpec, table, base=Path())


def near(one: npt.NDArray[np.float64] | float | None, other: object, atol: float) -> None:
    assert one is not None
    np.testing.assert_allclose(one, np.asarray(other), rtol=0, atol=atol)


def system(atoms: Atoms, **fields: Any) -> System:
    return System(atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, **fields)


def engine(spec: CalculatorSpec) -> ForeignEngine:
    return ForeignEngine(spec, device="cpu", limits=DEFAULT_LIMITS, threads=1)


def answers(there: ForeignEngine, systems: list[System], *, stress: bool = False) -> list[Result | Fault]:
    forces = there.card.has_forces
    prepared = there.prepare(systems)
    graphs = [one for one in prepared if isinstance(one, Graph)]
    computed = iter(there.compute(graphs, forces=forces, stress=stress))
    return [next(computed) if isinstance(one, Graph) else one for one in prepared]


def metal(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[seed % 4] = 47
    atoms.rattle(0.1, seed=seed)
    return atoms


@pytest.fixture(scope="module")
def emt(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """EMT beside a bundle of ours."""
    folder = tmp_path_factory.mktemp("emt")
    words = folder / "emt.toml"
    words.write_text(
        'calculator = "ase.calculators.emt:EMT"\nname = "emt"\nlevel_of_theory = "effective medium"\n'
        'elements = ["Cu", 47, "Au"]\n[arguments]\nasap_cutoff = true\n'
    )
    with running(bundles.tiny, "--calculator", words, "--threads", 1, stderr=folder / "log") as process:
        yield process


class TestEmtOverThePort:
    def test_it_equals_emt_here(self, emt: Process) -> None:
        frames = [metal(seed) for seed in range(12)] + [bulk("Au"), Atoms("Cu2", [[0, 0, 0], [2.4, 0, 0]])]
        with Client(emt.address, model="emt") as client:
            got = client.predict(frames, stress=True)
        assert not got.failures
        assert got.model is not None
        assert got.model.level_of_theory == "effective medium"
        for atoms, one in zip(frames, got, strict=True):
            atoms.calc = EMT(asap_cutoff=True)
            near(one.energy, atoms.get_potential_energy(), 1e-10)
            near(one.forces, atoms.get_forces(), 1e-10)
            assert one.stress is not None
            if atoms.pbc.all():
                here = atoms.get_stress(voigt=False)
                near(one.stress, here, 1e-10)
            else:
                assert np.isnan(one.stress).all()

    def test_it_relaxes_as_here_though_it_does_not_say_how_far_it_looks(self, emt: Process) -> None:
        atoms = metal(5)
        with Client(emt.address, model="emt") as client:
            there = client.relax([atoms], fmax=1e-6, steps=4)[0]
        atoms.calc = EMT(asap_cutoff=True)
        FIRE(atoms, logfile=None).run(fmax=1e-6, steps=4)
        assert (there.failure, there.steps) == (None, 4)
        near(there.positions, atoms.positions, 1e-8)

    def test_what_it_does_not_know_fails_alone(self, emt: Process) -> None:
        charged = metal(0)
        charged.info["charge"] = 1
        with Client(emt.address, model="emt") as client:
            got = client.predict([metal(1), molecule("H2O"), charged, metal(2)])
        assert [(one.index, one.reason, one.field) for one in got.failures] == [
            (1, FailureReason.UNSUPPORTED, "atomic_numbers"),
            (2, FailureReason.UNSUPPORTED, "charge"),
        ]
        assert np.isfinite(got.energy[[0, 3]]).all()

    def test_it_is_listed_and_counted_as_any_model(self, emt: Process) -> None:
        with Client(emt.address) as client:
            bundle, info = client.models()
            assert (bundle.name, info.name) == ("tiny", "emt")
            assert info.elements == (29, 47, 79)
            assert (info.force_mode, info.has_stress, info.cutoff) == ("unknown", True, 0.0)
            assert info.card["versions"].keys() == {"ase"}
            assert client.predict([metal(3)], model=f"emt@{info.digest[:20]}").model is not None
        assert emt.sample("equipot_structures_total", model="emt", outcome="ok") > 0
        assert emt.sample("equipot_model_info", model="emt", digest=info.digest) == 1


@pytest.fixture(scope="module")
def moody() -> Iterator[ForeignEngine]:
    there = engine(CalculatorSpec(calculator=f"{ODD}:Moody", time_limit=2.0, arguments={"spring": 2.0}))
    yield there
    there.close()


class TestOnBadDays:
    @pytest.mark.parametrize(
        ("symbol", "reason", "message"),
        [
            ("Ne", "internal", "ended with code 7 at this structure"),
            ("He", "internal", "took longer than 2 s at this structure"),
            ("Ar", "not_finite", "energy is not a finite number"),
            ("Kr", "internal", "RuntimeError: krypton does not converge"),
            ("Xe", "internal", "ValueError: its forces have shape (3, 2) for 2 atoms"),
            ("Rn", "internal", "ValueError: its forces have shape () for 2 atoms"),
            ("Fe", "internal", "RuntimeError: \\udcff"),
        ],
    )
    def test_the_others_of_its_batch_are_answered(
        self, moody: ForeignEngine, symbol: str, reason: str, message: str
    ) -> None:
        places = [[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]
        good, bad = system(Atoms("H2", places)), system(Atoms(["H", symbol], places))
        first, fault, last = answers(moody, [good, bad, good])
        assert isinstance(fault, Fault)
        assert (fault.reason, message in fault.message) == (reason, True)
        for one in (first, last):
            assert isinstance(one, Result)
            assert one.energy == 2.0 * 5.0
            np.testing.assert_array_equal(one.forces, -4.0 * np.array(places))

    def test_one_that_cannot_say_what_is_wrong_lives_on(self, moody: ForeignEngine) -> None:
        answers(moody, [system(Atoms("H"))])
        before = moody._process._process
        (fault,) = answers(moody, [system(Atoms("Fe"))])
        assert isinstance(fault, Fault)
        assert fault.message == "Speechless: it does not say why"
        assert moody._process._process is before

    def test_a_process_that_was_killed_while_it_was_idle_is_nobodys_fault(self, moody: ForeignEngine) -> None:
        process = moody._process._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (one,) = answers(moody, [system(Atoms("H"))])
        assert isinstance(one, Result)

    def test_a_process_that_was_stopped_while_it_was_idle_holds_up_nobody_for_ever(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(foreign_process, "PIPE_SECONDS", 1.0)
        there = engine(CalculatorSpec(calculator=f"{ODD}:Moody", time_limit=20.0))
        before = there._process._process
        assert before is not None
        os.kill(before.pid, signal.SIGSTOP)
        # More than a pipe takes in while nobody reads it.
        many = system(Atoms("H20000", np.random.default_rng(1).uniform(0, 200, (20_000, 3))))
        begun = time.monotonic()
        for one in answers(there, [many, system(Atoms("H"))]):
            assert isinstance(one, Result)
        assert time.monotonic() - begun < 15
        assert before.poll() is not None
        there.close()

    def test_one_that_starts_for_too_long_is_not_taken_for_one_that_has_started(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there = engine(CalculatorSpec(calculator=f"{ODD}:Moody"))
        before = there._process._process
        assert before is not None
        os.kill(before.pid, signal.SIGKILL)
        before.wait()
        with monkeypatch.context() as patched:
            patched.setattr(foreign_process, "START_SECONDS", 0.0)
            with pytest.raises(NotReady, match="is being started again"):
                answers(there, [system(Atoms("H"))])
        there._process._not_before = 0.0
        (one,) = answers(there, [system(Atoms("H"))])
        assert isinstance(one, Result)
        there.close()

    def test_in_its_place_comes_only_what_is_served(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        program = tmp_path / "odd.py"
        program.write_text(Path(ODD).read_text())
        files = {name: tmp_path / name for name in ("model_file", "log_file", "new_file", "trace_file")}
        for path in files.values():
            path.write_text("from before\n")
        files["new_file"].unlink()
        arguments = {name: str(path) for name, path in files.items()}
        there = engine(
            CalculatorSpec(calculator=f"{program}:Moody", arguments=arguments, outputs=("trace_file",))
        )
        assert json.loads(there.card.text)["weights"].keys() == {"odd.py", "model_file", "log_file"}
        (before,) = answers(there, [system(Atoms("H", [[1.0, 2.0, 0.0]]))])

        def kill() -> None:
            process = there._process._process
            assert process is not None
            process.kill()
            process.wait()

        program.write_text(Path(ODD).read_text().replace('"spring": 1.0', '"spring": 2.0'))
        kill()
        with pytest.raises(NotReady, match="is being started again"):
            answers(there, [system(Atoms("H", [[1.0, 2.0, 0.0]]))])
        program.write_text(Path(ODD).read_text())
        files["model_file"].write_text("another")
        there._process._not_before = 0.0
        with pytest.raises(NotReady, match="is being started again"):
            answers(there, [system(Atoms("H", [[1.0, 2.0, 0.0]]))])
        refused = [text for text in caplog.messages if "another one now" in text]
        assert [text.partition("weights ")[2].partition(":")[0] for text in refused] == [
            "(odd.py)",
            "(model_file)",
        ]
        # What it wrote itself is otherwise now, and holds up nothing.
        assert all(files[name].read_text().endswith("computing\n") for name in ("log_file", "new_file"))
        files["model_file"].write_text("from before\n")
        there._process._not_before = 0.0
        (after,) = answers(there, [system(Atoms("H", [[1.0, 2.0, 0.0]]))])
        assert isinstance(before, Result)
        assert isinstance(after, Result)
        assert after.energy == before.energy
        there.close()

    @pytest.mark.parametrize("guilty", [0, 150, 299])
    def test_of_many_that_are_computed_together_the_one_at_fault_is_found(
        self, moody: ForeignEngine, monkeypatch: pytest.MonkeyPatch, guilty: int
    ) -> None:
        """That the potential computes together, and how it ends, is simulated: none here is of that kind."""
        process = moody._process
        computed = Answered(0.0, b"", b"")

        def ask(part: list[int], structures: object, found: dict[int, Any], **wanted: bool) -> None:
            if guilty in part:
                raise foreign_process._DeadError("ended by signal 11")
            found |= dict.fromkeys(part, computed)

        with monkeypatch.context() as patch:
            patch.setattr(process, "facts", process.facts._replace(batched=True))
            for name, stand_in in (("_ask", ask), ("_end", lambda: None), ("_revive", lambda: None)):
                patch.setattr(process, name, stand_in)
            found = process.compute([None] * 300, forces=True, stress=False)  # type: ignore[list-item]
        assert [index for index, one in enumerate(found) if one is not computed] == [guilty]

    def test_a_batch_that_keeps_ending_it_is_given_up(self, moody: ForeignEngine) -> None:
        neon = system(Atoms("Ne"))
        got = answers(moody, [neon] * 10)
        assert all(isinstance(one, Fault) for one in got)
        assert "send it by itself" in got[-1].message  # type: ignore[union-attr]


def test_a_calculator_without_forces_or_stress_says_so() -> None:
    config = ServeConfig(calculators=(parse(f"{ODD}:Charged"),), port=0, metrics_port=None, threads=1)

    async def test() -> None:
        async with inside(config) as there:
            from equipot.client import AsyncClient

            async with AsyncClient(there.address) as client:
                info = await client.model()
                assert (info.name, info.force_mode, info.has_stress) == ("charged", "none", False)
                atoms = molecule("H2O")
                assert (await client.predict(atoms, forces=False)).energy[0] == pytest.approx(0.1)
                with pytest.raises(InvalidRequest, match="no forces"):
                    await client.predict(atoms)
                with pytest.raises(InvalidRequest, match="no stress"):
                    await client.predict(atoms, forces=False, stress=True)

    run(test())


@pytest.mark.parametrize(
    ("spec", "unsaid"),
    [
        (CalculatorSpec(calculator=f"{ODD}:Charged"), 0.1),
        (CalculatorSpec(calculator=f"{ODD}:Input"), 0.1),
        (CalculatorSpec(calculator=f"{ODD}:ByInfo", charge="info"), 0.0),
        (CalculatorSpec(calculator=f"{ODD}:Moody"), None),
    ],
)
def test_charge_and_spin_are_passed_on_or_refused_and_never_lost_or_anothers(
    spec: CalculatorSpec, unsaid: float | None
) -> None:
    there = engine(spec)
    try:
        atoms = Atoms("H")
        got = answers(
            there, [system(atoms, charge=c, spin_multiplicity=m) for c, m in ((1, 2), (-2, 3), (0, 1))]
        )
        if unsaid is not None:
            got += answers(
                there, [system(atoms, spin_multiplicity=3), system(atoms), system(atoms, charge=1)]
            )
            energies = [one.energy for one in got if isinstance(one, Result)]
            assert energies == pytest.approx([1.2, -1.7, 0.1, 0.3, unsaid, 1 + unsaid])
        else:
            assert [one.field for one in got if isinstance(one, Fault)] == [
                "charge",
                "charge",
                "spin_multiplicity",
            ]
    finally:
        there.close()


def test_a_calculator_that_hangs_is_ended_with_the_server_and_nobody_is_told_it_is_the_structure() -> None:
    there = engine(CalculatorSpec(calculator=f"{ODD}:Moody", time_limit=500.0))
    caught: list[Exception] = []

    def compute() -> None:
        try:
            answers(there, [system(Atoms("He"))])
        except NotReady as error:
            caught.append(error)

    waiting = threading.Thread(target=compute)
    waiting.start()
    process = there._process._process
    assert process is not None
    while not (programs := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    there.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert len(caught) == 1
    _, left = psutil.wait_procs(programs, 5)
    assert not left
    there.close()


def test_a_server_that_is_killed_leaves_neither_calculator_nor_its_programs_behind() -> None:
    server = f"""if True:
        from equipot.serve.foreign.process import CalculatorProcess
        from equipot.serve.foreign.spec import CalculatorSpec
        from equipot.serve.foreign.words import Structure

        there = CalculatorProcess(CalculatorSpec(calculator="{ODD}:Moody"), device="cpu", threads=1)
        helium = Structure((2).to_bytes(8, "little"), bytes(24), bytes(72), (False,) * 3, 0, 0)
        there.compute([helium], forces=False, stress=False)
    """
    with subprocess.Popen([sys.executable, "-c", server]) as popen:
        while len(left := psutil.Process(popen.pid).children(recursive=True)) < 2:
            assert popen.poll() is None
            time.sleep(0.05)
        popen.kill()
    assert not psutil.wait_procs(left, 10)[1]


def test_the_digest_is_of_what_decides_the_numbers() -> None:
    specs = [
        CalculatorSpec(calculator=f"{ODD}:Moody"),
        CalculatorSpec(calculator=f"{ODD}:Moody", time_limit=5.0, name="other"),
        CalculatorSpec(calculator=f"{ODD}:Moody", arguments={"spring": 3.0}),
        CalculatorSpec(calculator=f"{ODD}:Moody", level_of_theory="springs"),
    ]
    digests = []
    for spec in specs:
        there = engine(spec)
        digests.append(there.card.digest)
        there.close()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("emt", "write module:factory"),
        ("mace:", "needs a model file"),
        ("mace:no/such.model", "there is no file .*/no/such.model"),
        ("no_such.py:Factory", "there is no file .*/no_such.py"),
        ("no.such.module:Calculator", "ModuleNotFoundError"),
        ("ase.calculators.emt:NoSuch", "NoSuch"),
        (f"{ODD}:nothing", "no ASE calculator"),
        ("nowhere.toml", "nowhere.toml"),
    ],
)
def test_what_cannot_be_served_says_why(word: str, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        engine(parse(word))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"', "calculator is missing"),
        ('calculator = "chgnet"\nnam = "x"', "nam is no setting"),
        ('calculator = "chgnet"\nname = 1', "name is 1"),
        ('calculator = "chgnet"\ntime_limit = 0', "time_limit is 0"),
        ('calculator = "chgnet"\nelements = ["Xx"]', "'Xx'"),
        ('calculator = "chgnet"\ncharge = "maybe"', "'maybe'"),
        ('calculator = "chgnet"\noutputs = ["log"]', "'log', which is none of its arguments"),
        ("calculator", "TOML"),
    ],
)
def test_a_file_that_says_what_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.toml").write_text(text)
    with pytest.raises(ServeError, match=message):
        parse(str(tmp_path / "spec.toml"))


def test_two_potentials_of_one_name_are_refused() -> None:
    from equipot.serve.registry import Registry

    spec = CalculatorSpec(calculator="ase.calculators.emt:EMT")
    with pytest.raises(ServeError, match="called 'emt'"):
        Registry.load(ServeConfig(calculators=(spec, replace(spec, arguments={"asap_cutoff": True}))))


@pytest.mark.slow
def test_another_environments_python_serves_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # It has numpy and ASE, and neither torch's nor equipot's own requirements beside them.
    ours = Path(np.__file__).parents[1]
    for pattern in ("numpy", "numpy.libs", "ase", "ase-*.dist-info", "scipy", "scipy.libs", "matplotlib"):
        for place in ours.glob(pattern):
            (site / place.name).symlink_to(place)
    there = engine(
        CalculatorSpec(calculator="ase.calculators.emt:EMT", python=str(tmp_path / "venv" / "bin" / "python"))
    )
    try:
        (one,) = answers(there, [system(metal(1))])
        atoms = metal(1)
        atoms.calc = EMT()
        assert isinstance(one, Result)
        assert one.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    finally:
        there.close()
