"""Cells and rows of the generated page."""

from bittrue.bench.result import Measurement


def head(*names: str) -> str:
    return row(*names) + "|" + "---|" * len(names) + "\n"


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def with_spread(m: Measurement | None) -> str:
    """The median, with the range where there is one; empty where nothing was measured."""
    if m is None:
        return ""
    if m.repeats == 1:
        return shown(m.median, m.unit)
    return f"{shown(m.median, m.unit)} ({shown(m.low, m.unit)} to {shown(m.high, m.unit)})"


def shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.2f} s" if abs(value) >= 0.1 else f"{value * 1e3:.3f} ms"
    if unit == "nats":
        return f"{value:.2e}" if value else "0"
    if unit == "ratio":
        return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return f"{value:,.0f} {unit}".removesuffix(" count")
