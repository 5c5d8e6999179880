"""Dynamics on a server: what is asked, and frames as they come, each once. Opens no connection itself."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from equipot.client.batches import PRIORITIES, Part, Wish
from equipot.client.certainty import Certainty
from equipot.client.errors import InvalidRequest
from equipot.client.moving import Moves, certainty_told, failure_of, fixed_of, flags, floats, word
from equipot.client.results import ModelReference
from equipot.client.starts import masses_of, put_start, velocities_of
from equipot.client.structures import pack
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import BoolArray, Failure, FloatArray, encode_structures

IntegratorName = Literal["velocity_verlet", "langevin", "nose_hoover", "bussi", "mtk_isotropic", "mtk"]

LARGEST_SEED = 2**64 - 1

Warned = Callable[[str], None]
"""Told what looks wrong and is done all the same."""


class SimulateWords(TypedDict, total=False):
    """How to move; what is left out is as in `SimulateSettings`."""

    integrator: IntegratorName
    timestep: float
    temperature: float
    final_temperature: float | None
    friction: float | None
    thermostat_time: float | None
    pressure: float
    barostat_time: float | None
    seed: int | Sequence[int] | None
    frame_every: int
    forces: bool
    stress: bool
    observe_every: int
    token_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateSettings:
    """How to move.

    Attributes:
        steps: in all.
        integrator: "velocity_verlet" (constant energy), "langevin", "nose_hoover", "bussi" (constant
            temperature), "mtk_isotropic" or "mtk" (constant temperature and pressure), those of ASE.
        timestep: fs.
        temperature: K, of the bath, and of velocities that are drawn.
        final_temperature: K, to which that of a langevin or bussi bath goes linearly; None: it stays.
        friction: 1/fs, of a langevin bath; None: 0.01.
        thermostat_time: fs, on which other baths act; None: 100 steps.
        pressure: eV/Å³, from outside, upon a cell that moves.
        barostat_time: fs, on which the cell follows; None: 1000 steps.
        seed: of what is drawn; structure i has seed + i, unless each has its own. None: others each time.
        frame_every: how many steps apart frames come; 0: only the last.
        forces: whether frames have forces.
        stress: whether frames have the stress.
        observe_every: how many steps apart observations come; 0: never.
        token_every: how many steps apart states come to go on from after an interruption; 0: never.
    """

    steps: int
    integrator: IntegratorName = "velocity_verlet"
    timestep: float = 1.0
    temperature: float = 0.0
    final_temperature: float | None = None
    friction: float | None = None
    thermostat_time: float | None = None
    pressure: float = 0.0
    barostat_time: float | None = None
    seed: int | Sequence[int] | None = None
    frame_every: int = 0
    forces: bool = False
    stress: bool = False
    observe_every: int = 0
    token_every: int = 100

    def seeds(self, count: int) -> list[int]:
        """One for each of so many structures.

        Raises:
            InvalidRequest: a seed out of range.
        """
        if isinstance(self.seed, Sequence):
            seeds = list(self.seed)
        else:
            first = secrets.randbits(48) if self.seed is None else self.seed
            seeds = list(range(first, first + count))
        if len(seeds) != count or not all(0 <= seed <= LARGEST_SEED for seed in seeds):
            raise InvalidRequest(
                f"seed is {self.seed}: give 0 to {LARGEST_SEED}, or so many of them as structures",
                field="seeds",
            )
        return seeds

    def request(self, wish: Wish) -> pb.SimulateRequest:
        """The request, without structures.

        Raises:
            InvalidRequest: a word that none of the settings has, or a count that is none.
        """
        for name in ("steps", "frame_every", "observe_every", "token_every"):
            value = getattr(self, name)
            if value < 0 or value != int(value):
                raise InvalidRequest(f"{name} is {value}: give a whole number, at least 0", field=name)
        request = pb.SimulateRequest(
            model=wish.model,
            level_of_theory=wish.level_of_theory,
            priority=PRIORITIES[wish.priority],
            session=wish.session,
            integrator=word(pb.Integrator, "integrator", self.integrator),
            timestep=_given("timestep", self.timestep),
            temperature=self.temperature,
            friction=_given("friction", self.friction),
            thermostat_time=_given("thermostat_time", self.thermostat_time),
            pressure=self.pressure,
            barostat_time=_given("barostat_time", self.barostat_time),
            steps=self.steps,
            frame_every=self.frame_every,
            observe_every=self.observe_every,
            token_every=self.token_every,
            frame_forces=self.forces,
            frame_stress=self.stress,
            uncertainty=wish.options,
        )
        if self.final_temperature is not None:
            request.final_temperature = self.final_temperature
        return request


@dataclass(frozen=True, slots=True)
class Begun:
    """By what a structure is moved, and from which seed."""

    model: ModelReference
    seed: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MotionFrame:
    """One step of a trajectory.

    Attributes:
        step: from 0.
        positions: (n, 3) in Å, never folded into the cell.
        velocities: (n, 3) in Å/fs.
        cell: (3, 3) in Å.
        energy: eV, of the potential.
        kinetic_energy: eV.
        temperature: K.
        forces: (n, 3) in eV/Å; None if not asked for.
        stress: (3, 3) in eV/Å³, of the potential; None if not asked for.
        uncertainty: how sure the potential is there; None if not asked for.
    """

    step: int
    positions: FloatArray
    velocities: FloatArray
    cell: FloatArray
    energy: float
    kinetic_energy: float
    temperature: float
    forces: FloatArray | None
    stress: FloatArray | None
    uncertainty: Certainty | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one step comes to, in eV, K, Å³, eV/Å³ and eV/Å.

    The volume is 0 without three periodic directions, the pressure NaN where no stress is computed.
    """

    step: int
    energy: float
    kinetic_energy: float
    temperature: float
    volume: float
    pressure: float
    largest_force: float


