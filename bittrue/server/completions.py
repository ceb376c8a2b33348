"""POST /v1/completions: text or token ids in, raw text out."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import SamplingParams, TokenEvent, TokenLogprob
from bittrue.errors import InvalidRequest
from bittrue.server.formats import grammar_of
from bittrue.server.intake import read_body
from bittrue.server.keys import Caller, caller_of
from bittrue.server.models import check_model
from bittrue.server.protocol import BodyDecoder, CompletionBody
from bittrue.server.sampling import (
    TokenLimits,
    answer_tokens,
    checked_prompt,
    sampling_params,
    with_derived_seeds,
)
from bittrue.server.sse import EventStream, data
from bittrue.server.state import ServerState, state_of
from bittrue.server.submission import Submission, submit
from bittrue.server.text_stream import TextStream
from bittrue.server.tokens import encode_text, finite, token_name
from bittrue.server.usage import Usage, UsageTally
from bittrue.server.whole import whole_response
from bittrue.text.detokenize import Detokenizer
from bittrue.text.messages import parse_response_format
from bittrue.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_PROMPTS = 1024
_DECODE = BodyDecoder(CompletionBody)


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


async def completions(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    body: CompletionBody = _DECODE(await read_body(request, state.config.max_body_bytes))
    check_model(state, body.model)
    prompts = await _prompts(state, body)
    form = parse_response_format(body.response_format)
    grammar = await asyncio.to_thread(grammar_of, state, form, body.guided_regex)
    job = _job(state, caller_of(request), body, prompts, grammar)
    if body.stream:
        renderer = _StreamRenderer(job, bool(body.stream_options and body.stream_options.include_usage))
        return EventStream(job.submission, renderer)
    return await whole_response(request, job.submission, _Collector(job))


# ---- the request ----


async def _prompts(state: ServerState, body: CompletionBody) -> list[tuple[int, ...]]:
    """The prompts of the body as token ids. Raises InvalidRequest, PromptTooLong."""
    raw = body.prompt
    if isinstance(raw, str) or _are_token_ids(raw):
        entries: list[Any] = [raw]
    else:
        entries = list(raw)
    if not 0 < len(entries) <= _MAX_PROMPTS:
        raise InvalidRequest(f"prompt holds {len(entries)} prompts; send 1 to {_MAX_PROMPTS}", param="prompt")
    prompts = []
    for index, entry in enumerate(entries):
        param = "prompt" if len(entries) == 1 else f"prompt[{index}]"
        prompts.append(checked_prompt(state, await _token_ids(state, entry, param), param=param))
    return prompts


async def _token_ids(state: ServerState, entry: object, param: str) -> list[int]:
    if isinstance(entry, str):
        return await encode_text(state, entry)
    if isinstance(entry, list) and (not entry or (_are_token_ids(entry) and min(entry) >= 0)):
        return entry
    raise InvalidRequest(f"{param} is neither text nor a list of token ids", param=param)


def _are_token_ids(items: list[Any]) -> bool:
    """Integers alone (booleans are none). A million of them take milliseconds: other streams wait so long."""
    return set(map(type, items)) == {int}


@dataclass(slots=True)
class _Job:
    """One request on its way: what was asked, and the sequences that answer it."""

    state: ServerState
    body: CompletionBody
    prompts: list[tuple[int, ...]]
    params: SamplingParams
    submission: Submission
    usage: UsageTally
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_samples(self) -> int:
        return self.body.n or 1

    def note(self, event: TokenEvent) -> int:
        """Adds the event to the usage; the index of its choice."""
        index = self.submission.index(event)
        self.usage.add(event, prompt_index=index // self.num_samples)
        return index

    def new_choice(self, index: int) -> "_Choice":
        return _Choice(self.state.tokenizer, self.params, self.prompts[index // self.num_samples], self.body)

    def answer(self, kind: str, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.submission.response_id,
            object=kind,
            created=self.created,
            model=self.body.model,
            system_fingerprint=self.state.weight_version,
            choices=choices,
        )


def _job(
    state: ServerState,
    caller: Caller,
    body: CompletionBody,
    prompts: list[tuple[int, ...]],
    grammar: str | None,
) -> _Job:
    num_samples = body.n or 1
    if body.best_of is not None and body.best_of != num_samples:
        raise InvalidRequest(
            f"best_of must equal n ({num_samples}); ranking is not supported", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest(
            "max_tokens is 0, which only a request with echo may ask for", param="max_tokens"
        )
    limits = TokenLimits(body.max_tokens, "max_tokens", _DEFAULT_MAX_TOKENS)
    max_tokens = [answer_tokens(state, len(prompt), limits) for prompt in prompts]
    params = sampling_params(
        state, body, max_tokens=min(max_tokens), logprobs=body.logprobs, logprobs_param="logprobs"
    )
    params = msgspec.structs.replace(
        params, grammar=grammar, prompt_logprobs=body.logprobs if body.echo else None
    )
    sequences = [
        (prompt, msgspec.structs.replace(sample, max_tokens=limit))
        for prompt, limit in zip(prompts, max_tokens, strict=True)
        for sample in with_derived_seeds(params, num_samples)
    ]
    submission = submit(
        state,
        "cmpl",
        sequences,
        caller=caller,
        endpoint="/v1/completions",
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
    )
    has_drafts = state.config.speculation != "off"
    usage = UsageTally(sum(len(prompt) for prompt in prompts), has_drafts=has_drafts)
    return _Job(state, body, prompts, params, submission, usage)


# ---- the answer ----


class _Choice:
    """One sequence on its way to text and log-probabilities."""

    __slots__ = ("_body", "_is_begun", "_offsets", "_prompt", "_text", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt: tuple[int, ...], body: CompletionBody
    ) -> None:
        self._tokenizer, self._prompt, self._body = tokenizer, prompt, body
        self._text = TextStream(tokenizer, params)
        self._offsets = _Offsets(Detokenizer(tokenizer))
        self._is_begun = False

    def feed(self, event: TokenEvent) -> tuple[str, CompletionLogprobs | None]:
        """Text and log-probabilities this event adds; with ``echo``, the first one brings the prompt's."""
        text, logprobs = "", None
        if self._body.logprobs is not None:
            logprobs = CompletionLogprobs()
        if self._body.echo and not self._is_begun:
            text = self._tokenizer.decode(self._prompt)
            if logprobs is not None:
                known = event.prompt_logprobs or (None,) * len(self._prompt)
                spelt = _Offsets(Detokenizer(self._tokenizer, skip_special=False))
                self._add(logprobs, zip(self._prompt, known, strict=True), spelt)
                self._offsets = _Offsets(Detokenizer(self._tokenizer), start=len(text))
        self._is_begun = True
        if logprobs is not None:
            self._add(logprobs, ((entry.token_id, entry) for entry in event.logprobs), self._offsets)
        return text + self._text.feed(event), logprobs

    def _add(
        self,
        into: CompletionLogprobs,
        tokens: Iterable[tuple[int, TokenLogprob | None]],
        offsets: "_Offsets",
    ) -> None:
        for token_id, entry in tokens:
            name = token_name(self._tokenizer, token_id)
            into.tokens.append(name)
            into.text_offset.append(offsets.advance(token_id))
            into.token_logprobs.append(None if entry is None else finite(entry.logprob))
            if entry is None:
                into.top_logprobs.append(None)
            else:
                top = {token_name(self._tokenizer, rival): finite(value) for rival, value in entry.top}
                top.setdefault(name, finite(entry.logprob))
                into.top_logprobs.append(top)


