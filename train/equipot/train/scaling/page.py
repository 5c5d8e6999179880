"""A report as one HTML page that needs nothing else. Everything that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from equipot.train.audit.page import STYLE
from equipot.train.scaling.tables import Table

_LONG = 60  # characters of a cell that are broken into lines
_MORE = """
figure{margin:1rem 0}figure img{max-width:100%;width:auto}
.verdict{border-left:.35rem solid #0072B2;padding:.3rem .8rem;margin:.5rem 0;background:#f6f8fa}
.limits{font-size:.88rem;color:#57606a}.missing{color:#8a4b00}
.short td{white-space:normal;text-align:left;vertical-align:top}
.short td:first-child{font-weight:600;width:13rem}
table.short{font-size:.95rem;background:#f6f8fa;margin:1rem 0}
th{white-space:normal}td{font-variant-numeric:tabular-nums}td.long{white-space:normal;min-width:22rem;text-align:left}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem}nav a{white-space:nowrap}
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure as a data URI, and what is to be said of it."""

    uri: str
    caption: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the page: a question, what the numbers say, figures, tables, and how far it goes."""

    title: str
    question: str
    verdicts: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    limits: str


def render(
    title: str, scope: Sequence[str], short: Sequence[tuple[str, str]], when: str, parts: Sequence[Part]
) -> str:
    """The page; `short` are questions and answers for its head, `when` is the date it bears."""
    lines = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta name=viewport content="width=device-width,initial-scale=1"><title>{escape(title)}</title>',
        f"<style>{STYLE}{_MORE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in scope),
        f"<p class=quiet>{escape(when)}</p>",
        "<h2>In short</h2><table class=short>",
        *(f"<tr><td>{escape(asked)}</td><td>{escape(answer)}</td></tr>" for asked, answer in short),
        "</table>",
        "<nav>"
        + "".join(f'<a href="#part{k}">{escape(part.title)}</a>' for k, part in enumerate(parts))
        + "</nav>",
        *(_part(k, part) for k, part in enumerate(parts)),
        "</body></html>\n",
    ]
    return "\n".join(lines)


def _part(k: int, part: Part) -> str:
    tables = [_table(each) for each in part.tables if each.rows]
    lines = [
        f'<h2 id="part{k}">{escape(part.title)}</h2>',
        f"<p><i>{escape(part.question)}</i></p>" if part.question else "",
        *(f"<p class=verdict>{escape(line)}</p>" for line in part.verdicts),
        *(
            f'<figure><img alt="{escape(part.title)}" src="{each.uri}">'
            f"<figcaption>{escape(each.caption)}</figcaption></figure>"
            for each in part.pictures
        ),
        *tables,
        "" if part.pictures or tables else "<p class=missing>There is nothing to show of it yet.</p>",
        f"<p class=limits>Limits: {escape(part.limits)}</p>" if part.limits else "",
    ]
    return "\n".join(line for line in lines if line)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    body = f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>"
    if table.folded:
        return f"<details><summary>{escape(table.title)} ({len(table.rows)})</summary>{body}</details>"
    return f"<h3>{escape(table.title)}</h3>{body}"


def _cell(text: str) -> str:
    return f"<td{' class=long' if len(text) > _LONG else ''}>{escape(text)}</td>"
