"""A billion parameters on one small machine, from training to serving, their memory watched from outside.

    python benchmarks/giant.py [--width 7680] [--ranks 1] [--steps 4] [--bundle DIR] [--out FILE]

packs some molecules of examples/data, trains (ZeRO stage 3, fp32 weights, optimizer states in files), kills
every process with -9 after a checkpoint, resumes, exports a sharded bundle and serves it, all of it by
`equipot`'s own commands. Of each phase it prints, as JSON, the time and the most memory that its processes
had together: their proportional set sizes, summed, several times a second. Fails if the served energies and
forces are not those of the trained model, or if a phase takes more than `--limit`, which is then ended.
With `--bundle` the bundle stays, for `benchmarks/tensor_parallel.py --bundle`. At width 7,680 (1.09 billion
parameters) it takes half an hour, 12 GiB of memory and 50 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from ase.io import read, write

from equipot.client import Client
from equipot.model.card import read_card
from equipot.train.checkpoint import COMMITTED, step_name
from equipot.train.launch import free_port
from equipot.train.metrics import read_rows
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory

DATA = Path(__file__).parents[1] / "examples" / "data" / "ethanol-methanol.extxyz"

RECIPE = """
seed = 1
precision = "{precision}"
[data]
stores = ["{home}/store"]
[model]
width = {width}
layers = 3
forces = "{forces}"
[batch]
structures = 9 # of 9 atoms each
workers = 0
[optimizer]
learning_rate = {rate:.2g} # smaller for wider ones, or its first step throws it off
warmup_steps = 0
steps = {steps}
[zero]
stage = 3
offload_optimizer = "nvme"
nvme_path = "{home}/nvme"
[ema]
decay = 0 # no average: it would take 4 bytes a parameter
[checkpoint]
every_steps = {saved_at}
keep = 1
asynchronous = false # no copy: it would take 12 bytes a parameter
"""


@dataclass(slots=True)
class Phase:
    """What a phase took."""

    seconds: float = 0.0
    peak_pss_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class TooMuch(Exception):
    """A phase took more memory than it may."""


def main() -> None:
    """Go through all phases and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=7680)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="in all; it is killed after half of them")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--forces", choices=["conservative", "direct"], default="conservative")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB that a phase may take")
    parser.add_argument("--scratch", type=Path, help="where all files go")
    parser.add_argument("--bundle", type=Path, help="where the bundle is to stay")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="equipot-giant-", dir=args.scratch) as scratch:
        report = go(args, Path(scratch))
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


