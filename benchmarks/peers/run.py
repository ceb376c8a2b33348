"""Runs bittrue and its peers on one checkpoint, in turn, and stores tokens/s and ratios as a result.

Usage: python benchmarks/peers/run.py --peers-python VENV/bin/python --out benchmarks/results/peers-t256.json
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from agreement import compare
from protocol import Worker

from bittrue.bench.result import Label, Measurement, measured, new_result, write_result
from bittrue.config.model import ModelConfig
from bittrue.kv.layout import CSA_RATIO
from bittrue.model.presets import make_checkpoint

HERE = Path(__file__).parent
OURS = "bittrue"
PRECISION = "bf16"
# Per engine: the worker and its options, with places for paths and numbers.
PEERS: dict[str, tuple[str, ...]] = {
    "hf-f32": ("worker_hf.py", "{checkpoint}", "--dtype", "float32", "--threads", "{threads}"),
    "hf-bf16": ("worker_hf.py", "{checkpoint}", "--dtype", "bfloat16", "--threads", "{threads}"),
    "llama.cpp-bf16": ("worker_llama.py", "{gguf-bf16}", "--threads", "{threads}"),
    "llama.cpp-f32": ("worker_llama.py", "{gguf-f32}", "--kv", "f32", "--threads", "{threads}"),
    "llama.cpp-q8_0": ("worker_llama.py", "{gguf-q8_0}", "--threads", "{threads}"),
    "flyweight-bf16": ("worker_flyweight.py", "{gguf-flyweight}"),
}
DEFAULT_PEERS = "hf-f32,llama.cpp-bf16,flyweight-bf16"
# Not the same model: its numbers are a bar for speed only, and it is never checked.
SPEED_BAR_ONLY = ("flyweight-bf16",)


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the table: how many sequences decode together, and how long their prompts are."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


WARM_TOKENS = 64  # of each prompt, computed once before anything is timed
CELLS = (Cell(1, 256), Cell(1, 4096), Cell(8, 4096), Cell(1, 32768))
QUICK_CELLS = (Cell(1, 256), Cell(2, 512))


@dataclass(frozen=True, slots=True)
class Turns:
    """How long and how often everybody has a turn."""

    prefill_rounds: int
    decode_rounds: int
    steps: int  # decode steps of a turn
    seconds: float  # of a turn at most, beyond its first steps
    patience: float  # a prefill that takes longer is measured once


@dataclass(slots=True)
class Timings:
    """What one engine did in one cell: prefill seconds, and decode steps by round."""

    prefills: list[float] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0


class Comparison:
    """The workers of one run. Only one of them computes at a time."""

    def __init__(self, workers: dict[str, Worker], turns: Turns, vocab_size: int) -> None:
        self.workers, self.turns, self.vocab_size = workers, turns, vocab_size

    def measure(self, cell: Cell) -> Iterator[Measurement]:
        prompts = [random_ids(cell.context, self.vocab_size, seed) for seed in range(cell.batch)]
        timings = {name: Timings() for name in self.workers}
        for worker in self.workers.values():
            worker.ask("open", prompts=[prompt[:WARM_TOKENS] for prompt in prompts])
            worker.ask("close")
        for number in range(self.turns.prefill_rounds):
            for name in self._order(number):
                self._prefill(name, prompts, timings[name])
        for number in range(self.turns.decode_rounds):
            for name in self._order(number):
                answer = self.workers[name].ask("decode", steps=self.turns.steps, seconds=self.turns.seconds)
                timings[name].rounds.append(answer["seconds"])
                timings[name].peak_bytes = answer["peak_bytes"]
        for worker in self.workers.values():
            worker.ask("close")
        yield from _speeds(cell, timings)
        yield from _ratios(cell, timings)

    def _prefill(self, name: str, prompts: list[list[int]], timings: Timings) -> None:
        """Opens the cell's sequences. They stay open after the last round, for the decode steps."""
        if timings.prefills:
            if timings.prefills[0] > self.turns.patience:
                return
            self.workers[name].ask("close")
        timings.prefills.append(self.workers[name].ask("open", prompts=prompts)["seconds"])
        tell(f"  {name}: prefill of {len(prompts)} x {len(prompts[0])} tokens, {timings.prefills[-1]:.2f} s")

    def _order(self, number: int) -> list[str]:
        names = list(self.workers)
        return names if number % 2 == 0 else names[::-1]


