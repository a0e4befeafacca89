"""Heat-maps as inline SVG: a row for each thing, a column for each layer; no dependency, no script, both themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lit_llm.callbacks.report_chart import number

_WIDTH, _TOP, _ROW, _LEFT_OF_LETTER, _RIGHT = 420, 8, 20, 6.4, 8
_MOST_NUMBERED = 8  # columns up to which every cell shows its number


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    ends: tuple[float, float] | None = None,
    note: str = "",
) -> str:
    """A figure with a cell for every value; cells of values that are not finite stay empty.

    Args:
        title: above the map.
        rows: names on the left.
        columns: names below.
        values: of each row, one for each column.
        ends: values that are drawn empty and full; None: 0 and the largest.
        note: a sentence below.
    """
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = ends or (0.0, max(finite, default=1.0) or 1.0)
    left = 14 + _LEFT_OF_LETTER * max((len(name) for name in rows), default=0)
    wide = (_WIDTH - left - _RIGHT) / max(len(columns), 1)
    height = _TOP + _ROW * len(rows) + 22
    parts = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = _TOP + i * _ROW
        parts.append(f'<text class=tick x="{left - 6:.1f}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        parts += [
            _cell(left + j * wide, top, wide, value, f"{name}, {columns[j]}", (low, high), len(columns))
            for j, value in enumerate(row)
        ]
    every = max(1, math.ceil(len(columns) / 12))
    for j in range(0, len(columns), every):
        x = left + (j + 0.5) * wide
        parts.append(f'<text class=tick x="{x:.1f}" y="{height - 6}" text-anchor="middle">{escape(columns[j])}</text>')
    told = f"{title}: {len(rows)} rows, {len(columns)} columns, from {number(low)} (empty) to {number(high)} (full)"
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'
    scale = f"Empty is {number(low)}, full {number(high)}."
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}"
        f"<p class=note>{escape(f'{note} {scale}'.strip())}</p></figure>"
    )


def _cell(left: float, top: int, wide: float, value: float, where: str, ends: tuple[float, float], columns: int) -> str:
    if not math.isfinite(value):
        return ""
    low, high = ends
    share = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    cell = (
        f'<rect x="{left:.1f}" y="{top}" width="{max(wide - 1, 1):.1f}" height="{_ROW - 1}" '
        f'style="fill:rgb(var(--above)/{0.04 + 0.8 * share:.2f})">'
        f"<title>{escape(where)}: {number(value)}</title></rect>"
    )
    if columns > _MOST_NUMBERED:
        return cell
    middle = left + wide / 2
    return cell + f'<text class=tick x="{middle:.1f}" y="{top + 14}" text-anchor="middle">{number(value)}</text>'
