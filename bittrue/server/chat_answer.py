"""The answer of a chat request: from tokens to reasoning, content and tool calls in OpenAI's shape."""

from collections.abc import Iterable
from io import StringIO
from typing import Self

import msgspec
from msgspec import UNSET, UnsetType

from bittrue.engine.types import TokenEvent, TokenLogprob
from bittrue.server.tokens import finite
from bittrue.server.usage import Usage
from bittrue.text.parser import (
    Content,
    Event,
    OutputParser,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from bittrue.text.tokenizer import Tokenizer


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    """One entry per generated token, those of the reasoning and the end token included."""

    content: list[ContentLogprob]
    refusal: None = None


class Function(msgspec.Struct, omit_defaults=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    id: str
    function: Function
    type: str = "function"


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: Function | UnsetType = UNSET


class Message(msgspec.Struct):
    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: None = None


class MessageBuilder:
    """A message as it grows. Texts grow in buffers: a long answer costs no more per token than a short
    one."""

    __slots__ = ("_calls", "_content", "_reasoning")

    def __init__(self) -> None:
        self._content: StringIO | None = None
        self._reasoning: StringIO | None = None
        self._calls: list[tuple[str, str, StringIO]] = []  # id, name, arguments

    def add(self, events: Iterable[Event]) -> None:
        """Takes over what the parser told."""
        for event in events:
            match event:
                case Reasoning(text):
                    self._reasoning = self._reasoning or StringIO()
                    self._reasoning.write(text)
                case Content(text):
                    self._content = self._content or StringIO()
                    self._content.write(text)
                case ToolCallStart(_, call_id, name):
                    self._calls.append((call_id, name, StringIO()))
                case ToolCallArguments(index, text):
                    self._calls[index][2].write(text)
                case ToolCallEnd():
                    pass

    def message(self) -> Message:
        calls = [ToolCall(call_id, Function(name, text.getvalue())) for call_id, name, text in self._calls]
        content = None if self._content is None else self._content.getvalue()
        return Message(
            content="" if content is None and not calls else content,
            reasoning_content=UNSET if self._reasoning is None else self._reasoning.getvalue(),
            tool_calls=calls or UNSET,
        )


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET

    @classmethod
    def of(cls, event: Event) -> Self | None:
        """What one event adds for the client; None for the end of a call."""
        match event:
            case Reasoning(text):
                return cls(reasoning_content=text)
            case Content(text):
                return cls(content=text)
            case ToolCallStart(index, call_id, name):
                return cls(tool_calls=[ToolCallDelta(index, call_id, "function", Function(name, ""))])
            case ToolCallArguments(index, text):
                return cls(tool_calls=[ToolCallDelta(index, function=Function(arguments=text))])
            case ToolCallEnd():
                return None


class Choice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatAnswer:
    """One sequence's tokens as parser events, and why it ended as clients are told."""

    __slots__ = ("_has_calls", "_parser", "finish_reason")

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._has_calls = False
        self.finish_reason: str | None = None

    @property
    def num_reasoning_tokens(self) -> int:
        return self._parser.num_reasoning_tokens

    def feed(self, event: TokenEvent) -> list[Event]:
        ids = event.token_ids
        if isinstance(event.stop_match, int):
            ids = ids[:-1]  # the stop token is not part of the answer
        told = self._parser.feed(ids)
        if event.finish_reason is not None:
            told += self._parser.finish()
        self._has_calls = self._has_calls or any(isinstance(one, ToolCallEnd) for one in told)
        if event.finish_reason is not None:
            is_call = self._has_calls and event.finish_reason == "stop"
            self.finish_reason = "tool_calls" if is_call else event.finish_reason
        return told


def content_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> ContentLogprob:
    raw = tokenizer.token_bytes(entry.token_id)
    top = []
    for token_id, logprob in entry.top:
        rival = tokenizer.token_bytes(token_id)
        top.append(TopLogprob(rival.decode("utf-8", "replace"), finite(logprob), list(rival)))
    return ContentLogprob(raw.decode("utf-8", "replace"), finite(entry.logprob), list(raw), top)
