"""Line charts as inline SVG: no dependency, no script, colours from the page's light or dark theme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
_MOST_POINTS = 400
_FILE_STYLE = (
    "text{font-family:sans-serif}.title{font-size:13px;font-weight:600}.grid{stroke:#ddd}.tick{fill:#555;font-size:11px}"
    ".level{stroke-width:1.5;stroke-dasharray:5 4}.line{fill:none;stroke-width:2}"
    ".faint{fill:none;stroke-width:1;opacity:.35}"
)


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: as the legend shows it.
        points: (step, value), ascending, finite.
        colour: a CSS colour.
        noisy: draw the points faintly and a smoothed curve over them.
    """

    name: str
    points: Points
    colour: str
    noisy: bool = False

    @property
    def smoothed(self) -> bool:
        return self.noisy and len(self.points) > 20

    @property
    def end(self) -> float:
        """The last value of the drawn line."""
        return (_smooth(self.points) if self.smoothed else self.points)[-1][1]


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with: the teacher, the start."""

    name: str
    value: float
    colour: str


def line_chart(title: str, series: list[Series], levels: list[Level] | None = None, note: str = "") -> str:
    """A figure with title, legend (with the last values) and chart.

    Args:
        title: above the chart.
        series: at least one curve with at least one point.
        levels: lines to compare with.
        note: a sentence below the chart.
    """
    levels = levels or []
    label = f"{title}: " + ", ".join(f"{curve.name} ends at {number(curve.end)}" for curve in series)
    return _figure(title, _legend(series, levels), label, [_drawn(series, levels)], note)


def chart_file(title: str, series: list[Series]) -> str:
    """A line chart as an SVG file that stands alone, on white, with its legend below.

    Args:
        title: above the chart.
        series: at least one curve with at least one point; in colours that need no page.
    """
    legend = [
        f'<rect x="{_LEFT}" y="{_HEIGHT + 8 + 18 * row}" width="14" height="4" fill="{curve.colour}"/><text class="tick" '
        f'x="{_LEFT + 20}" y="{_HEIGHT + 14 + 18 * row}">{escape(curve.name)}: {number(curve.end)}</text>'
        for row, curve in enumerate(series)
    ]
    height = _HEIGHT + 24 + 18 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -22 {_WIDTH} {height + 22}" width="{2 * _WIDTH}">'
        f'<style>{_FILE_STYLE}</style><rect y="-22" width="{_WIDTH}" height="{height + 22}" fill="#fff"/>'
        f'<text class="title" x="{_LEFT}" y="-6">{escape(title)}</text>{_drawn(series, [])}{"".join(legend)}</svg>\n'
    )


def point_chart(title: str, points: list[tuple[float, float, str]], words: tuple[str, str], note: str = "") -> str:
    """A figure with one point for each pair of values, joined in their order and labelled.

    Args:
        title: above the chart.
        points: (x, y, label), at least one, finite.
        words: what x and y are.
        note: a sentence below the chart.
    """
    frame = _Frame.around([x for x, _, _ in points], [y for _, y, _ in points]).widened()
    places = [(frame.x(x), frame.y(y)) for x, y, _ in points]
    parts = [_grid(frame, whole=False)]
    parts.append(
        f'<path class="faint" style="stroke:var(--student)" d="{_path(frame, [(x, y) for x, y, _ in points])}"/>'
    )
    for (x, y, label), (left, top) in zip(points, places, strict=True):
        parts.append(
            f'<circle style="fill:var(--student)" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>step {escape(label)}: '
            f"{escape(words[0])} {number(x)}, {escape(words[1])} {number(y)}</title></circle>"
        )
    for index in _labelled(places):
        left, top = places[index]
        parts.append(
            f'<text class="tick" x="{left:.1f}" y="{top - 8:.1f}" text-anchor="middle">{escape(points[index][2])}</text>'
        )
    x, y, label = points[-1]
    told = f"{title}: {words[0]} {number(x)}, {words[1]} {number(y)} at step {label}"
    return _figure(title, "", told, parts, note)


def _labelled(places: list[tuple[float, float]]) -> list[int]:
    """The points whose labels do not run into each other; the last one, then the others from the first."""
    kept: list[int] = []
    for index in [len(places) - 1, *range(len(places) - 1)]:
        left, top = places[index]
        if all(abs(left - places[other][0]) > 40 or abs(top - places[other][1]) > 14 for other in kept):
            kept.append(index)
    return sorted(kept)


def _drawn(series: list[Series], levels: list[Level]) -> str:
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y for curve in series for y in _visible(curve)] + [level.value for level in levels]
    frame = _Frame.around(xs, ys)
    parts = [_grid(frame), *(_level(frame, level) for level in levels), *(_curve(frame, curve) for curve in series)]
    return "".join(parts)


def _figure(title: str, legend: str, label: str, parts: list[str], note: str) -> str:
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    note = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{svg}{note}</figure>"


def number(value: float) -> str:
    """Four significant digits, readable: 0.05132, 1,234, 1e-05."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """The visible part of the plane."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, xs: list[float], ys: list[float]) -> _Frame:
        low, high = min(ys), max(ys)
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        bottom = 0.0 if 0 <= low <= margin * 5 else low - margin
        left, right = min(xs), max(xs)
        return cls(left, right if right > left else left + 1, bottom, high + margin)

    def widened(self) -> _Frame:
        """With room on both sides and above, for marks and labels."""
        wide, tall = 0.06 * (self.right - self.left), 0.06 * (self.high - self.low)
        return _Frame(self.left - wide, self.right + wide, self.low, self.high + tall)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (_HEIGHT - _TOP - _BOTTOM)


