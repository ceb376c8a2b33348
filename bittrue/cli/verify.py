"""`bittrue verify MODEL`: checks laws L1 to L8 on a checkpoint and prints what was compared and exercised."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from bittrue.config.load import load_run_config
from bittrue.engine.engine import Engine
from bittrue.errors import UsageError
from bittrue.obs.log import Log
from bittrue.obs.progress import LoadProgress
from bittrue.ops.dispatch import describe
from bittrue.probes.result import LAWS, LawResult, Row, overall, summary
from bittrue.probes.verify import Options, law_numbers, notes, verify_laws

EXIT = {"holds": 0, "broken": 1, "inconclusive": 3}


def verify(
    model: Path,
    *,
    level: Literal["auto", "maths", "published"] = "auto",
    act: Literal["auto", "f32", "bf16"] = "auto",
    backend: Literal["cpu", "reference"] = "cpu",
    isa: Literal["auto", "portable", "avx2", "avx512"] = "auto",
    laws: Annotated[str, Parameter(help="Laws to check, by comma.")] = ",".join(LAWS),
    max_tokens: Annotated[int, Parameter(help="Longest prompt to compare.")] = 2400,
    rounds: Annotated[int, Parameter(help="Random variants of each law.")] = 2,
    kills: Annotated[int, Parameter(help="Times the engine process is killed.")] = 3,
    seed: Annotated[int, Parameter(help="Seed of everything that is random.")] = 0,
    json: Annotated[bool, Parameter(help="Print one JSON document instead of a table.")] = False,
) -> int:
    """Check on this machine that no fast path changes a bit of MODEL's output: chunking (L1), batching (L2),
    prefix cache (L3), tiers (L4), speculation (L5), preemption (L6), crash (L7), threads (L8), and L3 to L6
    all at once.

    Exit code 0: every law holds; 1: one is broken; 3: none is, but one was not exercised.
    """
    options = Options(
        max_tokens=max_tokens,
        rounds=rounds,
        seed=seed,
        threads=tuple(sorted({1, 2, 5, os.cpu_count() or 1})),
        laws=_chosen(laws),
        kills=kills,
    )
    for name, value, least in (
        ("max-tokens", max_tokens, 2),
        ("rounds", rounds, 1),
        ("kills", kills, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    choices = {"level": level, "act": act, "backend": backend, "isa": isa}
    engine = _plain_engine(model, choices)
    results = _run(engine, options)
    rows = summary(results)
    verdict = overall(rows)
    if json:
        document = {
            "model": str(model),
            "fingerprint": engine.fingerprint(),
            "verdict": verdict,
            "laws": rows,
            "comparisons": [_comparison(result) for result in results],
        }
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")
    else:
        Console().print(result_table(rows))
    return EXIT[verdict]


def _chosen(laws: str) -> tuple[str, ...]:
    try:
        return law_numbers(laws)
    except ValueError as error:
        raise UsageError(f"--laws {laws}: {error}") from None


def _plain_engine(model: Path, choices: Mapping[str, str]) -> Engine:
    """What all others are held to: it takes no fast path."""
    flags = {
        "model": str(model),
        "kv_memory": "512MiB",
        "max_running": 16,
        "prefix_cache": False,
        "log_level": "error",
        **choices,
    }
    with LoadProgress(Log(sys.stderr), str(model)) as progress:
        return Engine(model, load_run_config(None, flags), progress=progress)


def _run(engine: Engine, options: Options) -> list[LawResult]:
    story = Console(stderr=True)
    facts = engine.fingerprint()
    choice = f"level {facts['level']}, activations {facts['act']}, {describe(engine.parts.runner.model.ops)}"
    story.print(f"{engine.run.model}: {choice}", highlight=False)
    for note in notes(engine, options):
        story.print(f"note: {note}", highlight=False)
    results = []
    with story.status("comparing") as status:
        for result in verify_laws(engine, options):
            results.append(result)
            status.update(f"{result.law} {LAWS[result.law].name}: {result.variant}")
    return results


def _comparison(result: LawResult) -> dict[str, object]:
    return {
        "law": result.law,
        "variant": result.variant,
        "positions": result.num_positions,
        "exercised": dict(result.exercised),
        "first_difference": result.first_difference,
    }


def result_table(rows: list[Row]) -> Table:
    """One line per law: what was compared, what the fast paths really did, the first difference."""
    table = Table("law", "variants", "positions", "exercised", "first difference", "verdict")
    for row in rows:
        counts = [f"{name}: {count:,}" for name, count in row.exercised.items()]
        counts += [f"not exercised: {name}" for name in row.missing]
        table.add_row(
            f"{row.law} {row.name}",
            str(row.variants),
            f"{row.positions:,}",
            "\n".join(counts),
            row.first_difference or "none",
            "holds" if row.verdict == "holds" else row.verdict.upper(),
        )
    return table
