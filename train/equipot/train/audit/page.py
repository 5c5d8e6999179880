"""An audit as one HTML page that needs nothing else. Everything that comes from data is escaped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from equipot.train.audit import pictures
from equipot.train.audit.findings import Finding, Severity
from equipot.train.audit.pairs import Regression
from equipot.train.audit.run import Audit, StoreAudit
from equipot.train.audit.sketch import Sketch

STYLE = """
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1rem}
body{color:#1b1f24;background:#fff}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
.answer{font-size:1.1rem;padding:.7rem 1rem;border-radius:.4rem;background:#e6f4ea}
.answer.error{background:#fce4e1}.answer.warning{background:#fff3d6}
.finding{border-left:.35rem solid #9aa4af;padding:.3rem .8rem;margin:.7rem 0;background:#f6f8fa}
.finding.error{border-color:#c62828}.finding.warning{border-color:#d99000}
.finding p{margin:.2rem 0}
.word{font-weight:600;text-transform:uppercase;font-size:.75rem;letter-spacing:.04em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #e1e4e8;white-space:nowrap}
th:first-child,td:first-child,td.text{text-align:left}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.8rem}
figure{margin:0}figcaption{font-size:.8rem;color:#57606a}img{width:100%;height:auto}
small,.quiet{color:#57606a}code{font-size:.85rem;overflow-wrap:anywhere}
"""


def render(audit: Audit, when: str) -> str:
    """The page; `when` is the date it bears."""
    worst = next((s.value for s in Severity if any(f.severity is s for f in audit.findings)), "note")
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1"><title>Data audit</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>Is the aggregate consistent?</h1>",
        f'<p class="answer {worst}"><b>{escape(audit.answer[:1].upper() + audit.answer[1:])}.</b></p>',
        f"<p class=quiet>{_scope(audit)} {escape(when)}.</p>",
        "<h2>Findings</h2>",
        *([_finding(each) for each in audit.findings] or ["<p>None.</p>"]),
        "<h2>Stores</h2>",
        _overview(audit),
        _figures(pictures.compare(audit.stores)) if len(audit.stores) > 1 else "",
        "<h2>Elements</h2>",
        _coverage(audit),
        *(part for each in audit.stores for part in _store(each)),
        "<h2>How to read this</h2>",
        _explanation(audit),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _scope(audit: Audit) -> str:
    seen = "all" if audit.compared == audit.structures else f"{audit.compared:,} of"
    splits = f"splits of the mix {escape(str(audit.mix))}" if audit.mix else "no splits given"
    return (
        f"{len(audit.stores)} store(s), {audit.structures:,} structures, all of them read for energies, "
        f"forces, cells and exact duplicates; {seen} {audit.structures:,} looked at for near duplicates "
        f"(sample {audit.options.sample:,}, seed {audit.options.seed}, kin taken together), {splits}."
    )


def _finding(finding: Finding) -> str:
    stores = ", ".join(finding.stores)
    places = ""
    if finding.places:
        rows = [
            (place.store, place.file, str(place.frame), str(place.index), place.detail)
            for place in finding.places
        ]
        table = _table(("store", "file", "frame", "structure", "what"), rows, text=True)
        of = f" of {finding.count:,}" if finding.count > len(rows) else ""
        places = f"<details><summary>{len(rows)}{of} places</summary>{table}</details>"
    return (
        f'<div class="finding {finding.severity.value}"><p><span class=word>{finding.severity.value}</span> '
        f"<b>{escape(finding.summary)}</b> <small>{escape(stores)} · {escape(finding.code)}</small></p>"
        f"<p>{escape(finding.evidence)}</p><p><i>Remedy:</i> {escape(finding.remedy)}</p>{places}</div>"
    )


def _overview(audit: Audit) -> str:
    rows = []
    for each in audit.stores:
        s = each.statistics
        rows.append(
            (
                each.named.name,
                each.named.store.manifest.level_of_theory,
                f"{s.structures:,}",
                f"{s.atoms:,}",
                _number(s.residual.spread),
                _number(s.force_components.rms),
                _number(s.pressure.median),
                _slope(each.pairs.energy_force),
                _slope(each.pairs.energy_stress),
                _number(each.geometry.closest.median),
            )
        )
    head = (
        *("store", "level of theory", "structures", "atoms", "E/atom spread, eV", "force RMS, eV/Å"),
        *("pressure, eV/Å³", "ΔE : force work", "ΔE : stress work", "nearest / radii"),
    )
    return _table(head, rows)


def _coverage(audit: Audit) -> str:
    present = np.flatnonzero(sum(each.statistics.elements for each in audit.stores))
    levels = list(audit.references)
    head = (
        "element",
        *(f"{each.named.name}: structures" for each in audit.stores),
        *(f"reference, eV ({level})" for level in levels),
    )
    rows = []
    for z in present.tolist():
        references = [
            _number(float(audit.references[level][z]))
            if any(
                each.statistics.elements[z]
                for each in audit.stores
                if each.named.store.manifest.level_of_theory == level
            )
            else ""
            for level in levels
        ]
        counts = [f"{n:,}" if (n := int(each.statistics.structures_with[z])) else "" for each in audit.stores]
        rows.append((chemical_symbols[z], *counts, *references))
    return _table(head, rows)


def _store(audit: StoreAudit) -> Iterator[str]:
    s, m = audit.statistics, audit.named.store.manifest
    yield f"<h2>{escape(audit.named.name)}</h2>"
    yield (
        f"<p><code>{escape(str(audit.named.store.path))}</code><br>{escape(m.level_of_theory)}, licence "
        f"{escape(m.licence)}; {s.structures:,} structures, {s.sizes.low:.0f} to {s.sizes.high:.0f} atoms; "
        f"periodic in {_counts(s.periodicity)}; charges {_counts(s.charges)}; spin multiplicities "
        f"{_counts({'not stated' if k == 0 else k: v for k, v in s.spins.items()})}; without forces "
        f"{s.no_forces.count:,}, with all-zero forces {s.zero_forces.count:,}. "
        f"Distances from {audit.geometry.examined:,} structures.</p>"
    )
    yield _figures(pictures.of_store(audit))
    yield "<h3>Distributions</h3>"
    sketches = {
        "energy per atom, eV": s.energy_per_atom,
        "… after references": s.residual,
        "force components, eV/Å": s.force_components,
        "force sizes, eV/Å": s.force_sizes,
        "atoms per structure": s.sizes,
        "atoms per Å³": s.number_density,
        "pressure, eV/Å³": s.pressure,
        "net force, relative": s.net_force,
        "torque, relative": s.torque,
        "nearest / covalent radii": audit.geometry.closest,
        "cosine of forces with repulsion": audit.geometry.outward,
    }
    yield _sketch_table("of", sketches)
    yield "<h3>By element</h3>"
    rows = []
    for z in np.flatnonzero(s.elements).tolist():
        force, left = s.force_of.get(z, Sketch()), s.residual_of.get(z, Sketch())
        rows.append(
            (
                chemical_symbols[z],
                f"{int(s.elements[z]):,}",
                f"{int(s.structures_with[z]):,}",
                *(_number(value) for value in (force.median, force.quantile(0.99), force.high)),
                *(_number(value) for value in (left.median, left.spread, left.low, left.high)),
            )
        )
    head = (
        *("element", "atoms", "structures", "|F| median", "99 %", "max"),
        *("E/atom residual, median", "spread", "min", "max"),
    )
    yield _table(head, rows)
    yield "<details><summary>Nearest distances, Å, by pair of elements</summary>"
    pairs = {
        f"{chemical_symbols[a]}–{chemical_symbols[b]} "
        f"(radii {covalent_radii[a] + covalent_radii[b]:.2f})": sketch
        for (a, b), sketch in sorted(audit.geometry.nearest.items())
    }
    yield _sketch_table("pair", pairs)
    yield "</details>"


def _explanation(audit: Audit) -> str:
    return (
        "<p>Energies are referenced by one ridge fit per level of theory on the training split of a mix, and "
        "on everything of stores outside it. ΔE : work is the slope of energy differences between near "
        "frames of one group on what their forces (and, between cells, stress) say; 1 is right, and a slope "
        "is believed from 12 pairs on that explain more than half of the changes. Near duplicates have the "
        f"same composition and sorted interatomic distances up to {audit.options.tolerance:g} Å, whatever "
        "their position, orientation, mirror image, order of atoms or choice of cell; distances beyond 6 Å "
        "are not compared. Spreads are robust: 1.48 times the median distance from the median. Quantiles "
        "are good to 1 %. Pictures end at the outer half per cent.</p>"
    )


def _sketch_table(first: str, sketches: Mapping[str, Sketch]) -> str:
    quantiles = (0.01, 0.25, 0.5, 0.75, 0.99)
    rows = [
        (name, f"{s.n:,}", _number(s.low), *(_number(s.quantile(q)) for q in quantiles), _number(s.high))
        for name, s in sketches.items()
        if s.n
    ]
    return _table((first, "number", "min", "1 %", "25 %", "median", "75 %", "99 %", "max"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    kind = " class=text" if text else ""
    lines = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) for row in rows]
    return (
        "<div class=wide><table><tr>"
        + "".join(f"<th>{escape(cell)}</th>" for cell in head)
        + "</tr>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )


def _figures(found: Mapping[str, str]) -> str:
    figures = [
        f'<figure><img alt="{escape(title)}" src="{uri}"><figcaption>{escape(title)}</figcaption></figure>'
        for title, uri in found.items()
    ]
    return f"<div class=pictures>{''.join(figures)}</div>"


def _slope(found: Regression | None) -> str:
    return f"{found.slope:.3g} ({found.pairs:,} pairs, {found.explained:.0%})" if found else "–"


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "–"


def _counts(counts: Mapping[str, int] | Mapping[int, int] | Mapping[str | int, int]) -> str:
    return escape(", ".join(f"{value} ({count:,})" for value, count in list(counts.items())[:12]))
