"""Writes a study's report: one page that needs nothing else, its figures as PNG, and the fits as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipot.train.manifest import write_json
from equipot.train.scaling import (
    figures_compare,
    figures_depth,
    figures_errors,
    figures_laws,
    standings,
    tables,
    verdicts,
)
from equipot.train.scaling.answers import Answer, answers, opponents
from equipot.train.scaling.better import Contest, contests, papers_family
from equipot.train.scaling.bootstrap import LEVEL
from equipot.train.scaling.compare import Comparison, compare_families
from equipot.train.scaling.fit import COMPUTE, DATA, SIZE, Fits
from equipot.train.scaling.folder import StudyFolder, read_json
from equipot.train.scaling.page import Part, Picture, render
from equipot.train.scaling.pictures import save, style
from equipot.train.scaling.rows import Row, StudyResults, read_memory, seeds_of, write_results
from equipot.train.scaling.slices import Family

PAGE, FITS, FIGURES = "report.html", "fits.json", "figures"


@dataclass(frozen=True, slots=True)
class Written:
    """Where a report lies."""

    page: Path
    fits: Path
    table: Path
    figures: tuple[Path, ...]


def write_fits(results: StudyResults, fits: Fits) -> Path:
    """The fits as JSON beside the points; returns where."""
    path = results.path / FITS
    write_json(path, fits.to_json())
    return path


def write_report(results: StudyResults, fits: Fits, when: str) -> Written:
    """Draw and write everything; what cannot be drawn yet is named in its part.

    Args:
        results: of the study.
        fits: to them.
        when: the date that the page bears.
    """
    folder = results.path / FIGURES
    folder.mkdir(exist_ok=True)
    album = _Album(folder)
    said = _Findings.of(results.usable, fits)
    with style():
        parts = list(_parts(results, fits, said, album))
    page = results.path / PAGE
    declared = read_json(StudyFolder(results.path).resolved) or {}
    title = f"Scaling study {declared.get('name', results.path.name)}"
    page.write_text(
        render(title, _scope(results, fits, declared), said.answers(fits), when, parts), encoding="utf-8"
    )
    return Written(page, write_fits(results, fits), write_results(results), tuple(album.paths))


class _Album:
    """Draws figures into a folder, and keeps those of one name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.paths: list[Path] = []

    def draw(self, name: str, caption: str, make: Callable[[], Figure | None]) -> list[Picture]:
        path = self._folder / f"{name}.png"
        figure = make()
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
            return []
        self.paths.append(path)
        return [Picture(save(figure, path), caption)]


@dataclass(frozen=True, slots=True, eq=False)
class _Findings:
    """What several parts speak of."""

    compared: Sequence[Comparison]
    rivals: Sequence[Contest]
    """Of the base."""
    paper: Family | None
    against_paper: Sequence[Contest]
    standings: Sequence[standings.Standing]
    series: Sequence[figures_depth.DepthSeries]

    @staticmethod
    def of(rows: Sequence[Row], fits: Fits) -> _Findings:
        paper = papers_family(rows)
        against = [] if paper is None else contests(rows, paper, opponents(rows, fits.base))
        return _Findings(
            compared=compare_families(rows, fits),
            rivals=contests(rows, fits.base),
            paper=paper,
            against_paper=against,
            standings=standings.standings(against, "the paper's network", fits.base) if paper else [],
            series=figures_depth.depth_series(rows, fits.base),
        )

    def answers(self, fits: Fits) -> list[Answer]:
        return list(answers(fits, self.compared, self.rivals, self.standings, self.series))