@dataclass(frozen=True, slots=True)
class Restart:
    """A state to go on from: what is given as `resume`."""

    step: int
    token: bytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ended:
    """How a trajectory ended.

    Attributes:
        steps: that were taken.
        failure: why there are no more; None if these are all.
        model: what computed it; None if it was refused before anything was sent.
        seed: of what was drawn.
        positions: (n, 3) in Å, where the step after these led, if it failed there; None else, as the cell.
        cell: (3, 3) in Å, there.
    """

    steps: int
    failure: Failure | None
    model: ModelReference | None
    seed: int
    positions: FloatArray | None = None
    cell: FloatArray | None = None


Told = Begun | MotionFrame | Observation | Restart | Ended
"""What comes of a structure that is simulated."""


@dataclass(slots=True, eq=False)
class Trajectory:
    """All that came of one structure.

    Attributes:
        frames: by step.
        observations: by step.
        restart: the last state to go on from; None if there was none.
        ended: how it ended.
    """

    frames: list[MotionFrame] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    restart: Restart | None = None
    ended: Ended | None = None

    def add(self, told: Told) -> None:
        """Takes what came next."""
        match told:
            case MotionFrame():
                self.frames.append(told)
            case Observation():
                self.observations.append(told)
            case Restart():
                self.restart = told
            case Ended():
                self.ended = told

    @property
    def failure(self) -> Failure | None:
        """Why it has no more steps; None if it has all."""
        return None if self.ended is None else self.ended.failure


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a trajectory goes on: a token, and the last steps of which frames and observations are there."""

    token: bytes
    frames: int = -1
    observations: int = -1


def simulations(
    items: Sequence[object],
    parts: Iterable[Part],
    wish: Wish,
    how: SimulateSettings,
    *,
    resume: Sequence[Resumed | None] | None,
    warned: Warned,
    most_bytes: int,
) -> Iterator[Simulation]:
    """The requests for these items, of which `parts` are the items, cut; made as each is wanted.

    Raises:
        InvalidRequest: settings that are none; not one place to go on from for each item.
    """
    if resume is not None and len(resume) != len(items):
        raise InvalidRequest(f"resume has {len(resume)} entries for {len(items)} structures", field="tokens")
    seeds = how.seeds(len(items))
    start = 0
    for part in parts:
        simulation = Simulation(
            part,
            _Begun.of(items, part, start, seeds, resume),
            wish,
            how,
            start=start,
            warned=warned,
            most_bytes=most_bytes,
        )
        yield simulation
        start += len(part.n_atoms)
        # All parts by one bundle, whatever its name comes to mean meanwhile.
        wish = simulation.wish


@dataclass(slots=True, eq=False)
class _Begun:
    """How each structure of a part begins, and how far what came of it reaches."""

    fixed: list[BoolArray]
    velocities: list[FloatArray | None]
    masses: list[FloatArray] | None
    seeds: list[int]
    tokens: list[bytes]
    frames: list[int]
    observations: list[int]

    @classmethod
    def of(
        cls,
        items: Sequence[object],
        part: Part,
        start: int,
        seeds: Sequence[int],
        resume: Sequence[Resumed | None] | None,
    ) -> _Begun:
        indices = [start + place for place in part.places]
        resumed = [(resume[index] if resume else None) or Resumed(b"") for index in indices]
        sent = [items[index] for index in indices]
        return cls(
            fixed=fixed_of(items, part, start),
            velocities=[velocities_of(item) for item in sent],
            masses=masses_of(sent, [structure.atomic_numbers for structure in part.structures]),
            seeds=[seeds[index] for index in indices],
            tokens=[one.token for one in resumed],
            frames=[one.frames for one in resumed],
            observations=[one.observations for one in resumed],
        )


class Simulation(Moves):
    """One request's worth of structures, until each has ended: (index among all items, what came of it)."""

    def __init__(
        self,
        part: Part,
        begun: _Begun,
        wish: Wish,
        how: SimulateSettings,
        *,
        start: int,
        warned: Warned,
        most_bytes: int,
    ) -> None:
        """Nothing of it is asked yet."""
        super().__init__(part, wish, start=start, most_bytes=most_bytes)
        self._begun = begun
        self._how = how
        self._warned = warned
        self._was_warned = False
        for number, token in enumerate(begun.tokens):
            if token:
                self.go_on_from(number, token)

    def refused(self) -> Iterator[tuple[int, Told]]:
        """What is known before anything is asked: structures that are not sent."""
        for failure in self.part.failures:
            index = self.start + failure.index
            yield index, Ended(steps=0, failure=replace(failure, index=index), model=None, seed=0)

    def request(self) -> pb.SimulateRequest:
        """For all that have not ended, each from its last token."""
        asked, begun = self.ask_for(), self._begun
        request = self._how.request(self.wish)
        structures = [self.part.structures[number] for number in asked]
        request.structures.CopyFrom(encode_structures(pack(structures)))
        request.fixed = flags([begun.fixed[number] for number in asked])
        put_start(
            request,
            [begun.velocities[number] for number in asked],
            None if begun.masses is None else [begun.masses[number] for number in asked],
            [len(structure) for structure in structures],
        )
        request.seeds.extend(begun.seeds[number] for number in asked)
        request.tokens.extend(self.tokens_within(request.ByteSize()))
        return request

    def take(self, reply: pb.SimulateReply) -> Iterator[tuple[int, Told]]:
        """What a reply to the last request means; what came already is left out.

        Raises:
            ModelChanged: another bundle answers than the one that answered first.
            ServerError: it does not fit the request.
        """
        match reply.WhichOneof("kind"):
            case "begun":
                self.settle(ModelReference.from_wire(reply.begun.model))
                if not self._was_warned:
                    self._was_warned = True
                    for warning in reply.begun.warnings:
                        self._warned(warning)
                    model = ModelReference.from_wire(reply.begun.model)
                    for number, place in enumerate(self.part.places):
                        yield self.start + place, Begun(model, self._begun.seeds[number])
            case "token" if self.keep(reply.token):
                yield self.index_of(reply.token.index), Restart(reply.token.step, reply.token.token)
            case "frame" if self._is_new(self._begun.frames, reply.frame):
                index = self.index_of(reply.frame.index)
                yield index, frame_of(reply.frame, self.n_atoms_of(reply.frame.index))
            case "observation" if self._is_new(self._begun.observations, reply.observation):
                yield self.index_of(reply.observation.index), observation_of(reply.observation)
            case "result":
                result = reply.result
                index = self.index_of(result.index)
                seed = self._begun.seeds[self.number_of(result.index)]
                yield index, ended_of(result, self.finish(result.index), index, seed)

    def _is_new(self, reached: list[int], told: pb.MotionFrame | pb.MotionObservation) -> bool:
        number = self.number_of(told.index)
        if told.step <= reached[number]:
            return False
        reached[number] = told.step
        return True


