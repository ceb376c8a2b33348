"""Writes docs/benchmarks.md and its pictures from the results stored in benchmarks/results."""

from pathlib import Path

from bittrue.bench.pictures import pictures
from bittrue.bench.report import page
from bittrue.bench.result import read_results

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = read_results(ROOT / "benchmarks" / "results")
    (ROOT / "docs" / "benchmarks.md").write_text(page(results), encoding="utf-8")
    for name, picture in pictures(results).items():
        (ROOT / "docs" / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
