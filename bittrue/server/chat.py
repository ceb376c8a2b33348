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
from bittrue.server.answers import json_response
from bittrue.server.chat_answer import (
    ChatAnswer,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    Message,
    content_logprob,
)
from bittrue.server.chat_prompt import chat_options
from bittrue.server.formats import chat_grammar
from bittrue.server.intake import read_body, while_connected
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
from bittrue.server.usage import UsageTally
from bittrue.text.codec import ChatOptions, EncodedPrompt
from bittrue.text.messages import parse_messages
from bittrue.text.parser import OutputParser
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
    job = _job(state, body, options, encoded, await _grammar(state, body, options))
    if body.stream:
        renderer = _StreamRenderer(job, bool(body.stream_options and body.stream_options.include_usage))
        return EventStream(job.submission.channel, renderer, keepalive_s=state.config.keepalive_s)
    with job.submission.channel:
        return json_response(await while_connected(request.receive, _whole(job)))


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
    state: ServerState, body: ChatBody, options: ChatOptions, encoded: EncodedPrompt, grammar: str | None
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
    submission = submit(state, "chatcmpl", sequences, priority=body.priority or 0)
    return _Job(state, body, options, encoded, params, submission, UsageTally(len(prompt)))


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


async def _whole(job: _Job) -> ChatCompletion:
    submission, answers = job.submission, job.new_answers()
    choices = [
        Choice(index, Message(), ChoiceLogprobs([]) if job.body.logprobs else None, "")
        for index in range(len(answers))
    ]
    while submission.channel.unfinished:
        for event in await submission.channel.next_events():
            index = submission.index(event)
            job.usage.add(event, prompt_index=0)
            choice = choices[index]
            choice.message.add(answers[index].feed(event))
            choice.finish_reason = answers[index].finish_reason or ""
            more = job.logprobs_of(event)
            if choice.logprobs is not None and more is not None:
                choice.logprobs.content += more.content
    job.usage.num_reasoning = sum(answer.num_reasoning_tokens for answer in answers)
    for choice in choices:
        if choice.message.content is None and choice.message.tool_calls is msgspec.UNSET:
            choice.message.content = ""
    return ChatCompletion(
        id=submission.response_id,
        created=job.created,
        model=job.body.model,
        system_fingerprint=job.state.weight_version,
        choices=choices,
        usage=job.usage.total(),
    )


class _StreamRenderer:
    """Events -> chunks. The first chunk of a choice carries the role; one without news is not sent."""

    def __init__(self, job: _Job, include_usage: bool) -> None:
        self._job, self._include_usage = job, include_usage
        self._answers = job.new_answers()
        self._held: list[ChoiceLogprobs | None] = [None] * len(self._answers)
        self._is_begun = [False] * len(self._answers)
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
        job = self._job
        index = job.submission.index(event)
        job.usage.add(event, prompt_index=0)
        if not self._is_begun[index]:
            self._is_begun[index] = True
            yield self._data(ChunkChoice(index, Delta(role="assistant", content="")))
        more = job.logprobs_of(event)
        held = self._held[index]
        if held is not None and more is not None:
            more = ChoiceLogprobs(held.content + more.content)
        for told in self._answers[index].feed(event):
            delta = Delta.of(told)
            if delta is not None:
                yield self._data(ChunkChoice(index, delta, more))
                more = None
        if event.finish_reason is not None:
            yield self._data(ChunkChoice(index, Delta(), more, self._answers[index].finish_reason))
            more = None
        self._held[index] = more

    def end(self) -> Iterator[bytes]:
        if self._include_usage:
            usage = self._job.usage
            usage.num_reasoning = sum(answer.num_reasoning_tokens for answer in self._answers)
            self._chunk.choices, self._chunk.usage = [], usage.total()
            yield data(self._chunk)

    def _data(self, choice: ChunkChoice) -> bytes:
        self._chunk.choices = [choice]
        return data(self._chunk)
