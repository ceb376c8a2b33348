"""Measures what replaying recorded choices is worth: rollouts in one precision, a trainer in another.

Usage: python benchmarks/rl_replay.py --out benchmarks/results/rl-replay-mini.json

The policy is a checkpoint, once as it is and once after some training steps in float32, which take its
weights off the grids of FP8 and FP4. The trainer computes in float32 on the policy's own weights; engines
sample from them as they would be served: float32, bfloat16, FP8 experts or FP4 experts (the latter two with
FP8 matrices, activations and rows, and FP4 index keys). Every token an engine sampled is computed again by
the trainer: choosing for itself, repeating the recorded experts, rows or both, and, as controls, repeating
records of other tokens.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bittrue.bench.report_rl import replay_tables
from bittrue.bench.result import Label, Measurement, Unit, measured, new_result, write_result
from bittrue.config.model import ModelConfig
from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import ParityBroken
from bittrue.model.convert import open_source
from bittrue.model.inventory import inventory
from bittrue.model.presets import Precision
from bittrue.model.quantize import dequantize
from bittrue.ops.contracts import CSA_RATIO, OpTable
from bittrue.ops.dispatch import describe, select
from bittrue.ops.threads import set_threads
from bittrue.rl.parity import Parity, Selection, check_selection, measure
from bittrue.rl.replay import document_of, routes_of, rows_of, selections_of
from bittrue.rl.rollout import Inbox, Prompt, Sampler
from bittrue.rl.types import Rollout
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import Origin, open_origin
from bittrue.train.config import ModelSection, OptimSection
from bittrue.train.data import Stream
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.optim import Optimiser, clip_gradients
from bittrue.train.run import optim_settings
from bittrue.train.tasks.catalogue import make_tasks
from bittrue.train.tasks.recall import recall_problem
from bittrue.train.tasks.render import Renderer
from bittrue.train.tasks.task import seeded
from bittrue.train.trainer import Trainer

PRECISIONS: tuple[Precision, ...] = ("f32", "bf16", "fp8", "fp4")
LEAST_TOKENS, MOST_TOKENS = 2048, 4096  # of a prompt
QUESTIONS = 40  # of a prompt; all but the last are answered in it
ANSWER = 384  # tokens sampled behind a prompt
# The training steps of the second policy: tasks with short and with long answers, no draft head.
STEP_TOKENS = 8192
TASKS = {"recall": 1.0, "countdown": 1.0, "sort": 1.0}
# What trainer and engine have to choose alike for a record to pass as that of its tokens.
LEAST_ROUTING, LEAST_INDEX = 0.8, 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    start: str
    seeds: int
    prompts: int
    steps: int
    lr: float
    threads: int


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What one engine sampled from one seed's prompts. ``scored`` are its log-probabilities of the prompts'
    tokens after the first; ``answers`` marks those that answer an earlier question behind the place from
    which on rows are chosen."""

    rollouts: Sequence[Rollout]
    scored: Sequence[NDArray[np.float32]]
    answers: Sequence[NDArray[np.bool_]]

    @property
    def documents(self) -> list[Document]:
        return [document_of(rollout) for rollout in self.rollouts]

    def is_same(self, other: "Sampled") -> bool:
        """Whether tokens, log-probabilities and records are the same bits."""
        return all(np.array_equal(own, its) for own, its in zip(self._arrays(), other._arrays(), strict=True))

    def _arrays(self) -> list[NDArray[Any]]:
        names = ("prompt_ids", "answer_ids", "logprobs", "experts", "index_rows")
        return [*(getattr(r, name) for r in self.rollouts for name in names), *self.scored]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one seed showed of one way to replay."""

    sampled: Parity
    given: Parity
    routing: Selection
    index: Selection
    is_refused: bool


class Policy:
    """Float32 weights, the trainer that has them, and checkpoints of them in every precision."""

    def __init__(self, plan: Plan, ops: OpTable, folder: Path, *, steps: int) -> None:
        self._plan, self._ops = plan, ops
        origin = _origin(plan, "f32")
        self.trainer = _trainer(origin, ops)
        self.tokenizer = Tokenizer(origin.files["tokenizer.json"], source="tokenizer.json")
        self.name = f"after {steps} steps in float32" if steps else "as it is"
        if steps:
            self._train(steps)
        self.checkpoints = {precision: self._export(precision, folder) for precision in PRECISIONS}

    def _train(self, steps: int) -> None:
        masters = self.trainer.masters
        source = Stream(
            self.tokenizer,
            make_tasks(TASKS, {"recall": (LEAST_TOKENS // 2, MOST_TOKENS)}),
            seed=1,
            tokens_per_step=STEP_TOKENS,
            max_tokens=MOST_TOKENS,
        )
        optimiser = Optimiser(masters.named, optim_settings(OptimSection()), spread=self.trainer.crew.map)
        for step in range(steps):
            for leaf in masters.named.values():
                leaf.grad = None
            stats = self.trainer.backward(source.documents(step), LossWeights(mtp=0.0))
            clip_gradients(masters.named, 1.0)
            optimiser.step(self._plan.lr)
            self.trainer.publish()
            tell(f"training step {step + 1} of {steps}: {stats.main:.3f} nats a target")

    def _export(self, precision: Precision, folder: Path) -> Path:
        origin = _origin(self._plan, precision)
        other = _trainer(origin, self._ops)
        other.masters.load(self.trainer.masters.named, self.trainer.masters.biases)
        return other.export(folder / precision, origin.raw, origin.files)

    def rounding(self, precision: Precision) -> float:
        """Norm of what the weights of a checkpoint are off by, over the norm of the weights."""
        exact, stored = (open_source(self.checkpoints[p]) for p in ("f32", precision))
        config = ModelConfig.from_dict(exact.raw_config)
        names = [spec.name for spec in inventory(config) if spec.name.endswith(".weight")]
        off = total = 0.0
        for name in names:
            if name.endswith("norm.weight"):
                continue
            own, found = (dequantize(source.matrix(name)).double() for source in (exact, stored))
            off, total = off + float((own - found).square().sum()), total + float(own.square().sum())
        return float(np.sqrt(off / total))

    # ---- what the engines sample -------------------------------------------------------------------------

    def sample(self, precision: Precision) -> list[Sampled]:
        """For every seed."""
        knobs = {"kv_memory": "256MiB", "threads": self._plan.threads, "log_level": "error"}
        sizes = {"max_context": 2 * MOST_TOKENS, "max_running": self._plan.prompts}
        with closing(Engine(self.checkpoints[precision], **knobs, **sizes)) as engine:  # type: ignore[arg-type]
            return [self._sample(engine, seed) for seed in range(self._plan.seeds)]

    def _sample(self, engine: Engine, seed: int) -> Sampled:
        asked = [self._prompt(seed, place) for place in range(self._plan.prompts)]
        # Behind its end token an answer goes on with whatever is drawn: long answers are compared, too.
        params = SamplingParams(max_tokens=ANSWER, temperature=1.0, ignore_eos=True)
        versions = {engine.fingerprint()["weight_version"]: 0}
        sampler = Sampler(Inbox(engine), params, group_size=1, policy_versions=versions)
        groups = sampler.groups([prompt for prompt, _ in asked], seed=seed)
        scored = [np.array(engine.score(prompt.token_ids), np.float32) for prompt, _ in asked]
        return Sampled([group.rollouts[0] for group in groups], scored, [marks for _, marks in asked])

    def _prompt(self, seed: int, place: int) -> tuple[Prompt, NDArray[np.bool_]]:
        """A conversation about a file up to the last answer, and which tokens after the first answer
        earlier questions behind the place from which on rows are chosen."""
        span = (MOST_TOKENS - LEAST_TOKENS) // self._plan.prompts
        rng = seeded("replay", seed, place)
        num_tokens = LEAST_TOKENS + span * place + rng.randrange(span)
        document = Renderer(self.tokenizer).document(recall_problem(rng, num_tokens, QUESTIONS), "recall")
        end = int(np.flatnonzero(~document.is_target)[-1]) + 1
        marks = document.is_target[1:end].copy()
        marks[: CSA_RATIO * (self.trainer.masters.config.index_topk + 1) - 1] = False
        return Prompt(f"recall-{seed}-{place}", tuple(document.token_ids[:end].tolist())), marks


def _origin(plan: Plan, precision: Precision) -> Origin:
    return open_origin(ModelSection(start=plan.start, precision=precision, draft="none"))


def _trainer(origin: Origin, ops: OpTable) -> Trainer:
    config = ModelConfig.from_dict(origin.raw)
    return Trainer(origin.masters(config), ops, level=config.default_level, act=config.default_act)


# ---- replaying -------------------------------------------------------------------------------------------


class Table:
    """The ways to replay what one engine sampled from one seed."""

    def __init__(self, trainer: Trainer, sampled: Sampled, seed: int) -> None:
        self._trainer, self._config = trainer, trainer.masters.config
        self._sampled, self._documents = sampled, sampled.documents
        self._free = trainer.chosen(self._documents)
        rng = np.random.default_rng(seed)
        self._shuffled = [_shuffled(rollout, rng) for rollout in sampled.rollouts]
        self._shifted = [_moved(r, np.maximum(np.arange(r.num_tokens - 1) - 1, 0)) for r in sampled.rollouts]

    def cells(self) -> Iterator[tuple[str, Cell]]:
        rollouts = self._sampled.rollouts
        yield "none", self._cell(rollouts, routing=False, index=False)
        yield "routing", self._cell(rollouts, routing=True, index=False)
        yield "index", self._cell(rollouts, routing=False, index=True)
        yield "both", self._cell(rollouts, routing=True, index=True)
        yield "shuffled", self._control(self._shuffled)
        yield "shifted", self._control(self._shifted)

    def _cell(self, records: Sequence[Rollout], *, routing: bool, index: bool) -> Cell:
        """Choices are compared as they are made under replay."""
        routes = routes_of(self._config, records) if routing else None
        rows = rows_of(self._config, records) if index else None
        parities = self._parities(records, routing=routing, index=index)
        chosen = self._free
        if routing or index:
            chosen = self._trainer.chosen(self._documents, routes=routes, rows=rows)
        selections = selections_of(self._config, records, *chosen)
        return Cell(*parities, *selections, is_refused=_is_refused(*selections))

    def _control(self, records: Sequence[Rollout]) -> Cell:
        """Records are compared with what the trainer chooses for itself, as a run would before it trains."""
        parities = self._parities(records, routing=True, index=True)
        selections = selections_of(self._config, records, *self._free)
        return Cell(*parities, *selections, is_refused=_is_refused(*selections))

    def _parities(self, records: Sequence[Rollout], *, routing: bool, index: bool) -> tuple[Parity, Parity]:
        """Of the sampled tokens, and of the answers given in the prompts."""
        found = self._trainer.logprobs(
            self._documents,
            routes=routes_of(self._config, records) if routing else None,
            rows=rows_of(self._config, records) if index else None,
        )
        own = [logprobs.numpy() for logprobs in found]
        rollouts, scored = self._sampled.rollouts, self._sampled.scored
        answers = [values[len(r.prompt_ids) - 1 :] for values, r in zip(own, rollouts, strict=True)]
        prompts = [values[: len(r.prompt_ids) - 1] for values, r in zip(own, rollouts, strict=True)]
        every = [np.ones(len(r.answer_ids), np.bool_) for r in rollouts]
        return (
            _parity([r.logprobs for r in rollouts], answers, every),
            _parity(scored, prompts, self._sampled.answers),
        )


def _parity(
    recorded: Sequence[NDArray[np.float32]],
    recomputed: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
) -> Parity:
    ids = np.repeat(np.arange(len(masks)), [len(mask) for mask in masks])
    return measure(np.concatenate(recorded), np.concatenate(recomputed), ids, np.concatenate(masks))


def _is_refused(routing: Selection, index: Selection) -> bool:
    try:
        check_selection(routing, "experts", min_overlap=LEAST_ROUTING)
        check_selection(index, "index rows", min_overlap=LEAST_INDEX)
    except ParityBroken:
        return True
    return False


def _shuffled(rollout: Rollout, rng: np.random.Generator) -> Rollout:
    """Every token gets the experts of any token, and the rows of any earlier one: those of a later one need
    not be there yet."""
    moved = _moved(
        rollout, (np.arange(rollout.num_tokens - 1) * rng.random(rollout.num_tokens - 1)).astype(int)
    )
    assert rollout.experts is not None
    return replace(moved, experts=rng.permutation(rollout.experts))


def _moved(rollout: Rollout, source: NDArray[np.int64]) -> Rollout:
    """Token i gets the record of token ``source[i]`` <= i, rows of the first with a choice at least."""
    experts, rows = rollout.experts, rollout.index_rows
    assert experts is not None and rows is not None and len(experts) == rollout.num_tokens - 1
    first = len(experts) - len(rows)
    return replace(rollout, experts=experts[source], index_rows=rows[np.maximum(source[first:] - first, 0)])


# ---- numbers ---------------------------------------------------------------------------------------------


def measurements(plan: Plan, ops: OpTable) -> Iterator[Measurement]:
    begun_s = time.perf_counter()
    for steps in dict.fromkeys((0, plan.steps)):
        with tempfile.TemporaryDirectory() as folder:
            policy = Policy(plan, ops, Path(folder), steps=steps)
            before: list[tuple[Sampled, dict[str, Cell]]] = []
            for precision in PRECISIONS:
                labels: dict[str, Label] = {"policy": policy.name, "rollout": precision}
                yield _summed("rounding of weights", "ratio", [policy.rounding(precision)], labels)
                found, same = [], 0
                for seed, sampled in enumerate(policy.sample(precision)):
                    # Where weights are on the grid of FP4, FP8 holds them as well: the same bits come out.
                    is_same = bool(before) and sampled.is_same(before[seed][0])
                    same += is_same
                    cells = before[seed][1] if is_same else dict(Table(policy.trainer, sampled, seed).cells())
                    found.append((sampled, cells))
                yield _summed("seeds equal to the precision before", "ratio", [same / plan.seeds], labels)
                yield from _of_precision([cells for _, cells in found], labels)
                before = found
                tell(f"{policy.name}, rollouts in {precision}: {time.perf_counter() - begun_s:.0f} s")


def _of_precision(seeds: Sequence[Mapping[str, Cell]], labels: Mapping[str, Label]) -> Iterator[Measurement]:
    for replayed in seeds[0]:
        cells = [cells[replayed] for cells in seeds]
        where = {**labels, "replay": replayed}
        for text, parities in (
            ("sampled", [cell.sampled for cell in cells]),
            ("given", [cell.given for cell in cells]),
        ):
            yield from _of_parities(parities, {**where, "answers": text})
        for name, selections in (
            ("router", [cell.routing for cell in cells]),
            ("index", [cell.index for cell in cells]),
        ):
            yield _summed(f"{name} flips", "ratio", [s.flips for s in selections], where)
            yield _summed(f"{name} overlap", "ratio", [s.overlap for s in selections], where)
        yield _summed("records refused", "ratio", [float(cell.is_refused) for cell in cells], where)
    for text in ("sampled", "given"):
        means = {way: [getattr(c[way], text).mean_abs for c in seeds] for way in seeds[0]}
        for one, other in (("routing", "none"), ("index", "none"), ("both", "none"), ("shuffled", "both")):
            if all(means[other]):  # else there is nothing to be a share of
                ratios = [a / b for a, b in zip(means[one], means[other], strict=True)]
                yield _summed(f"{one} over {other}", "ratio", ratios, {**labels, "answers": text})


def _of_parities(parities: Sequence[Parity], labels: Mapping[str, Label]) -> Iterator[Measurement]:
    each: tuple[tuple[str, Unit, str], ...] = (
        ("tokens compared", "count", "num_tokens"),
        ("tokens that differ", "count", "differing"),
        ("difference, mean", "nats", "mean_abs"),
        ("difference, largest", "nats", "max_abs"),
        ("k3", "nats", "k3"),
        ("beyond a factor of two", "ratio", "beyond_ln2"),
    )
    for name, unit, field in each:
        yield _summed(name, unit, [float(getattr(parity, field)) for parity in parities], labels)


def _summed(name: str, unit: Unit, values: Sequence[float], labels: Mapping[str, Label]) -> Measurement:
    """Over seeds; the mean beside the median."""
    return measured(name, unit, values, {**labels, "mean": float(np.mean(values))})


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/mini", help="a published checkpoint, or one of a run")
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    parser.add_argument("--seeds", type=int, default=5, help="each with prompts and noise of its own")
    parser.add_argument("--prompts", type=int, default=2, help="of a seed")
    parser.add_argument("--steps", type=int, default=16, help="that train the second policy")
    parser.add_argument("--lr", type=float, default=3e-3, help="of these")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    given = parse()
    if min(given.seeds, given.prompts) < 1 or given.steps < 0:
        raise SystemExit("--seeds and --prompts have to be at least 1, --steps at least 0")
    plan = Plan(given.model, given.seeds, given.prompts, given.steps, given.lr, given.threads)
    ops = select("cpu")
    set_threads(ops, plan.threads)
    torch.set_num_threads(plan.threads)
    facts: dict[str, Label] = {
        "model": Path(plan.start).name,
        "seeds": plan.seeds,
        "prompts": plan.prompts,
        "prompt": f"{LEAST_TOKENS} to {MOST_TOKENS} tokens",
        "answer": ANSWER,
        "steps": plan.steps,
        "lr": plan.lr,
        "threads": plan.threads,
        "ops": describe(ops),
    }
    begun = new_result("rl-replay", shlex.join(["python", *sys.argv]), facts, ())  # names today's checkout
    result = replace(begun, measurements=tuple(measurements(plan, ops)))
    write_result(given.out, result)
    sys.stdout.write("".join(replay_tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
