"""Times training steps of bittrue against Hugging Face transformers: same weights, documents and threads.

Usage: python benchmarks/training.py --run configs/mini-1.toml --out benchmarks/results/training-mini.json

The run file names the sizes and where the documents come from: their tokens, one after the other, are cut
into documents of equal length, every token a target. transformers, which cannot pack, gets them as a batch
without a padded token, whole or in parts as it is quicker; bittrue packs them, as many at a time as the run
file says. All take turns in one process; ratios are taken round by round.
"""

import argparse
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bittrue.bench.report_train import training_tables
from bittrue.bench.result import Label, Measurement, measured, new_result, write_result
from bittrue.bench.timing import once, time_in_turn
from bittrue.model.inventory import DraftKind
from bittrue.model.presets import Precision
from bittrue.ops.contracts import CSA_RATIO, OpTable
from bittrue.ops.dispatch import describe, select
from bittrue.ops.threads import set_threads
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import make_trainer, open_origin, open_source_of
from bittrue.train.config import TrainConfig, load_train_config
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.optim import Optimiser, clip_gradients
from bittrue.train.run import optim_settings
from bittrue.train.trainer import Trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a third party
    import transformers
    from transformers import AutoModelForCausalLM

EXPERTS = ("eager", "batched_mm", "grouped_mm")  # those of transformers that need no GPU
# batched_mm copies the weights of its experts for every token: more at once do not fit in memory.
MOST_BATCHED = 1024
PASSES = (1, 4)  # parts of the documents that transformers is tried on
TRIES = 2
# Where every entry is attended to; else ties of index scores, which both break in their own way, move more.
LOSS_ERROR, PRUNED_LOSS_ERROR = 1e-5, 1e-2
GRADIENT_ERROR = 1e-4

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed. ``tokens``: of a step."""

    lengths: tuple[int, ...]
    tokens: int
    rounds: int


class Ours:
    """A trainer with the weights of the run file's seed, in one precision."""

    def __init__(self, config: TrainConfig, ops: OpTable, precision: Precision, draft: DraftKind) -> None:
        self.origin = open_origin(config.model.model_copy(update={"precision": precision, "draft": draft}))
        self.trainer: Trainer = make_trainer(self.origin, ops, config.run, is_quantised=True)
        self._optimiser = Optimiser(
            self.trainer.masters.named, optim_settings(config.optim), spread=self.trainer.crew.map
        )
        self._clip = config.optim.clip
        self._weights = LossWeights(
            config.loss.mtp, config.loss.mtp_depth, config.loss.index, config.loss.balance
        )

    def backward(self, documents: Sequence[Document], weights: LossWeights | None = None) -> float:
        """The loss of the next tokens in nats; gradients are those of all losses."""
        for leaf in self.trainer.masters.named.values():
            leaf.grad = None
        return self.trainer.backward(documents, weights or self._weights).main

    def whole_step(self, documents: Sequence[Document]) -> None:
        """As a run does it, at a learning rate of 0: every round finds the same weights."""
        self.backward(documents)
        clip_gradients(self.trainer.masters.named, self._clip)
        self._optimiser.step(0.0)
        self.trainer.publish()


