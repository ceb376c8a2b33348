"""Writes docs/benchmarks.md and docs/benchmarks.svg from the results stored in benchmarks/results."""

from pathlib import Path

from bittrue.bench.plot import svg
from bittrue.bench.report import page
from bittrue.bench.result import read_results

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = read_results(ROOT / "benchmarks" / "results")
    (ROOT / "docs" / "benchmarks.md").write_text(page(results), encoding="utf-8")
    (ROOT / "docs" / "benchmarks.svg").write_text(svg(results), encoding="utf-8")


if __name__ == "__main__":
    main()
