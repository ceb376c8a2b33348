"""Chat messages to prompt tokens, on DeepSeek's own V4 encoding."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import deepseek_recipe as recipe

from bittrue.errors import InvalidRequest
from bittrue.text.messages import (
    ChatMessage,
    ResponseFormat,
    ThinkingMode,
    ToolChoice,
    ToolDefinition,
    checked_text,
)
from bittrue.text.tokenizer import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    Tokenizer,
)

# Part of the model's identity: another encoder may render the same messages to other tokens.
ENCODER_VERSION = "deepseek-recipe 0.2.0 V4"

# The special tokens a rendered conversation is built from; the recipe puts no others around text.
_STRUCTURE = frozenset({BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER})


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered.

    ``developer`` says what a developer message is: "system" (OpenAI's meaning, merged into the system text)
    or "user" (the official encoder's internal role: a user turn that may carry tools, dropped with old
    reasoning). ``ends_with_answer`` leaves out the opening of a new answer after a last assistant message.
    """

    tools: tuple[ToolDefinition, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    thinking: ThinkingMode = field(default_factory=ThinkingMode)
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    developer: Literal["system", "user"] = "system"
    ends_with_answer: bool = False


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready for the engine. ``text`` spells special tokens out; only ``token_ids`` is exact."""

    token_ids: tuple[int, ...]
    text: str
    starts_in_reasoning: bool  # the answer's first token belongs to the reasoning
    encoder_version: str = ENCODER_VERSION


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the rendered prompt: plain text, or the spelling of exactly one special token."""

    text: str
    is_special: bool


_Pieces: TypeAlias = list[_Piece]


class Codec:
    """Renders conversations with one tokenizer; immutable, threads may share it.

    Text of messages is tokenised apart from the special tokens around it: a marker a user typed stays text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoding = recipe.DeepseekV4Encoding()

    def encode_chat(
        self, messages: Sequence[ChatMessage], options: ChatOptions | None = None
    ) -> EncodedPrompt:
        """Messages -> prompt tokens.

        Thinking: the prompt ends in ``<think>``, else in ``</think>``. A last assistant message with
        ``is_prefix`` is left open for the model to continue. tool_choice "required" and named add nothing to
        the prompt: the grammar enforces them after the reasoning. A tool call without arguments renders as
        one line break between its tags. Raises InvalidRequest naming ``messages[i].field``.
        """
        options = options or ChatOptions()
        _check(messages, options)
        messages = _as_roles(messages, options)
        pieces = self._render(messages, options)
        return EncodedPrompt(
            token_ids=tuple(self._ids(pieces)),
            text="".join(piece.text for piece in pieces),
            starts_in_reasoning=_ends_in_reasoning(pieces),
        )

    def _render(self, messages: Sequence[ChatMessage], options: ChatOptions) -> _Pieces:
        """The pieces of the prompt; tasks and developer tools, which the recipe lacks, are spliced in."""
        mark = _unused_character(messages)
        marked = _with_marks(messages, mark, is_thinking=options.thinking.is_enabled)
        if options.ends_with_answer:
            # The recipe takes a last assistant message for history and drops its reasoning, unless a prefix.
            marked[-1] = replace(marked[-1], content=marked[-1].content + mark, is_prefix=True)
        carried = next((message.tools for message in messages if message.tools), ())
        conversation = _conversation(marked, options, carried or options.tools)
        pieces = self._pieces(conversation)
        if carried:
            section = self._tools_section(carried)
            pieces = _cut(pieces, section)
        for message in messages:
            if message.task is not None:
                pieces = _splice_task(pieces, mark, message.task, is_thinking=options.thinking.is_enabled)
            elif message.tools:
                pieces = _splice_text(pieces, mark, section)
        if options.ends_with_answer:
            pieces = [*_splice_text(pieces, mark, []), _Piece(EOS, True)]
        return _merged(pieces)

    def _pieces(self, conversation: recipe.Conversation) -> _Pieces:
        rendered = self._encoding.render_conversation(conversation)
        prompt, at, pieces = rendered.prompt, 0, []
        for start, end in rendered.special_ranges:
            # The recipe also reports grounding tokens (<｜box｜> ...) that an assistant's text spells; they
            # come from the request and stay text, like everything a caller typed.
            if prompt[start:end] not in _STRUCTURE:
                continue
            pieces.append(_Piece(prompt[at:start], False))
            pieces.append(_Piece(prompt[start:end], True))
            at = end
        pieces.append(_Piece(prompt[at:], False))
        return [piece for piece in pieces if piece.text]

    def _tools_section(self, tools: tuple[ToolDefinition, ...]) -> _Pieces:
        """The blank line and tool section that follow a system text, without what stands around them."""
        pieces = self._pieces(_conversation([ChatMessage("user", "?")], ChatOptions(), tools))
        return pieces[1:-4]  # before: the begin token; after: <｜User｜> ? <｜Assistant｜> </think>

    def _ids(self, pieces: _Pieces) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if piece.is_special:
                ids.append(self._tokenizer.special_id(piece.text))
            else:
                ids.extend(self._tokenizer.encode_text(piece.text))
        return ids


def _check(messages: Sequence[ChatMessage], options: ChatOptions) -> None:
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", param="messages")
    last = len(messages) - 1
    if options.ends_with_answer and (messages[last].role != "assistant" or messages[last].task is not None):
        raise InvalidRequest("a transcript ends with an assistant message", param="messages")
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        checked_text(message.content, f"{path}.content")
        checked_text(message.reasoning_content or "", f"{path}.reasoning_content")
        for position, call in enumerate(message.tool_calls):
            checked_text(call.name, f"{path}.tool_calls[{position}].function.name")
            checked_text(call.arguments, f"{path}.tool_calls[{position}].function.arguments")
        if message.is_prefix and index != last:
            raise InvalidRequest("only the last message can be continued", param=f"{path}.prefix")
        if message.tools and (message.role != "developer" or options.developer != "user"):
            raise InvalidRequest("tools belong to the request or a developer turn", param=f"{path}.tools")
        if message.task is not None:
            _check_task(messages, index)


def _check_task(messages: Sequence[ChatMessage], index: int) -> None:
    message, path = messages[index], f"messages[{index}].task"
    wanted = "assistant" if message.task == "title" else "user"
    if message.role != wanted or message.tool_calls or message.is_prefix:
        raise InvalidRequest(f"task {message.task} belongs to a plain {wanted} message", param=path)
    if index + 1 < len(messages) and messages[index + 1].role != "assistant":
        raise InvalidRequest(
            "a task is answered by the next message, which must be an assistant's", param=path
        )


def _as_roles(messages: Sequence[ChatMessage], options: ChatOptions) -> list[ChatMessage]:
    """Developer messages as the role they stand for."""
    if options.developer == "system":
        return [replace(m, role="system") if m.role == "developer" else m for m in messages]
    has_tools = bool(options.tools) or any(m.tools for m in messages)
    drops_reasoning = options.thinking.is_enabled and not has_tools
    turns = [i for i, m in enumerate(messages) if m.role in ("user", "tool", "developer")]
    last_turn = turns[-1] if turns else -1
    return [
        replace(m, role="user") if m.role == "developer" else m
        for i, m in enumerate(messages)
        if not (drops_reasoning and m.role == "developer" and i < last_turn)
    ]


def _unused_character(messages: Sequence[ChatMessage]) -> str:
    """A private-use character that no message holds: it marks the end of a text until rendering is done."""
    used = set().union(*(f"{message.content}{message.reasoning_content}" for message in messages))
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


def _with_marks(messages: Sequence[ChatMessage], mark: str, *, is_thinking: bool) -> list[ChatMessage]:
    """The messages with the mark where something is spliced in, and with the reasoning their mode has.

    As in the recipe's own request conversion: none in chat mode, empty where a thinking history lacks it. The
    answer to a task has none.
    """
    marked = []
    for index, message in enumerate(messages):
        if message.task is not None or message.tools:
            message = replace(message, content=message.content + mark)
        if message.role == "assistant":
            is_answer_to_task = index > 0 and messages[index - 1].task is not None
            has_reasoning = is_thinking and not is_answer_to_task
            message = replace(
                message, reasoning_content=message.reasoning_content or "" if has_reasoning else None
            )
        marked.append(message)
    return marked


def _conversation(
    messages: Sequence[ChatMessage], options: ChatOptions, tools: tuple[ToolDefinition, ...]
) -> recipe.Conversation:
    form = options.response_format
    return recipe.Conversation(
        [_recipe_message(message) for message in messages],
        thinking_mode=options.thinking.is_enabled,
        tools=[recipe.ToolDefinition(t.name, t.description, dict(t.parameters)) for t in tools],
        tool_choice="none" if options.tool_choice.mode == "none" else "auto",
        reasoning_effort=options.thinking.effort,
        response_format="json_object" if form.kind == "json_object" else "text",
        response_schema=form.schema if form.kind == "json_schema" else None,
    )


def _recipe_message(message: ChatMessage) -> recipe.Message:
    match message.role:
        case "system":
            return recipe.SystemMessage(message.content)
        case "assistant":
            calls = [recipe.ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls]
            return recipe.AssistantMessage(
                message.content, message.reasoning_content, calls or None, message.is_prefix
            )
        case "tool":
            return recipe.ToolMessage(message.content, message.tool_call_id)
        case "latest_reminder":
            return recipe.LatestReminderMessage(message.content)
        case _:
            return recipe.UserMessage(message.content)


def _find_mark(pieces: _Pieces, mark: str) -> int:
    return next(i for i, piece in enumerate(pieces) if not piece.is_special and mark in piece.text)


def _splice_text(pieces: _Pieces, mark: str, inserted: _Pieces) -> _Pieces:
    at = _find_mark(pieces, mark)
    before, after = pieces[at].text.split(mark, 1)
    return [*pieces[:at], _Piece(before, False), *inserted, _Piece(after, False), *pieces[at + 1 :]]


def _splice_task(pieces: _Pieces, mark: str, task: str, *, is_thinking: bool) -> _Pieces:
    """Replace the opening of the answer after the marked message by the task's token.

    A task's answer has no reasoning; only "action" keeps the opening, and its token follows it.
    """
    at = _find_mark(pieces, mark)
    before = _Piece(pieces[at].text.removesuffix(mark), False)
    end = at + 1
    kept = [before]
    if pieces[end].text == EOS:
        kept.append(pieces[end])
        end += 1
    assert pieces[end] == _Piece(ASSISTANT, True)
    end += 1
    while end < len(pieces) and pieces[end].is_special and pieces[end].text in (THINK_START, THINK_END):
        end += 1
    if task == "action":
        opening = THINK_START if is_thinking else THINK_END
        kept += [_Piece(ASSISTANT, True), _Piece(opening, True)]
    kept.append(_Piece(TASK_TOKENS[task], True))
    return [*pieces[:at], *kept, *pieces[end:]]


def _cut(pieces: _Pieces, section: _Pieces) -> _Pieces:
    """The pieces without the tool section, whose first and last text may be joined to other text."""
    start = next(i for i, piece in enumerate(pieces) if piece.text.endswith(section[0].text))
    end = start + len(section) - 1
    head = _Piece(pieces[start].text.removesuffix(section[0].text), False)
    tail = _Piece(pieces[end].text.removeprefix(section[-1].text), False)
    assert pieces[start + 1 : end] == section[1:-1]
    return [*pieces[:start], head, tail, *pieces[end + 1 :]]


def _merged(pieces: _Pieces) -> _Pieces:
    """Neighbouring texts as one piece, as they are tokenised together; empty ones left out."""
    merged: _Pieces = []
    for piece in pieces:
        if not piece.text:
            continue
        if merged and not merged[-1].is_special and not piece.is_special:
            merged[-1] = _Piece(merged[-1].text + piece.text, False)
        else:
            merged.append(piece)
    return merged


def _ends_in_reasoning(pieces: _Pieces) -> bool:
    """True when the last thing opened is ``<think>``: also for a prefix that stops inside the reasoning."""
    for piece in reversed(pieces):
        if piece.is_special:
            return piece.text == THINK_START
    return False
