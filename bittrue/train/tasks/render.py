"""Problems to training documents: the codec's tokens, in a fraction of its time."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from bittrue.text.codec import Codec
from bittrue.text.messages import ChatMessage, ThinkingMode, ToolCall
from bittrue.text.tokenizer import ASSISTANT, DSML, EOS, THINK_END, THINK_START, USER, Tokenizer
from bittrue.train.document import Document
from bittrue.train.tasks.task import Problem


class Renderer:
    """Renders with one tokenizer.

    What stands before the first question comes from the codec, once for each set of tools and way of
    thinking; the turns are put together here. Tests hold every task to the codec.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._codec = Codec(tokenizer)
        self._user, self._assistant, self._eos, self._dsml, self._think, self._think_end = (
            tokenizer.special_id(name) for name in (USER, ASSISTANT, EOS, DSML, THINK_START, THINK_END)
        )
        self._id_of_byte = _id_of_byte(tokenizer)
        self._begins: dict[tuple[tuple[str, ...], ThinkingMode], list[int]] = {}

    def document(self, problem: Problem, task: str) -> Document:
        """The conversation in which every answer is the reference; its answers are the targets."""
        ids, text = list(self._begin(problem)), ""
        for part in self._turns(problem):
            if isinstance(part, str):
                text += part
                continue
            # Neighbouring texts are tokenised together, as the codec does.
            ids += self._encoded(text)
            ids.append(part)
            text = ""
        return answer_document(ids, self._tokenizer, task)

    def prompt(self, problem: Problem) -> list[int]:
        """The tokens after which the first answer is generated."""
        opening = self._think if problem.thinking.is_enabled else self._think_end
        asked = self._encoded(problem.questions[0].prompt)
        return [*self._begin(problem), self._user, *asked, self._assistant, opening]

    def _begin(self, problem: Problem) -> list[int]:
        """What stands before the first user token."""
        key = (tuple(map(repr, problem.tools)), problem.thinking)
        found = self._begins.get(key)
        if found is None:
            ids = self._codec.encode_chat([ChatMessage("user", "?")], problem.options()).token_ids
            found = self._begins[key] = list(ids[: ids.index(self._user)])
        return found

    def _turns(self, problem: Problem) -> Iterator[str | int]:
        """The conversation from the first user token on: texts, and ids of special tokens. It ends in one."""
        thinks = problem.thinking.is_enabled
        last = len(problem.questions) - 1
        for place, question in enumerate(problem.questions):
            yield self._user
            yield question.prompt
            # Without tools, reasoning of earlier turns is dropped.
            keeps_reasoning = thinks and (place == last or bool(problem.tools))
            for message in question.reference:
                if message.role == "tool":
                    yield self._user
                    yield f"<tool_result>{message.content}</tool_result>"
                    continue
                yield self._assistant
                if keeps_reasoning:
                    yield self._think
                    yield message.reasoning_content or ""
                yield self._think_end
                yield message.content
                if message.tool_calls:
                    yield from self._calls(message.tool_calls)
                yield self._eos

    def _calls(self, calls: Sequence[ToolCall]) -> Iterator[str | int]:
        yield "\n\n<"
        yield self._dsml
        yield "tool_calls>\n"
        for call in calls:
            yield "<"
            yield self._dsml
            yield f'invoke name="{call.name}">\n'
            for name, value in json.loads(call.arguments).items():
                is_string = isinstance(value, str)
                yield "<"
                yield self._dsml
                yield f'parameter name="{name}" string="{str(is_string).lower()}">'
                yield (value if is_string else json.dumps(value, ensure_ascii=False)) + "</"
                yield self._dsml
                yield "parameter>\n"
            yield "</"
            yield self._dsml
            yield "invoke>\n"
        yield "</"
        yield self._dsml
        yield "tool_calls>"

    def _encoded(self, text: str) -> Sequence[int]:
        """``encode_text``, by a table where every byte is a token: its call takes longer than a document."""
        if self._id_of_byte is None or not text.isascii():
            return self._tokenizer.encode_text(text)
        return [self._id_of_byte[byte] for byte in text.encode()]


def answer_document(token_ids: Sequence[int], tokenizer: Tokenizer, task: str) -> Document:
    """A document of which the assistant's answers are the targets: all that follows the opening of an answer
    (``<｜Assistant｜>`` with ``<think>`` or ``</think>``), to its end token included."""
    assistant, eos = tokenizer.special_id(ASSISTANT), tokenizer.eos_id
    openings = (tokenizer.special_id(THINK_START), tokenizer.special_id(THINK_END))
    ids = list(token_ids)
    is_target = np.zeros(len(ids), dtype=np.bool_)
    at = 0
    for _ in range(ids.count(assistant)):
        at = ids.index(assistant, at) + 1
        if at < len(ids) and ids[at] in openings:
            end = _find(ids, eos, at)
            is_target[at + 1 : end + 1] = True
    return Document(np.array(ids, dtype=np.int32), is_target, task)


def _find(ids: list[int], token_id: int, start: int) -> int:
    """The next place of a token from ``start`` on, or the end."""
    try:
        return ids.index(token_id, start)
    except ValueError:
        return len(ids)


def _id_of_byte(tokenizer: Tokenizer) -> list[int] | None:
    """The token of each byte where tokens are bytes, or None where some are longer."""
    pieces = [
        (piece, token_id)
        for token_id, piece in enumerate(tokenizer.all_token_bytes())
        if token_id not in tokenizer.added_ids
    ]
    if any(len(piece) != 1 for piece, _ in pieces) or len(pieces) != 256:
        return None
    found = {piece[0]: token_id for piece, token_id in pieces}
    return [found[byte] for byte in range(256)]
