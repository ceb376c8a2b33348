"""POST /generate: token ids in and out, with log-probabilities."""

from collections.abc import Iterator
from io import StringIO

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import Choices, FinishReason, SamplingParams, TokenEvent, TokenLogprob
from bittrue.errors import InvalidRequest
from bittrue.server.intake import read_body
from bittrue.server.keys import caller_of
from bittrue.server.protocol import BodyDecoder, GenerateBody
from bittrue.server.sampling import TokenLimits, answer_tokens, checked_prompt, generate_params
from bittrue.server.sse import EventStream, data
from bittrue.server.state import ServerState, state_of
from bittrue.server.submission import Submission, submit
from bittrue.server.text_stream import TextStream
from bittrue.server.tokens import encode_text
from bittrue.server.whole import whole_response

_DECODE = BodyDecoder(GenerateBody)


class Generated(msgspec.Struct, kw_only=True):
    """The answer, or in a stream what one event adds. An entry of ``logprobs``: [id, lp, [[id, lp], ..]].

    ``num_drafted``, ``num_accepted``: drafts so far, and those that became output. ``record``: with the end,
    where ``record`` asked for them; bytes are base64.
    """

    request_id: str
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    record: Choices | None = None
    weight_version: str = ""


async def generate(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    body: GenerateBody = _DECODE(await read_body(request, state.config.max_body_bytes))
    prompt = await _prompt(state, body)
    limits = TokenLimits(body.sampling.max_tokens, "sampling.max_tokens", SamplingParams().max_tokens)
    max_tokens = answer_tokens(state, len(prompt), limits)
    params = generate_params(state, body.sampling, max_tokens=max_tokens)
    submission = submit(
        state,
        "gen",
        [(prompt, params)],
        caller=caller_of(request),
        endpoint="/generate",
        cache_salt=body.cache_salt,
        priority=body.priority,
        records_choices=body.record,
    )
    if body.stream:
        collects = submission.is_kept_afterwards
        return EventStream(submission, _Renderer(submission, params, len(prompt), collects=collects))
    return await whole_response(request, submission, _Renderer(submission, params, len(prompt)))


async def _prompt(state: ServerState, body: GenerateBody) -> tuple[int, ...]:
    if (body.prompt_ids is None) == (body.prompt is None):
        raise InvalidRequest("give exactly one of prompt_ids and prompt", param="prompt_ids")
    if body.prompt_ids is not None:
        return checked_prompt(state, body.prompt_ids, param="prompt_ids")
    return checked_prompt(state, await encode_text(state, body.prompt or ""), param="prompt")


class _Renderer:
    """Events -> parts of the answer, and the answer as a whole."""

    def __init__(
        self, submission: Submission, params: SamplingParams, num_prompt_tokens: int, *, collects: bool = True
    ) -> None:
        self._text = TextStream(submission.state.tokenizer, params)
        self._has_logprobs = params.logprobs is not None
        self._collects = collects
        self._num_cached: int | None = None
        self._empty = Generated(
            request_id=submission.response_id,
            num_prompt_tokens=num_prompt_tokens,
            weight_version=submission.state.weight_version,
        )
        self._whole = msgspec.structs.replace(
            self._empty, token_ids=[], logprobs=[] if self._has_logprobs else None
        )
        self._texts = StringIO()

    def collect(self, event: TokenEvent) -> None:
        self._part(event)

    def feed(self, event: TokenEvent) -> Iterator[bytes]:
        yield data(self._part(event))

    def end(self) -> Iterator[bytes]:
        return iter(())

    def body(self) -> Generated:
        self._whole.text = self._texts.getvalue()
        return self._whole

    def _part(self, event: TokenEvent) -> Generated:
        if self._num_cached is None:  # the first event tells what was cached when the sequence began
            self._num_cached = min(event.num_cached_tokens, self._empty.num_prompt_tokens)
        part = msgspec.structs.replace(
            self._empty,
            token_ids=list(event.token_ids),
            text=self._text.feed(event),
            logprobs=list(event.logprobs) if self._has_logprobs else None,
            prompt_logprobs=None if event.prompt_logprobs is None else list(event.prompt_logprobs),
            finish_reason=event.finish_reason,
            stop_match=event.stop_match,
            num_cached_tokens=self._num_cached,
            num_drafted=event.num_drafted,
            num_accepted=event.num_accepted,
            record=event.choices,
        )
        if self._collects:
            self._add(part)
        return part

    def _add(self, part: Generated) -> None:
        whole = self._whole
        whole.token_ids += part.token_ids
        self._texts.write(part.text)
        if whole.logprobs is not None:
            whole.logprobs += part.logprobs or []
        if part.prompt_logprobs is not None:
            whole.prompt_logprobs = part.prompt_logprobs
        whole.finish_reason, whole.stop_match = part.finish_reason, part.stop_match
        whole.num_cached_tokens = part.num_cached_tokens
        whole.num_drafted, whole.num_accepted = part.num_drafted, part.num_accepted
        whole.record = part.record
