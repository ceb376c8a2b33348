"""From a request's fields to SamplingParams: defaults, limits of this server, and one seed per sequence."""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from bittrue.engine.types import SamplingParams
from bittrue.errors import InvalidRequest, PromptTooLong
from bittrue.server.protocol import GenerateSampling, SamplingFields
from bittrue.server.state import ServerState


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """How long an answer may be. ``asked`` None: as long as ``default`` and the context allow."""

    asked: int | None
    field: str  # what the client calls it
    default: int | None  # None: the rest of the context


def checked_prompt(state: ServerState, prompt: Sequence[int], *, param: str) -> tuple[int, ...]:
    """The prompt if it leaves room for at least one token and every id exists.

    Raises PromptTooLong with both numbers, InvalidRequest.
    """
    if not prompt:
        raise InvalidRequest(f"{param} is empty; send at least one token", param=param)
    if len(prompt) >= state.max_context:
        error = _too_long(state, len(prompt))
        error.param = param
        raise error
    _check_ids(state, prompt, param)
    return tuple(prompt)


def _too_long(state: ServerState, num_tokens: int) -> PromptTooLong:
    """Names the knob that would let the prompt in."""
    if not state.is_limited_by_memory:
        return PromptTooLong(num_tokens=num_tokens, limit=state.max_context)
    most = state.client.ready.max_context
    if num_tokens >= most:
        return PromptTooLong(num_tokens=num_tokens, limit=most)
    knob = f"--kv-memory (it needs {state.kv_memory_for(num_tokens + 1)} bytes)"
    return PromptTooLong(num_tokens=num_tokens, limit=state.max_context, knob=knob)


def answer_tokens(state: ServerState, num_prompt: int, limits: TokenLimits) -> int:
    """max_tokens of a sequence. Raises InvalidRequest where what was asked cannot fit behind the prompt."""
    room = state.max_context - num_prompt
    if limits.asked is None:
        return room if limits.default is None else min(limits.default, room)
    if limits.asked > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens and {limits.field} asks for {limits.asked} more, but the "
            f"context of this server is {state.max_context} tokens; ask for at most {room}",
            param=limits.field,
            code="context_length_exceeded",
        )
    return limits.asked


def sampling_params(
    state: ServerState, body: SamplingFields, *, max_tokens: int, logprobs: int | None, logprobs_param: str
) -> SamplingParams:
    """The sampling of the request's first sequence, without a grammar. Raises InvalidRequest."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}, but at most {max_tokens} tokens are generated", param="min_tokens"
        )
    if logprobs is not None:
        _check_logprobs(state, logprobs, logprobs_param)
    stop_ids, bias = body.stop_token_ids or [], body.logit_bias or {}
    _check_ids(state, stop_ids, "stop_token_ids")
    _check_ids(state, bias, "logit_bias")
    stop = body.stop if body.stop is not None else ()
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(stop_ids),
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=bias,
        logprobs=logprobs,
    )


def generate_params(state: ServerState, fields: GenerateSampling, *, max_tokens: int) -> SamplingParams:
    """The sampling of a /generate request. Raises InvalidRequest."""
    if fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {fields.min_tokens}, but at most {max_tokens} tokens are generated",
            param="sampling.min_tokens",
        )
    for name, asked in (("logprobs", fields.logprobs), ("prompt_logprobs", fields.prompt_logprobs)):
        if asked is not None:
            _check_logprobs(state, asked, f"sampling.{name}")
    _check_ids(state, fields.stop_token_ids, "sampling.stop_token_ids")
    _check_ids(state, fields.logit_bias, "sampling.logit_bias")
    values = {name: getattr(fields, name) for name in fields.__struct_fields__}
    values |= {
        "top_k": max(fields.top_k, 0),
        "seed": secrets.randbits(63) if fields.seed is None else fields.seed,
        "max_tokens": max_tokens,
        "stop": tuple(fields.stop),
        "stop_token_ids": tuple(fields.stop_token_ids),
    }
    return SamplingParams(**values)


def with_derived_seeds(params: SamplingParams, num_sequences: int) -> list[SamplingParams]:
    """One SamplingParams per sequence: the first keeps the seed, so that n = 1 equals the first of n."""
    return [params] + [
        msgspec.structs.replace(params, seed=_derived_seed(params.seed, index))
        for index in range(1, num_sequences)
    ]


def _derived_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _check_ids(state: ServerState, ids: Iterable[int], param: str) -> None:
    worst = max(ids, default=0)
    if worst >= state.vocab_size:
        raise InvalidRequest(
            f"{param} holds the token id {worst}; this model's ids are 0 to {state.vocab_size - 1}",
            param=param,
        )


def _check_logprobs(state: ServerState, asked: int, param: str) -> None:
    limit = state.config.max_logprobs
    if asked > limit:
        raise InvalidRequest(f"{param} is {asked}, but this server gives at most {limit}", param=param)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
