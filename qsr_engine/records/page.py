"""report.html: one page with a paragraph, tables and pictures, that needs no other file, on any screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

Cell = tuple[str, bool]  # text, and whether it is the best of its column

_PICTURES = {  # titles by the names of their files
    "period_and_lr": "H and the learning rate",
    "accuracy_over_communication": "Accuracy over averagings",
    "accuracy_over_steps": "Accuracy over steps",
    "loss_over_communication": "Held-out loss over averagings",
    "loss_over_steps": "Loss over steps",
    "waiting_over_steps": "Waiting at boundaries",
    "members_over_steps": "Members",
    "sharpness_over_steps": "Sharpness",
    "norms_over_steps": "Norms",
}


def page(said: str, tables: Mapping[str, Sequence[Sequence[Cell]]], notes: Sequence[str], drawn: Sequence[Path]) -> str:
    """The page.

    Args:
        said: one paragraph.
        tables: by their titles; the first row of each is its header. A table without another row is left out.
        notes: a line each.
        drawn: files of pictures (PNG).
    """
    parts = [f"<p>{html.escape(said)}</p>"]
    parts += [f"<h2>{html.escape(title)}</h2>{_table(rows)}" for title, rows in tables.items() if len(rows) > 1]
    if notes:
        parts.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>")
    for file in drawn:
        title, data = html.escape(_PICTURES.get(file.stem, file.stem)), base64.b64encode(file.read_bytes()).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">')
    return _PAGE.format("\n".join(parts))


def _table(rows: Sequence[Sequence[Cell]]) -> str:
    """In a box that scrolls by itself where the screen is narrow; the first column stays."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text, _ in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    text, best = html.escape(cell[0]), cell[1]
    return f"<td><b>{text}</b></td>" if best else f"<td>{text}</td>"


# Pictures are drawn on white. In the dark they are inverted, and their hues turned back.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qsr report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #222; --line: #ddd; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }}
body, th:first-child, td:first-child {{ background: var(--paper); color: var(--ink); }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }} p {{ max-width: 45rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3em 0.8em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
th:first-child, td:first-child {{ position: sticky; left: 0; }}
img {{ display: block; width: 100%; max-width: 56rem; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --ink: #dcdde0; --line: #3a3d44; }}
  img {{ filter: invert(0.91) hue-rotate(180deg); }}
}}
</style></head><body><h1>Comparison of runs</h1>
{}
<p>Bold: the best of the finished runs.</p>
</body></html>
"""
