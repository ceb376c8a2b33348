"""Stored results -> docs/benchmarks.svg: decode speed against context on two logarithmic axes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bittrue.bench.result import Result
from bittrue.bench.targets import Results

_WIDTH, _HEIGHT = 460, 340  # of one panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 64, 46
_OURS = "bittrue"
_OUR_COLOUR = "#000000"
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: told apart by all
_CONTEXTS = tuple(4.0**k for k in range(12))
_SPEEDS = tuple(digit * 10.0**k for k in range(-3, 8) for digit in (1, 2, 5))

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Tokens/s against context, one line per name."""

    title: str
    lines: Mapping[str, Sequence[Point]]


def panels(results: Results) -> list[Panel]:
    """One panel per model: its engines compared, and its frontier where one is stored."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for result in results.values():
        if result.benchmark == "peers":
            lines = found.setdefault(str(result.config["preset"]), {})
            for m in result.measurements:
                if m.name == "decode" and m.has(batch=1):
                    lines.setdefault(str(m.labels["engine"]), {})[float(m.labels["context"])] = m.median
    for result in results.values():
        if result.benchmark == "frontier":
            model = str(result.config["model"])
            preset = next((name for name in found if model == name or model.startswith(f"{name}-")), model)
            line = found.setdefault(preset, {}).setdefault(f"{_OURS}, frontier", {})
            line.update(_decode_line(result))
    return [
        Panel(name, {engine: sorted(points.items()) for engine, points in lines.items()})
        for name, lines in found.items()
        if any(lines.values())
    ]


def _decode_line(result: Result) -> dict[float, float]:
    found = (m for m in result.measurements if m.name == "decode" and m.has(batch=1))
    return {float(m.labels["context"]): m.median for m in found}


def svg(results: Results) -> str:
    """The picture; empty but valid where nothing is stored."""
    shown = panels(results)
    width = max(1, len(shown)) * _WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        "<title>Decode speed against context, batch 1</title>",
        f'<rect width="{width}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for i, panel in enumerate(shown):
        parts += [f'<g transform="translate({i * _WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    points = [point for line in panel.lines.values() for point in line]
    x, y = _Axis.over([p[0] for p in points], _CONTEXTS), _Axis.over([p[1] for p in points], _SPEEDS)
    yield _text(_LEFT, 18, f"{panel.title}: decode, tokens/s, batch 1", weight="bold")
    for value in x.ticks:
        at = x.place(value, _LEFT, _WIDTH - _RIGHT)
        yield _line(at, _TOP, at, _HEIGHT - _BOTTOM, "#dddddd")
        yield _text(at, _HEIGHT - _BOTTOM + 15, _short(value), anchor="middle")
    for value in y.ticks:
        at = y.place(value, _HEIGHT - _BOTTOM, _TOP)
        yield _line(_LEFT, at, _WIDTH - _RIGHT, at, "#dddddd")
        yield _text(_LEFT - 6, at + 4, f"{value:,g}", anchor="end")
    yield _text((_LEFT + _WIDTH) / 2, _HEIGHT - 10, "context, tokens", anchor="middle")
    for i, (name, line) in enumerate(panel.lines.items()):
        is_ours = name.startswith(_OURS)
        colour = _OUR_COLOUR if is_ours else _COLOURS[i % len(_COLOURS)]
        dash = ' stroke-dasharray="5 3"' if "frontier" in name else ""
        places = [(x.place(a, _LEFT, _WIDTH - _RIGHT), y.place(b, _HEIGHT - _BOTTOM, _TOP)) for a, b in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        stroke = 2.6 if is_ours else 1.4
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{stroke}"{dash}/>'
        for a, b in places:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>'
        column, row = i % 3, i // 3
        left, top = _LEFT + column * 130, 34 + row * 14
        yield _line(left, top - 4, left + 18, top - 4, colour, stroke)
        yield _text(left + 23, top, name)


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis between two ticks that enclose every value."""

    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], possible: Sequence[float]) -> "_Axis":
        """The ticks of ascending ``possible`` that are needed: at least two."""
        ticks = [tick for tick in possible if tick < max(values)]
        below = [tick for tick in ticks if tick <= min(values)]
        ticks = ticks[max(0, len(below) - 1) :]
        return cls((*ticks, next(tick for tick in possible if tick >= max(values) and tick not in ticks)))

    def place(self, value: float, start: float, end: float) -> float:
        low, high = math.log(self.ticks[0]), math.log(self.ticks[-1])
        return start + (math.log(value) - low) / (high - low) * (end - start)


def _short(value: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="#222222"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width}"/>'
