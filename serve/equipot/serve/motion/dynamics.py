"""How a structure is moved in time: ASE's integrators, chosen by words. Knows no server.

Temperatures are those of ASE: of three degrees of freedom for each atom that moves, also where the total
momentum is conserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from equipot.serve.errors import Fault, InvalidRequest
from equipot.serve.motion.notes import Frame, Observation
from equipot.serve.motion.progress import Progress
from equipot.serve.motion.state import BadState, Origin, State, capture, digest_of, restore
from equipot.serve.motion.walker import Algorithm, Halt, keep

IntegratorName = Literal["velocity_verlet", "langevin", "nose_hoover", "bussi", "mtk_isotropic", "mtk"]

MOST_STEPS = 10**9
LARGEST_TIMESTEP = 100.0
"""fs; not even the slowest lattice is followed with more."""

HIGHEST_TEMPERATURE = 1e6
"""K; electrons have left by then."""

MOST_MOVED = 1.0
"""Å in one step, which no atom moves unless it has been flung away."""

HYDROGEN_TIMESTEP = 1.0
"""fs with which a hydrogen's vibration is just followed; what is heavier by m, by √m times as much."""

FloatArray = npt.NDArray[np.float64]
Integrator = Any
"""One of ASE's, which have no types."""

_RANDOM: frozenset[IntegratorName] = frozenset({"langevin", "bussi"})
_STATE: dict[IntegratorName, tuple[str, ...]] = {
    "velocity_verlet": (),
    "langevin": (),
    "bussi": ("transferred_energy",),
    "nose_hoover": ("_q", "_p", "_thermostat._eta", "_thermostat._p_eta"),
    "mtk_isotropic": (
        *("_q", "_p", "_eps", "_p_eps", "_volume0", "_cell0"),
        *("_thermostat._eta", "_thermostat._p_eta", "_barostat._xi", "_barostat._p_xi"),
    ),
    "mtk": (
        *("_q", "_p", "_h", "_p_g"),
        *("_thermostat._eta", "_thermostat._p_eta", "_barostat._xi", "_barostat._p_xi"),
    ),
}
"""What these keep from step to step beside positions, momenta and cell."""

