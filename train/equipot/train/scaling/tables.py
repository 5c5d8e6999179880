"""Tables of a study's report: a title, a head and rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipot.train.scaling.better import Contest
from equipot.train.scaling.compare import Comparison, Effect
from equipot.train.scaling.fit import SIZE_AND_DATA, SIZE_AND_SEEN, Fits, Law
from equipot.train.scaling.rows import Row, StudyResults
from equipot.train.scaling.slices import Family
from equipot.train.scaling.standings import (
    COSINE,
    ENERGY,
    FORCES,
    LOSS,
    TRIVIAL,
    Place,
    Standing,
    balanced,
    places,
)

_ERRORS: Sequence[tuple[str, str, float]] = (
    ("energy MAE, meV/atom", "energy_mae_per_atom", 1000),
    ("energy RMSE", "energy_rmse_per_atom", 1000),
    ("force MAE, meV/Å", "force_mae", 1000),
    ("force RMSE", "force_rmse", 1000),
    ("force cosine", "force_cosine", 1),
)
_SHOWN = (ENERGY, FORCES, COSINE)


@dataclass(frozen=True, slots=True)
class Table:
    """Text to be shown; the first column is left-aligned."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


def laws(fits: Fits, kind: tuple[str, ...]) -> Table:
    """Single-variable laws of all metrics and families."""
    found = [law for law in fits.laws if law.slice.variables == kind]
    head = ("of", "metric", "at", "points", "E", "A", "exponent", "scatter", "seeds")
    return Table(f"Laws in {kind[0]}", head, tuple(_law(law, fits) for law in found), folded=True)


def brief(fits: Fits) -> Table:
    """Single-variable laws in few columns: of the loss, and of the base's energies and forces."""
    rows: list[tuple[str, ...]] = []
    for law in fits.laws:
        if len(law.letters) > 1 or (law.metric != "loss" and law.slice.family != fits.base):
            continue
        length = [f"{value} {name}" for name, value in law.slice.fixed if name in ("steps", "epochs")]
        name = f"{law.slice.family.label(fits.base)}: {law.metric} in {law.slice.variables[0]}"
        name += f", {length[0]}" if length else ""
        if law.fit is None:
            rows.append((name, "–", "–", "–", law.refused))
            continue
        found = law.fit.intervals(law.letters)
        notes = "; ".join(f"{key}: {each.note}" for key, each in found.items() if each.note and key != "A")
        spans = [_span(each.value, each.low, each.high) for key, each in found.items() if key != "A"]
        rows.append((name, *spans, f"{law.fit.spread.total:.1%}", notes))
    return Table("Laws L = E + A·x^−α", ("law", "E", "α", "scatter", "note"), tuple(rows))


def joint(fits: Fits) -> Table:
    """Laws in parameters and data."""
    found = [law for law in fits.laws if law.slice.variables in (SIZE_AND_DATA, SIZE_AND_SEEN)]
    rows = []
    for law in found:
        fixed = ", ".join(f"{k} {v}" for k, v in law.slice.fixed)
        name = law.slice.family.label(fits.base)
        if law.fit is None:
            rows.append((name, " and ".join(law.slice.variables), fixed, law.refused))
            continue
        words = "; ".join(
            f"{key} {_span(each.value, each.low, each.high)}{f' [{each.note}]' if each.note else ''}"
            for key, each in law.fit.intervals(law.letters).items()
        )
        rows.append((name, " and ".join(law.slice.variables), fixed, words))
    return Table(
        "Joint laws L = E + A_N·N^−α_N + …", ("of", "in", "at", "parameters"), tuple(rows), folded=True
    )


def optima(fits: Fits) -> Table:
    """What budgets are best spent on."""
    rows = tuple(
        (
            f"{each.budget:.3g}",
            f"{each.width} ({each.width_interval[0]}–{each.width_interval[1]})",
            str(fits.layers),
            f"{each.parameters:,.0f}",
            f"{each.structures:,.0f} ({each.structures_interval[0]:,.0f}–{each.structures_interval[1]:,.0f})",
            f"{each.structures / fits.epoch_structures:.3g}",
            _span(float(each.band.fitted[0]), float(each.band.run_low[0]), float(each.band.run_high[0])),
        )
        for each in fits.optima
    )
    head = ("FLOPs", "width", "layers", "parameters", "structures seen", "epochs", "loss (a run's band)")
    return Table("Best use of a budget", head, rows)


