"""POST /generate: token ids in and out, with log-probabilities."""

from collections.abc import Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob
from bittrue.errors import InvalidRequest
from bittrue.server.answers import json_response
from bittrue.server.intake import read_body, while_connected
from bittrue.server.protocol import BodyDecoder, GenerateBody
from bittrue.server.sampling import TokenLimits, answer_tokens, checked_prompt, generate_params
from bittrue.server.sse import EventStream, data
from bittrue.server.state import ServerState, state_of
from bittrue.server.submission import Submission, submit
from bittrue.server.text_stream import TextStream
from bittrue.server.tokens import encode_text

_DECODE = BodyDecoder(GenerateBody)


class Generated(msgspec.Struct, kw_only=True):
    """The answer, or in a stream what one event adds. An entry of ``logprobs``: [id, lp, [[id, lp], ..]]."""

    request_id: str
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    weight_version: str = ""


async def generate(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    body: GenerateBody = _DECODE(await read_body(request, state.config.max_body_bytes))
    prompt = await _prompt(state, body)
    limits = TokenLimits(body.sampling.max_tokens, "sampling.max_tokens", SamplingParams().max_tokens)
    max_tokens = answer_tokens(state, len(prompt), limits)
    params = generate_params(state, body.sampling, max_tokens=max_tokens)
    submission = submit(state, "gen", [(prompt, params)], priority=body.priority)
    renderer = _Renderer(state, submission, params, len(prompt))
    if body.stream:
        return EventStream(submission.channel, renderer, keepalive_s=state.config.keepalive_s)
    with submission.channel:
        return json_response(await while_connected(request.receive, _whole(submission, renderer)))


async def _prompt(state: ServerState, body: GenerateBody) -> tuple[int, ...]:
    if (body.prompt_ids is None) == (body.prompt is None):
        raise InvalidRequest("give exactly one of prompt_ids and prompt", param="prompt_ids")
    if body.prompt_ids is not None:
        return checked_prompt(state, body.prompt_ids, param="prompt_ids")
    return checked_prompt(state, await encode_text(state, body.prompt or ""), param="prompt")


class _Renderer:
    """Events -> parts of the answer."""

    def __init__(
        self, state: ServerState, submission: Submission, params: SamplingParams, num_prompt_tokens: int
    ) -> None:
        self._text = TextStream(state.tokenizer, params)
        self._has_logprobs = params.logprobs is not None
        self._empty = Generated(
            request_id=submission.response_id,
            num_prompt_tokens=num_prompt_tokens,
            weight_version=state.weight_version,
        )

    def empty(self) -> Generated:
        return msgspec.structs.replace(self._empty, logprobs=[] if self._has_logprobs else None)

    def part(self, event: TokenEvent) -> Generated:
        return msgspec.structs.replace(
            self._empty,
            token_ids=list(event.token_ids),
            text=self._text.feed(event),
            logprobs=list(event.logprobs) if self._has_logprobs else None,
            prompt_logprobs=None if event.prompt_logprobs is None else list(event.prompt_logprobs),
            finish_reason=event.finish_reason,
            stop_match=event.stop_match,
            num_cached_tokens=event.num_cached_tokens,
        )

    def feed(self, event: TokenEvent) -> Iterator[bytes]:
        yield data(self.part(event))

    def end(self) -> Iterator[bytes]:
        return iter(())


async def _whole(submission: Submission, renderer: _Renderer) -> Generated:
    answer = renderer.empty()
    while submission.channel.unfinished:
        for event in await submission.channel.next_events():
            part = renderer.part(event)
            answer.token_ids += part.token_ids
            answer.text += part.text
            if answer.logprobs is not None:
                answer.logprobs += part.logprobs or []
            if part.prompt_logprobs is not None:
                answer.prompt_logprobs = part.prompt_logprobs
            answer.finish_reason, answer.stop_match = part.finish_reason, part.stop_match
            answer.num_cached_tokens = max(answer.num_cached_tokens, part.num_cached_tokens)
    return answer
