"""Files of prompts: one JSON object a line, checked as a whole, split so that no prompt is on both sides."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from bittrue.errors import ConfigError, InvalidRequest, UsageError
from bittrue.rl.row_verifier import check_table, verifier_of
from bittrue.rl.verifiers.frames import Sent
from bittrue.text.codec import ChatOptions, Codec
from bittrue.text.messages import ChatMessage, ThinkingMode, checked_text, parse_messages, parse_tools
from bittrue.text.tokenizer import Tokenizer

Thinking = Literal["off", "low", "high", "max"]
DEFAULT_TASK = "prompts"
_OWN = frozenset({"prompt", "messages", "tools", "id", "task", "verifier"})
_TASK = re.compile(r"[\w.+-]+", re.ASCII)  # it stands in names of metrics
_ONE_IN = 10  # prompts are held out where no file of them is given
_SHOWN = 60  # characters of a prompt in an error


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and who judges its answers. ``where``: file and line. ``canonical``: the conversation
    without its spacing, by which prompts are the same."""

    id: str
    task: str
    where: str
    canonical: str
    token_ids: tuple[int, ...]
    starts_in_reasoning: bool
    has_tools: bool
    verifier: Sent

    @property
    def is_held_out(self) -> bool:
        """Whether the prompt is among those that no run trains on, by its hash alone: the same for every
        seed, order and file."""
        digest = hashlib.blake2b(self.canonical.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % _ONE_IN == 0


@dataclass(frozen=True, slots=True)
class PromptFiles:
    """The rows that are trained on, and those that are not."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


class PromptReader:
    """Reads rows ``{"prompt": text}`` (one message of the user) or ``{"messages": [...]}`` in OpenAI's shape.

    Beside them may stand ``tools``, ``id`` (else the line's number), ``task`` (a name in metrics) and
    ``verifier``; any other column is for verifiers. ``verifier``: the table of rows that have none of their
    own, empty where every row has one. ``max_tokens``: of a prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, thinking: Thinking, verifier: Mapping[str, Any], max_tokens: int
    ) -> None:
        """Raises ConfigError for a verifier that is none."""
        if verifier:
            check_table(verifier)
        self._codec = Codec(tokenizer)
        self._thinking = ThinkingMode(False) if thinking == "off" else ThinkingMode(True, thinking)
        self._verifier, self._max_tokens = verifier, max_tokens

    def read(self, path: Path) -> list[Row]:
        """The rows of a file. Raises UsageError that names the line."""
        rows: list[Row] = []
        lines: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    row = self._row(line, f"{path}:{number}", str(number))
                    if row.id in lines:
                        raise UsageError(
                            f"{row.where}: the id {row.id!r} is that of {lines[row.id]} too; change one"
                        )
                    lines[row.id] = row.where
                    rows.append(row)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if not rows:
            raise UsageError(f"{path} holds no prompt")
        return rows

    def _row(self, line: bytes, where: str, number: str) -> Row:
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
            return self._checked(entry, where, number)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{where}: the line is not a JSON object: {error}") from error
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error

    def _checked(self, entry: Mapping[str, Any], where: str, number: str) -> Row:
        if ("prompt" in entry) == ("messages" in entry):
            raise UsageError("a row has a prompt, or messages, and not both")
        messages = _messages(entry)
        if messages[-1].role == "assistant" and not messages[-1].is_prefix:
            raise UsageError("the last message is an answer already; remove it, or mark it as a prefix")
        tools = parse_tools(entry.get("tools"))
        encoded = self._codec.encode_chat(messages, ChatOptions(tools=tools, thinking=self._thinking))
        if len(encoded.token_ids) > self._max_tokens:
            fact = f"the prompt has {len(encoded.token_ids)} tokens, {self._max_tokens} fit beside an answer"
            raise UsageError(f"{fact}; shorten it, or lower rollout.max_tokens")
        table = entry.get("verifier", self._verifier)
        if not isinstance(table, Mapping) or not table:
            raise UsageError("the row has no verifier; give it one, or all of them data.verifier")
        columns = {name: value for name, value in entry.items() if name not in _OWN}
        prompt = entry["prompt"] if "prompt" in entry else entry["messages"]
        return Row(
            id=_id(entry.get("id", number)),
            task=_task(entry.get("task", DEFAULT_TASK)),
            where=where,
            canonical=_canonical(messages),
            token_ids=encoded.token_ids,
            starts_in_reasoning=encoded.starts_in_reasoning,
            has_tools=bool(tools),
            verifier=verifier_of(table, columns, prompt),
        )


def read_files(reader: PromptReader, prompts: Path, held_out: Path | None) -> PromptFiles:
    """Both sides: two files, or one of which a tenth is held out by hash. Raises UsageError, also for a
    prompt that is in both files."""
    rows = reader.read(prompts)
    if held_out is None:
        train = tuple(row for row in rows if not row.is_held_out)
        if not train:
            raise ConfigError(
                f"every prompt of {prompts} is held out by its hash; give more, or data.held_out",
                field="data.prompts",
            )
        return PromptFiles(train, tuple(row for row in rows if row.is_held_out))
    kept = reader.read(held_out)
    places = {row.canonical: row.where for row in rows}
    both = next((row for row in kept if row.canonical in places), None)
    if both is not None:
        raise UsageError(
            f"{both.where} asks what {places[both.canonical]} asks, {_shown(both)!r}, which would be trained "
            "on and held out; remove one of them"
        )
    return PromptFiles(tuple(rows), tuple(kept))


def digest_of(rows: Iterable[Row]) -> str:
    """SHA-256, in hexadecimal, of what rows ask and who judges."""
    found = hashlib.sha256()
    for row in rows:
        facts = [row.id, row.task, row.token_ids, row.starts_in_reasoning, row.has_tools, row.verifier]
        found.update(msgspec.json.encode(facts) + b"\n")
    return found.hexdigest()


def _messages(entry: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    if "messages" in entry:
        return parse_messages(entry["messages"])
    text = checked_text(entry["prompt"], "prompt")
    if not text.strip():
        raise InvalidRequest("prompt is empty", param="prompt")
    return (ChatMessage("user", text),)


def _id(raw: object) -> str:
    if isinstance(raw, bool) or not isinstance(raw, str | int) or raw == "":
        raise UsageError(f"id is {raw!r}, not a text or a whole number")
    return str(raw)


def _task(raw: object) -> str:
    if not isinstance(raw, str) or not _TASK.fullmatch(raw):
        raise UsageError(f"task is {raw!r}; it names metrics: letters, digits and _ . + - alone")
    return raw


def _canonical(messages: Sequence[ChatMessage]) -> str:
    """The conversation as one text, white space of any kind and length made one space."""
    facts = [
        [
            message.role,
            " ".join(message.content.split()),
            " ".join((message.reasoning_content or "").split()),
            [[call.name, call.arguments] for call in message.tool_calls],
        ]
        for message in messages
    ]
    return json.dumps(facts, ensure_ascii=False)


def _shown(row: Row) -> str:
    """The beginning of what is asked, for people."""
    text: str = json.loads(row.canonical)[-1][1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
