"""What rewards add to labels: reinforcement learning beside its controls, from one start, over seeds.

Usage: python benchmarks/rl_gain.py --seeds 5 --work /tmp/gain --out benchmarks/results/rl-gain.json

The task has many right answers: any text that closes a prefix of brackets. Labels are a fixed set of prompts,
each closed by a teacher that is always right and verbose: it opens further brackets on its way. A model
learns them from random weights to the plateau, at a rate that goes to zero. From there, each at the same
rate, with as many updates and as many trained tokens in every update:

rl           rewards of the checker on fresh prompts, without labels;
random       the same with a reward that is a coin's;
continued    more of the labelled set;
rejection    answers the start gave to the prompts that rl sees, as many as it samples: the right ones.

All are measured on the same held-out prompts, greedily and sampled, and shown whole.
"""

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bittrue.bench.result import Label, Measurement, Result, new_result, write_result
from bittrue.bench.tasks import wilson
from bittrue.cli.main import run as command
from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.model.publication import Publisher
from bittrue.obs.log import Log
from bittrue.rl.assembly import open_policy, open_side
from bittrue.rl.config import RlConfig
from bittrue.rl.loop import PolicyRun
from bittrue.rl.pipeline import Pipeline
from bittrue.rl.problems import Problems
from bittrue.rl.records import Records
from bittrue.rl.replay import document_of
from bittrue.rl.rollout import Inbox, Sampler
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.data import read_documents
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights, count
from bittrue.train.metrics import METRICS_FILE, MetricsFile, read_metrics
from bittrue.train.optim import Optimiser, clip_gradients
from bittrue.train.run import optim_settings
from bittrue.train.run_file import load_run_file
from bittrue.train.tasks.brackets import BracketsQuestion, unclosed
from bittrue.train.tasks.catalogue import make_tasks
from bittrue.train.tasks.task import problem_in, seeded

ARMS = ("rl", "rejection", "continued", "random")
TASK = "brackets"
LONGEST_LABEL, OPENS = 60, 0.75
_NOTHING_ELSE = LossWeights(mtp=0.0, index=0.0, balance=0.0)

Curve = list[tuple[int, dict[str, float]]]  # updates done, held-out shares


@dataclass(frozen=True, slots=True)
class Plan:
    """``labelled``: prompts with labels."""

    run: Path
    sft: Path
    labelled: int
    seeds: int
    arms: Sequence[str]
    work: Path


# ---- the start ---------------------------------------------------------------------------------------


def labelled_set(plan: Plan) -> Path:
    """The labelled prompts as a file of chats, none of them held out."""
    path = plan.work / "labelled.jsonl"
    rng, rows = seeded("labelled", TASK), {}
    (task,) = make_tasks({TASK: 1.0})
    while len(rows) < plan.labelled:
        (question,) = problem_in(task, "train", rng).questions
        assert isinstance(question, BracketsQuestion)
        answer = verbose_answer(question.opened, rng)
        assert question.accepts(answer)
        messages = [("user", question.prompt), ("assistant", answer)]
        rows[question.prompt] = {"messages": [{"role": who, "content": text} for who, text in messages]}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()))
    return path


def verbose_answer(opened: str, rng: random.Random) -> str:
    """A completion that opens more than it must, mostly round brackets, within a length it draws."""
    stack = list(unclosed(opened) or "")
    room = rng.randint(len(stack), max(len(stack), LONGEST_LABEL))
    answer = ""
    while stack:
        if len(answer) + len(stack) + 2 <= room and rng.random() < OPENS:
            (opener,) = rng.choices("([{", (0.7, 0.2, 0.1))
            answer, stack = answer + opener, [*stack, opener]
        else:
            answer += {"(": ")", "[": "]", "{": "}"}[stack.pop()]
    return answer


def make_start(plan: Plan, labelled: Path) -> Path:
    """The model that learned the labelled set to the plateau; made once."""
    start = plan.work / "start"
    if not start.is_dir():
        text = plan.sft.read_text().replace("@labelled", str(labelled))
        own = plan.work / "sft.toml"
        own.write_text(text)
        code = command(["train", str(own), "--out", str(plan.work / "sft"), "--export", str(start)])
        if code:
            raise SystemExit(code)
    return start


