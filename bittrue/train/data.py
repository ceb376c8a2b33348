"""Streams of training documents: what a step reads is a function of the seed and the step."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bittrue.errors import ConfigError, InvalidRequest, UsageError
from bittrue.text.codec import ChatOptions, Codec
from bittrue.text.messages import ThinkingMode, checked_text, parse_messages, parse_tools
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.document import Document
from bittrue.train.tasks.render import Renderer, answer_document
from bittrue.train.tasks.task import Problem, Split, Task, problem_in, seeded

CHAT = "chat"  # what a document of several plain tasks is called
_CHAT_SHARE = 0.1  # of the documents of plain tasks
_CHAT_QUESTIONS = (2, 4)
_LINES = "lines"
_SHAPES = (("messages", "tools", "thinking"), ("text",), ("prompt", "completion"))
_MEASURED = 64  # documents of a task whose mean is taken for its length


class DocumentSource(Protocol):
    """Where documents come from."""

    def documents(self, step: int) -> list[Document]:
        """The documents of a step: the same for the same step, whatever was asked before."""
        ...


class Stream:
    """Documents of generated problems.

    ``weights``: the tasks and the share of the stream's tokens each is to have, on average (any scale).
    Documents are drawn until they hold ``tokens_per_step`` or more: the last one is never cut and never
    replaced by a shorter one, so that the shares do not depend on the size of a step. A step holds less than
    tokens_per_step + max_tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        weights: Mapping[Task, float],
        *,
        seed: int,
        tokens_per_step: int,
        max_tokens: int,
        split: Split = "train",
    ) -> None:
        """Raises ConfigError where a task's document cannot fit ``max_tokens``."""
        if not weights or min(weights.values()) <= 0:
            raise ConfigError("a stream needs tasks, each with a weight above 0", field="tasks")
        for task in weights:
            if task.longest > max_tokens:
                fact = (
                    f"documents of {task.name} have up to {task.longest} tokens, max_tokens is {max_tokens}"
                )
                remedy = "shorten its lengths, " if task.name == "recall" else ""
                remedy += "leave it out or raise max_tokens"
                raise ConfigError(f"{fact}; {remedy}", field="max_tokens")
        self._renderer = Renderer(tokenizer)
        self._seed, self._split = seed, split
        self._tokens_per_step, self._max_tokens = tokens_per_step, max_tokens
        self._tasks = list(weights)
        self._plain = [task for task in self._tasks if task.is_plain]
        self.mean_tokens = {task.name: self._mean_tokens(task) for task in self._tasks}
        # A conversation of several plain tasks has their mean length times its mean number of questions.
        longer = 1 + _CHAT_SHARE * (sum(_CHAT_QUESTIONS) / 2 - 1)
        self._rates = [
            weight / self.mean_tokens[task.name] / (longer if task.is_plain else 1)
            for task, weight in weights.items()
        ]
        self._plain_rates = [
            rate for task, rate in zip(self._tasks, self._rates, strict=True) if task.is_plain
        ]

    def documents(self, step: int) -> list[Document]:
        """The documents of a step: the same for the same step, whatever was asked before."""
        found: list[Document] = []
        num_tokens = 0
        while num_tokens < self._tokens_per_step:
            found.append(self.example(step, len(found)))
            num_tokens += len(found[-1])
        return found

    def example(self, step: int, place: int) -> Document:
        """The document at ``place`` in a step: a function of the seed, the split and these two."""
        return self._rendered(*self.conversation(step, place))

    def conversation(self, step: int, place: int) -> tuple[str, tuple[Problem, ...]]:
        """What the document is drawn from: the name it goes by, and the problems it asks in turn."""
        rng = seeded("stream", self._seed, self._split, step, place)
        task = rng.choices(self._tasks, self._rates)[0]
        if task.is_plain and rng.random() < _CHAT_SHARE:
            count = rng.randint(*_CHAT_QUESTIONS)
            tasks = rng.choices(self._plain, self._plain_rates, k=count)
            return CHAT, tuple(problem_in(one, self._split, rng) for one in tasks)
        return task.name, self._problems(task, rng)

    def _problems(self, task: Task, rng: random.Random) -> tuple[Problem, ...]:
        count = rng.randint(*task.problems_per_document)
        return tuple(problem_in(task, self._split, rng) for _ in range(count))

    def _rendered(self, name: str, problems: tuple[Problem, ...]) -> Document:
        """One conversation of all problems, or of the first ones, as many as fit."""
        for count in range(len(problems), 0, -1):
            questions = tuple(q for problem in problems[:count] for q in problem.questions)
            document = self._renderer.document(replace(problems[0], questions=questions), name)
            if len(document) <= self._max_tokens:
                break
        return document

    def _mean_tokens(self, task: Task) -> float:
        rng = seeded("length", task.name)
        found = [self._rendered(task.name, self._problems(task, rng)) for _ in range(_MEASURED)]
        return sum(map(len, found)) / len(found)


