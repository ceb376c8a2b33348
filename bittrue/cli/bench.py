"""`bittrue bench ...`: speed of ops, of long contexts, of a server under load, and of the server itself."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from bittrue.bench.frontier import Frontier, FrontierBench, engine_config
from bittrue.bench.linear import bench_many_rows, bench_one_row
from bittrue.bench.machine import Roof, measure_roof
from bittrue.bench.ops import bench_cases
from bittrue.bench.result import Benchmark, Label, Measurement, Result, encode_result, new_result
from bittrue.bench.server import bench_added, bench_start, running_server
from bittrue.bench.serving import Endpoint, serve_load
from bittrue.bench.trace import Load, TraceKind
from bittrue.cli.ops import chosen_cases
from bittrue.engine.engine import Engine
from bittrue.errors import UsageError
from bittrue.obs.log import Log
from bittrue.obs.progress import LoadProgress
from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_threads, threads_of

Json = Annotated[bool, Parameter(help="Print one JSON document instead of a table.")]
Threads = Annotated[int, Parameter(help="CPU threads; 0 = every core.")]
Seed = Annotated[int, Parameter(help="Seed of prompts and random rows.")]


def ops(
    *,
    op: Annotated[str | None, Parameter(help="Only this op.")] = None,
    isa: Annotated[Literal["portable", "avx2", "avx512"] | None, Parameter(help="Default: the best.")] = None,
    threads: Threads = 0,
    seconds: Annotated[float, Parameter(help="Least time spent on a case.")] = 0.05,
    json: Json = False,
) -> int:
    """Time every case of every op on the CPU backend, next to what this machine can copy, read and multiply.

    With linear among them, also: many rows against torch's product, and one row over weights that no cache
    holds against the memory.
    """
    table = select("cpu", isa=isa)
    set_threads(table, threads or os.cpu_count() or 1)
    story = Console(stderr=True)
    with story.status("timing") as status:
        roof = measure_roof(seconds=20 * seconds)
        found = list(roof.measurements)

        def take(measurements: Iterable[Measurement]) -> None:
            for m in measurements:
                found.append(m)
                status.update(f"timed {m.name}: {m.labels.get('case', '')}")

        take(bench_cases(table, chosen_cases(op), seconds=seconds, seed=0))
        if op in (None, "linear"):
            take(bench_many_rows(table, seconds=10 * seconds, seed=0))
            take(bench_one_row(table, seconds=10 * seconds, seed=0))
    config: dict[str, Label] = {"ops": table.name, "threads": threads_of(table), "seconds": seconds}
    show(story, "ops", config, found, ops_table(found, roof), json=json)
    return 0


def frontier(
    model: Path,
    *,
    contexts: Annotated[str, Parameter(help="Token counts, by comma.")] = "256,4096,32768,131072,917504",
    batch: Annotated[int, Parameter(help="Sequences that decode together.")] = 1,
    max_real_prefill: Annotated[int, Parameter(help="Beyond: random rows in place of a prefill.")] = 131072,
    rounds: Annotated[int, Parameter(help="Times every context is decoded at, in turn.")] = 5,
    steps: Annotated[int, Parameter(help="Timed decode steps of a context in a round.")] = 8,
    prefill_seconds: Annotated[float, Parameter(help="A prefill is repeated while all fit in this.")] = 10.0,
    threads: Threads = 0,
    isa: Literal["auto", "portable", "avx2", "avx512"] = "auto",
    level: Literal["auto", "maths", "published"] = "auto",
    act: Literal["auto", "f32", "bf16"] = "auto",
    max_step_tokens: Annotated[int, Parameter(help="Most tokens in one engine step.")] = 512,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Prefill speed up to each context, decode speed and resident memory at it, with MODEL in this process.

    Decode at a context beyond --max-real-prefill runs over random rows, and is labelled `filled`.
    """
    plan = Frontier(
        contexts=parse_contexts(contexts),
        batch=batch,
        max_real_prefill=max_real_prefill,
        rounds=rounds,
        steps=steps,
        prefill_seconds=prefill_seconds,
        seed=seed,
    )
    knobs = {"isa": isa, "level": level, "act": act, "threads": threads, "max_step_tokens": max_step_tokens}
    run = engine_config(model, plan, **knobs)
    story = Console(stderr=True)
    with LoadProgress(Log(sys.stderr), str(model)) as progress:
        engine = Engine(model, run, progress=progress)
    with story.status("starting") as status:
        found = list(FrontierBench(engine, plan, status.update).run())
    parts = engine.parts
    config: dict[str, Label] = {
        "model": model.name,
        "level": parts.level,
        "act": parts.act,
        "ops": parts.runner.model.ops.name,
        "threads": threads_of(parts.runner.model.ops),
        "max_step_tokens": run.max_step_tokens,
        "max_real_prefill": plan.max_real_prefill,
        "index_heads": engine.config.index_num_heads,
        "index_topk": engine.config.index_topk,
        "weight_version": parts.weight_version,
    }
    show(story, "frontier", config, found, plain_table(found), json=json)
    return 0


