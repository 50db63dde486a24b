"""`dqkernels plot --html`: one page about records that opens offline: pictures, machine, protocol, every row.

Nothing outside the page is asked for (its Content-Security-Policy says so to the browser), no script runs, and every
text of a record is escaped: records come from other machines.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dqkernels.bench import picture_draw, plot

_STYLE = """
:root { color-scheme: light dark;
  --back: #ffffff; --text: #1f2328; --faint: #d0d7de; --soft: #f6f8fa; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --faint: #3d444d; --soft: #161b22; --link: #4ba3e3; }
}
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 860px; padding: 16px; }
h1 { font-size: 24px; } h2 { font-size: 20px; border-bottom: 1px solid var(--faint); margin-top: 40px; }
h3 { font-size: 16px; margin-bottom: 4px; }
a { color: var(--link); }
img { display: block; width: 100%; height: auto; margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; width: max-content; }
th, td { border: 1px solid var(--faint); padding: 2px 8px; text-align: left; vertical-align: top; max-width: 360px;
  overflow-wrap: anywhere; }
th { background: var(--soft); }
td.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.none { opacity: 0.6; }
details { margin: 8px 0; } summary { cursor: pointer; }
.warning { border-left: 4px solid #d55e00; padding-left: 8px; }
"""
#: Columns that come first where rows have them; then as they occur.
_FIRST = ("candidate", "name", "row", "op", "stage", "status", "reason")
#: Keys of rows that say the same to nobody: a figure per pair, sentences in the hundreds.
_HIDDEN = ("by_pair", "pair_scores_milli", "losses")
_LONGEST = 400


def page(loaded: Sequence[plot.Loaded]) -> str:
    """The whole document.

    Raises:
        PlotError: for a record of a kind with pictures that cannot be drawn.
        NoMatplotlib: where matplotlib is missing.
    """
    title = "dqkernels: " + (loaded[0].name if len(loaded) == 1 else f"{len(loaded)} records")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="generator" content="dqkernels plot page">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_text(title)}</h1>",
            *_overview(loaded),
            *(line for index, one in enumerate(loaded) for line in _record(one, f"record-{index}")),
            "</body>",
            "</html>",
            "",
        ]
    )


def _overview(loaded: Sequence[plot.Loaded]) -> list[str]:
    rows = []
    for index, one in enumerate(loaded):
        link = f'<a href="#record-{index}">{_text(one.file)}</a>'
        commit = one.environment.get("git_commit")
        cells = [one.kind, one.machine, one.data.get("created_utc"), commit[:10] if isinstance(commit, str) else None]
        rows.append(f"<tr><td>{link}</td>{''.join(_cell(value) for value in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("record", "kind", "machine", "measured", "commit"))
    return ['<div class="scroll"><table>', f"<tr>{head}</tr>", *rows, "</table></div>"]


def _record(one: plot.Loaded, anchor: str) -> list[str]:
    lines = [f'<section id="{anchor}">', f"<h2>{_text(one.file)}</h2>", f"<p>{_text(one.footer)}</p>"]
    if "busy before the run" in one.footer:
        lines.append('<p class="warning">The machine was busy before this run: do not quote its times.</p>')
    found = plot.pictures(one)
    for picture in found:
        lines += [f"<h3>{_text(picture.title)}</h3>", _pictured(one, picture)]
    if not found:
        lines.append("<p>No picture: nothing in this record has figures that one would show.</p>")
    if one.kind == "dq_docstrings":
        lines += _rows("Runs", one.data.get("runs"), one)
        lines += _rows("Not run", one.data.get("not_run"), one)
    else:
        lines += _rows("Rows", one.data.get("rows"), one)
    for name in ("environment", "protocol", "settings"):
        found = one.environment if name == "environment" else one.data.get(name)
        lines += _pairs(name, found)
    return [*lines, "</section>"]


def _pictured(one: plot.Loaded, picture) -> str:
    """Both colours of a picture; the reader's page chooses."""
    light, dark = (
        "data:image/png;base64," + base64.b64encode(picture_draw.draw(picture, style, "png", one.footer)).decode()
        for style in ("light", "dark")
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(picture.alt)}"></picture>'
    )


def _rows(title: str, rows: Any, one: plot.Loaded) -> list[str]:
    """Every row; what has no figures says why in place of them."""
    if not isinstance(rows, list) or not rows:
        return []
    kept = [row for row in rows if isinstance(row, dict)]
    keys = list(
        dict.fromkeys([*(k for k in _FIRST if any(k in row for row in kept)), *(k for row in kept for k in row)])
    )
    keys = [key for key in keys if key not in _HIDDEN]
    same = {key for key in keys if key not in _FIRST and len(kept) > 1 and _alike(row.get(key) for row in kept)}
    lines = [f"<details{' open' if len(kept) <= 40 else ''}><summary>{_text(title)}: {len(kept)}</summary>"]
    if same:
        words = "; ".join(
            f"{key} {_shown(kept[0].get(key))}" for key in keys if key in same and kept[0].get(key) is not None
        )
        lines += [f"<p>In every row: {_text(words)}.</p>"] if words else []
    keys = [key for key in keys if key not in same]
    lines += ['<div class="scroll"><table>', "<tr>" + "".join(f"<th>{_text(key)}</th>" for key in keys) + "</tr>"]
    for row in kept:
        lines.append("<tr>" + "".join(_cell(row.get(key)) for key in keys) + "</tr>")
    return [*lines, "</table></div></details>"]


def _alike(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(type(value) is type(first) and value == first for value in others)


def _pairs(name: str, found: Any) -> list[str]:
    if not isinstance(found, dict) or not found:
        return []
    lines = [f"<details><summary>{_text(name)}</summary>", '<div class="scroll"><table>']
    lines += [f"<tr><th>{_text(key)}</th>{_cell(value)}</tr>" for key, value in found.items()]
    return [*lines, "</table></div></details>"]


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="none">-</td>'
    figure = isinstance(value, int | float) and not isinstance(value, bool)
    return f"<td{' class=figure' if figure else ''}>{_text(_shown(value))}</td>"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _text(value: Any) -> str:
    """Escaped for text and for attributes; what is no character of a page is left out."""
    plain = "".join(char if char in "\n\t" or char.isprintable() else " " for char in str(value))
    return html.escape(plain.encode("utf-8", "replace").decode(), quote=True)
