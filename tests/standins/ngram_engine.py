"""A small deterministic engine without a model: the next token is a hash of seed, position and two tokens."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bittrue.config.run import RunConfig
from bittrue.engine.types import (
    CacheCounters,
    DraftCounters,
    EngineStats,
    FinishReason,
    MemoryReport,
    PrefillProgress,
    Request,
    Running,
    TokenEvent,
    TokenLogprob,
)
from bittrue.errors import CheckpointError, NotFlushed, PromptTooLong, PublicationRefused, QueueFull
from bittrue.model.weight_update import WeightUpdate
from bittrue.text.detokenize import Detokenizer
from bittrue.text.stop import StopMatcher
from bittrue.text.tokenizer import Tokenizer

PAGE = 4


@dataclass(frozen=True)
class Reply:
    """A prompt that contains ``key`` is answered with ``reply`` and the end token."""

    key: list[int]
    reply: list[int]


@dataclass(frozen=True)
class Poison:
    """A prompt that contains ``token`` kills the process when its ``at``-th token would be drawn: by
    ``signal``, or with exit code 70."""

    token: int
    at: int = 0
    signal: int = 0


@dataclass(frozen=True)
class StandinOptions:
    """What the directory's standin.json says."""

    vocab_size: int = 1000
    max_context: int = 512
    eos_id: int = 1
    low: int = 10  # tokens of the walk: low <= id < high
    high: int = 200
    step_s: float = 0.0
    num_pages: int = 400
    prefill_tokens: int = 0  # of the prompt, in one step; 0 = all
    replies: list[Reply] = field(default_factory=list)
    crash_on: list[int] = field(
        default_factory=list
    )  # a prompt with this token kills the process at its first step
    poisons: list[Poison] = field(default_factory=list)
    num_cached: int = 0  # tokens of every prompt that are said to come from the cache
    num_drafted: int = 0  # drafts per token, the first of which is said to be accepted
    flush_error: str = ""  # what a flush fails with
    broken_file: str = ""  # start-up fails with a CheckpointError that names it

    def save(self, directory: Path) -> None:
        (directory / "standin.json").write_text(json.dumps(asdict(self)))


@dataclass
class _Live:
    request: Request
    generated: list[int]
    stops: StopMatcher
    detokenizer: Detokenizer | None
    pages: int = 0
    has_reported_prompt: bool = False
    num_computed: int = 0
    num_drawn: int = 0  # by this process