# ---- arms --------------------------------------------------------------------------------------------


class Arena:
    """The run file's trainer and engine at their start, and the held-out prompts."""

    def __init__(self, config: RlConfig, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.config, self._records = config, Records(out)
        self.side = open_side(config, out, Log(sys.stderr, "warning"))
        self.engine = Engine(
            out / "policy-0",
            threads=self.side.threads,
            kv_memory=config.rollout.kv_memory,
            max_queue=1 << 20,
            max_running=config.rollout.max_running,
            log_level="warning",
        )
        tokenizer = Tokenizer(self.side.origin.files["tokenizer.json"], source="tokenizer.json")
        self.tokenizer = tokenizer
        self.prompts = Problems(tokenizer, config.data.tasks, seed=config.data.seed)
        self._held_out = {
            name: Problems(tokenizer, {name: 1.0}, seed=config.data.seed, split="validation")
            for name in config.data.tasks
        }
        self.versions: dict[str, int] = {}
        self._publisher = Publisher()
        self._pipeline = Pipeline(config, self.engine, self.prompts, self._records, self.versions, first=0)

    def measure(self, updates: int) -> dict[str, float]:
        """Held-out shares of the trainer's weights."""
        update = self._publisher.update(dict(self.side.learner.tensors()))
        self.engine.update_weights(update)
        self.versions[update.version] = updates
        values: dict[str, float] = {}
        for name, source in self._held_out.items():
            values |= self._pipeline.measure(name, source)
        return values

    def right_answers(self) -> list[Document]:
        """Of all answers the start gives to the prompts that training sees, those that are right."""
        settings, found = self.config.rollout, []
        params = SamplingParams(max_tokens=settings.max_tokens, temperature=1.0)
        for step in range(self.config.run.steps):
            asked = self.prompts.of_step(step, settings.prompts)
            sampler = Sampler(
                Inbox(self.engine), params, group_size=settings.group, policy_versions=self.versions
            )
            groups = sampler.groups([each.prompt for each in asked], seed=self.config.data.seed + step)
            pairs = [(each, group.rollouts) for each, group in zip(asked, groups, strict=True)]
            for scored in self.prompts.score(pairs):
                found += [document_of(each.rollout) for each in scored if each.outcome == "right"]
        return found

    def close(self) -> None:
        self.engine.close()


def reinforced(config: RlConfig, out: Path) -> tuple[Curve, list[int]]:
    """A run of the loop itself: its curve, and the tokens that each of its updates learned from."""
    out.mkdir(parents=True, exist_ok=True)
    with open_policy(config, out, Log(sys.stderr, "warning")) as policy:
        _go(policy.run, out)
    lines = list(read_metrics(out / METRICS_FILE))
    worst = max(line.get("parity/logprob_abs_diff/max", 0.0) for line in lines)
    assert worst == 0.0, f"parity {worst}"
    budgets = [int(line.get("parity/num_tokens", 0)) for line in lines if line["step"] < config.run.steps]
    return [(int(line["step"]), _shares(line)) for line in lines if _shares(line)], budgets


def _go(run: PolicyRun, out: Path) -> None:
    with MetricsFile(out / METRICS_FILE) as metrics:
        run.begin(metrics)
        run.go(metrics)


def supervised(
    config: RlConfig, out: Path, budgets: Sequence[int], documents: Callable[[Arena], list[Document]]
) -> Curve:
    """Likelihood of documents at the rate of the rl arm, update by update as many tokens."""
    arena = Arena(config, out)
    try:
        trainer, steps = arena.side.learner.trainer, config.run.steps
        optimiser = Optimiser(trainer.masters.named, optim_settings(config.optim), spread=trainer.crew.map)
        curve: Curve = [(0, arena.measure(0))]
        stream = _endless(documents(arena), seed=config.data.seed)
        for step, budget in enumerate(budgets):
            for leaf in trainer.masters.named.values():
                leaf.grad = None
            batch = _filled(stream, budget)
            if batch:
                trainer.backward(batch, _NOTHING_ELSE)
                clip_gradients(trainer.masters.named, config.optim.clip)
                optimiser.step(config.optim.lr * (1.0 - step / steps))
                trainer.publish()
            if (step + 1) % config.run.eval_every == 0 or step + 1 == steps:
                curve.append((step + 1, arena.measure(step + 1)))
        return curve
    finally:
        arena.close()


def _endless(documents: Sequence[Document], *, seed: int) -> Iterator[Document]:
    rng = np.random.default_rng(seed)
    while True:
        for i in rng.permutation(len(documents)):
            yield documents[i]


def _filled(stream: Iterator[Document], budget: int) -> list[Document]:
    batch: list[Document] = []
    while budget > 0 and count(batch, ahead=1) < budget:
        batch.append(next(stream))
    return batch


def _shares(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith("eval/")}


# ---- all of it ---------------------------------------------------------------------------------------


def run_seed(plan: Plan, config: RlConfig, labelled: Path, seed: int) -> dict[str, Curve]:
    """Every arm of one seed: prompts and noise of its own, the same start."""
    own = _with(config, "data", seed=config.data.seed + seed)
    curves: dict[str, Curve] = {}
    curves["rl"], budgets = reinforced(own, plan.work / f"rl-{seed}")
    _tell(seed, "rl", curves["rl"])
    for arm in plan.arms:
        out = plan.work / f"{arm}-{seed}"
        match arm:
            case "random":
                curves[arm], _ = reinforced(_with(own, "data", reward="random"), out)
            case "continued":
                curves[arm] = supervised(own, out, budgets, lambda arena: _of_file(arena, labelled))
            case "rejection":
                curves[arm] = supervised(own, out, budgets, lambda arena: arena.right_answers())
            case _:
                continue
        _tell(seed, arm, curves[arm])
    return curves


def _of_file(arena: Arena, labelled: Path) -> list[Document]:
    return read_documents(labelled, arena.tokenizer, max_tokens=512)


def _with(config: RlConfig, section: str, **values: object) -> RlConfig:
    own = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: own})