class JsonLines:
    """Documents of a file, one JSON object a line, in a fresh order every time through.

    A line is ``{"messages": [...], "tools": [...], "thinking": bool}`` in OpenAI's shape, the last message
    an assistant's (targets: every answer); ``{"text": ...}`` (targets: all of it); or ``{"prompt": ...,
    "completion": ...}`` (targets: the completion). Documents begin with the begin token and end with the end
    token. The file is read and checked as a whole at once.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, *, seed: int, tokens_per_step: int, max_tokens: int
    ) -> None:
        """Raises UsageError that names the file and the line."""
        self._all = read_documents(path, tokenizer, max_tokens=max_tokens)
        self._seed = seed
        # Every step has as many documents, so that which ones follows from its number.
        mean = sum(map(len, self._all)) / len(self._all)
        self.documents_per_step = max(1, round(tokens_per_step / mean))

    def __len__(self) -> int:
        return len(self._all)

    def documents(self, step: int) -> list[Document]:
        """The documents of a step: the same for the same step, whatever was asked before."""
        first = step * self.documents_per_step
        orders: dict[int, list[int]] = {}
        found = []
        for place in range(first, first + self.documents_per_step):
            epoch, index = divmod(place, len(self._all))
            if epoch not in orders:
                orders[epoch] = list(range(len(self._all)))
                seeded("lines", self._seed, epoch).shuffle(orders[epoch])
            found.append(self._all[orders[epoch][index]])
        return found


def read_documents(path: Path, tokenizer: Tokenizer, *, max_tokens: int) -> list[Document]:
    """The document of every line. Raises UsageError that names the file and the line."""
    codec = Codec(tokenizer)
    found = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                document = _line_document(_object(line, where), where, tokenizer, codec)
                if len(document) > max_tokens:
                    fact = f"{len(document)} tokens, at most {max_tokens} are allowed"
                    raise UsageError(f"{where}: the document has {fact}; shorten it or raise max_tokens")
                found.append(document)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not found:
        raise UsageError(f"{path} holds no document")
    return found


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: the line is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{where}: the line is not a JSON object")
    return found


def _line_document(entry: dict[str, Any], where: str, tokenizer: Tokenizer, codec: Codec) -> Document:
    shape = next((fields for fields in _SHAPES if fields[0] in entry), None)
    if shape is None:
        raise UsageError(f"{where}: the line has none of messages, text and prompt")
    unknown = [name for name in entry if name not in shape]
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r} beside {shape[0]!r}")
    try:
        if shape[0] == "messages":
            return _chat_document(entry, tokenizer, codec)
        return _text_document(entry, shape, tokenizer)
    except InvalidRequest as error:
        raise UsageError(f"{where}: {error}") from error


def _chat_document(entry: dict[str, Any], tokenizer: Tokenizer, codec: Codec) -> Document:
    thinks = entry.get("thinking", False)
    if not isinstance(thinks, bool):
        raise InvalidRequest("thinking must be a bool", param="thinking")
    options = ChatOptions(
        tools=parse_tools(entry.get("tools")), thinking=ThinkingMode(thinks, "low"), ends_with_answer=True
    )
    prompt = codec.encode_chat(parse_messages(entry["messages"]), options)
    return answer_document(prompt.token_ids, tokenizer, _LINES)


def _text_document(entry: dict[str, Any], shape: tuple[str, ...], tokenizer: Tokenizer) -> Document:
    texts = [checked_text(entry.get(name), name) for name in shape]
    parts = [tokenizer.encode_text(text) for text in texts]
    # A prompt and its completion are tokenised apart, as when the one is asked and the other generated.
    ids = [tokenizer.bos_id, *(token for part in parts for token in part), tokenizer.eos_id]
    num_given = 1 + sum(map(len, parts[:-1]))
    is_target = np.arange(len(ids)) >= num_given
    return Document(np.array(ids, dtype=np.int32), is_target, _LINES)