def serving(
    url: str,
    *,
    trace: TraceKind = "closed",
    concurrency: Annotated[int, Parameter(help="Open requests (closed), or those of one burst.")] = 8,
    rate: Annotated[float, Parameter(help="Requests per second (poisson, burst).")] = 1.0,
    prompt_tokens: int = 256,
    output_tokens: int = 64,
    spread: Annotated[float, Parameter(help="Lengths vary by up to this share.")] = 0.0,
    requests: int = 32,
    vocab: Annotated[int, Parameter(help="Prompt token ids are below this.")] = 1000,
    model: Annotated[str, Parameter(help="Default: the first the server lists.")] = "",
    api_key: str = "",
    chat: Annotated[bool, Parameter(help="Ask /v1/chat/completions, with text.")] = False,
    ignore_eos: Annotated[bool, Parameter(help="Ask for answers of full length.")] = True,
    timeout: Annotated[float, Parameter(help="Seconds a request may take.")] = 600.0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Send a load to an OpenAI-compatible server at URL and measure its answers as they stream.

    Exit code 0 when every request was answered whole, else 1.
    """
    load = Load(
        kind=trace,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        spread=spread,
        vocab=vocab,
        seed=seed,
    )
    endpoint = Endpoint(url, model, api_key, chat, ignore_eos, timeout)
    story = Console(stderr=True)
    with story.status(f"{requests} requests to {url}"):
        served = serve_load(endpoint, load)
    for reason, count in served.errors.items():
        story.print(f"{count} of {requests} requests failed: {reason}", highlight=False, markup=False)
    labels: dict[str, Label] = {"trace": trace}
    labels |= {"concurrency": concurrency} if trace != "poisson" else {}
    labels |= {"rate": rate} if trace != "closed" else {}
    found = list(served.measurements(**labels))
    config: dict[str, Label] = {
        "url": url,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "spread": spread,
        "chat": chat,
        "seed": seed,
    }
    show(story, "serving", config, found, plain_table(found), json=json)
    return 1 if served.errors else 0


def server(
    model: Path,
    *,
    streams: Annotated[int, Parameter(help="Requests that stream together.")] = 16,
    prompt_tokens: int = 32,
    output_tokens: int = 64,
    rounds: Annotated[int, Parameter(help="Rounds of in process and over HTTP, in turn.")] = 5,
    starts: Annotated[int, Parameter(help="Times the server is started.")] = 3,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Measure what the server adds to MODEL: start to first token, and time per streamed token."""
    for name, value in (("starts", starts), ("rounds", rounds), ("output-tokens", output_tokens - 1)):
        if value < 1:
            raise UsageError(f"--{name} is too small; it must be at least {2 if 'tokens' in name else 1}")
    story = Console(stderr=True)
    flags = [f"--threads={threads}", "--max-context=4096", "--kv-memory=256MiB"]
    with story.status("starting the server") as status:
        found = list(bench_start(model, flags, repeats=starts))
        status.update("streaming")
        engine = Engine(model, threads=threads, max_context=4096, kv_memory=256 << 20, prefix_cache=False)
        load = Load(
            requests=streams,
            concurrency=streams,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocab=min(1000, engine.config.vocab_size),
            seed=seed,
        )
        with running_server(model, *flags) as url:
            found += bench_added(engine, url, load, rounds=rounds)
    config: dict[str, Label] = {
        "model": model.name,
        "threads": threads_of(engine.parts.runner.model.ops),
        "prompt_tokens": prompt_tokens,
    }
    show(story, "server", config, found, plain_table(found), json=json)
    return 0


def parse_contexts(text: str) -> tuple[int, ...]:
    """``"256,4096"`` -> (256, 4096). Raises UsageError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--contexts is {text!r}; write token counts by comma, such as 256,4096") from None


def show(
    story: Console,
    benchmark: Benchmark,
    config: dict[str, Label],
    measurements: Sequence[Measurement],
    table: Table,
    *,
    json: bool,
) -> None:
    """Prints the result: as JSON alone, or as a table with the place of the measurement on stderr."""
    result = new_result(benchmark, shlex.join(["bittrue", *sys.argv[1:]]), config, measurements)
    if json:
        sys.stdout.write(encode_result(result))
        return
    story.print(place(result), highlight=False, markup=False)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)


def place(result: Result) -> str:
    """Where a result comes from, in one line."""
    config = ", ".join(f"{name} {value}" for name, value in result.config.items())
    return f"{result.machine}, {result.cores} cores, commit {result.commit}, {result.date}; {config}"


def ops_table(measurements: Sequence[Measurement], roof: Roof) -> Table:
    """One line per case: median, spread, and the rates of the least bytes and operations it needs, each with
    its share of the machine's copy bandwidth and of its matrix product."""
    table = Table("op", "case", "median", "10-90 %", "GB/s", "of copy", "GFLOP/s", "of peak")
    for m in measurements:
        rates = [""] * 4
        if m.bytes:
            share = m.bytes_per_s / roof.copy.bytes_per_s
            rates[:2] = [f"{m.bytes_per_s / 1e9:.2f}", f"{share:.0%}"]
        if m.flops:
            share = m.flops_per_s / roof.product.flops_per_s
            rates[2:] = [f"{m.flops_per_s / 1e9:.2f}", f"{share:.0%}"]
        case = ", ".join(str(m.labels[name]) for name in ("of", "case") if name in m.labels)
        table.add_row(m.name, case, shown(m, m.median), f"{shown(m, m.low)} - {shown(m, m.high)}", *rates)
    return table


LEAST_SHARE = 0.05  # of the longest op: what a table still shows


def plain_table(measurements: Sequence[Measurement]) -> Table:
    """One line per measurement; of the times by op those that count (JSON holds all)."""
    table = Table("measurement", "median", "10-90 %", "repeats", "labels")
    longest: dict[str, float] = {}
    for m in measurements:
        if "op" in m.labels:
            # The longest op of a step comes first.
            step = f"{m.name} {m.labels['context']}"
            if m.median < LEAST_SHARE * longest.setdefault(step, m.median):
                continue
        labels = ", ".join(f"{name} {_label(value)}" for name, value in m.labels.items())
        spread = f"{shown(m, m.low)} - {shown(m, m.high)}" if m.repeats > 1 else ""
        table.add_row(m.name, shown(m, m.median), spread, str(m.repeats), labels)
    return table


def shown(m: Measurement, value: float) -> str:
    """A value of the measurement with its unit, in a size people read."""
    if m.unit == "s":
        return f"{value * 1e6:.1f} us" if abs(m.median) < 1e-3 else f"{value * 1e3:.2f} ms"
    if m.unit in ("bytes", "bytes/s"):
        return f"{value / 1e6:.1f} M{'B/s' if m.unit == 'bytes/s' else 'B'}"
    if m.unit == "ratio":
        return f"{value:.3f}"
    return f"{value:g}" if m.unit == "count" else f"{value:.1f} {m.unit}"


def _label(value: Label) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
