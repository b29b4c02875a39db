"""Charts as inline SVG. Colours are the page's CSS variables, so they follow its light or dark theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 130, 14, 44
LONGEST_NAME = 17  # characters that fit beside a chart
MOST_POINTS = 400  # of one curve
STRONGEST = 2.0  # doublings from what was expected that get a heatmap's full colour


@dataclass(frozen=True)
class Curve:
    """A line with its name at its end. ``style`` names a CSS class of the page."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


def line_chart(title: str, x_name: str, y_name: str, curves: list[Curve]) -> str:
    """Curves over a common pair of axes."""
    points = [point for curve in curves for point in curve.points]
    last_x = max(x for x, _ in points)
    x_ticks = [tick for tick in ticks(0, last_x, 8) if tick <= last_x]
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 9)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / last_x
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    parts = []
    for value in y_ticks:
        y = place(0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{value:g}", "tick end"))
    for value in x_ticks:
        x = place(value, y_ticks[0])[0]
        parts.append(text(x, bottom + 18, f"{value:,.0f}", "tick middle"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 6, x_name, "axis middle"))
    turn = f"translate(13 {(TOP + bottom) / 2}) rotate(-90)"
    parts.append(f'<text class="axis middle" transform="{turn}">{escape(y_name)}</text>')
    ends = []
    for curve in curves:
        placed = [place(x, y) for x, y in thinned(curve.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="curve {curve.style}" points="{path}"/>')
        if curve.dots:
            for (x, y), (step, value) in zip(placed, thinned(curve.points), strict=True):
                note = escape(f"{curve.name}: {value:.3f} at step {step:,.0f}")
                parts.append(
                    f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{note}</title></circle>"
                )
        if curve.name:
            ends.append((placed[-1][1], curve))
    for (_, curve), y in zip(sorted(ends, key=lambda end: end[0]), spaced([y for y, _ in ends]), strict=True):
        parts.append(text(right + 10, y + 4, short(curve.name), f"name {curve.style}"))
    return svg(title, WIDTH, HEIGHT, parts)


def heatmap(
    title: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    expected: Sequence[float],
) -> str:
    """Shares with their column's ``expected`` one: blank where equal, in one colour above, another below."""
    left, top, height = 122, 24, 30
    width = max(14.0, min(78.0, (WIDTH - left) / len(columns)))
    parts = []
    for j, name in enumerate(columns):
        if width >= 24 or j % 4 == 0:
            parts.append(text(left + (j + 0.5) * width, top - 8, name, "tick middle"))
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + i * height
        parts.append(text(left - 10, y + height / 2 + 4, short(name), "tick end"))
        for j, value in enumerate(row):
            ratio = math.log2(max(value, 1e-6) / max(expected[j], 1e-6)) / STRONGEST
            strength = min(abs(ratio), 1.0)
            side = "above" if ratio > 0 else "below"
            x = left + j * width
            note = escape(f"{name}, {columns[j]}: {value:.1%}")
            parts.append(
                f'<rect class="cell {side}" x="{x + 1:.1f}" y="{y + 1}" width="{width - 2:.1f}" '
                f'height="{height - 2}" rx="3" fill-opacity="{strength:.3f}"><title>{note}</title></rect>'
            )
            if width >= 34:
                tone = "strong" if strength > 0.75 else "weak"
                parts.append(text(x + width / 2, y + height / 2 + 4, f"{value:.0%}", f"value middle {tone}"))
    return svg(title, round(left + width * len(columns)) + 4, top + height * len(rows) + 4, parts)


def svg(title: str, width: int, height: int, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, at most about ``most``, that enclose low to high."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MOST_POINTS of the points, the last one among them."""
    stride = -(-len(points) // MOST_POINTS)
    return points[::-1][::stride][::-1]


def spaced(heights: list[float], least: float = 15) -> list[float]:
    """The heights in order, moved down where names would overlap and back up where they leave the chart."""
    places: list[float] = []
    for height in sorted(heights):
        places.append(max(height, places[-1] + least) if places else height)
    overflow = max(0.0, places[-1] - (HEIGHT - BOTTOM)) if places else 0.0
    return [place - overflow for place in places]