def go(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All phases; their report."""
    run, bundle = home / "run", args.bundle or home / "bundle"
    make_recipe(args, home)
    phases: dict[str, Phase] = {}

    @contextmanager
    def watched(name: str, *command: object) -> Iterator[tuple[subprocess.Popen[bytes], Phase]]:
        print(f"{name} …", file=sys.stderr, flush=True)
        phase = phases[name] = Phase()
        with equipot(home / f"{name}.log", *command) as process, watch(process, phase, args.limit):
            yield process, phase
        took = f"{phase.seconds:.0f} s, {phase.peak_pss_bytes / 2**30:.2f} GiB"
        print(f"{name}: {took}", file=sys.stderr, flush=True)

    train = ("train", home / "recipe.toml", "--ranks", args.ranks, "--out", run)
    with watched("train", *train) as (process, phase):
        saved = run / "checkpoints" / step_name(args.steps // 2) / COMMITTED
        wait_for(saved.exists, process, home / "train.log")
        time.sleep(2)  # into the next step
        phase.notes["killed in step"] = args.steps // 2 + 1
    with watched("resume", *train, "--resume") as (process, _):
        end_of(process, home / "resume.log")
    with watched("export", "export", run, "--out", bundle, "--name", "giant") as (process, _):
        end_of(process, home / "export.log")
    expected = trained_errors(run, args.steps)
    found: dict[str, dict[str, float]] = {}
    for name, more in {"serve": (), "serve by 2 ranks": ("--tensor-parallel", 2)}.items():
        port = free_port()
        words = ("serve", bundle, "--port", port, "--metrics-port", 0, *more)
        with watched(name, *words) as (process, phase):
            begun = time.monotonic()
            wait_for(lambda port=port: is_served(port), process, home / f"{name}.log")  # type: ignore[misc]
            phase.notes["seconds to load"] = round(time.monotonic() - begun, 1)
            found[name] = served_errors(run, port)
            process.send_signal(signal.SIGTERM)
            end_of(process, home / f"{name}.log")
    # bf16 training validates with rounded weights, and the bundle holds the fp32 ones
    tolerance = 1e-3 if args.precision == "fp32" else 0.2
    for name, errors in found.items():
        for key, value in expected.items():
            assert abs(errors[key] - value) <= tolerance * value, (name, key, errors[key], value)
    card = read_card(bundle)
    return {
        "what": "giant",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.machine()}, torch {torch.__version__}",
        "parameters": card.n_parameters,
        "width": args.width,
        "ranks": args.ranks,
        "precision": args.precision,
        "forces": args.forces,
        "optimizer": "AdamW, fp32 master weights and moments in files",
        "steps": args.steps,
        "seconds_a_step": [round(seconds, 1) for seconds in seconds_of_steps(run)],
        "phases": {
            name: {
                "peak_pss_gib": round(phase.peak_pss_bytes / 2**30, 3),
                "seconds": round(phase.seconds, 1),
                **phase.notes,
            }
            for name, phase in phases.items()
        },
        "largest_peak_pss_gib": round(max(p.peak_pss_bytes for p in phases.values()) / 2**30, 3),
        "shards": [shard.bytes for shard in card.shards],
        "validation_errors": {"of the trained model": expected, **found},
    }


def make_recipe(args: argparse.Namespace, home: Path) -> None:
    """A store of real molecules, and what is to be trained on it."""
    frames = read(DATA, "300:360")
    write(home / "frames.extxyz", frames)
    words = ["--level-of-theory", "PBE/def2-SVP", "--licence", "MIT", "--group-by", "frame"]
    with equipot(
        home / "import.log", "data", "import", home / "frames.extxyz", "--out", home / "store", *words
    ) as process:
        end_of(process, home / "import.log")
    text = RECIPE.format(
        home=home,
        width=args.width,
        forces=args.forces,
        precision=args.precision,
        rate=0.1 / args.width,
        steps=args.steps,
        saved_at=args.steps // 2,
    )
    (home / "recipe.toml").write_text(text)


@contextmanager
def equipot(log: Path, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """`equipot …`; what is left of it at the end is killed with -9."""
    command = [sys.executable, "-m", "equipot.cli", *map(str, words)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            for each in tree(process.pid):
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def watch(process: subprocess.Popen[bytes], phase: Phase, limit: float) -> Iterator[None]:
    """Note the time and the memory of all a command's processes; end it where it takes too much."""
    over, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.wait(0.4):
            size = sum(pss_of(each.pid) for each in tree(process.pid))
            phase.peak_pss_bytes = max(phase.peak_pss_bytes, size)
            if size > limit * 2**30:
                over.set()
                for each in tree(process.pid):
                    each.kill()

    thread = threading.Thread(target=look, daemon=True)
    begun = time.monotonic()
    thread.start()
    try:
        yield
    finally:
        phase.seconds = time.monotonic() - begun
        done.set()
        thread.join()
        if over.is_set():
            raise TooMuch(f"more than {limit} GiB: {phase.peak_pss_bytes / 2**30:.2f}")


def pss_of(pid: int) -> int:
    """Proportional set size: of pages that processes share, each counts its part."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # gone, or going
    return 0


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for something that a running command brings about."""
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {log.read_text()[-3000:]}")
        time.sleep(0.2)


def end_of(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command's end, which must be a good one."""
    if process.wait() != 0:
        raise RuntimeError(f"ended with {process.returncode}: {log.read_text()[-3000:]}")


def seconds_of_steps(run: Path) -> list[float]:
    """Time of each step of a run."""
    rows = [row for row in read_rows(run / "metrics.csv") if row.structures_per_second]
    return [9 / row.structures_per_second for row in rows if row.structures_per_second]


def trained_errors(run: Path, steps: int) -> dict[str, float]:
    """What the training processes found on the validation split with their weights after the last step."""
    rows = [row for row in read_rows(run / "metrics.csv") if row.validation_loss is not None]
    last = rows[-1]
    assert last.step == steps
    assert last.validation_energy_mae_mev_per_atom is not None
    assert last.validation_forces_mae_ev_per_angstrom is not None
    return {
        "energy_mae_mev_per_atom": last.validation_energy_mae_mev_per_atom,
        "forces_mae_ev_per_angstrom": last.validation_forces_mae_ev_per_angstrom,
    }


def is_served(port: int) -> bool:
    """Whether a model is there to be asked."""
    try:
        with Client(f"localhost:{port}", timeout=2) as client:
            return bool(client.models())
    except Exception:
        return False


def served_errors(run: Path, port: int) -> dict[str, float]:
    """The same errors of what the service says of the same structures."""
    directory = RunDirectory(run)
    mix = reopen_mix(directory, RunCard.read(directory.card))
    places = mix.part("validation")
    frames = read(run.parent / "frames.extxyz", ":")
    chosen: Sequence[Any] = [frames[row] for _, row in places[np.arange(len(places))]]
    with Client(f"localhost:{port}", timeout=600) as client:
        answer = client.predict(chosen)
    energy = [
        abs(mine.energy - atoms.get_potential_energy()) / len(atoms)
        for mine, atoms in zip(answer, chosen, strict=True)
    ]
    forces = [
        np.abs(mine.forces - atoms.get_forces()).ravel() for mine, atoms in zip(answer, chosen, strict=True)
    ]
    return {
        "energy_mae_mev_per_atom": 1e3 * float(np.mean(energy)),
        "forces_mae_ev_per_angstrom": float(np.mean(np.concatenate(forces))),
    }


if __name__ == "__main__":
    main()
