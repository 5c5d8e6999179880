"""What the integrators hold: energy, momentum and temperature, as our settings' units have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units

from equipot.serve.motion.dynamics import Dynamics, IntegratorName, Start, Watch
from equipot.serve.motion.notes import Frame, Kept, Observation
from equipot.serve.motion.progress import Given
from equipot.serve.motion.state import FloatArray, State
from equipot.serve.motion.walker import Walker

N_ATOMS, STIFF, SOFT = 40, 5.0, 0.5
OBSERVE = 5


class Springs:
    """Atoms bound to their sites and to each other, with a quartic term so that energy is shared."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        self.sites = random.uniform(0, 12, (N_ATOMS, 3))
        self.tethered = True

    def __call__(self, positions: FloatArray) -> Given:
        moved = positions - self.sites
        if not self.tethered:
            # Nothing holds the whole: its momentum stays.
            moved = moved - moved.mean(axis=0)
        pairs = moved - np.roll(moved, 1, axis=0)
        square = (moved**2).sum(axis=1, keepdims=True)
        energy = 0.5 * SOFT * square.sum() + 0.5 * STIFF * (pairs**2).sum() + (square**2).sum()
        slope = SOFT * moved + STIFF * (pairs - np.roll(pairs, -1, axis=0)) + 4 * square * moved
        if not self.tethered:
            slope = slope - slope.mean(axis=0)
        return Given(float(energy), -slope, None)


def follow(springs: Springs, how: Dynamics, watch: Watch, *, seed: int = 1) -> list[Any]:
    """Everything noted."""
    atoms = Atoms(f"C{N_ATOMS}", springs.sites.copy())
    walker = Walker(atoms, how.algorithm(Start(velocities=None, seed=seed), watch))
    given = None
    while walker.advance(given):
        assert walker.fault() is None
        given = springs(atoms.positions)
    return walker.progress.notes


def observed(notes: list[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, 3): energy, kinetic energy, temperature."""
    rows = [
        (note.energy, note.kinetic_energy, note.temperature)
        for note in notes
        if isinstance(note, Observation)
    ]
    return np.array(rows)


def mean_and_error(values: FloatArray, blocks: int = 10) -> tuple[float, float]:
    """Of the mean, from blocks longer than the correlation."""
    means = np.array([block.mean() for block in np.array_split(values, blocks)])
    return float(values.mean()), float(means.std(ddof=1) / np.sqrt(blocks))


class TestConstantEnergy:
    def test_fluctuates_with_the_square_of_the_step_and_does_not_drift(self) -> None:
        springs = Springs()
        spread = {}
        for timestep in (1.0, 2.0):
            steps = int(3000 / timestep)
            how = Dynamics(steps=steps, timestep=timestep, temperature=600.0)
            seen = observed(follow(springs, how, Watch(observations=2)))
            total = seen[:, 0] + seen[:, 1]
            slope = np.polyfit(np.arange(len(total)), total, 1)[0] * len(total)
            spread[timestep] = total.std()
            assert abs(slope) < 2 * total.std(), timestep
            assert total.std() < 0.01 * seen[:, 1].mean()
        assert 2.5 < spread[2.0] / spread[1.0] < 6.5

    def test_keeps_its_momentum(self) -> None:
        springs = Springs()
        springs.tethered = False
        frames = [
            note
            for note in follow(springs, Dynamics(steps=300, temperature=500.0), Watch(frames=30))
            if isinstance(note, Frame)
        ]
        speed = np.abs(frames[0].velocities).mean()
        for frame in frames:
            assert np.abs(frame.velocities.mean(axis=0)).max() < 1e-12 * speed * N_ATOMS


class TestBaths:
    @pytest.mark.parametrize(
        ("integrator", "words"),
        [
            ("langevin", {"friction": 0.02}),
            ("bussi", {"thermostat_time": 50.0}),
            ("nose_hoover", {"thermostat_time": 50.0}),
        ],
    )
    def test_hold_the_temperature(self, integrator: IntegratorName, words: dict[str, float]) -> None:
        how = Dynamics(integrator=integrator, steps=12_000, temperature=400.0, **words)
        seen = observed(follow(Springs(), how, Watch(observations=OBSERVE)))
        temperatures = seen[len(seen) // 6 :, 2]
        mean, error = mean_and_error(temperatures)
        assert abs(mean - 400.0) < max(4 * error, 1.0)
        assert error < 12.0
        # A canonical ensemble's kinetic temperature spreads by √(2 / 3N) of itself.
        assert temperatures.std() == pytest.approx(400.0 * np.sqrt(2 / (3 * N_ATOMS)), rel=0.25)

    def test_act_in_the_time_that_was_given(self) -> None:
        """From rest, a bath of friction γ brings kinetic energy as 1 − exp(−2γt) where nothing else does."""
        free = Springs()
        how = Dynamics(integrator="langevin", steps=100, timestep=0.5, temperature=400.0, friction=0.02)
        found = []
        for seed in range(30):
            atoms = Atoms(f"C{N_ATOMS}", free.sites.copy())
            start = Start(velocities=np.zeros((N_ATOMS, 3)), seed=seed)
            walker = Walker(atoms, how.algorithm(start, Watch(frames=0)))
            given = None
            while walker.advance(given):
                given = Given(0.0, np.zeros((N_ATOMS, 3)), None)
            (last,) = walker.progress.notes
            assert isinstance(last, Frame)
            found.append(last.temperature)
        expected = 400.0 * (1 - np.exp(-2 * 0.02 * 50.0))
        assert np.mean(found) == pytest.approx(expected, rel=0.04)

    def test_are_canonical_after_a_restart_too(self) -> None:
        """A run that stops and goes on at every token is the run that never stopped."""
        springs = Springs()
        how = Dynamics(integrator="bussi", steps=60, temperature=400.0, thermostat_time=50.0)
        whole = follow(springs, how, Watch(frames=1, states=9))
        frames = {note.step: note for note in whole if isinstance(note, Frame)}
        states: list[State] = [note.state for note in whole if isinstance(note, Kept)]
        for state in states:
            atoms = Atoms(f"C{N_ATOMS}", springs.sites.copy())
            start = Start(velocities=None, seed=99)
            walker = Walker(atoms, how.algorithm(start, Watch(frames=1)), resumed=state)
            given = None
            while walker.advance(given):
                given = springs(atoms.positions)
            rest = [note for note in walker.progress.notes if isinstance(note, Frame)]
            assert [note.step for note in rest] == list(range(state.step + 1, 61))
            for note in rest:
                np.testing.assert_array_equal(note.positions, frames[note.step].positions)

    def test_velocities_are_those_of_maxwell_and_boltzmann(self) -> None:
        how = Dynamics(steps=1, temperature=300.0)
        drawn = []
        for seed in range(60):
            (first, *_) = follow(Springs(), how, Watch(frames=1), seed=seed)
            drawn.append(first.velocities)
        spread = np.concatenate(drawn).std() / units.fs
        expected = np.sqrt(units.kB * 300.0 / 12.011)
        assert spread == pytest.approx(expected * np.sqrt(1 - 1 / N_ATOMS), rel=0.03)