def held_out(fits: Fits) -> Table:
    """Every prediction of a held-out point."""
    rows = tuple(
        (
            each.row.name,
            f"{law.metric} in {' and '.join(law.slice.variables)}",
            f"{each.observed:.4g}",
            f"{each.fitted:.4g}",
            f"{each.error:+.1%}",
            f"{each.low / each.fitted - 1:+.0%} to {each.high / each.fitted - 1:+.0%}",
            "inside" if each.inside else "outside",
        )
        for law, each in fits.foretold
    )
    head = ("point", "law", "observed", "predicted", "error", "a run's band", "observed is")
    return Table("Held out (loss; energies in eV/atom, forces in eV/Å)", head, rows)


def comparisons(found: Sequence[Comparison]) -> Table:
    """Effects and shifts."""
    rows = []
    for each in found:
        for metric, effect in each.effects.items():
            rows.append(
                (
                    each.label,
                    metric,
                    _span(effect.ratio, effect.low, effect.high)
                    if effect.pairs > 1
                    else f"{effect.ratio:.3g}",
                    str(effect.pairs),
                    f"{effect.probability:.2g}" if effect.pairs > 1 else "–",
                    each.how,
                )
            )
        for shift in each.shifts:
            name = f"exponent in {shift.law.slice.variables[0]}, less the base's"
            rows.append((each.label, name, _span(*shift.exponent), "–", "–", "two fitted laws"))
        for tilt in each.tilts:
            rows.append(
                (
                    each.label,
                    f"local exponent in {tilt.variable}, less the base's",
                    _span(tilt.exponent, tilt.low, tilt.high),
                    str(tilt.pairs),
                    "–",
                    f"{tilt.values} different {tilt.variable}",
                )
            )
    head = ("of", "what", "times the base's, or difference", "pairs", "p", "pairs share")
    return Table("Against the base", head, tuple(rows), folded=True)


def contests(found: Sequence[Contest], base: Family) -> Table:
    """Ratios of losses, a row for each candidate and share, a column for each source."""
    names = list(dict.fromkeys(name for each in found for name in each.by_source))
    rows = tuple(
        (
            each.family.label(base),
            f"{each.compute:.0%}",
            str(len(each.pairs)),
            *(_ratio(each.by_source.get(name)) for name in names),
            _ratio(each.clock),
        )
        for each in found
    )
    head = ("of", "FLOPs", "pairs", *(f"loss: {name}" for name in names), "seconds")
    return Table("Times the rival's (with 95% intervals over the pairs of seeds)", head, rows)


def standings(found: Sequence[Standing]) -> Table:
    """Errors of rivals side by side wherever they were evaluated: seeds' mean and spread, and the ratio."""
    rows: list[tuple[str, ...]] = []
    for place in places([row for each in found for row in each.rows]):
        for name, key, factor in (("loss", LOSS, 1.0), *(each for each in _ERRORS if each[1] in _SHOWN)):
            if not any(each.values(place, key) for each in found):
                continue
            unit = name.partition(",")[0] + " ÷ trivial" if place.balanced and key in TRIVIAL else name
            scale = 1.0 if place.balanced else factor
            trivial = place.trivial(found[0].rows[0], key) if key in TRIVIAL else None
            cells = [_seeds(each, place, key, scale) for each in found]
            rows.append((place.name, unit, *cells, _number(trivial, scale)))
    head = ("of", "error", *(each.label for each in found), "trivial baseline")
    title = (
        "With the same frames and compute: mean ± spread of the seeds (× the first's, 95% interval of pairs)"
    )
    return Table(title, head, tuple(rows))


def sources(row: Row) -> Table:
    """Errors on the test split by source, and the trivial baselines beside them."""
    rows = [("all structures alike", *_errors(row.test))]
    shares = [balanced(row, key) if key in _SHOWN else None for _, key, _ in _ERRORS]
    rows.append(("mean of sources, each ÷ trivial (no units)", *(_number(each) for each in shares)))
    rows += [(name, *_errors(found)) for name, found in row.test.get("by_source", {}).items()]
    for name, found in row.baselines.items():
        rows.append((f"baseline: {name.replace('_', ' ')}", *_errors(found)))
        rows += [(f"… on {source}", *_errors(each)) for source, each in found.get("by_source", {}).items()]
    return Table("Test split, by groups never trained on", ("source", *(e[0] for e in _ERRORS)), tuple(rows))