def _speeds(cell: Cell, timings: dict[str, Timings]) -> Iterator[Measurement]:
    num_tokens = cell.batch * cell.context
    for name, t in timings.items():
        labels: dict[str, Label] = {"engine": name, "batch": cell.batch, "context": cell.context}
        yield measured("prefill", "tokens/s", [num_tokens / seconds for seconds in t.prefills], labels)
        steps = [cell.batch / step for each in t.rounds for step in each]
        yield measured("decode", "tokens/s", steps, {**labels, "peak_bytes": t.peak_bytes})


def _ratios(cell: Cell, timings: dict[str, Timings]) -> Iterator[Measurement]:
    """Our speed over that of the fastest peer, round by round where both have the round."""
    peers = {name: t for name, t in timings.items() if name != OURS}
    if OURS not in timings or not peers:
        return
    labels: dict[str, Label] = {"batch": cell.batch, "context": cell.context}
    best = min(peers, key=lambda name: float(np.median(peers[name].prefills)))
    pairs = list(zip(peers[best].prefills, timings[OURS].prefills, strict=False))
    ratios = [theirs / ours for theirs, ours in pairs]
    yield measured("prefill over fastest peer", "ratio", ratios, {**labels, "peer": best})
    decode = {name: [float(np.median(steps)) for steps in t.rounds] for name, t in timings.items()}
    best = min(peers, key=lambda name: float(np.median(decode[name])))
    ratios = [theirs / ours for theirs, ours in zip(decode[best], decode[OURS], strict=True)]
    yield measured("decode over fastest peer", "ratio", ratios, {**labels, "peer": best})


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    source = np.random.Generator(np.random.PCG64(seed))
    ids: list[int] = source.integers(8, vocab_size, count).tolist()
    return ids


def prepare(folder: Path, preset: str, names: Sequence[str], peers_python: Path) -> dict[str, Path]:
    """The checkpoint and its GGUF forms, made where they are missing: {placeholder: path}."""
    checkpoint = folder / f"{preset}-{PRECISION}"
    if not checkpoint.exists():
        make_checkpoint(preset, 0, PRECISION, checkpoint)
    forms = {
        "gguf-bf16": ("bf16", "gpt-2"),
        "gguf-f32": ("f32", "gpt-2"),
        "gguf-q8_0": ("q8_0", "gpt-2"),
        "gguf-flyweight": ("bf16", "joyai-llm"),
    }
    paths = {"checkpoint": checkpoint}
    for form, (matrices, pre) in forms.items():
        if any(f"{{{form}}}" in PEERS[name] for name in names):
            paths[form] = folder / f"{preset}-{form.removeprefix('gguf-')}.gguf"
            if not paths[form].exists():
                tell(f"writing {paths[form].name}")
                options = ["--matrices", matrices, "--pre", pre]
                command = [
                    str(peers_python),
                    str(HERE / "to_gguf.py"),
                    str(checkpoint),
                    str(paths[form]),
                    *options,
                ]
                subprocess.run(command, check=True, stdout=sys.stderr)
    return paths


def start(stack: ExitStack, name: str, command: Sequence[str], threads: int) -> Worker:
    """A worker that ends with ``stack``."""
    worker = Worker(name, command, threads=threads)
    stack.callback(worker.end)
    tell(f"{name}: {worker.facts}")
    return worker


def peer_command(name: str, paths: dict[str, Path], threads: int, python: str) -> list[str]:
    words = {key: str(path.resolve()) for key, path in paths.items()} | {"threads": str(threads)}
    return [python, *(word.format_map(words) for word in PEERS[name])]


def our_command(checkpoint: Path, threads: int, act: str, cells: Sequence[Cell]) -> list[str]:
    longest, most = max(cell.context for cell in cells), max(cell.batch for cell in cells)
    command = [sys.executable, "worker_bittrue.py", str(checkpoint.resolve()), "--act", act]
    return [*command, "--threads", str(threads), "--max-context", str(longest), "--max-batch", str(most)]


def check(
    workers: dict[str, Worker], exact: Worker, config: ModelConfig, lengths: Sequence[int]
) -> Iterator[Measurement]:
    """Compares every engine with ``exact``, ours in float32, on random texts of ``lengths`` tokens.

    Raises SystemExit when one computes another model, but for the engines that are known to.
    """
    failed = []
    for length in lengths:
        ids = random_ids(length, config.vocab_size, seed=77)
        expected = exact.ask("score", token_ids=ids)
        for name, worker in workers.items():
            found = compare(expected, worker.ask("score", token_ids=ids))
            is_pruned = length > unpruned_tokens(config)
            agrees = found.agrees(is_exact="f32" in name, is_pruned=is_pruned)
            tell(f"  {name}, {length} tokens: {'agrees' if agrees else 'DIFFERS'}; {found.describe()}")
            if not agrees and name not in SPEED_BAR_ONLY:
                failed.append(f"{name} at {length} tokens")
            yield from found.measurements({"engine": name, "tokens": length, "agrees": agrees})
    if failed:
        raise SystemExit(f"not timed, for these compute something else: {', '.join(failed)}")


