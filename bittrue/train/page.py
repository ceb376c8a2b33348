"""The HTML that reports of runs share: one file, no script, light and dark as the reader likes."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from bittrue.train.plot import DARK_STYLE

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --quiet: #666; --good: #0a6b3d; --bad: #b00020; }
body { font: 14px/1.45 sans-serif; color: var(--text); background: var(--page); max-width: 1180px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 22px; margin-bottom: 4px; } h2 { font-size: 17px; margin-top: 28px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 12px 20px; }
svg { width: 100%; height: auto; } figure { margin: 0; }
table { border-collapse: collapse; margin-bottom: 8px; } td, th { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
td + td { overflow-wrap: anywhere; }
td { font-variant-numeric: tabular-nums; } .number { text-align: right; }
.columns { display: flex; flex-wrap: wrap; gap: 0 48px; align-items: flex-start; }
.verdict { font-size: 16px; font-weight: bold; margin: 4px 0; } .good { color: var(--good); } .bad { color: var(--bad); }
.quiet { color: var(--quiet); margin: 2px 0; } code { font-size: 12px; } summary { cursor: pointer; }
@media (prefers-color-scheme: dark) {
:root { --text: #ddd; --page: #16181b; --quiet: #999; --good: #5bd18f; --bad: #ff7d86; }
"""  # noqa: E501


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of ``parts``, which are HTML."""
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    style = f"<style>{_STYLE}{DARK_STYLE}\n}}</style></head><body>"
    return "\n".join([head, style, *parts, "</body></html>"])


def figures(pictures: Iterable[str]) -> str:
    """Pictures side by side where there is room."""
    return "\n".join(
        ['<div class="plots">', *(f"<figure>{picture}</figure>" for picture in pictures), "</div>"]
    )


def columns(sections: Mapping[str, str]) -> str:
    """Sections with their headings, side by side where there is room."""
    inner = "\n".join(f"<div><h2>{escape(name)}</h2>{body}</div>" for name, body in sections.items())
    return f'<div class="columns">\n{inner}\n</div>'


def facts(rows: Mapping[str, str]) -> str:
    """A table of two columns."""
    body = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows.items())
    return f"<table>{body}</table>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a heading; every column but the first holds numbers."""
    first = "".join(f"<th{_number(i)}>{escape(head)}</th>" for i, head in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{_number(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def shown(value: object) -> str:
    """A setting as one reads it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {shown(item)}" for key, item in value.items())
    return str(value)


def _number(column: int) -> str:
    return ' class="number"' if column else ""