def unseen(row: Row) -> Table:
    """Errors on sources never trained on."""
    rows = []
    for name, found in row.unseen.items():
        left = f"{found.get('unsupported', '–')} of {found.get('structures_in_store', '–')}"
        if "problem" in found:
            rows.append((name, *["–"] * len(_ERRORS), left, found["problem"]))
            continue
        baseline = found.get("baseline", {})
        rows.append(
            (name, *_errors(found), left, f"shift by {found.get('energies_shifted_by', 0)} structures")
        )
        rows.append(("… references, zero forces", *_errors(baseline), "", ""))
    head = ("source", *(each[0] for each in _ERRORS), "left out", "energies")
    return Table("Sources never trained on", head, tuple(rows))


def latency(measured: Mapping[str, Any]) -> Table:
    """Measured memory and time, relative to the plain form."""
    rows = tuple(
        (name, *(f"{each[key]:.0%}" for key in ("memory", "whole", "time", "wall")))
        for name, each in measured.get("relative to plain", {}).items()
    )
    head = ("setting", "memory beyond an empty rank", "whole memory", "computing time", "time on the wall")
    return Table(f"Measured, relative to the plain form at width {measured.get('width', '–')}", head, rows)


def points(results: StudyResults) -> Table:
    """Every finished point."""
    rows = tuple(
        (
            row.name,
            ", ".join(row.group),
            f"{row.parameters:,}",
            f"{row.train_structures:,}",
            f"{row.steps:,}",
            f"{row.epochs:.3g}",
            f"{row.flops:.3g}",
            _number(row.value("loss")),
            *(_number(row.test.get(key), factor) for _, key, factor in (_ERRORS[0], _ERRORS[2], _ERRORS[4])),
            *(_number(balanced(row, key)) for key in (ENERGY, FORCES)),
            row.stopped + (", held out" if row.holdout else ""),
        )
        for row in results.rows
    )
    head = (
        *("point", "experiments", "parameters", "structures", "steps", "epochs", "FLOPs", "test loss"),
        *("energy MAE, meV/atom", "force MAE, meV/Å", "force cosine"),
        *("energy ÷ trivial, mean of sources", "forces ÷ trivial, mean of sources", "ended"),
    )
    return Table("Points", head, rows, folded=True)


def _law(law: Law, fits: Fits) -> tuple[str, ...]:
    name = law.slice.family.label(fits.base)
    fixed = ", ".join(f"{k} {v}" for k, v in law.slice.fixed)
    if law.fit is None:
        return (name, law.metric, fixed, str(len(law.slice.rows)), law.refused, "", "", "", "")
    found = law.fit.intervals(law.letters)
    seeds = "–" if law.fit.seed_spread is None else f"{law.fit.seed_spread:.1%}"
    return (
        name,
        law.metric,
        fixed,
        f"{len(law.slice.rows)} of {law.fit.settings} settings",
        *(
            _span(each.value, each.low, each.high) + (f" [{each.note}]" if each.note else "")
            for each in found.values()
        ),
        f"{law.fit.spread.total:.1%}",
        seeds,
    )


def _errors(found: Mapping[str, Any]) -> list[str]:
    return [_number(found.get(key), factor) for _, key, factor in _ERRORS]


def _ratio(found: Effect | None) -> str:
    if found is None:
        return "–"
    return _span(found.ratio, found.low, found.high) if found.pairs > 1 else f"{found.ratio:.3g}"


def _seeds(standing: Standing, place: Place, key: str, factor: float) -> str:
    values = np.array(standing.values(place, key)) * factor
    if not len(values):
        return "–"
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    spread = f" ± {deviation:.2g}" if deviation > 1e-9 else ""
    found = standing.against(place, key) if key in TRIVIAL else None
    if found is None:
        return f"{values.mean():.3g}{spread}"
    span = f", {found.low:.2g} to {found.high:.2g}" if found.pairs > 1 else ""
    return f"{values.mean():.3g}{spread} (× {found.ratio:.2g}{span})"


def _number(value: float | None, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor:.4g}"


def _span(value: float, low: float, high: float) -> str:
    return f"{value:.3g} ({low:.3g} to {high:.3g})"