def _parts(results: StudyResults, fits: Fits, said: _Findings, album: _Album) -> Iterable[Part]:
    rows = results.usable
    level = next((law.fit.level for law in fits.laws if law.fit), LEVEL)
    found = said.compared
    confounds = [each for each in found if figures_compare.is_confound(each)]
    architectures = [each for each in found if figures_compare.is_architecture(each)]
    bands = (
        "Error bars: one standard deviation of the seeds. Dark band: the law; light band: another run, both "
        f"at {level:.0%}."
    )
    yield Part(
        "Loss against parameters",
        "How does the error fall with the number of parameters?",
        [each for law in fits.of(SIZE) for each in verdicts.of_law(law)],
        album.draw("loss-vs-parameters", bands, lambda: figures_laws.of_variable(fits, SIZE)),
        [tables.laws(fits, SIZE)],
        _limits_of(rows, fits, "parameters"),
    )
    yield Part(
        "Loss against data",
        "How does it fall with data, and do data beat parameters?",
        [
            *(each for law in fits.of(DATA) for each in verdicts.of_law(law)),
            *verdicts.of_data_against_size(fits),
            *verdicts.of_steps_and_epochs(fits),
        ],
        album.draw("loss-vs-data", bands, lambda: figures_laws.of_variable(fits, DATA)),
        [tables.laws(fits, DATA)],
        _limits_of(rows, fits, "training structures"),
    )
    yield Part(
        "Loss against compute",
        "What does a budget buy, and what is it best spent on?",
        list(verdicts.of_compute(fits)),
        album.draw(
            "loss-vs-compute",
            "Left: validation losses on the way, coloured by size, and the frontier of end points with its "
            "law. A curve's inner points had a learning rate that was not yet let down, so end points alone "
            "are fitted. Right: models of equal compute.",
            lambda: figures_laws.of_compute(results, fits),
        ),
        [tables.laws(fits, COMPUTE), tables.joint(fits), tables.optima(fits)],
        "The frontier is that of the sizes that were trained; with others it would lie lower. Compute is "
        "that of the model's matrix products, not of the clock.",
    )
    yield Part(
        "Points that were not fitted",
        "Does a law foretell a run?",
        list(verdicts.of_held_out(fits)),
        [],
        [tables.held_out(fits)],
        "",
    )
    series = said.series
    yield Part(
        "Width against depth, and over-smoothing",
        "Does width beat depth at equal size, and can depth be rescued?",
        list(verdicts.of_depth(series, fits)),
        album.draw(
            "width-vs-depth",
            "Models of equal size and length by number of layers; the likeness (mean cosine) of atoms' "
            "features.",
            lambda: figures_depth.of_depth(series, fits.base),
        ),
        [],
        "The learning rate follows the width by one rule and was not tuned for each depth; deep models of "
        "this size are narrow.",
    )
    yield Part(
        "Confounds, one by one",
        "What does each choice of the paper's runs do to errors and laws?",
        list(verdicts.of_comparisons(confounds)),
        [
            *album.draw(
                "confounds",
                "Filled: told apart from 1 by the pairs (p < 0.05); dots: pairs. Intervals of errors at 95%.",
                lambda: figures_compare.of_effects(confounds),
            ),
            *album.draw(
                "confounds-laws",
                "Each law over the base's.",
                lambda: figures_compare.of_shifted_laws(confounds),
            ),
        ],
        [tables.comparisons(confounds)],
        "Each switch was thrown alone; together they may do other than the sum. p values are of Student's t "
        "over the log ratios of pairs, not corrected for their number.",
    )
    groups, how = figures_compare.pairs_by_label(found, fits)
    yield Part(
        "Architectures",
        "Is the EGNN the right backbone?",
        list(verdicts.of_comparisons(architectures)),
        [
            *album.draw(
                "architectures",
                "Dots: points; marks: their geometric mean; bars: one standard deviation, where all are "
                "seeds of one setting. Of different budgets the ratios below say more.",
                lambda: figures_compare.of_architectures(groups, how),
            ),
            *album.draw(
                "architectures-effects",
                "Errors as multiples of the base's.",
                lambda: figures_compare.of_effects(architectures),
            ),
        ],
        [tables.comparisons(architectures)],
        "One rule of learning rates for all, and sizes of this study alone.",
    )
    rivals = said.rivals
    yield Part(
        "A better EGNN",
        "Is the base's error reached with a quarter of its compute?",
        [
            *verdicts.of_quarter(rivals, fits.base),
            *verdicts.of_contests([each for each in rivals if each.share == 1.0], "the base", fits.base),
        ],
        album.draw(
            "better",
            "Ratios of losses, paired by seed; 1 is the base at full compute.",
            lambda: figures_compare.of_contests(rivals, fits.base),
        ),
        [tables.contests(rivals, fits.base)],
        "Compute is counted in model FLOPs; the clock depends on the kernels.",
    )
    yield _against_the_paper(fits, said, album)
    yield from _errors(results, fits, album)
    memory, measured = read_memory(results.path)
    yield Part(
        "Memory",
        "What does a step take, and is the latency of saving memory won back?",
        [*verdicts.of_memory(memory), *verdicts.of_latency(measured)],
        album.draw(
            "memory",
            "Left: predicted by the planner. Middle: against time, relative to the plain form as it is. "
            "Right: what the points' processes took.",
            lambda: figures_errors.of_memory(memory, rows),
        ),
        [tables.latency(measured)],
        "Of a machine without GPU; `equipot memory profile --table` measures a recipe.",
    )


