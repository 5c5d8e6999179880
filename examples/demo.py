"""The main job, from real DFT data to forces over the network, as a newcomer would type it.

Every step is an `equipot` command or a few lines of client code; `make demo` runs it on two cores in minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from ase import Atoms, units
from ase.io import read
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from equipot.client import Client, EquipotCalculator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DATA = HERE / "data" / "ethanol-methanol.extxyz"
RECIPE = HERE / "demo.toml"


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean absolute errors: energy in meV/atom, forces in eV/Å."""

    energy: float
    forces: float


def main() -> int:
    """Runs the demo; the exit code is 0 if the trained model beats the baselines as promised."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("demo-run"), help="everything is written here")
    out: Path = options.parse_args().out
    started = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    store, run, test = out / "store", out / "run", out / "test.extxyz"
    equipot("data", "import", DATA, "--out", store, "--level-of-theory", "PBE/def2-SVP", "--licence", "MIT",
            "--group-by", "block:10")  # fmt: skip
    overrides = ["--set", f'data.stores=["{store}"]']
    equipot("train", RECIPE, "--ranks", "2", "--out", run, *overrides)
    equipot("train", RECIPE, "--out", out / "untrained-run", *overrides, "--set", "optimizer.steps=0")
    equipot("data", "frames", run, "--split", "test", "--out", test)
    equipot("export", run, "--out", out / "bundle", "--name", "alcohols")
    equipot("export", out / "untrained-run", "--out", out / "untrained", "--name", "untrained")

    with serving(out / "bundle", out / "untrained", log=out / "server.log") as address:
        equipot("models", "--address", address)
        equipot("predict", test, "--address", address, "--out", out / "predicted.extxyz", "--uncertainty")
        kept = report_accuracy(address, test, out)
        relax(address, out)
        run_dynamics(address, out)

    learning_curve = run / "learning-curve.png"
    print(f"\nDone in {time.monotonic() - started:.0f} s. Look at:")
    for what, where in {
        "learning curve": learning_curve, "coverage of intervals": run / "reliability.png",
        "parity on untouched frames": out / "parity.png", "energy conservation": out / "nve.png",
        "predictions": out / "predicted.extxyz",
        "the bundle, ready to serve": out / "bundle",
    }.items():  # fmt: skip
        print(f"  {what:<28} {where}")
    print(f"\nServe it again:  equipot serve {out / 'bundle'}")
    return 0 if kept else 1


def equipot(*arguments: object) -> None:
    """Runs one `equipot` command, shown as it would be typed; ends the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ equipot {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "equipot.cli", *words])
    if done.returncode:
        sys.exit(f"the demo stops: `equipot {words[0]}` ended with code {done.returncode}")


@contextlib.contextmanager
def serving(*bundles: Path, log: Path) -> Iterator[str]:
    """A server of its own on a free port for the length of a `with` block; yields its address."""
    words = ["serve", *map(str, bundles), "--port", "0", "--metrics-port", "0"]
    print(f"\n$ equipot {shlex.join(words)} &", flush=True)
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "equipot.cli", *words], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert server.stdout is not None
        address = ""
        for line in server.stdout:
            print(line, end="", flush=True)
            if line.startswith("serving ") and " on " in line:
                address = line.split(" on ")[1].split()[0]
                break
        if not address:
            sys.exit(f"the server did not start: see {log}")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


def report_accuracy(address: str, test: Path, out: Path) -> bool:
    """Compares the served model with two baselines on frames it never saw; true if it keeps the promise."""
    frames = read(test, ":")
    forces = np.concatenate([frame.get_forces() for frame in frames])
    with Client(address) as client:
        answers = {name: client.predict(frames, model=name) for name in ("alcohols", "untrained")}
        card = json.loads(client.model("alcohols").card_json)
    errors = {name: errors_of(frames, list(answer.energy), answer.forces) for name, answer in answers.items()}
    referenced = reference_energies(frames, card["references"], card["config"]["elements"])
    errors["reference energies, zero forces"] = errors_of(frames, referenced, np.zeros_like(forces))

    print(f"\n{len(frames)} test frames, none of them seen in training, through {address}")
    print(f"  {'':<34}{'energy MAE, meV/atom':>22}{'force MAE, eV/Å':>18}")
    for name, error in errors.items():
        print(f"  {name:<34}{error.energy:>22.2f}{error.forces:>18.4f}")
    trained, trivial = errors["alcohols"], errors["reference energies, zero forces"]
    kept = trained.forces <= trivial.forces / 3
    ratio, verdict = trained.forces / trivial.forces, "kept" if kept else "NOT kept"
    print(f"  force MAE is {ratio:.1%} of the zero-force baseline's (≤ 33.3 %: {verdict})")
    plot_parity(
        frames, answers["alcohols"].energy, answers["alcohols"].forces, referenced, out / "parity.png"
    )
    return kept


