"""Line plots as SVG text: steps on a linear axis, values on a linear or a logarithmic one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 34
_LEGEND_ROW = 15
_COLUMNS = 4  # of the legend, at most
_LETTER = 6.2  # about the width of one
_RULE = 'stroke="currentColor" stroke-opacity="0.14"'
_BAR_ROW, _BAR_NUMBERS = 22, 130
_MAX_POINTS = 280  # of a line: about one every two pixels
# Okabe and Ito, told apart by all; then their darker halves.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#004b75",
    "#8a3d00",
    "#006649",
    "#84506c",
)

# On a dark page: rules of CSS, which win over what a picture says of itself.
_ON_DARK = (
    *("#4ea6e0", "#ff8a3d", "#2cc99a", "#e5a3c8", "#f0b73a", "#8accf2", "#eeeeee"),
    *("#7fc0de", "#d39a66", "#66c7a4", "#cfa0c0"),
)
DARK_STYLE = "\n".join(
    f'[stroke="{light}"] {{ stroke: {dark}; }} [fill="{light}"] {{ fill: {dark}; }}'
    for light, dark in zip(COLOURS, _ON_DARK, strict=True)
)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: a value for each of its steps, ascending. ``weights``: how much each counts in a mean;
    ``is_dashed``: of another run than the others. ``tint``: its place among the colours, where lines share
    one; else its own place."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    weights: Sequence[float] | None = None
    is_dashed: bool = False
    tint: int | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over one axis of steps. ``marks``: steps with a vertical line."""

    title: str
    lines: Sequence[Line]
    is_logarithmic: bool = False
    marks: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    is_logarithmic: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return start + (at - low) / (high - low) * (end - start)