def _against_the_paper(fits: Fits, said: _Findings, album: _Album) -> Part:
    quarter = [each for each in said.against_paper if each.share < 1 and each.reached]
    words = "it" if said.paper is None else said.paper.label(fits.base)
    return Part(
        "Against the paper's network",
        "On the same structures and with the same compute, what is its network (raw coordinates, no "
        "residuals, no normalisation) worth, on held-out frames and on sources never trained on?",
        [
            *(line for each in said.standings[1:] for line in standings.verdict(each, "the paper's network")),
            *verdicts.of_contests(quarter[:2] or said.against_paper[:1], "the paper's network", fits.base),
        ],
        album.draw(
            "paper",
            "Ratios of test losses, paired by seed; 1 is the paper's network. Intervals of 95%.",
            lambda: figures_compare.of_contests(said.against_paper, fits.base),
        ),
        [tables.standings(said.standings)] if said.standings else [],
        f"The paper's network here: {words}. Its data, size and optimiser were others; what is "
        "compared here is the function. Of each "
        "network's widths that of least validation loss is shown; one rule of learning rates serves all. "
        "Silicon's energies are so much larger than those of molecules that plain means of energy errors are "
        "those of silicon: read the mean of sources.",
    )


def _errors(results: StudyResults, fits: Fits, album: _Album) -> Iterable[Part]:
    rows = results.usable
    best = best_row(rows, fits.base)
    sample = results.parity(best)
    yield Part(
        "Errors by source and element",
        f"What does the best model of the base do where ({best.name})?",
        [],
        [
            *(
                album.draw(
                    "parity",
                    "Predictions against labels on the test split, a sample; the axes leave out the outer "
                    "half per cent of the labels.",
                    lambda: figures_errors.of_parity(sample, best),
                )
                if sample
                else []
            ),
            *album.draw("elements", "Test split.", lambda: figures_errors.of_elements(best)),
        ],
        [tables.sources(best), tables.unseen(best)],
        "Force cosine: mean over atoms whose label is at least 1 meV/Å long. Sources never trained on: only "
        "structures of known elements, charges and spins; energies of another level of theory after a shift "
        "by element fitted to other structures of it.",
    )
    yield Part("All points", "", [], [], [tables.points(results)], "")


def best_row(rows: Sequence[Row], base: Family) -> Row:
    """The base's point of least test loss."""
    mine = [row for row in rows if Family.of(row) == base]
    return min(mine, key=lambda row: row.value("loss") or np.inf)


def _scope(results: StudyResults, fits: Fits, declared: Mapping[str, Any]) -> Sequence[str]:
    rows = results.usable
    base = fits.base
    switches: dict[str, Any] = {name: getattr(base, name) for name in Family.__slots__ if getattr(base, name)}
    question = declared.get("question", "")
    lines = [
        *([question] if question else []),
        f"{len(rows)} points with {seeds_of(rows)} seed(s), {min(row.parameters for row in rows):,} to "
        f"{max(row.parameters for row in rows):,} parameters, up to "
        f"{max(row.train_structures for row in rows):,} training structures and "
        f"{max(row.flops for row in rows):.3g} model FLOPs a point; sources: {', '.join(results.sources)}.",
        "The base, which all is compared with: " + ", ".join(f"{k} {v}" for k, v in switches.items()) + ".",
    ]
    if fits.left_out:
        ends = ", ".join(f"{count} {word}" for word, count in fits.left_out.items())
        lines.append(f"Points that are kept and have no part in fits and comparisons: {ends}.")
    return lines


def _limits_of(rows: Sequence[Row], fits: Fits, variable: str) -> str:
    mine = [row for row in rows if Family.of(row) == fits.base]
    return (
        f"Seen: {seeds_of(mine)} seed(s), at most {max(row.train_structures for row in mine):,} structures; "
        f"laws in {variable} are extrapolated at one's own risk, and their exponents belong to this data, "
        "length and batch."
    )
