"""`bittrue verify MODEL`: checks laws L1, L2 and L8 on a checkpoint and prints what was compared."""

import os
import sys
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
from bittrue.probes.laws import LawResult
from bittrue.probes.verify import selection_length, verify_laws


def verify(
    model: Path,
    *,
    level: Literal["auto", "maths", "published"] = "auto",
    act: Literal["auto", "f32", "bf16"] = "auto",
    backend: Literal["cpu", "reference"] = "cpu",
    isa: Literal["auto", "portable", "avx2", "avx512"] = "auto",
    max_tokens: Annotated[int, Parameter(help="Longest prompt to compare.")] = 2400,
    rounds: Annotated[int, Parameter(help="Random variants of each law.")] = 2,
    seed: Annotated[int, Parameter(help="Seed of prompts, chunks and batches.")] = 0,
    json: Annotated[bool, Parameter(help="Print one JSON document instead of a table.")] = False,
) -> int:
    """Check that chunking (L1), batching (L2) and threads (L8) change no bit of MODEL's output on this
    machine.

    Exit code 0: every law holds; 1: one does not.
    """
    for name, value, least in (("max-tokens", max_tokens, 2), ("rounds", rounds, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    flags = {
        "model": str(model),
        "level": level,
        "act": act,
        "backend": backend,
        "isa": isa,
        "kv_memory": "512MiB",
    }
    with LoadProgress(Log(sys.stderr), str(model)) as progress:
        engine = Engine(model, load_run_config(None, flags), progress=progress)
    story = Console(stderr=True)
    facts = engine.fingerprint()
    choice = f"level {facts['level']}, activations {facts['act']}, {describe(engine.parts.runner.model.ops)}"
    story.print(f"{model}: {choice}", highlight=False)
    if selection_length(engine) > max_tokens:
        story.print(
            f"note: the index of this model leaves rows out only beyond {selection_length(engine)} tokens; "
            "raise --max-tokens to exercise it",
            highlight=False,
        )
    cores = os.cpu_count() or 1
    counts = sorted({1, 2, 5, cores})
    results = []
    with story.status("comparing") as status:
        for result in verify_laws(engine, max_tokens=max_tokens, rounds=rounds, seed=seed, threads=counts):
            results.append(result)
            status.update(f"{result.law}: {result.variant}")
    holds = all(result.holds for result in results)
    if json:
        rows = [{**msgspec.structs.asdict(_row(r))} for r in results]
        document = {"model": str(model), "fingerprint": facts, "holds": holds, "results": rows}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")
    else:
        Console().print(result_table(results))
    return 0 if holds else 1


class _Row(msgspec.Struct, frozen=True):
    law: str
    variant: str
    num_positions: int
    holds: bool
    first_difference: str | None


def _row(result: LawResult) -> _Row:
    return _Row(result.law, result.variant, result.num_positions, result.holds, result.first_difference)


def result_table(results: list[LawResult]) -> Table:
    """One line per law: variants tried, positions compared, the first difference."""
    table = Table("law", "variants", "positions", "first difference", "verdict")
    for law in dict.fromkeys(result.law for result in results):
        group = [result for result in results if result.law == law]
        broken = next((result for result in group if not result.holds), None)
        table.add_row(
            law,
            str(len(group)),
            f"{sum(result.num_positions for result in group):,}",
            "none" if broken is None else f"{broken.variant}: {broken.first_difference}",
            "holds" if broken is None else "BROKEN",
        )
    return table