def svg(plot: Plot) -> str:
    """The picture of a plot, with its legend below; says so where there is nothing to draw."""
    lines = [line for line in plot.lines if line.steps]
    rows = -(-len(lines) // _columns(lines)) if len(lines) > 1 else 0
    parts = _head(plot.title, _HEIGHT + rows * _LEGEND_ROW)
    parts += _curves(plot, lines) if lines else [_text(_LEFT, _HEIGHT / 2, "nothing measured yet")]
    return "\n".join([*parts, "</svg>"])


def bars(title: str, counts: Mapping[str, float]) -> str:
    """The picture of counts, a bar each, with its number and its share of all."""
    total = sum(counts.values())
    rows = [(name, count) for name, count in counts.items() if count] if total else []
    start = _LETTER * max((len(name) for name, _ in rows), default=0) + 12
    room = _WIDTH - start - _BAR_NUMBERS
    parts = _head(title, _TOP + _BAR_ROW * max(len(rows), 1) + 8)
    if not rows:
        parts.append(_text(_LEFT, _TOP + 16, "none"))
    for i, (name, count) in enumerate(rows):
        top = _TOP + 4 + i * _BAR_ROW
        width = max(count / max(value for _, value in rows) * room, 1.0)
        parts.append(_text(start - 6, top + 12, name, anchor="end"))
        parts.append(f'<rect x="{start}" y="{top}" width="{width:.1f}" height="16" fill="{COLOURS[0]}"/>')
        parts.append(_text(start + width + 6, top + 12, f"{count:,.0f} ({count / total:.1%})"))
    return "\n".join([*parts, "</svg>"])


def _head(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="11" role="img">',
        f"<title>{escape(title)}</title>",
        _text(_LEFT, 17, title, weight="bold"),
    ]


def _columns(lines: Sequence[Line]) -> int:
    """Of a legend whose names do not run into each other."""
    longest = max(len(line.name) for line in lines)
    return max(1, min(_COLUMNS, int((_WIDTH - _LEFT) / (_LETTER * longest + 26))))


def binned(line: Line, first: int, last: int) -> list[Point]:
    """(step, mean) of up to _MAX_POINTS equal parts of the steps; parts without a value are left out."""
    width = max(1.0, (last - first + 1) / _MAX_POINTS)
    groups: dict[int, list[int]] = {}
    for i, step in enumerate(line.steps):
        groups.setdefault(int((step - first) / width), []).append(i)
    found = []
    for members in groups.values():
        weights = [1.0 if line.weights is None else line.weights[i] for i in members]
        total = sum(weights) or 1.0
        mean = sum(line.values[i] * w for i, w in zip(members, weights, strict=True)) / total
        found.append((sum(line.steps[i] for i in members) / len(members), mean))
    return found


def _curves(plot: Plot, lines: Sequence[Line]) -> Iterator[str]:
    first = min(line.steps[0] for line in lines)
    last = max(max(line.steps[-1] for line in lines), first + 1)
    bins = [binned(line, first, last) for line in lines]
    values = [mean for found in bins for _, mean in found]
    x = _linear(first, last)
    y = _logarithmic(values) if plot.is_logarithmic else _linear(min(values), max(values))
    columns = _columns(lines)
    yield from _grid(x, y)
    for mark in plot.marks:
        if first <= mark <= last:
            at = x.place(mark, _LEFT, _WIDTH - _RIGHT)
            yield f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#b00020" '
            yield 'stroke-dasharray="3 3"/>'
    for i, (line, found) in enumerate(zip(lines, bins, strict=True)):
        colour = COLOURS[(i if line.tint is None else line.tint) % len(COLOURS)]
        places = [
            (x.place(step, _LEFT, _WIDTH - _RIGHT), y.place(mean, _HEIGHT - _BOTTOM, _TOP))
            for step, mean in found
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dashes = ' stroke-dasharray="5 3"' if line.is_dashed else ""
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'
        if len(places) == 1:
            yield f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
        if len(lines) > 1:
            left = _LEFT + i % columns * ((_WIDTH - _LEFT) / columns)
            top = _HEIGHT + 7 + i // columns * _LEGEND_ROW
            place = f'x1="{left:.1f}" y1="{top - 4}" x2="{left + 14:.1f}" y2="{top - 4}"'
            yield f'<line {place} stroke="{colour}" stroke-width="2.5"{dashes}/>'
            yield _text(left + 19, top, line.name)


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for value in y.ticks:
        at = y.place(value, _HEIGHT - _BOTTOM, _TOP)
        yield f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" {_RULE}/>'
        yield _text(_LEFT - 6, at + 4, short(value), anchor="end")
    for value in x.ticks:
        at = x.place(value, _LEFT, _WIDTH - _RIGHT)
        bottom = _HEIGHT - _BOTTOM
        yield f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}" {_RULE}/>'
        yield _text(at, bottom + 15, short(value), anchor="middle")
    yield _text(_WIDTH - _RIGHT, _HEIGHT - 5, "step", anchor="end")


def _linear(low: float, high: float) -> _Axis:
    """About five round ticks between or around the values; zeros alone lie on the ground."""
    if low == high == 0.0:
        high = 1.0
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    rough = (high - low) / 5
    unit: float = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(k * step, 12) for k in range(first, last + 1))
    return _Axis(ticks[0], ticks[-1], ticks)


def _logarithmic(values: Sequence[float]) -> _Axis:
    """Ticks at 1, 2 and 5 times powers of ten that enclose the values, which are above 0; at most nine."""
    positive = [value for value in values if value > 0] or [1.0]
    lowest, highest = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    digits = (1, 2, 5) if highest - lowest <= 3 else (1,)
    ticks = [digit * 10.0**k for k in range(lowest, highest + 1) for digit in digits]
    low = max((tick for tick in ticks if tick <= min(positive)), default=ticks[0])
    high = min((tick for tick in ticks if tick >= max(positive) and tick > low), default=ticks[-1] * 10)
    return _Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), is_logarithmic=True)


def short(value: float) -> str:
    """A number as an axis shows it: at most four digits, k and M for thousands and millions."""
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="currentColor"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