def _visible(curve: Series) -> list[float]:
    """Values that the frame must hold: of a long noisy curve all but the extreme half percent at either end."""
    values = sorted(y for _, y in curve.points)
    cut = len(values) // 200 if curve.noisy else 0
    return values[cut : len(values) - cut] + [y for _, y in _smooth(curve.points)] if cut else values


def _grid(frame: _Frame, whole: bool = True) -> str:
    parts = []
    for value in ticks(frame.low, frame.high, 5):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(frame.left, frame.right, 5):
        if not whole or value == round(value):  # there is no half of a step
            x = frame.x(value)
            anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{_tick(value)}</text>'
            )
    return "".join(parts)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within an interval, at most `most` plus one of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [round(index * distance, 12) for index in range(first, last + 1)]


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _level(frame: _Frame, level: Level) -> str:
    y = frame.y(level.value)
    return (
        f'<line class="level" style="stroke:{level.colour}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
        f"<title>{escape(level.name)}: {number(level.value)}</title></line>"
    )


def _curve(frame: _Frame, curve: Series) -> str:
    style = f'style="stroke:{curve.colour}"'
    if curve.smoothed:
        return (
            f'<path class="faint" {style} d="{_path(frame, _extremes(curve.points))}"/>'
            f'<path class="line" {style} d="{_path(frame, _thinned(_smooth(curve.points)))}"/>'
        )
    parts = [f'<path class="line" {style} d="{_path(frame, _thinned(curve.points))}"/>']
    if len(curve.points) <= 40:
        for x, y in curve.points:
            parts.append(
                f'<circle style="fill:{curve.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
                f"<title>{escape(curve.name)}, step {x:g}: {number(y)}</title></circle>"
            )
    return "".join(parts)


def _path(frame: _Frame, points: Points) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _smooth(points: Points) -> Points:
    """An exponential moving average over about a thirtieth of the curve, without a bias towards its start."""
    decay = 1 - 1 / max(4.0, len(points) / 30)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _thinned(points: Points) -> Points:
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride <= 1 else [*points[::stride], points[-1]]


def _extremes(points: Points) -> Points:
    """Lowest and highest point of each of equal pieces, so that thinning hides no spike."""
    stride = math.ceil(2 * len(points) / _MOST_POINTS)
    if stride <= 2:
        return points
    kept = []
    for start in range(0, len(points), stride):
        piece = points[start : start + stride]
        kept += sorted({min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])})
    return kept


def _legend(series: list[Series], levels: list[Level]) -> str:
    entries = [(curve.name, curve.end, curve.colour, "") for curve in series]
    entries += [(level.name, level.value, level.colour, " class=dashed") for level in levels]
    items = [
        f'<li><i{dashed} style="border-color:{colour}"></i>{escape(name)} <b>{number(value)}</b></li>'
        for name, value, colour, dashed in entries
    ]
    return f"<ul class=legend>{''.join(items)}</ul>"
