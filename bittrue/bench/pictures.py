"""The pictures beside docs/benchmarks.md, by file name."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import PurePath

from bittrue.bench import plot as speed
from bittrue.bench.report_rl_runs import distill_plots, gain_plots, staleness_plots
from bittrue.bench.result import Benchmark, Result
from bittrue.bench.targets import Results
from bittrue.train.plot import Plot, svg

SPEED = "benchmarks.svg"
_SVG = "http://www.w3.org/2000/svg"
_GAP = 12
_PLOTS: dict[Benchmark, Callable[[Result], Sequence[Plot]]] = {
    "rl-gain": gain_plots,
    "rl-staleness": staleness_plots,
    "rl-distill": distill_plots,
}


def pictures(results: Results) -> dict[str, str]:
    """Every picture as SVG text: the speeds of all engines, and one for each result that has curves."""
    own = {picture_of(file): sheet(_PLOTS[r.benchmark](r)) for file, r in results.items() if has_curves(r)}
    return {SPEED: speed.svg(results), **own}


def has_curves(result: Result) -> bool:
    return result.benchmark in _PLOTS


def picture_of(file: str) -> str:
    """``rl-gain.json`` -> ``benchmarks-rl-gain.svg``."""
    return f"benchmarks-{PurePath(file).stem}.svg"


def sheet(plots: Sequence[Plot]) -> str:
    """The plots one above the other, dark on white, whatever the page around them is."""
    ElementTree.register_namespace("", _SVG)
    whole = ElementTree.Element(f"{{{_SVG}}}svg", {"color": "#222222", "role": "img"})
    ground = ElementTree.SubElement(whole, f"{{{_SVG}}}rect", {"fill": "#ffffff"})
    width = top = 0.0
    for plot in plots:
        part = ElementTree.fromstring(svg(plot))
        _, _, own_width, height = map(float, part.attrib["viewBox"].split())
        place = {"x": 0.0, "y": top, "width": own_width, "height": height}
        part.attrib |= {name: f"{value:g}" for name, value in place.items()}
        whole.append(part)
        width, top = max(width, own_width), top + height + _GAP
    ground.attrib |= {"width": f"{width:g}", "height": f"{top:g}"}
    whole.set("viewBox", f"0 0 {width:g} {top:g}")
    return ElementTree.tostring(whole, encoding="unicode") + "\n"
