"""Times steps of reinforcement learning: bittrue against TRL's GRPOTrainer with the model of transformers.

Usage: python benchmarks/rl_trl.py --peers-python PEER/bin/python --out benchmarks/results/rl-trl-mini.json

Both start from the same weights and ask the same prompts, step by step; the batch, the longest answer and
the checker are those of the run file. First TRL's model has to give the log-probabilities of ours in float32.
Then its ways to compute are tried, and the fastest one runs against ours in turn, a block of steps each;
ratios are taken round by round. A step is everything from where the one before ended: problems, answers,
scores, update, publication. Checkpoints, evaluations and the first step of each are left out.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from protocol import Worker  # noqa: E402
from run import Cell, check, our_command, start, unpruned_tokens  # noqa: E402

from bittrue.bench.report_rl_peer import rl_peer_tables  # noqa: E402
from bittrue.bench.result import Label, Measurement, measured, new_result, write_result  # noqa: E402
from bittrue.bench.timing import REST_S  # noqa: E402
from bittrue.config.model import ModelConfig  # noqa: E402
from bittrue.model.convert import open_source, to_official  # noqa: E402
from bittrue.obs.log import Log  # noqa: E402
from bittrue.rl.assembly import open_policy  # noqa: E402
from bittrue.rl.config import RlConfig  # noqa: E402
from bittrue.train.metrics import METRICS_FILE, MetricsFile  # noqa: E402
from bittrue.train.run_file import load_run_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = "bittrue", "trl"
EXACT = "trl-f32"  # the name by which it is held to float32
TRIED_STEPS = 2

Step = Mapping[str, float]  # what it took and did, by the names of our_step


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed: ``rounds`` in which both have a turn of ``steps`` steps."""

    rounds: int
    steps: int

    @property
    def total(self) -> int:
        """Steps of each side; the first is not timed."""
        return 1 + self.rounds * self.steps


@dataclass(frozen=True, slots=True)
class Way:
    """How transformers computes: its experts, and in how many parts a batch is trained on."""

    experts: str
    passes: int


