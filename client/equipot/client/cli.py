"""The client's verbs: `equipot predict` and `equipot models`."""

from __future__ import annotations

import itertools
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from equipot.client.certainty import Tally
from equipot.client.errors import ClientError, InvalidRequest
from equipot.client.explanation_table import print_explanation
from equipot.client.options import (
    AllowPlaintextToken,
    Coverage,
    RefuseOutside,
    Shown,
    TellUncertainty,
    TlsCa,
    TlsCert,
    TlsKey,
    TlsName,
    TokenFile,
    UseTls,
    certainty_wanted,
    shown,
)
from equipot.client.results import ModelInfo, ModelReference, Prediction
from equipot.client.retry import RetryPolicy
from equipot.client.settings import DEFAULT_TIMEOUT, Asked
from equipot.client.sync import Client

if TYPE_CHECKING:
    from ase import Atoms

    from equipot.client.frames import Comparison, FrameReader, FrameWriter

DEFAULT_ADDRESS = "127.0.0.1:50051"
_ENDS = 10
_MOST_FAILURES = 20

predict_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Address = Annotated[str, typer.Option(help="HOST:PORT of the server")]
Timeout = Annotated[float, typer.Option(min=0.001, help="seconds for each request")]


@predict_app.command()
def predict(
    file: Annotated[Path, typer.Argument(help="any file ASE reads; all its frames")],
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="name or name@digest; default: the server's")] = "",
    level_of_theory: Annotated[str, typer.Option(help="one of the model's; default: its only one")] = "",
    out: Annotated[Path | None, typer.Option(help="default: FILE's name with -predicted.extxyz")] = None,
    stress: Annotated[
        bool | None, typer.Option(help="default: if the model has it and the first frame is periodic")
    ] = None,
    timeout: Timeout = DEFAULT_TIMEOUT,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
    priority: Annotated[
        Literal["low", "normal", "high"], typer.Option(help="low: others go first; high: where it is granted")
    ] = "normal",
    uncertainty: TellUncertainty = False,
    coverage: Coverage = 0.9,
    refuse_outside: RefuseOutside = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say what it would cost and which frames would fail.")
    ] = False,
) -> None:
    """Predict energy and forces of every frame of a file and write them, in order, into an extxyz file.

    Frames that cannot be answered are written without results, with the reason in `equipot_failure`; the exit
    code is then 1. A run that is stopped leaves the finished frames in OUT.partial.
    """
    from equipot.client.frames import Comparison, FrameReader, FrameWriter

    trust = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    )
    target = out or Path(f"{file.stem}-predicted.extxyz")
    if target.exists() and file.exists() and target.samefile(file):
        raise ClientError(f"{target} is the input itself: give another --out")
    with trust.client(address, model=model, timeout=timeout, priority=priority) as client:
        info = _first_contact(client, trust, timeout)
        reader = FrameReader(file)
        if stress and not info.has_stress:
            raise InvalidRequest(f"the model {info.name} has no stress: leave --stress out", field="stress")
        if stress is None:
            stress = info.has_stress and bool(reader.first.pbc.all())
        if explain:
            explanation = client.explain(reader, stress=stress, level_of_theory=level_of_theory)
            reader.check()
            print_explanation(Console(), explanation)
            raise typer.Exit(int(bool(explanation.failures)))
        report = Report(Comparison())
        writer = FrameWriter(target)
        try:
            with writer:
                asked = Asked(
                    stress=stress,
                    level_of_theory=level_of_theory,
                    uncertainty=certainty_wanted(
                        uncertainty=uncertainty, coverage=coverage, refuse_outside=refuse_outside
                    ),
                )
                _run(client, info, asked, reader, writer, report)
                reader.check()
        except BaseException:
            if writer.n_written:
                _say(
                    Console(stderr=True), f"the {writer.n_written} frames done before are in {writer.partial}"
                )
            raise
    report.print(Console(), target)
    if report.n_failed:
        raise typer.Exit(1)


@models_app.command()
def models(
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
) -> None:
    """List the models that a server serves."""
    trust = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    )
    with trust.client(address, timeout=timeout, retry=RetryPolicy(attempts=2)) as client:
        served = client.models()
    table = Table(title=f"served by {address}", title_justify="left")
    for column in (
        "model",
        "state",
        "level of theory",
        "elements",
        "forces",
        "certainty",
        "parameters",
        "digest",
    ):
        table.add_column(column, overflow="fold")
    for info in served:
        table.add_row(
            _named(info),
            f"{info.state}: {info.reason}" if info.reason else info.state,
            "\n".join(info.levels_of_theory),
            " ".join(_SYMBOLS[number] for number in info.elements) or "not stated",
            f"{info.force_mode}, stress" if info.has_stress else info.force_mode,
            _certainty(info),
            f"{info.n_parameters:,}",
            info.digest[:19],
        )
    Console().print(table)


def _certainty(info: ModelInfo) -> str:
    """What it can say of how sure it is."""
    known = [f"spread of {info.members}"] if info.members > 1 else []
    known += ["intervals"] if info.is_calibrated else []
    known += ["domain"] if info.has_domain else []
    return "\n".join(known) or "none"