def _tell(seed: int, arm: str, curve: Curve) -> None:
    name = next(name for name in curve[0][1] if name.endswith("greedy"))
    shown = " ".join(f"{100 * values[name]:.1f}" for _, values in curve)
    sys.stderr.write(f"seed {seed} {arm}: {shown}\n")


def measurements(config: RlConfig, of_seeds: Sequence[dict[str, Curve]]) -> Iterator[Measurement]:
    """Each held-out share with its Wilson interval, by arm, seed and updates."""
    for seed, curves in enumerate(of_seeds):
        for arm, curve in curves.items():
            for updates, values in curve:
                for name, value in values.items():
                    labels: dict[str, Label] = {"arm": arm, "seed": seed, "updates": updates}
                    low, high = value, value
                    if name.endswith("greedy"):
                        low, high = wilson(round(value * config.run.eval_problems), config.run.eval_problems)
                    yield Measurement(name, "ratio", value, low, high, config.run.eval_problems, labels)


def measure(plan: Plan) -> Result:
    plan.work.mkdir(parents=True, exist_ok=True)
    config = load_run_file(RlConfig, plan.run)
    labelled = labelled_set(plan)
    config = _with(config, "model", start=str(make_start(plan, labelled)))
    of_seeds = [run_seed(plan, config, labelled, seed) for seed in range(plan.seeds)]
    chosen: dict[str, Label] = {
        "task": TASK,
        "run": str(plan.run),
        "sft": str(plan.sft),
        "labelled": plan.labelled,
        "seeds": plan.seeds,
        "steps": config.run.steps,
        "lr": config.optim.lr,
        "answers": config.rollout.prompts * config.rollout.group,
        "held out": config.run.eval_problems,
    }
    found = tuple(measurements(config, of_seeds))
    return new_result("rl-gain", shlex.join(["python", *sys.argv]), chosen, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("configs/rl-gain.toml"))
    parser.add_argument("--sft", type=Path, default=Path("configs/rl-gain-sft.toml"))
    parser.add_argument("--labelled", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS[1:]), help="controls, by comma")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs; its start is used again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    plan = Plan(given.run, given.sft, given.labelled, given.seeds, given.arms.split(","), given.work)
    result = measure(plan)
    if given.out is not None:
        write_result(given.out, result)


if __name__ == "__main__":
    main()