def unpruned_tokens(config: ModelConfig) -> int:
    """Tokens up to which every query reads every compressed row."""
    return CSA_RATIO * config.index_topk


def command_line(arguments: argparse.Namespace) -> str:
    """As it was typed, but for where the peers' environment lies on this machine."""
    words = [
        "peers/bin/python" if Path(word).absolute() == arguments.peers_python else word for word in sys.argv
    ]
    return shlex.join(["python", *words])


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def parse_cells(text: str) -> tuple[Cell, ...]:
    """1x256,8x4096 -> cells. Raises ValueError."""
    pairs = (cell.split("x") for cell in text.split(","))
    return tuple(Cell(int(batch), int(context)) for batch, context in pairs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Absolute, as workers run in their own folder; not resolved: the link is what makes it an environment's.
    parser.add_argument(
        "--peers-python",
        type=lambda path: Path(path).absolute(),
        required=True,
        help="the python of the peers' environment",
    )
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    parser.add_argument("--preset", default="t256", help="the random checkpoint that all run")
    parser.add_argument(
        "--folder", type=Path, default=Path("models/generated/peers"), help="where it is kept"
    )
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"by comma, of {', '.join(PEERS)}")
    parser.add_argument(
        "--cells",
        type=parse_cells,
        default=CELLS,
        help=f"sequences x prompt tokens, by comma (default: {','.join(map(str, CELLS))})",
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--decode-rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a turn")
    parser.add_argument("--seconds", type=float, default=5.0, help="longest turn of decode steps")
    parser.add_argument("--patience", type=float, default=30.0, help="a prefill of more seconds is done once")
    parser.add_argument(
        "--quick", action="store_true", help="short prompts and few rounds: proves that it runs"
    )
    parser.add_argument("--no-check", action="store_true", help="time engines without checking their output")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    names = arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise SystemExit(f"unknown peers {', '.join(unknown)}: choose of {', '.join(PEERS)}")
    cells = QUICK_CELLS if arguments.quick else arguments.cells
    rounds = (1, 2) if arguments.quick else (arguments.prefill_rounds, arguments.decode_rounds)
    turns = Turns(*rounds, arguments.steps, arguments.seconds, arguments.patience)
    paths = prepare(arguments.folder, arguments.preset, names, arguments.peers_python)
    with ExitStack() as stack:
        compare_all(stack, arguments, paths, names, cells, turns)


def compare_all(
    stack: ExitStack,
    arguments: argparse.Namespace,
    paths: dict[str, Path],
    names: Sequence[str],
    cells: Sequence[Cell],
    turns: Turns,
) -> None:
    """Starts every engine, checks it, measures every cell and writes what is known after each."""
    threads, checkpoint = arguments.threads, paths["checkpoint"]
    workers = {OURS: start(stack, OURS, our_command(checkpoint, threads, "auto", cells), threads)}
    for name in names:
        command = peer_command(name, paths, threads, str(arguments.peers_python))
        workers[name] = start(stack, name, command, threads)
    config: dict[str, Label] = {
        "preset": arguments.preset,
        "weights": PRECISION,
        "threads": threads,
        **{f"{name} {key}": value for name, worker in workers.items() for key, value in worker.facts.items()},
    }
    model = ModelConfig.from_file(checkpoint / "config.json")
    found: list[Measurement] = []
    if not arguments.no_check:
        # Just before the index leaves rows out, where float32 must agree to rounding, and well after.
        lengths = [unpruned_tokens(model) - 12, unpruned_tokens(model) + 1000][: 1 if arguments.quick else 2]
        tell("checking outputs")
        with ExitStack() as only_here:
            command = our_command(checkpoint, threads, "f32", [Cell(1, max(lengths))])
            found += check(workers, start(only_here, f"{OURS}-f32", command, threads), model, lengths)
    comparison = Comparison(workers, turns, model.vocab_size)
    for cell in cells:
        tell(f"batch {cell.batch}, context {cell.context}")
        found += comparison.measure(cell)
        write_result(arguments.out, new_result("peers", command_line(arguments), config, found))
        for m in found[-2:]:
            tell(f"  {m.name}: {m.median:.2f} ({m.labels['peer']})")


if __name__ == "__main__":
    main()