def _named(info: ModelInfo) -> str:
    """A model's name with its version and what else it is called."""
    notes = [*info.labels, *(["default"] if info.is_default else ["current"] if info.is_current else [])]
    name = f"{info.name}@{info.version}" if info.version else info.name
    # Without versions there is nothing that a plain name could mean besides.
    notes = [note for note in notes if info.version or note != "current"]
    return f"{name} ({', '.join(notes)})" if notes else name


@dataclass(slots=True)
class Report:
    """What a run shows at its end, of bounded size however long the file."""

    comparison: Comparison
    n_frames: int = 0
    n_failed: int = 0
    certainty: Tally = field(default_factory=Tally)
    model: ModelReference | None = None
    first: list[tuple[str, ...]] = field(default_factory=list)
    last: deque[tuple[str, ...]] = field(default_factory=lambda: deque(maxlen=_ENDS))
    failures: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, frame: Atoms, prediction: Prediction) -> None:
        """Takes one frame into account."""
        failure = prediction.failure
        self.model = prediction.model or self.model
        numbers = ("failed", "")
        if failure is None and prediction.forces is not None:
            largest = float(np.linalg.norm(prediction.forces, axis=1).max())
            numbers = (f"{prediction.energy:.4f}", f"{largest:.4f}")
        row = (str(self.n_frames), frame.get_chemical_formula(), str(len(frame)), *numbers)
        if failure is not None:
            self.n_failed += 1
            if len(self.failures) < _MOST_FAILURES:
                self.failures.append((str(failure.index), failure.field, failure.message, failure.remedy))
        self.certainty.add(prediction.uncertainty)
        (self.first if len(self.first) < _ENDS else self.last).append(row)
        self.n_frames += 1

    def print(self, console: Console, path: Path) -> None:
        """Prints tables of frames and failures, the errors against the file's labels, and where it all is."""
        table = Table("frame", "formula", "atoms", "energy, eV", "max |F|, eV/Å")
        for column in table.columns[2:]:
            column.justify = "right"
        skipped = self.n_frames - len(self.first) - len(self.last)
        for row in itertools.chain(self.first, [("…",) * 5] if skipped else (), self.last):
            table.add_row(*row)
        console.print(table)
        if self.failures:
            table = Table("frame", "field", "what is wrong", "remedy", title="failed", title_justify="left")
            for row in self.failures:
                table.add_row(*row)
            console.print(table)
            if self.n_failed > len(self.failures):
                more = self.n_failed - len(self.failures)
                _say(console, f"… and {more} more: see equipot_failure in {path}")
        compared = self.comparison
        if compared.n_energies:
            _say(console, f"energy MAE against the file's own: {1000 * compared.energy:.2f} meV/atom")
        if compared.n_components:
            _say(console, f"force MAE against the file's own: {compared.forces:.4f} eV/Å")
        for line in self.certainty.lines():
            _say(console, line)
        by = f" by {self.model.pinned} ({self.model.level_of_theory})" if self.model is not None else ""
        _say(console, f"{self.n_frames - self.n_failed} of {self.n_frames} frames predicted{by}")
        _say(console, f"results: {path}")


class Interruption:
    """Turns the first Ctrl-C into a wish to stop between two frames; the second one stops at once.

    An exception out of nowhere is not safe in what runs here: numpy may lose it while ASE writes, and a gRPC
    channel that was interrupted while it sent may never close.
    """

    def __init__(self, errors: Console) -> None:
        self._errors = errors
        self._came = False

    def __enter__(self) -> Self:
        """Listens, unless whoever started this process had it ignore Ctrl-C."""
        self._former = signal.getsignal(signal.SIGINT)
        if self._former is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        """Listens no more."""
        signal.signal(signal.SIGINT, self._former)

    def check(self) -> None:
        """Raises KeyboardInterrupt if one came."""
        if self._came:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        signal.signal(signal.SIGINT, self._former)
        _say(self._errors, "stopping when the next answer is here; Ctrl-C again stops at once")


def _first_contact(client: Client, trust: Shown, timeout: float) -> ModelInfo:
    """The model, at once or not at all: whoever mistyped an address should not wait for the retries."""
    hurry = RetryPolicy(attempts=3)
    address, model = client.address, client.model_name
    with trust.client(address, model=model, timeout=min(timeout, 10.0), retry=hurry) as probe:
        return probe.model()


def _run(
    client: Client,
    info: ModelInfo,
    asked: Asked,
    reader: FrameReader,
    writer: FrameWriter,
    report: Report,
) -> None:
    from equipot.client.frames import labels_of, with_results

    waiting: deque[Atoms] = deque()

    def frames() -> Iterator[Atoms]:
        for frame in reader:
            waiting.append(frame)
            yield frame

    errors = Console(stderr=True)
    progress_columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.completed} frames"),
        TimeElapsedColumn(),
    )
    asked |= Asked(model=f"{info.name}@{info.digest}")
    answers = client.predict_iter(frames(), **asked)
    with (
        Interruption(errors) as interruption,
        Progress(
            *progress_columns, console=errors, transient=True, disable=not errors.is_terminal
        ) as progress,
        closing(answers),
    ):
        task = progress.add_task("frames", total=None)
        for prediction in answers:
            frame = waiting.popleft()
            report.comparison.add(labels_of(frame), prediction)
            report.add(frame, prediction)
            writer.write(with_results(frame, prediction))
            progress.advance(task)
            interruption.check()


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


_TABLE = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
    "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
    "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
_SYMBOLS = _TABLE.split()