def errors_of(frames: list[Atoms], energies: list[float], forces: np.ndarray | None) -> Errors:
    """MAE of energies per atom in meV and of force components in eV/Å."""
    assert forces is not None
    per_atom = [
        abs(energy - frame.get_potential_energy()) / len(frame)
        for energy, frame in zip(energies, frames, strict=True)
    ]
    labelled = np.concatenate([frame.get_forces() for frame in frames])
    return Errors(energy=1000 * float(np.mean(per_atom)), forces=float(np.abs(forces - labelled).mean()))


def reference_energies(
    frames: list[Atoms], references: dict[str, list[list[float]]], elements: list[int]
) -> list[float]:
    """Total energies in eV of a model that knows only the elements: the bundle's own reference energies."""
    table = dict(zip(elements, references["energy"][0], strict=True))
    return [sum(table[int(number)] for number in frame.numbers) for frame in frames]


def plot_parity(
    frames: list[Atoms], energies: np.ndarray, forces: np.ndarray | None, referenced: list[float], path: Path
) -> None:
    """Predicted against DFT: energies relative to the reference energies, and force components."""
    assert forces is not None
    sizes = np.array([len(frame) for frame in frames])
    truth = (np.array([frame.get_potential_energy() for frame in frames]) - referenced) / sizes
    found = (np.asarray(energies) - referenced) / sizes
    labelled = np.concatenate([frame.get_forces() for frame in frames])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for axes, x, y, title, unit in (
        (left, truth, found, "energy per atom, above the references", "eV/atom"),
        (right, labelled.ravel(), forces.ravel(), "force components", "eV/Å"),
    ):
        axes.plot(x, y, ".", markersize=3, alpha=0.5)
        axes.axline((float(np.mean(x)), float(np.mean(x))), slope=1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=f"DFT, {unit}", ylabel=f"served model, {unit}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def relax(address: str, out: Path) -> None:
    """Relaxes a distorted ethanol with ASE's BFGS, each step answered by the service."""
    atoms = ethanol()
    atoms.rattle(0.1, seed=7)
    with EquipotCalculator(address, model="alcohols") as calculator:
        atoms.calc = calculator
        before = atoms.get_potential_energy(), np.linalg.norm(atoms.get_forces(), axis=1).max()
        optimizer = BFGS(atoms, logfile=str(out / "relaxation.log"), trajectory=str(out / "relaxation.traj"))
        converged = optimizer.run(fmax=0.02, steps=300)
        after = atoms.get_potential_energy(), np.linalg.norm(atoms.get_forces(), axis=1).max()
    state = "converged" if converged else "did not converge"
    print(f"\nRelaxation of a distorted ethanol: {state} in {optimizer.nsteps} steps")
    print(
        f"  energy {before[0]:.4f} → {after[0]:.4f} eV, largest force {before[1]:.2f} → {after[1]:.3f} eV/Å"
    )


def run_dynamics(address: str, out: Path) -> None:
    """Runs 1 ps of NVE dynamics through the service and reports the drift of the total energy."""
    step, steps = 0.5 * units.fs, 2000
    times, potential, total = [], [], []
    with EquipotCalculator(address, model="alcohols") as calculator:
        atoms = ethanol()
        atoms.calc = calculator
        BFGS(atoms, logfile=None).run(fmax=0.05, steps=300)
        thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(7))
        Stationary(atoms)
        ZeroRotation(atoms)
        dynamics = VelocityVerlet(atoms, timestep=step)

        def record() -> None:
            times.append(dynamics.get_time() / units.fs / 1000)
            potential.append(atoms.get_potential_energy())
            total.append(atoms.get_total_energy())

        dynamics.attach(record, interval=5)
        began = time.monotonic()
        dynamics.run(steps)
        elapsed = time.monotonic() - began
    energies = np.array(total)
    slope, offset = np.polyfit(times, energies, 1)
    spread = float(np.std(energies - (slope * np.array(times) + offset)))
    print(f"\nNVE dynamics of ethanol, {steps} steps of 0.5 fs: {1000 * elapsed / steps:.1f} ms a step")
    print(f"  drift of the total energy {1000 * slope / len(atoms):+.3f} meV/atom/ps")
    print(f"  fluctuation of the total energy {1000 * spread:.2f} meV, of the potential energy "
          f"{1000 * float(np.std(potential)):.0f} meV")  # fmt: skip
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(times, 1000 * (np.array(potential) - potential[0]), linewidth=0.8, label="potential")
    axes.plot(times, 1000 * (energies - energies[0]), label="total")
    axes.set(title="NVE through the service", xlabel="time, ps", ylabel="energy − its first value, meV")
    axes.legend()
    figure.savefig(out / "nve.png", dpi=150)
    plt.close(figure)


def ethanol() -> Atoms:
    """An ethanol molecule, from the shipped data's first ethanol frame."""
    frames = read(DATA, ":")
    atoms: Atoms = next(frame for frame in frames if frame.get_chemical_formula() == "C2H6O").copy()
    return atoms


if __name__ == "__main__":
    sys.exit(main())
