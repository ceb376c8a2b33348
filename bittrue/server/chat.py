"""POST /v1/chat/completions: messages in, an answer with reasoning, content and tool calls out."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import SamplingParams, TokenEvent
from bittrue.errors import InvalidRequest
from bittrue.server.chat_answer import (
    ChatAnswer,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    ContentLogprob,
    Delta,
    MessageBuilder,
    content_logprob,
)
from bittrue.server.chat_prompt import chat_options
from bittrue.server.formats import chat_grammar
from bittrue.server.intake import read_body
from bittrue.server.keys import Caller, caller_of
from bittrue.server.models import check_model
from bittrue.server.protocol import BodyDecoder, ChatBody
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
from bittrue.server.usage import Usage, UsageTally
from bittrue.server.whole import whole_response
from bittrue.text.codec import ChatOptions, EncodedPrompt
from bittrue.text.messages import parse_messages
from bittrue.text.parser import Event, OutputParser
from bittrue.text.tokenizer import THINK_END

_DECODE = BodyDecoder(ChatBody)
_LONG_BODY = 32_768  # bytes


async def chat_completions(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    raw = await read_body(request, state.config.max_body_bytes)
    body: ChatBody = _DECODE(raw)
    check_model(state, body.model)
    options = chat_options(state, body)
    encoded = await _encoded(state, body, options, num_bytes=len(raw))
    grammar = await _grammar(state, body, options)
    job = _job(state, caller_of(request), body, options, encoded, grammar)
    if body.stream:
        renderer = _StreamRenderer(job, bool(body.stream_options and body.stream_options.include_usage))
        return EventStream(job.submission, renderer)
    return await whole_response(request, job.submission, _Answer(job))


# ---- the request ----


async def _encoded(
    state: ServerState, body: ChatBody, options: ChatOptions, *, num_bytes: int
) -> EncodedPrompt:
    """The prompt. Long conversations are encoded in a thread, so that streams do not stall."""
    started_s = time.perf_counter()
    messages = parse_messages(body.messages)
    if num_bytes > _LONG_BODY:
        encoded = await asyncio.to_thread(state.codec.encode_chat, messages, options)
    else:
        encoded = state.codec.encode_chat(messages, options)
    state.metrics.observe("bittrue_tokenize_seconds", time.perf_counter() - started_s)
    return encoded


async def _grammar(state: ServerState, body: ChatBody, options: ChatOptions) -> str | None:
    """The grammar of the answer, compiled in a thread: a schema may take long."""
    if not options.tools and options.response_format.kind == "text" and body.guided_regex is None:
        return None
    return await asyncio.to_thread(
        chat_grammar,
        state,
        options,
        body.guided_regex,
        is_single_call=body.parallel_tool_calls is False,
    )


@dataclass(slots=True)
class _Job:
    """One request on its way: what was asked, and the sequences that answer it."""

    state: ServerState
    body: ChatBody
    options: ChatOptions
    encoded: EncodedPrompt
    params: SamplingParams
    submission: Submission
    usage: UsageTally
    created: int = field(default_factory=lambda: int(time.time()))

    def new_answers(self) -> list[ChatAnswer]:
        """One per sequence, in the order of the choices."""
        return [
            ChatAnswer(
                OutputParser(
                    self.state.tokenizer,
                    request_id=request_id,
                    starts_in_reasoning=self.encoded.starts_in_reasoning,
                    parse_tools=bool(self.options.tools) and self.options.tool_choice.mode != "none",
                    stop=self.params.stop,
                    # A grammar leaves no malformed call: its arguments can be told as they come.
                    incremental_arguments=self.params.grammar is not None,
                )
            )
            for request_id in self.submission.index_of
        ]

    def logprobs_of(self, event: TokenEvent) -> ChoiceLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChoiceLogprobs([content_logprob(self.state.tokenizer, entry) for entry in event.logprobs])


def _job(
    state: ServerState,
    caller: Caller,
    body: ChatBody,
    options: ChatOptions,
    encoded: EncodedPrompt,
    grammar: str | None,
) -> _Job:
    prompt = checked_prompt(state, encoded.token_ids, param="messages")
    asked, name = _asked_tokens(body)
    max_tokens = answer_tokens(state, len(prompt), TokenLimits(asked, name, None))
    params = sampling_params(
        state, body, max_tokens=max_tokens, logprobs=_asked_logprobs(body), logprobs_param="top_logprobs"
    )
    if grammar is not None:
        after = (state.tokenizer.special_id(THINK_END),) if encoded.starts_in_reasoning else None
        params = msgspec.structs.replace(params, grammar=grammar, grammar_after=after)
    sequences = [(prompt, sample) for sample in with_derived_seeds(params, body.n or 1)]
    submission = submit(
        state,
        "chatcmpl",
        sequences,
        caller=caller,
        endpoint="/v1/chat/completions",
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
    )
    usage = UsageTally(len(prompt), has_drafts=state.config.speculation != "off")
    return _Job(state, body, options, encoded, params, submission, usage)


def _asked_tokens(body: ChatBody) -> tuple[int | None, str]:
    if body.max_completion_tokens is not None:
        if body.max_tokens is not None and body.max_tokens != body.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ; send one", param="max_tokens")
        return body.max_completion_tokens, "max_completion_tokens"
    if body.max_tokens == 0:
        raise InvalidRequest("max_tokens is 0; ask for at least one token", param="max_tokens")
    return body.max_tokens, "max_tokens"


def _asked_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


# ---- the answer ----


class _Answer:
    """The answer of a request as it grows. Without ``collects`` only its parts are told."""

    def __init__(self, job: _Job, *, collects: bool = True) -> None:
        self._job, self._collects = job, collects
        self._answers = job.new_answers()
        self._messages = [MessageBuilder() for _ in self._answers]
        self._logprobs: list[list[ContentLogprob]] = [[] for _ in self._answers]

    def add(self, event: TokenEvent) -> tuple[int, list[Event], ChoiceLogprobs | None]:
        """The choice an event is of, and what it adds there."""
        index = self._job.submission.index(event)
        self._job.usage.add(event, prompt_index=0)
        told = self._answers[index].feed(event)
        logprobs = self._job.logprobs_of(event)
        if self._collects:
            self._messages[index].add(told)
            if logprobs is not None:
                self._logprobs[index] += logprobs.content
        return index, told, logprobs

    def collect(self, event: TokenEvent) -> None:
        self.add(event)

    def finish_reason(self, index: int) -> str | None:
        return self._answers[index].finish_reason

    def usage(self) -> Usage:
        self._job.usage.num_reasoning = sum(answer.num_reasoning_tokens for answer in self._answers)
        return self._job.usage.total()

    def body(self) -> ChatCompletion:
        job = self._job
        choices = [
            Choice(
                index,
                message.message(),
                ChoiceLogprobs(logprobs) if job.body.logprobs else None,
                self.finish_reason(index) or "",
            )
            for index, (message, logprobs) in enumerate(zip(self._messages, self._logprobs, strict=True))
        ]
        return ChatCompletion(
            id=job.submission.response_id,
            created=job.created,
            model=job.body.model,
            system_fingerprint=job.state.weight_version,
            choices=choices,
            usage=self.usage(),
        )


class _StreamRenderer:
    """Events -> chunks. The first chunk of a choice carries the role; one without news is not sent."""

    def __init__(self, job: _Job, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._answer = _Answer(job, collects=job.submission.is_kept_afterwards)
        num_choices = len(job.submission.index_of)
        self._held: list[ChoiceLogprobs | None] = [None] * num_choices
        self._is_begun = [False] * num_choices
        self._chunk = ChatChunk(
            id=job.submission.response_id,
            created=job.created,
            model=job.body.model,
            system_fingerprint=job.state.weight_version,
            choices=[],
        )
        if include_usage:
            self._chunk.usage = None

    def feed(self, event: TokenEvent) -> Iterator[bytes]:
        index, told, more = self._answer.add(event)
        if not self._is_begun[index]:
            self._is_begun[index] = True
            yield self._data(ChunkChoice(index, Delta(role="assistant", content="")))
        held = self._held[index]
        if held is not None and more is not None:
            more = ChoiceLogprobs(held.content + more.content)
        for one in told:
            delta = Delta.of(one)
            if delta is not None:
                yield self._data(ChunkChoice(index, delta, more))
                more = None
        if event.finish_reason is not None:
            yield self._data(ChunkChoice(index, Delta(), more, self._answer.finish_reason(index)))
            more = None
        self._held[index] = more

    def end(self) -> Iterator[bytes]:
        if self._include_usage:
            self._chunk.choices, self._chunk.usage = [], self._answer.usage()
            yield data(self._chunk)

    def body(self) -> ChatCompletion:
        return self._answer.body()

    def _data(self, choice: ChunkChoice) -> bytes:
        self._chunk.choices = [choice]
        return data(self._chunk)