@dataclass(slots=True)
class Turns:
    """Both sides' steps, block by block: A B, B A, A B, ... Ours run by themselves and call ``tell`` behind
    each; there the peer has its turns while ours stand still."""

    plan: Plan
    peer: Worker
    blocks: dict[str, list[list[Step]]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    _running: list[Step] | None = None  # of our block; None in the first step
    _start_s: float = 0.0

    def tell(self, values: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._start_s
        if self._running is None:
            self._running = []
        else:
            self._running.append(our_step(seconds, values))
        if len(self._running) == self.plan.steps:
            self.blocks[OURS].append(self._running)
            self._running = []
            self._say(OURS)
            self._peers_turns()
        self._start_s = time.perf_counter()

    def _peers_turns(self) -> None:
        """Ours have just ended round i. In even rounds ours come first, and the odd round after them begins
        with the peer: two turns in a row."""
        if len(self.blocks[OURS]) % 2 == 0:
            return
        for _ in range(min(2, self.plan.rounds - len(self.blocks[THEIRS]))):
            time.sleep(REST_S)
            self.blocks[THEIRS].append(self.peer.ask("steps", count=self.plan.steps)["steps"])
            self._say(THEIRS)
        time.sleep(REST_S)

    def _say(self, by: str) -> None:
        seconds = mean(self.blocks[by][-1], "seconds")
        tell(f"  {by}, block {len(self.blocks[by])} of {self.plan.rounds}: {seconds:.2f} s a step")


def our_step(seconds: float, values: Mapping[str, float]) -> Step:
    """One step of ours in the peer's words."""
    return {
        "seconds": seconds,
        "rollout_seconds": values["perf/rollout_seconds"],
        "train_seconds": values["perf/train_seconds"],
        "publish_seconds": values["perf/sync_seconds"],
        "answer_length": values["rollout/response_length/mean"],
        "reward": values["reward/mean"],
        "taught": 1.0 - values["rollout/frac_reward_zero_std"],
    }


def mean(steps: Sequence[Step], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def run_config(arguments: argparse.Namespace, plan: Plan) -> RlConfig:
    """The run file's, of one task, without anything beside the steps."""
    changes: dict[str, object] = {
        "data.tasks": {arguments.task: 1.0},
        "run.steps": plan.total,
        "run.eval_every": 0,
        "run.checkpoint_every": plan.total + 1,
        "run.threads": arguments.threads,
        "run.micro_tokens": arguments.micro_tokens,
        "optim.matrices": "adamw",  # as the peer does
    }
    return load_run_file(RlConfig, arguments.run, changes)


def peer_command(config: RlConfig, checkpoint: Path, python: Path) -> list[str]:
    """TRL's with what the run file says."""
    values = {
        "tasks": json.dumps(config.data.tasks),
        "threads": config.run.threads,
        "seed": config.data.seed,
        "steps": config.run.steps,
        "prompts": config.rollout.prompts,
        "group": config.rollout.group,
        "max-tokens": config.rollout.max_tokens,
        "lr": config.optim.lr,
        "clip": config.optim.clip,
        "clip-low": config.policy.clip_low,
        "clip-high": config.policy.clip_high,
        "beta1": config.optim.beta1,
        "beta2": config.optim.beta2,
    }
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["env", f"PYTHONPATH={ROOT}", str(python), "worker_trl.py", str(checkpoint), *options]


def try_ways(peer: Worker, ways: Sequence[Way]) -> dict[Way, list[float]]:
    """Seconds of some steps in each way."""
    found: dict[Way, list[float]] = {}
    for way in ways:
        answer = peer.ask("try", experts=way.experts, passes=way.passes, steps=TRIED_STEPS)
        found[way] = [step["seconds"] for step in answer["steps"]]
        tell(f"  {THEIRS}, {way.experts}, {way.passes} passes: {min(found[way]):.2f} s a step")
    return found


def in_turn(
    config: RlConfig, plan: Plan, peer: Worker, way: Way, folder: Path
) -> dict[str, list[list[Step]]]:
    """Steps of both, by block."""
    peer.ask("train", experts=way.experts, passes=way.passes)
    peer.ask("steps", count=1)
    turns = Turns(plan, peer)
    folder.mkdir()
    with (
        open_policy(config, folder, Log(sys.stderr)) as policy,
        MetricsFile(folder / METRICS_FILE) as metrics,
    ):
        policy.run.begin(metrics)
        policy.run.go(metrics, tell=turns.tell)
    return turns.blocks


def summed_up(
    blocks: Mapping[str, Sequence[Sequence[Step]]], ways: Mapping[str, Mapping[str, Label]]
) -> Iterator[Measurement]:
    """``ways``: how each side computed, as labels."""
    for by, each in blocks.items():
        steps = [step for block in each for step in block]
        labels: dict[str, Label] = {"by": by, **ways[by]}
        for name, kind in (
            ("seconds", "step"),
            ("rollout_seconds", "rollout"),
            ("train_seconds", "train"),
            ("publish_seconds", "publish"),
        ):
            if name in steps[0]:
                yield measured(kind, "s", [step[name] for step in steps], labels)
        yield measured("tokens of an answer", "count", [step["answer_length"] for step in steps], labels)
        yield measured("right answers", "ratio", [step["reward"] for step in steps], labels)
        yield measured("answers trained on", "ratio", [step["taught"] for step in steps], labels)
    for name, kind in (("seconds", "step"), ("rollout_seconds", "rollout"), ("train_seconds", "train")):
        pairs = zip(blocks[THEIRS], blocks[OURS], strict=True)
        ratios = [mean(theirs, name) / mean(ours, name) for theirs, ours in pairs]
        yield measured(f"{kind}, TRL over bittrue", "ratio", ratios, {})


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def command_line(arguments: argparse.Namespace) -> str:
    """As it was typed, but for where the peer's environment lies on this machine."""
    words = [
        "peers-trl/bin/python" if Path(word).absolute() == arguments.peers_python else word
        for word in sys.argv
    ]
    return shlex.join(["python", *words])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Absolute, as workers run in their own folder; not resolved: the link is what makes it an environment's.
    parser.add_argument(
        "--peers-python", type=lambda path: Path(path).absolute(), required=True, help="TRL's environment"
    )
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    parser.add_argument("--run", type=Path, default=ROOT / "configs" / "rl-mini.toml", help="a run file")
    parser.add_argument("--task", default="countdown", help="the one task of both")
    parser.add_argument("--rounds", type=int, default=8, help="in which both have a turn")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="of bittrue's trainer")
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument(
        "--experts", default="grouped_mm,eager", help="of transformers, tried first, by comma"
    )
    parser.add_argument("--passes", default="1,2", help="parts of its batch, tried first, by comma")
    return parser.parse_args()


def compare(
    peer: Worker, checkpoint: Path, config: RlConfig, plan: Plan, arguments: argparse.Namespace
) -> Iterator[Measurement]:
    """Everything that is measured. Raises SystemExit where both are not the same model."""
    yield from held_to_ours(peer, checkpoint, arguments.threads)
    names = arguments.experts.split(",")
    passes = [int(number) for number in arguments.passes.split(",")]
    tried = try_ways(peer, [Way(name, number) for name in names for number in passes])
    for way, seconds in tried.items():
        yield measured("tried step", "s", seconds, {"experts": way.experts, "passes": way.passes})
    fastest = min(tried, key=lambda way: min(tried[way]))
    blocks = in_turn(config, plan, peer, fastest, checkpoint.parent / "run")
    yield from summed_up(blocks, {OURS: {}, THEIRS: {"experts": fastest.experts, "passes": fastest.passes}})


def held_to_ours(peer: Worker, checkpoint: Path, threads: int) -> Iterator[Measurement]:
    """The peer's log-probabilities against ours in float32, where no rounding can choose other rows."""
    model = ModelConfig.from_file(checkpoint / "config.json")
    length = unpruned_tokens(model) - 12
    with ExitStack() as only_here:
        command = our_command(checkpoint, threads, "f32", [Cell(1, length)])
        yield from check({EXACT: peer}, start(only_here, f"{OURS}-f32", command, threads), model, [length])


def main() -> int:
    arguments = parse()
    if min(arguments.rounds, arguments.steps) < 1:
        raise SystemExit("--rounds and --steps have to be at least 1")
    plan = Plan(arguments.rounds, arguments.steps)
    config = run_config(arguments, plan)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        exact = to_official(open_source(config.model.start), folder / "exact", precision="f32")
        command = peer_command(config, exact, arguments.peers_python)
        peer = start(stack, THEIRS, command, arguments.threads)
        found = list(compare(peer, exact, config, plan, arguments))
    facts: dict[str, Label] = {
        "model": Path(config.model.start).name,
        "task": arguments.task,
        "prompts": config.rollout.prompts,
        "group": config.rollout.group,
        "max_tokens": config.rollout.max_tokens,
        "steps": plan.steps,
        "threads": arguments.threads,
        **{f"{THEIRS} {name}": value for name, value in peer.facts.items()},
    }
    result = new_result("rl-trl", command_line(arguments), facts, found)
    write_result(arguments.out, result)
    sys.stdout.write("".join(rl_peer_tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
