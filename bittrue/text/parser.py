"""Generated tokens to reasoning, content and tool calls, the same for any split of the stream."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from bittrue.text.marked import (
    MARK_DSML,
    MARK_THINK_END,
    MARK_THINK_START,
    MarkedText,
    has_mark,
    spelled,
)
from bittrue.text.messages import ToolCall
from bittrue.text.tokenizer import THINK_END, Tokenizer


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; ``index`` counts calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: the pieces joined are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete."""

    index: int


Event: TypeAlias = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A whole answer: what the events of its stream add up to. ``reasoning`` is None where there was none."""

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]


class _Stage(Enum):
    REASONING = auto()
    CONTENT = auto()
    BLOCK = auto()  # in a tool block, between calls
    CALL = auto()  # in a call, between parameters
    VALUE = auto()  # in a parameter's value


_BLOCK_OPEN = f"<{MARK_DSML}tool_calls>"
_BLOCK_CLOSE = f"</{MARK_DSML}tool_calls>"
_CALL_OPEN = f"<{MARK_DSML}invoke"
_CALL_CLOSE = f"</{MARK_DSML}invoke>"
_PARAMETER_OPEN = f"<{MARK_DSML}parameter"
_PARAMETER_CLOSE = f"</{MARK_DSML}parameter>"
_CALL_HEAD = re.compile(r'\s*name="([^\ud800-\ud802]*?)">')
_PARAMETER_HEAD = re.compile(r'\s*name="([^\ud800-\ud802]*?)" string="(true|false)">')
_SPACE = re.compile(r"[ \t\r\n]*")
_SEPARATOR = re.compile(r"\n{0,2}\Z")  # the blank line before a block belongs to the block
_OPEN_TAIL = re.compile(r"\n{0,2}<?\Z")
_MAX_HEAD = 1024  # characters of a tag's attributes; a longer head is no head


class OutputParser:
    """Parses one answer as it is generated.

    Only the tokens ``</think>`` and ``｜DSML｜`` themselves act; the same characters typed as text are text.
    White space between tags is free. A call is reported when its closing tag has arrived; a malformed or
    unfinished call is returned as content, verbatim, and nothing is lost or told twice. With
    ``incremental_arguments`` (for output that a grammar guarantees) calls are reported as they come: what was
    told before a fault stays, the call gets no ToolCallEnd, and only the untold rest becomes content.

    Arguments: string="true" gives a JSON string, string="false" the JSON as written, or a JSON string of it
    where it is not valid JSON. Ids of calls are a function of ``request_id`` and the call's index.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        request_id: str,
        starts_in_reasoning: bool,
        parse_tools: bool = True,
        stop: Sequence[str] = (),
        incremental_arguments: bool = False,
    ) -> None:
        self._request_id = request_id
        self._marked = MarkedText(tokenizer, stop)
        self._think_end_id = tokenizer.special_id(THINK_END)
        self._stage = _Stage.REASONING if starts_in_reasoning else _Stage.CONTENT
        self._parses_tools = parse_tools
        self._is_incremental = incremental_arguments
        self._is_reasoning_open = starts_in_reasoning
        self.num_reasoning_tokens = 0  # tokens before the one that ends the reasoning
        self._buffer = ""  # marked text not yet understood
        self._raw: list[str] = []  # marked text understood but not yet told: returned if the call fails
        self._out: list[Event] = []
        self._untold: list[Event] = []  # events of the unfinished call
        self._num_calls = 0
        self._num_block_calls = 0
        self._parameters: set[str] = set()
        self._value: list[str] = []
        self._is_string = True
        self._is_fresh = True  # nothing has come

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._marked.matched_stop

    def feed(self, token_ids: Sequence[int]) -> list[Event]:
        """What these tokens add to the answer."""
        if self._is_reasoning_open:
            for token_id in token_ids:
                if token_id == self._think_end_id:
                    self._is_reasoning_open = False
                    break
                self.num_reasoning_tokens += 1
        return self._advance(self._marked.feed(token_ids))

    def finish(self) -> list[Event]:
        """The end of the answer: an unfinished call and everything held back becomes content."""
        events = self._advance(self._marked.flush())
        while self._stage in (_Stage.BLOCK, _Stage.CALL, _Stage.VALUE):
            is_cut_short = self._num_block_calls > 0 and _BLOCK_CLOSE.startswith(self._buffer)
            if self._stage is _Stage.BLOCK and is_cut_short:
                self._buffer, self._raw, self._stage = "", [], _Stage.CONTENT
            else:
                self._fail()
            events += self._advance("")
        self._tell_text(self._buffer)
        self._buffer = ""
        return _joined(events + self._taken())

    def _advance(self, text: str) -> list[Event]:
        self._buffer += text
        steps = {
            _Stage.REASONING: self._step_reasoning,
            _Stage.CONTENT: self._step_content,
            _Stage.BLOCK: self._step_block,
            _Stage.CALL: self._step_call,
            _Stage.VALUE: self._step_value,
        }
        while self._buffer and steps[self._stage]():
            pass
        return _joined(self._taken())

    def _taken(self) -> list[Event]:
        taken, self._out = self._out, []
        return taken

    # Each step consumes a prefix of the buffer and says whether another step may be able to go on.

    def _step_reasoning(self) -> bool:
        end = self._buffer.find(MARK_THINK_END)
        if end < 0:
            self._tell_text(self._buffer)
            self._buffer = ""
            return False
        self._tell_text(self._buffer[:end])
        self._buffer = self._buffer[end + 1 :]
        self._stage = _Stage.CONTENT
        self._is_fresh = False
        return True

    def _step_content(self) -> bool:
        if self._is_fresh and self._buffer[0] == MARK_THINK_START:
            # The model opens its reasoning itself although the prompt had closed it.
            self._buffer, self._stage, self._is_fresh = self._buffer[1:], _Stage.REASONING, False
            return True
        self._is_fresh = False
        at = self._buffer.find("<" + MARK_DSML) if self._parses_tools else -1
        if at < 0:
            keep = len(self._buffer) if not self._parses_tools else _start(_OPEN_TAIL, self._buffer)
            self._tell_text(self._buffer[:keep])
            self._buffer = self._buffer[keep:]
            return False
        if self._buffer.startswith(_BLOCK_OPEN, at):
            separator = _start(_SEPARATOR, self._buffer[:at])
            self._tell_text(self._buffer[:separator])
            self._raw = []
            self._consume(at + len(_BLOCK_OPEN), skip=separator)
            self._stage, self._num_block_calls = _Stage.BLOCK, 0
            return True
        if _BLOCK_OPEN.startswith(self._buffer[at:]):
            separator = _start(_SEPARATOR, self._buffer[:at])
            self._tell_text(self._buffer[:separator])
            self._buffer = self._buffer[separator:]
            return False
        self._tell_text(self._buffer[: at + 2])
        self._buffer = self._buffer[at + 2 :]
        return True

    def _step_block(self) -> bool:
        self._consume_space()
        if self._buffer.startswith(_BLOCK_CLOSE) and self._num_block_calls:
            self._buffer, self._raw = self._buffer[len(_BLOCK_CLOSE) :], []
            self._stage = _Stage.CONTENT
            return True
        if not self._buffer.startswith(_CALL_OPEN):
            return self._wait_or_fail(_CALL_OPEN, _BLOCK_CLOSE)
        head = self._head(_CALL_OPEN, _CALL_HEAD)
        if head is None:
            return self._stage is _Stage.CONTENT
        index = self._num_calls
        self._num_calls += 1
        self._parameters = set()
        self._stage = _Stage.CALL
        self._tell(ToolCallStart(index, tool_call_id(self._request_id, index), head[1]))
        self._tell(ToolCallArguments(index, "{"))
        return True

    def _step_call(self) -> bool:
        self._consume_space()
        index = self._num_calls - 1
        if self._buffer.startswith(_CALL_CLOSE):
            self._buffer = self._buffer[len(_CALL_CLOSE) :]
            self._tell(ToolCallArguments(index, "}"))
            self._tell(ToolCallEnd(index))
            self._out += self._untold
            self._untold, self._raw = [], []
            self._num_block_calls += 1
            self._stage = _Stage.BLOCK
            return True
        if not self._buffer.startswith(_PARAMETER_OPEN):
            return self._wait_or_fail(_PARAMETER_OPEN, _CALL_CLOSE)
        head = self._head(_PARAMETER_OPEN, _PARAMETER_HEAD)
        if head is None:
            return self._stage is _Stage.CONTENT
        name = head[1]
        if name in self._parameters:
            return self._fail()
        comma = ", " if self._parameters else ""
        self._parameters.add(name)
        self._is_string, self._value = head[2] == "true", []
        self._stage = _Stage.VALUE
        opening = f"{comma}{_json_text(name)}: "
        if self._is_string:
            self._tell(ToolCallArguments(index, opening + '"'))
        else:
            self._value = [opening]
        return True

    def _step_value(self) -> bool:
        index = self._num_calls - 1
        end = self._buffer.find(_PARAMETER_CLOSE)
        size = end if end >= 0 else len(self._buffer) - _overlap(self._buffer, _PARAMETER_CLOSE)
        piece = spelled(self._buffer[:size])
        self._consume(size if end < 0 else end + len(_PARAMETER_CLOSE))
        if self._is_string:
            if piece:
                self._tell(ToolCallArguments(index, _json_text(piece)[1:-1]))
        else:
            self._value.append(piece)
        if end < 0:
            return False
        if self._is_string:
            self._tell(ToolCallArguments(index, '"'))
        else:
            opening, value = self._value[0], "".join(self._value[1:])
            self._tell(ToolCallArguments(index, opening + (value if _is_json(value) else _json_text(value))))
        self._stage = _Stage.CALL
        return True

    def _head(self, opening: str, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The attributes of the tag at the front of the buffer, consumed; None when unfinished or no tag."""
        rest = self._buffer[len(opening) : len(opening) + _MAX_HEAD]
        head = pattern.match(rest)
        if head is not None:
            self._consume(len(opening) + head.end())
        elif has_mark(rest) or len(rest) >= _MAX_HEAD:
            self._fail()
        return head

    def _wait_or_fail(self, *expected: str) -> bool:
        if any(tag.startswith(self._buffer) for tag in expected):
            return False
        return self._fail()

    def _fail(self) -> bool:
        """Gives up the tool block: what was not told becomes content, and what follows is read as content."""
        untold = "".join(self._raw)
        if self._untold:
            self._num_calls -= 1  # the failed call was never told; its index is free
        self._raw, self._untold = [], []
        self._stage = _Stage.CONTENT
        self._tell_text(untold)
        return True

    def _consume(self, size: int, *, skip: int = 0) -> None:
        self._raw.append(self._buffer[skip:size])
        self._buffer = self._buffer[size:]

    def _consume_space(self) -> None:
        space = _SPACE.match(self._buffer)
        if space is not None and space.end():
            self._consume(space.end())

    def _tell_text(self, marked: str) -> None:
        if not marked:
            return
        kind = Reasoning if self._stage is _Stage.REASONING else Content
        self._out.append(kind(spelled(marked)))

    def _tell(self, event: Event) -> None:
        """An event of a call: told at once, or when the call is complete."""
        if self._is_incremental:
            self._out.append(event)
            self._raw = []
        else:
            self._untold.append(event)


def parse_answer(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    request_id: str,
    starts_in_reasoning: bool,
    parse_tools: bool = True,
    stop: Sequence[str] = (),
) -> ParsedAnswer:
    """A whole answer at once; equal to what its stream adds up to."""
    parser = OutputParser(
        tokenizer,
        request_id=request_id,
        starts_in_reasoning=starts_in_reasoning,
        parse_tools=parse_tools,
        stop=stop,
    )
    return collect([*parser.feed(token_ids), *parser.finish()])


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """What the events of one answer add up to."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case ToolCallStart():
                starts.append(event)
            case ToolCallArguments(index, text):
                arguments.setdefault(index, []).append(text)
            case ToolCallEnd():
                pass
    calls = tuple(ToolCall(s.id, s.name, "".join(arguments.get(s.index, []))) for s in starts)
    return ParsedAnswer("".join(reasoning) if reasoning else None, "".join(content), calls)


def tool_call_id(request_id: str, index: int) -> str:
    """The id of a call: the same for the same request and index, streamed or not, and after a restart."""
    return "call_" + hashlib.sha256(f"{request_id}:{index}".encode()).hexdigest()[:24]


def _joined(events: Sequence[Event]) -> list[Event]:
    """Neighbouring texts of one kind as one event."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif (
            isinstance(event, ToolCallArguments)
            and isinstance(last, ToolCallArguments)
            and event.index == last.index
        ):
            joined[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def _start(pattern: re.Pattern[str], text: str) -> int:
    """Where a pattern that matches at the end of any text begins."""
    found = pattern.search(text)
    return len(text) if found is None else found.start()


def _overlap(text: str, closing: str) -> int:
    """Length of the longest proper prefix of ``closing`` that the text ends with."""
    for size in range(min(len(text), len(closing) - 1), 0, -1):
        if text.endswith(closing[:size]):
            return size
    return 0


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