_USES: dict[str, frozenset[IntegratorName]] = {
    "final_temperature": _RANDOM,
    "friction": frozenset({"langevin"}),
    "thermostat_time": frozenset({"nose_hoover", "bussi", "mtk_isotropic", "mtk"}),
    "pressure": frozenset({"mtk_isotropic", "mtk"}),
    "barostat_time": frozenset({"mtk_isotropic", "mtk"}),
}
_NO_FIXED: frozenset[IntegratorName] = frozenset({"nose_hoover", "mtk_isotropic", "mtk"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How many steps apart something is noted; 0: never, but for a frame of the last step.

    Attributes:
        frames: with positions and velocities.
        forces: whether frames have forces.
        stress: whether frames have the stress.
        observations: of energies and temperature.
        states: to go on from.
    """

    frames: int = 0
    forces: bool = False
    stress: bool = False
    observations: int = 0
    states: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Start:
    """How a structure begins.

    Attributes:
        velocities: (n, 3) in Å/fs; None: they are drawn.
        seed: of all that is drawn.
    """

    velocities: FloatArray | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamics:
    """How to move.

    Attributes:
        integrator: "velocity_verlet" (NVE), "langevin", "nose_hoover", "bussi" (NVT), "mtk_isotropic" or
            "mtk" (NPT); ASE's classes of these names have the references.
        steps: in all.
        timestep: fs.
        temperature: K, of the bath and of velocities that are drawn.
        final_temperature: K, to which the bath's goes linearly over all steps; None: it stays.
        friction: 1/fs; None: 0.01.
        thermostat_time: fs; None: 100 steps.
        pressure: eV/Å³, from outside.
        barostat_time: fs; None: 1000 steps.

    Raises:
        InvalidRequest: a value out of its range or without a meaning here, by its name on the wire.
    """

    integrator: IntegratorName = "velocity_verlet"
    steps: int
    timestep: float = 1.0
    temperature: float = 0.0
    final_temperature: float | None = None
    friction: float | None = None
    thermostat_time: float | None = None
    pressure: float = 0.0
    barostat_time: float | None = None

    def __post_init__(self) -> None:
        if self.integrator not in get_args(IntegratorName):
            raise _refused("integrator", self.integrator, f"one of {', '.join(get_args(IntegratorName))}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise _refused("steps", self.steps, f"1 to {MOST_STEPS}")
        if not 0 < self.timestep <= LARGEST_TIMESTEP:
            raise _refused("timestep", self.timestep, f"above 0 and at most {LARGEST_TIMESTEP:g} fs")
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= HIGHEST_TEMPERATURE:
                raise _refused(name, value, f"0 to {HIGHEST_TEMPERATURE:g} K")
        if self.integrator != "velocity_verlet" and not self.temperature > 0:
            raise _refused("temperature", self.temperature, f"above 0 K for {self.integrator}")
        if self.final_temperature is not None and not self.final_temperature > 0:
            raise _refused("final_temperature", self.final_temperature, "above 0 K")
        for name in ("friction", "thermostat_time", "barostat_time"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise _refused(name, value, "a number above 0")
        if not math.isfinite(self.pressure):
            raise _refused("pressure", self.pressure, "a pressure in eV/Å³")
        for name, users in _USES.items():
            if getattr(self, name) and self.integrator not in users:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name):g}, and {self.integrator} has none: leave it out,"
                    f" or take {' or '.join(sorted(users))}",
                    field=name,
                )

    @property
    def moves_cell(self) -> bool:
        """Whether stress is needed."""
        return self.integrator in _USES["pressure"]

    def warnings(self, masses: FloatArray, *, conservative: bool) -> list[str]:
        """What looks wrong and is done all the same; `masses` (u) are those of all atoms."""
        said = []
        lightest = float(masses.min(initial=math.inf, where=masses > 0))
        longest = HYDROGEN_TIMESTEP * math.sqrt(lightest / 1.008)
        # One that is meant for this very mass is none too long.
        if self.timestep > 1.001 * longest:
            said.append(
                f"a time step of {self.timestep:g} fs is long for atoms of {lightest:.3g} u, which vibrate in"
                f" some {10 * longest:.3g} fs: {longest:.2g} fs or less follows them"
            )
        for name in ("thermostat_time", "barostat_time"):
            value = getattr(self, name)
            if value is not None and value < 10 * self.timestep:
                said.append(f"{name} is {value:g} fs, less than ten steps: it disturbs more than it holds")
        if not conservative and self.integrator in ("velocity_verlet", "nose_hoover", *_USES["pressure"]):
            said.append("the model's forces are not the slope of its energy, so no energy is conserved")
        return said

    def check_fixed(self, fixed: npt.NDArray[np.bool_]) -> None:
        """Refuses fixed atoms where ASE's integrator would count their degrees of freedom.

        Raises:
            InvalidRequest: there are some.
        """
        if self.integrator in _NO_FIXED and fixed.any():
            raise InvalidRequest(
                f"{self.integrator} takes no fixed atoms, whose degrees of freedom it would heat:"
                " take langevin or bussi",
                field="fixed",
            )

    def algorithm(self, start: Start, watch: Watch) -> Algorithm:
        """Moves atoms in place, asking their calculator once a step."""

        def simulate(atoms: Atoms, progress: Progress) -> None:
            _check(atoms)
            if self.moves_cell and atoms.cell.rank < 3:
                raise Halt(
                    _bad("cell", "has no volume, so it cannot move", "give three vectors that span one")
                )
            rng = np.random.default_rng(start.seed)
            begun = progress.steps
            if progress.resumed is None:
                self._set_off(atoms, start, rng)
            integrator = self._make(atoms, rng)
            if progress.resumed is not None:
                restore(integrator, _STATE[self.integrator], progress.resumed)
                if self.integrator in _RANDOM:
                    _wind(rng, progress.resumed)
                integrator.nsteps = begun
            for _ in integrator.irun(max(0, self.steps - begun)):
                progress.steps = step = integrator.nsteps
                if progress.resumed is None or step > begun:
                    self._note(atoms, progress, watch, step)
                    if watch.states and step and step % watch.states == 0:
                        words, arrays = capture(integrator, _STATE[self.integrator])
                        if self.integrator in _RANDOM:
                            words["rng"] = rng.bit_generator.state
                        keep(atoms, progress, words, arrays)
                self._warm(integrator, step)
            progress.converged = True

        return simulate

    def origin(self, model: str, level_of_theory: str, structure: str) -> Origin:
        """To what the state of a structure belongs that moves so; more steps may be added to it."""
        settings = asdict(self)
        if self.final_temperature is None:
            del settings["steps"]
        return Origin(
            model=model,
            level_of_theory=level_of_theory,
            algorithm=f"simulate {self.integrator}",
            settings=digest_of(settings),
            structure=structure,
        )

    def _set_off(self, atoms: Atoms, start: Start, rng: np.random.Generator) -> None:
        if start.velocities is not None:
            if not np.isfinite(start.velocities).all():
                raise Halt(_bad("velocities", "are not all finite", "give numbers in Å/fs"))
            atoms.set_velocities(start.velocities / units.fs)
        elif self.temperature > 0:
            thermalize_momenta(atoms, self.temperature, rng=rng)
            if not atoms.constraints and len(atoms) > 1:
                Stationary(atoms)
        if self.integrator == "bussi" and atoms.get_kinetic_energy() < 1e-12:
            raise Halt(_bad("velocities", "are all zero, which bussi cannot rescale", "have them drawn"))

    def _make(self, atoms: Atoms, rng: np.random.Generator) -> Integrator:
        step, bath = self.timestep * units.fs, {"temperature_K": self.temperature}
        slow = (self.thermostat_time or 100 * self.timestep) * units.fs
        slower = (self.barostat_time or 1000 * self.timestep) * units.fs
        both = {"pressure_au": self.pressure, "tdamp": slow, "pdamp": slower}
        friction = (self.friction or 0.01) / units.fs
        makers: dict[IntegratorName, Callable[[], Integrator]] = {
            "velocity_verlet": lambda: VelocityVerlet(atoms, step),
            "langevin": lambda: Langevin(atoms, step, friction=friction, fixcm=False, rng=rng, **bath),
            "bussi": lambda: Bussi(atoms, step, taut=slow, rng=rng, **bath),
            "nose_hoover": lambda: NoseHooverChainNVT(atoms, step, tdamp=slow, **bath),
            "mtk_isotropic": lambda: IsotropicMTKNPT(atoms, step, **bath, **both),
            "mtk": lambda: MTKNPT(atoms, step, **bath, **both),
        }
        integrator = makers[self.integrator]()
        self._warm(integrator, 0)
        return integrator

    def _warm(self, integrator: Integrator, step: int) -> None:
        """Sets the temperature of the bath for the step after this one, if it changes."""
        if self.final_temperature is None:
            return
        now = self.temperature + (self.final_temperature - self.temperature) * step / self.steps
        if self.integrator == "langevin":
            integrator.set_temperature(temperature_K=now)
        else:
            integrator.temp = now * units.kB
            integrator.target_kinetic_energy = 0.5 * integrator.temp * integrator.ndof

    def _note(self, atoms: Atoms, progress: Progress, watch: Watch, step: int) -> None:
        last = progress.last
        assert last is not None
        if step == self.steps or (watch.frames and step % watch.frames == 0):
            progress.notes.append(
                Frame(
                    step=step,
                    positions=atoms.get_positions(),
                    velocities=atoms.get_velocities() * units.fs,
                    cell=atoms.cell[:].copy(),
                    energy=last.energy,
                    kinetic_energy=atoms.get_kinetic_energy(),
                    temperature=atoms.get_temperature(),
                    forces=last.forces if watch.forces else None,
                    stress=last.stress if watch.stress else None,
                )
            )
        if watch.observations and step % watch.observations == 0:
            progress.notes.append(
                Observation(
                    step=step,
                    energy=last.energy,
                    kinetic_energy=atoms.get_kinetic_energy(),
                    temperature=atoms.get_temperature(),
                    volume=atoms.get_volume() if atoms.pbc.all() else 0.0,
                    pressure=_pressure(atoms) if last.known_stress is not None else math.nan,
                    largest_force=float(np.linalg.norm(last.forces, axis=1).max()),
                )
            )


def _wind(rng: np.random.Generator, state: State) -> None:
    try:
        rng.bit_generator.state = state.words["rng"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadState("lacks rng", "begin this structure without a token") from error


def _pressure(atoms: Atoms) -> float:
    stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
    return float(-np.trace(stress) / 3)


def _check(atoms: Atoms) -> None:
    if not atoms.get_number_of_degrees_of_freedom():
        raise Halt(_bad("fixed", "holds every atom", "let at least one move"))
    masses = atoms.get_masses()
    bad = np.flatnonzero(~(np.isfinite(masses) & (masses > 0)))
    if len(bad):
        what = f"holds {masses[bad[0]]:g} for atom {bad[0]}"
        raise Halt(_bad("masses", what, "give each atom a mass above 0 in unified atomic mass units"))


def _bad(name: str, message: str, remedy: str) -> Fault:
    return Fault("invalid_structure", name, f"{name} {message}", remedy)


def _refused(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}: give {allowed}", field=name)
