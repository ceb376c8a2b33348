"""The JSON bodies clients send: strict structs, and how a bad body becomes an error that names the field."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bittrue.errors import InvalidRequest

MAX_SEED = 2**63 - 1
Probability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
CacheSalt = Annotated[str, Meta(max_length=256)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # asks for padding of chunks; this server pads none


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every generating OpenAI endpoint takes. ``None`` is absent."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=MAX_SEED)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    response_format: Any = None
    guided_regex: Annotated[str, Meta(min_length=1)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None  # smaller goes first
    cache_salt: CacheSalt | None = None  # cached prefixes are shared only where it is the same
    # Sent by OpenAI clients, without a meaning here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatBody(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions. Messages, tools and formats are read by bittrue.text.messages."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Any = None
    thinking: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionBody(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]  # text, token ids, or a list of either
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: None = None


class GenerateSampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Sampling of /generate: the fields of engine.types.SamplingParams, in the ranges of SamplingFields."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    stop: Annotated[list[StopText], Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] = []
    ignore_eos: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] = {}
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0)] | None = None


class GenerateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /generate: exactly one of ``prompt_ids`` and ``prompt`` (text, without special tokens)."""

    prompt_ids: TokenIds | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    sampling: GenerateSampling = msgspec.field(default_factory=GenerateSampling)
    stream: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: CacheSalt | None = None
    record: bool = False


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: exactly one of ``prompt`` and ``messages`` (with the chat fields that shape it)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: Any = None
    reasoning_effort: Any = None
    thinking: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class BodyDecoder:
    """Turns request bodies into structs of one type."""

    __slots__ = ("_decode",)

    def __init__(self, body_type: type[msgspec.Struct]) -> None:
        self._decode = msgspec.json.Decoder(body_type).decode

    def __call__(self, body: bytes) -> Any:
        """Raises InvalidRequest naming the field."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise _named(str(error)) from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"the body is not valid UTF-8 ({error.reason}); send JSON as UTF-8", code="invalid_utf8"
            ) from error
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
        except RecursionError as error:
            raise InvalidRequest("the body is nested too deeply; a thousand levels is too many") from error


_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)


def _named(message: str) -> InvalidRequest:
    """msgspec's message, with the path it ends in as the error's param."""
    found = _AT.match(message)
    assert found is not None, message
    what, path = found["what"], (found["path"] or "").replace("[...]", "")
    for pattern, fact, code in (
        (_UNKNOWN, "unknown field", "unknown_field"),
        (_MISSING, "missing field", "missing_field"),
    ):
        field = pattern.match(what)
        if field is not None:
            name = f"{path}.{field['name']}" if path else field["name"]
            return InvalidRequest(f"{fact} {name}", param=name, code=code)
    if not path:
        return InvalidRequest(f"the body is not what this endpoint takes: {what[:1].lower()}{what[1:]}")
    return InvalidRequest(f"{path}: {what[:1].lower()}{what[1:]}", param=path, code="invalid_value")