class NgramEngine:
    """Implements process.ServedEngine."""

    def __init__(
        self,
        model_dir: str,
        config: RunConfig,
        *,
        progress: Callable[[int, int, str], None] | None = None,
        verified: str = "",
    ) -> None:
        stored = json.loads((Path(model_dir) / "standin.json").read_text())
        stored["replies"] = [Reply(**reply) for reply in stored["replies"]]
        stored["poisons"] = [Poison(**poison) for poison in stored["poisons"]]
        self.config = StandinOptions(**stored)
        self._given = Path(model_dir) / "given.txt"
        if self.config.broken_file:
            raise CheckpointError(
                f"{self.config.broken_file}: tensor layers.0.attn.wq_a.weight holds a NaN",
                file=self.config.broken_file,
                tensor="layers.0.attn.wq_a.weight",
            )
        self.verified = "standin-files"
        with (Path(model_dir) / "starts.txt").open("a") as starts:
            starts.write(f"verified={verified}\n")
        self.max_context = config.max_context or self.config.max_context
        tokenizer_file = Path(model_dir) / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(tokenizer_file) if tokenizer_file.exists() else None
        self._max_running, self._max_queue = config.max_running, config.max_queue
        self._waiting: list[_Live] = []
        self._running: list[_Live] = []
        self._num_steps = 0
        self._num_lookup = self._num_hit = self._num_drawn = 0

    def add(self, request: Request) -> None:
        if len(request.prompt) >= self.max_context:
            raise PromptTooLong(num_tokens=len(request.prompt), limit=self.max_context)
        if len(self._waiting) >= max(self._max_queue, 1) + self._max_running:
            raise QueueFull("too many sequences wait")
        detokenizer = Detokenizer(self._tokenizer) if self._tokenizer else None
        live = _Live(request, [], StopMatcher(request.params.stop), detokenizer)
        for token in request.resume:
            assert self._append(live, token)[0] is None
        self._waiting.append(live)
        self._num_lookup += len(request.prompt)
        self._num_hit += self._cached(request)
        with self._given.open("a") as given:
            given.write(f"{request.request_id} {request.priority} {request.cache_salt}\n")

    def abort(self, request_id: str) -> None:
        self._waiting = [live for live in self._waiting if live.request.request_id != request_id]
        self._running = [live for live in self._running if live.request.request_id != request_id]

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[TokenEvent]:
        self._num_steps += 1
        time.sleep(self.config.step_s)
        free = self.config.num_pages - sum(self._pages(live) for live in self._running)
        while (
            self._waiting and len(self._running) < self._max_running and free >= self._pages(self._waiting[0])
        ):
            free -= self._pages(self._waiting[0])
            self._running.append(self._waiting.pop(0))
        events = [self._advance(live) for live in self._running if self._is_prefilled(live)]
        ended = {event.request_id for event in events if event.finish_reason}
        self._running = [live for live in self._running if live.request.request_id not in ended]
        return events

    def stats(self) -> EngineStats:
        held = sum(self._pages(live) for live in self._running)
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps_total=self._num_steps,
            pages_total=self.config.num_pages,
            pages_free=self.config.num_pages - held,
            pages_held=held,
            slots_total=self._max_running,
            slots_free=self._max_running - len(self._running),
            slots_held=len(self._running),
            weight_version="standin-1",
            cache=CacheCounters(
                lookup_tokens=self._num_lookup,
                hit_tokens={"device": self._num_hit},
                tier_bytes={"host": 5000, "disk": 6000},
                tier_events={"disk.hit": 2},
            ),
            drafts=DraftCounters(
                drafted_at=(self._num_drawn,) * self.config.num_drafted,
                accepted_at=(self._num_drawn, *(0,) * self.config.num_drafted)[: self.config.num_drafted],
            ),
            prefills=tuple(
                PrefillProgress(live.request.request_id, live.num_computed, len(live.request.prompt))
                for live in self._running
                if live.num_computed < len(live.request.prompt)
            ),
        )

    def flush(self) -> dict[str, int]:
        if self.config.flush_error:
            raise NotFlushed(self.config.flush_error)
        return {"pages": 3, "snapshots": 1, "host": 4, "disk": 5}

    def update_weights(self, update: WeightUpdate, *, running: Running) -> bool:
        raise PublicationRefused("the stand-in has no weights; publish to a model")

    def _cached(self, request: Request) -> int:
        return min(self.config.num_cached, len(request.prompt) - 1)

    def _is_prefilled(self, live: _Live) -> bool:
        """Whether the step that now runs reaches the end of the prompt."""
        num_prompt = len(live.request.prompt)
        live.num_computed = min(num_prompt, live.num_computed + (self.config.prefill_tokens or num_prompt))
        return live.num_computed == num_prompt

    def memory(self) -> MemoryReport:
        return MemoryReport(ledger={"weights": 0, "process": 1 << 20}, page_bytes=100, slot_bytes=1000)

    def fingerprint(self) -> dict[str, Any]:
        return {"engine": "ngram", "vocab_size": self.config.vocab_size}

    def close(self) -> None:
        self._waiting, self._running = [], []

    def _pages(self, live: _Live) -> int:
        return -(-(len(live.request.prompt) + live.request.params.max_tokens) // PAGE)

    def _advance(self, live: _Live) -> TokenEvent:
        request = live.request
        if any(token in request.prompt for token in self.config.crash_on):
            os._exit(70)
        for poison in self.config.poisons:
            if poison.token in request.prompt and len(live.generated) == poison.at:
                if poison.signal:
                    os.kill(os.getpid(), poison.signal)
                os._exit(70)
        tokens: tuple[int, ...] = ()
        reason: FinishReason | None = "length"
        match: str | int | None = None
        if request.params.max_tokens > 0:
            tokens = (self._next(live),)
            reason, match = self._append(live, tokens[0])
            live.num_drawn += 1
            self._num_drawn += 1
        is_first, live.has_reported_prompt = not live.has_reported_prompt, True
        num_top, num_prompt_top = request.params.logprobs, request.params.prompt_logprobs
        prompt_logprobs = None
        if is_first and num_prompt_top is not None:
            rest = request.prompt[1:]
            prompt_logprobs = (None, *(self._logprob(token_id, num_prompt_top) for token_id in rest))
        return TokenEvent(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=() if num_top is None else tuple(self._logprob(token, num_top) for token in tokens),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_match=match,
            num_prompt_tokens=len(request.prompt),
            num_cached_tokens=self._cached(request),
            num_drafted=live.num_drawn * self.config.num_drafted,
            num_accepted=live.num_drawn if self.config.num_drafted else 0,
        )

    def _next(self, live: _Live) -> int:
        params = live.request.params
        for reply in self.config.replies:
            if _contains(live.request.prompt, reply.key):
                answer = [*reply.reply, self.config.eos_id]
                return answer[min(len(live.generated), len(answer) - 1)]
        best = max(params.logit_bias, key=lambda token: params.logit_bias[token], default=None)
        if best is not None and params.logit_bias[best] >= 50:
            return best
        seed = 0 if params.temperature == 0 else params.seed
        num_tokens = len(live.request.prompt) + len(live.generated)
        last = [*live.request.prompt[-2:], *live.generated[-2:]][-2:]
        digest = hashlib.blake2b(repr((seed, num_tokens, last)).encode(), digest_size=8).digest()
        return self.config.low + int.from_bytes(digest, "little") % (self.config.high - self.config.low)

    def _append(self, live: _Live, token: int) -> tuple[FinishReason | None, str | int | None]:
        params = live.request.params
        live.generated.append(token)
        num = len(live.generated)
        if num > params.min_tokens and token in params.stop_token_ids:
            return "stop", token
        if num > params.min_tokens and token == self.config.eos_id and not params.ignore_eos:
            return "stop", None
        if live.detokenizer is not None:
            match = live.stops.feed(live.detokenizer.feed([token])).matched
            if match is not None:
                return "stop", match
        is_full = num >= params.max_tokens or len(live.request.prompt) + num >= self.max_context
        return ("length" if is_full else None), None

    def _logprob(self, token: int, num_top: int) -> TokenLogprob:
        top = tuple((self.config.low + i, -0.5 - i / 4) for i in range(num_top))
        return TokenLogprob(token, -1.0 - token % 7 / 8, top)


def _contains(tokens: tuple[int, ...], key: list[int]) -> bool:
    return any(list(tokens[i : i + len(key)]) == key for i in range(len(tokens) - len(key) + 1))