class _Offsets:
    """Characters of the text before each token. Of special tokens, only an echoed prompt's are spelt out."""

    __slots__ = ("_detokenizer", "_num_characters")

    def __init__(self, detokenizer: Detokenizer, *, start: int = 0) -> None:
        self._detokenizer = detokenizer
        self._num_characters = start

    def advance(self, token_id: int) -> int:
        start = self._num_characters
        self._num_characters += len(self._detokenizer.feed((token_id,)))
        return start


class _Collector:
    """The answer as a whole, as it grows."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        num_choices = len(job.submission.index_of)
        self._choices = [job.new_choice(index) for index in range(num_choices)]
        self._texts = [StringIO() for _ in range(num_choices)]
        self._logprobs: list[CompletionLogprobs | None] = [None] * num_choices
        self._finish_reasons: list[str | None] = [None] * num_choices

    def collect(self, event: TokenEvent) -> None:
        index = self._job.note(event)
        self.add(index, event, *self._choices[index].feed(event))

    def add(self, index: int, event: TokenEvent, text: str, logprobs: CompletionLogprobs | None) -> None:
        """What an event added to a choice."""
        self._texts[index].write(text)
        self._finish_reasons[index] = event.finish_reason
        if logprobs is not None:
            self._logprobs[index] = _joined(self._logprobs[index], logprobs)

    def body(self) -> Completion:
        columns = zip(self._texts, self._logprobs, self._finish_reasons, strict=True)
        completion = self._job.answer(
            "text_completion",
            [
                CompletionChoice(index, text.getvalue(), logprobs, finish_reason)
                for index, (text, logprobs, finish_reason) in enumerate(columns)
            ],
        )
        completion.usage = self._job.usage.total()
        return completion


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    """``first`` with ``second`` behind it; a new one where there is no first."""
    joined = first or CompletionLogprobs()
    joined.tokens += second.tokens
    joined.token_logprobs += second.token_logprobs
    joined.top_logprobs += second.top_logprobs
    joined.text_offset += second.text_offset
    return joined


class _StreamRenderer:
    """Events -> chunks. A chunk without text, log-probabilities or an end is not sent."""

    def __init__(self, job: _Job, include_usage: bool) -> None:
        self._job, self._include_usage = job, include_usage
        self._whole = _Collector(job) if job.submission.is_kept_afterwards else None
        self._choices: dict[int, _Choice] = {}
        self._held: dict[int, CompletionLogprobs | None] = {}
        self._chunk = job.answer("text_completion", [])
        if include_usage:
            self._chunk.usage = None

    def feed(self, event: TokenEvent) -> Iterator[bytes]:
        index = self._job.note(event)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = self._job.new_choice(index)
        text, logprobs = choice.feed(event)
        if self._whole is not None:
            self._whole.add(index, event, text, logprobs)
        if logprobs is not None:
            self._held[index] = logprobs = _joined(self._held.get(index), logprobs)
        if text or event.finish_reason is not None:
            self._held[index] = None
            self._chunk.choices = [CompletionChoice(index, text, logprobs, event.finish_reason)]
            yield data(self._chunk)

    def end(self) -> Iterator[bytes]:
        if self._include_usage:
            self._chunk.choices = []
            self._chunk.usage = self._job.usage.total()
            yield data(self._chunk)

    def body(self) -> Completion:
        assert self._whole is not None
        return self._whole.body()