class Theirs:
    """The same weights in transformers, float32 and eager attention."""

    def __init__(self, ours: Ours) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            place = ours.trainer.export(Path(folder) / "model", ours.origin.raw, ours.origin.files)
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, attn_implementation="eager"
            )
        self.model.train()
        self.default: str = self.model.config._experts_implementation

    def backward(self, ids: Tensor, experts: str, per_pass: int) -> float:
        """The mean loss of a batch [B, n] of documents, ``per_pass`` tokens at a time."""
        if self.model.config._experts_implementation != experts:
            self.model.set_experts_implementation(experts)
        self.model.zero_grad(set_to_none=True)
        parts = ids.split(max(1, per_pass // ids.shape[1]))
        total = 0.0
        for part in parts:
            loss = self.model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(ids))
            loss.backward()
            total += float(loss.detach())
        return total


def documents_of(config: TrainConfig, tokenizer: Tokenizer, length: int, tokens: int) -> list[Document]:
    """``tokens`` of the run's documents, cut into documents of ``length`` whose tokens are all targets."""
    source = open_source_of(config.data, tokenizer, tokens_per_step=tokens)
    whole = np.concatenate([document.token_ids for document in source.documents(0)])
    cuts = range(0, tokens // length * length, length)
    return [Document(whole[at : at + length], np.arange(length) > 0) for at in cuts]


def batch_of(documents: Sequence[Document]) -> Tensor:
    """[B, n] i64."""
    return torch.from_numpy(np.stack([document.token_ids for document in documents]).astype(np.int64))


def check(ours: Ours, theirs: Theirs, documents: Sequence[Document]) -> Iterator[Measurement]:
    """How far both are apart in float32. Exits where they are not the same model."""
    length, config = len(documents[0]), ours.trainer.masters.config
    weights = LossWeights(mtp=0.0, index=0.0, balance=0.0)
    loss = ours.backward(documents, weights)
    error = abs(theirs.backward(batch_of(documents), theirs.default, sum(map(len, documents))) / loss - 1)
    is_exact = length // CSA_RATIO <= config.index_topk
    labels: dict[str, Label] = {"length": length, "exact": is_exact}
    yield measured("loss off by", "ratio", [error], labels)
    if error > (LOSS_ERROR if is_exact else PRUNED_LOSS_ERROR):
        raise SystemExit(f"documents of {length}: the losses of both differ by {error:.1e}")
    expected = theirs.model.get_input_embeddings().weight.grad
    found = ours.trainer.masters.named["embed.weight"].grad
    assert found is not None
    error = float((found - expected).norm() / expected.norm())
    yield measured("gradient of the embedding off by", "ratio", [error], labels)
    if is_exact and error > GRADIENT_ERROR:
        raise SystemExit(f"documents of {length}: the gradients of both differ by {error:.1e}")


def fastest(theirs: Theirs, ids: Tensor) -> tuple[str, int]:
    """The implementation of experts and the tokens a pass that take the least time."""
    seconds: dict[tuple[str, int], float] = {}
    for experts in EXPERTS:
        for passes in PASSES:
            per_pass = max(ids.numel() // passes, ids.shape[1])
            if (experts, per_pass) in seconds or (experts == "batched_mm" and per_pass > MOST_BATCHED):
                continue
            try:
                tries = [once(partial(theirs.backward, ids, experts, per_pass)) for _ in range(TRIES)]
            except RuntimeError as error:  # torch has it for other devices only
                tell(f"transformers cannot train with {experts}: {error}")
                break
            seconds[experts, per_pass] = min(tries)
            tell(
                f"transformers, {experts}, {per_pass} tokens a pass: {ids.numel() / min(tries):.0f} tokens/s"
            )
    return min(seconds, key=seconds.__getitem__)


def compare(config: TrainConfig, ops: OpTable, plan: Plan) -> Iterator[Measurement]:
    """Tokens per second of everybody at every length, and ratios round by round."""
    exact = Ours(config, ops, "f32", "none")
    published, drafting = (Ours(config, ops, "fp4", draft) for draft in ("none", "mtp"))
    theirs = Theirs(exact)
    tokenizer = Tokenizer(exact.origin.files["tokenizer.json"], source="tokenizer.json")
    for length in plan.lengths:
        documents = documents_of(config, tokenizer, length, plan.tokens)
        ids, tokens = batch_of(documents), sum(map(len, documents))
        yield from check(exact, theirs, documents)
        ways = {"default": (theirs.default, tokens), "fastest": fastest(theirs, ids)}
        calls: dict[str, Call] = {
            f"transformers, {name}": partial(theirs.backward, ids, *way) for name, way in ways.items()
        }
        if ways["fastest"] == ways["default"]:
            del calls["transformers, fastest"]
        calls["bittrue, float32"] = partial(exact.backward, documents)
        calls["bittrue, published"] = partial(published.backward, documents)
        calls["bittrue, published, with draft"] = partial(drafting.backward, documents)
        calls["bittrue, published, with draft, and the optimiser"] = partial(drafting.whole_step, documents)
        tell(f"documents of {length} tokens: {plan.rounds} rounds")
        timings = time_in_turn(calls, seconds=0.0, least=plan.rounds)
        default = timings.pop("transformers, default")
        quickest = timings.pop("transformers, fastest", default)
        timings = {"transformers, default": default, "transformers, fastest": quickest, **timings}
        yield from summed_up(timings, ways, {"length": length}, tokens)


def summed_up(
    timings: dict[str, list[float]], ways: dict[str, tuple[str, int]], labels: dict[str, Label], tokens: int
) -> Iterator[Measurement]:
    """``timings`` by name, round by round; ``ways``: what transformers did."""
    for by, seconds in timings.items():
        each: dict[str, Label] = {**labels, "by": by}
        over = by.removeprefix("transformers, ")
        if over in ways:
            each |= {"experts": ways[over][0], "pass": ways[over][1]}
        yield measured("training", "tokens/s", [tokens / s for s in seconds], each)
        if over in ways:
            continue
        for name in ways:
            pairs = zip(timings[f"transformers, {name}"], seconds, strict=True)
            ratios = [peer / own for peer, own in pairs]
            yield measured("training over transformers", "ratio", ratios, {**each, "over": name})


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run file: sizes, seed, documents")
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    parser.add_argument("--lengths", default="64,256,1024", help="tokens of a document, by comma")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=7, help="in which everybody has a turn")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    plan = Plan(tuple(map(int, arguments.lengths.split(","))), arguments.tokens, arguments.rounds)
    if not 0 < max(plan.lengths) <= plan.tokens or plan.rounds < 1:
        raise SystemExit("--lengths have to be from 1 to --tokens, and --rounds at least 1")
    config = load_train_config(arguments.run, {"run.recompute": False})
    ops = select("cpu")
    set_threads(ops, arguments.threads)
    torch.set_num_threads(arguments.threads)
    found = list(compare(config, ops, plan))
    facts: dict[str, Label] = {
        "preset": config.model.preset,
        "run": arguments.run.name,
        "tokens": plan.tokens,
        "micro_tokens": config.run.micro_tokens,
        "threads": arguments.threads,
        "ops": describe(ops),
        "transformers": str(transformers.__version__),
        "torch": str(torch.__version__),
    }
    result = new_result("training", shlex.join(["python", *sys.argv]), facts, found)
    write_result(arguments.out, result)
    sys.stdout.write("".join(training_tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
