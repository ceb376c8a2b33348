"""What drafts gain: tokens per second against off by text, length and proposer; acceptance by place."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np

from bittrue.bench.engines import Model, ask, at_least, decode_speed
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.timing import REST_S
from bittrue.engine.engine import Engine
from bittrue.engine.types import DraftCounters, SamplingParams
from bittrue.errors import KVCorrupted
from bittrue.spec.control import DraftControl

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)  # fixed
MAX_DRAFT = 8
CHANGE_EVERY = 16
HOPELESS_IDS = 32
_BIAS = 100.0  # logits of random weights stay far below

Tell = Callable[[str], None]
Way = tuple[str, int | str]  # proposer; length: a number, "adaptive" or "off"
OFF: Way = ("none", "off")


class FixedLength(DraftControl):
    """The same length always, whatever becomes of the drafts."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._length = length

    def length_for(
        self, seq_id: str, num_decodes: int, free_rows: int | None = None, *, num_steps: int = 1
    ) -> int:
        return self._length


@dataclass(frozen=True, slots=True)
class Text:
    """Prompts, and how the answers are held to what the text is about. ``proposers``: whose drafts mean
    something here."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]
    proposers: tuple[str, ...] = ("ngram",)


@dataclass(frozen=True, slots=True)
class Texts:
    """Random weights say nothing that repeats. So a repetitive answer is made by what a request may ask for;
    the target computes and samples every token of it all the same."""

    model: Model
    batch: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def copied(self, *, changes: bool) -> Text:
        """A passage of the prompt once more, as when a file is written again; with ``changes`` one of 16
        tokens on average is another. A grammar allows just that text. It would give a draft module its first
        draft, too: only what looks back is measured on it."""
        source = np.random.Generator(np.random.PCG64((self.seed, 1)))
        prompts, params = self._prompts(), []
        start = (self.prompt_tokens - self.output_tokens) // 2
        for i, prompt in enumerate(prompts):
            passage = list(prompt[start : start + self.output_tokens])
            others = self.model.prompt(self.output_tokens, self.seed, i, 1)
            for place, other in enumerate(others):
                if changes and source.random() < 1 / CHANGE_EVERY:
                    passage[place] = other
            lark = "start: " + " ".join(f"<[{token}]>" for token in passage)
            grammar = llguidance.LLMatcher.grammar_from_lark(lark)
            params.append(self._params(temperature=0.0, grammar=grammar))
        name = f"copied, 1 of {CHANGE_EVERY} changed" if changes else "copied"
        return Text(name, prompts, tuple(params))

    def hopeless(self) -> Text:
        """Random text of few different tokens: what comes next is never known, though nearly every pair of
        tokens has stood before, so that looking back finds something to draft. The bias would help a draft
        module."""
        ids = sorted(set(self.model.prompt(4096, self.seed, ids=HOPELESS_IDS)))
        bias = dict.fromkeys(ids, _BIAS)
        params = [
            self._params(temperature=1.0, seed=self.seed + i, logit_bias=bias) for i in range(self.batch)
        ]
        return Text(f"random, of {HOPELESS_IDS} tokens", self._prompts(HOPELESS_IDS), tuple(params))

    def free(self) -> Text:
        """What random weights say: nothing is ever found by looking back, and a random draft module is
        wrong."""
        params = (self._params(temperature=0.0),) * self.batch
        return Text("of random weights", self._prompts(), params, ("ngram", "mtp"))

    def _prompts(self, ids: int = 0) -> tuple[tuple[int, ...], ...]:
        return tuple(self.model.prompt(self.prompt_tokens, self.seed, i, ids=ids) for i in range(self.batch))

    def _params(self, **fields: Any) -> SamplingParams:
        return SamplingParams(max_tokens=self.output_tokens, ignore_eos=True, **fields)


@dataclass(frozen=True, slots=True)
class Speculation:
    """Engines that draft in different ways answer the same prompts in turn."""

    model: Model
    tell: Tell
    prompt_tokens: int = 512
    output_tokens: int = 256
    rounds: int = 5
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(output_tokens=(self.output_tokens, 2), rounds=(self.rounds, 1))
        at_least(prompt_tokens=(self.prompt_tokens, self.output_tokens))

    def run(self) -> Iterator[Measurement]:
        with ExitStack() as stack:
            engines: dict[Way, Engine] = {}
            for way, knobs in self._ways().items():
                engine = engines[way] = stack.enter_context(self._engine(**knobs))
                if isinstance(way[1], int):
                    fix_length(engine, way[1])
            one, eight = (
                Texts(self.model, batch, self.prompt_tokens, self.output_tokens, self.seed)
                for batch in (1, 8)
            )
            yield from self._text(one.copied(changes=True), engines)
            adaptive = {way: engine for way, engine in engines.items() if not isinstance(way[1], int)}
            for text in (one.copied(changes=False), one.hopeless(), one.free()):
                yield from self._text(text, adaptive)
            for text in (eight.copied(changes=True), eight.hopeless(), eight.free()):
                yield from self._text(text, adaptive)

    def _ways(self) -> dict[Way, dict[str, Any]]:
        """Knobs by (proposer, length)."""
        ngram: dict[str, Any] = {"speculation": "ngram", "max_draft": MAX_DRAFT}
        ways: dict[Way, dict[str, Any]] = {OFF: {}, ("ngram", "adaptive"): ngram}
        ways |= {("ngram", length): {**ngram, "max_draft": length} for length in LENGTHS}
        if self.model.has_draft_module:
            ways["mtp", "adaptive"] = {"speculation": "mtp"}
        return ways

    def _engine(self, **knobs: Any) -> AbstractContextManager[Engine]:
        context = self.prompt_tokens + self.output_tokens
        return self.model.engine(
            max_context=context, max_running=8, threads=self.threads, prefix_cache=False, **knobs
        )

    def _text(self, text: Text, all_engines: Mapping[Way, Engine]) -> Iterator[Measurement]:
        """Speed of every way, taken in turn; one round is dropped. Raises KVCorrupted where drafts changed
        the text."""
        engines = {way: e for way, e in all_engines.items() if way == OFF or way[0] in text.proposers}
        batch = len(text.prompts)
        self.tell(f"{text.name}, batch {batch}")
        speeds: dict[Way, list[float]] = {way: [] for way in engines}
        before: dict[Way, DraftCounters] = {}
        order = list(engines)
        for number in range(-1, self.rounds):
            said: dict[Way, list[tuple[int, ...]]] = {}
            for way in order:
                if number == 0:
                    before[way] = engines[way].stats().drafts
                time.sleep(REST_S)
                answers = ask(engines[way], text.prompts, text.params)
                said[way] = [answer.token_ids for answer in answers]
                if number >= 0:
                    speeds[way].append(decode_speed(answers))
            wrong = [way for way, tokens in said.items() if tokens != said[OFF]]
            if wrong:
                raise KVCorrupted(f"{text.name}: drafts changed the text with {wrong}")
            order.reverse()
        for way, values in speeds.items():
            labels: dict[str, Label] = {
                "text": text.name,
                "batch": batch,
                "by": way[0],
                "drafts": str(way[1]),
            }
            yield measured("decode", "tokens/s", values, labels)
            if way != OFF:
                shares = [on / off for on, off in zip(values, speeds[OFF], strict=True)]
                yield measured("decode over off", "ratio", shares, labels)
                yield from acceptance(since(before[way], engines[way].stats().drafts), labels)


def since(before: DraftCounters, after: DraftCounters) -> DraftCounters:
    """What was counted between two moments of one engine."""

    def between(earlier: tuple[int, ...], later: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(earlier, later, strict=True))

    return DraftCounters(
        drafted_at=between(before.drafted_at, after.drafted_at),
        accepted_at=between(before.accepted_at, after.accepted_at),
    )


def acceptance(drafts: DraftCounters, labels: Mapping[str, Label]) -> Iterator[Measurement]:
    """By place in a step's drafts: how many there were, and which share of them became output."""
    for place, (drafted, accepted) in enumerate(zip(drafts.drafted_at, drafts.accepted_at, strict=True), 1):
        if drafted:
            each: dict[str, Label] = {**labels, "place": place, "drafted": drafted}
            yield measured("acceptance", "ratio", [accepted / drafted], each)


def fix_length(engine: Engine, length: int) -> None:
    """Has the engine draft as many tokens always."""
    # Not a knob: a length that does not adapt is of use to a measurement alone.
    engine._drafting._control = FixedLength(length)