def frame_of(frame: pb.MotionFrame, n_atoms: int) -> MotionFrame:
    """The frame in a reply.

    Raises:
        ServerError: it is not one of so many atoms.
    """
    return MotionFrame(
        step=frame.step,
        positions=floats(frame.positions, (n_atoms, 3)),
        velocities=floats(frame.velocities, (n_atoms, 3)),
        cell=floats(frame.cell, (3, 3)),
        energy=frame.energy,
        kinetic_energy=frame.kinetic_energy,
        temperature=frame.temperature,
        forces=floats(frame.forces, (n_atoms, 3)) if frame.forces else None,
        stress=floats(frame.stress, (3, 3)) if frame.stress else None,
        uncertainty=certainty_told(frame, n_atoms),
    )


def ended_of(result: pb.SimulateResult, n_atoms: int, index: int, seed: int) -> Ended:
    """How the structure with so many atoms ended, whose failure bears this index.

    Raises:
        ServerError: it does not fit the structure.
    """
    return Ended(
        steps=result.steps,
        failure=failure_of(result, index),
        model=ModelReference.from_wire(result.model) if result.HasField("model") else None,
        seed=seed,
        positions=floats(result.positions, (n_atoms, 3)) if result.positions else None,
        cell=floats(result.cell, (3, 3)) if result.cell else None,
    )


def observation_of(seen: pb.MotionObservation) -> Observation:
    """The observation in a reply."""
    return Observation(
        step=seen.step,
        energy=seen.energy,
        kinetic_energy=seen.kinetic_energy,
        temperature=seen.temperature,
        volume=seen.volume,
        pressure=seen.pressure,
        largest_force=seen.largest_force,
    )


def _given(name: str, value: float | None) -> float:
    """As the wire has it, where 0 stands for what is not given."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"{name} is {value}: give a number above 0", field=name)
    return value or 0.0
