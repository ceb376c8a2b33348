"""Grammars an answer must follow: JSON, regular expressions and tool calls, as masks over the vocabulary."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import llguidance
import numpy as np
from numpy.typing import NDArray

from bittrue.errors import CheckpointError, InvalidRequest
from bittrue.text.dsml_grammar import tool_block_lark, tool_text_lark
from bittrue.text.messages import ResponseFormat, ToolDefinition
from bittrue.text.tokenizer import DSML, Tokenizer

Mask: TypeAlias = NDArray[np.bool_]  # [V]: True where the token may come next

# Bounded white space: with an unbounded pattern a model can pad for ever and never close the object.
_WHITESPACE = r"[ \n\r\t]{0,12}"


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """Tool calls in DSML.

    "required": one or more calls of any of the tools; "named": exactly one call of the only tool; "auto":
    free text, then perhaps calls. ``is_single`` allows one call only.
    """

    tools: tuple[ToolDefinition, ...]
    mode: Literal["required", "named", "auto"]
    is_single: bool = False


class GrammarCompiler:
    """Turns what a request asks for into grammar text, and grammar text into states. Threads may share it.

    ``vocab_size`` is the number of logits where a model has more rows than the tokenizer has ids; the masks
    are that long and the extra ids are never allowed. Fewer logits than ids: CheckpointError.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self.eos_id = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if self.vocab_size < tokenizer.vocab_size:
            raise CheckpointError(
                f"tokenizer.json has {tokenizer.vocab_size} ids, but the model knows {self.vocab_size}: it "
                "belongs to another model; take the tokenizer.json published with these weights",
                file="tokenizer.json",
            )
        self._dsml = f"<[{tokenizer.special_id(DSML)}]>"
        # Every added token counts as special here: no regular expression and no JSON string may contain one.
        document: dict[str, Any] = json.loads(tokenizer.document)
        for token in document["added_tokens"]:
            token["special"] = True
        text = json.dumps(document, ensure_ascii=False)
        self.ll_tokenizer = llguidance.LLTokenizer(text, eos_token=self.eos_id)
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def compile(self, spec: ResponseFormat | ToolGrammar, *, param: str = "response_format") -> str | None:
        """The grammar text for a format or tool choice; None where nothing is constrained.

        Raises InvalidRequest with ``param``, or ``tools`` for a ToolGrammar, when the schema, pattern or tool
        parameters cannot be turned into a grammar.
        """
        if isinstance(spec, ToolGrammar):
            return self._checked(self._tool_grammar(spec), "tools")
        match spec.kind:
            case "text":
                return None
            case "json_object":
                grammar = _json_grammar({"type": "object"})
            case "json_schema":
                grammar = _json_grammar(spec.schema or {})
            case "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(spec.pattern or "")
            case "lark":
                grammar = llguidance.LLMatcher.grammar_from_lark(spec.pattern or "")
        return self._checked(grammar, param)

    def check(self, grammar: str, *, param: str = "grammar") -> None:
        """Raises InvalidRequest when the text is not a grammar this engine accepts."""
        self._checked(grammar, param)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A fresh matcher; raises InvalidRequest for a bad grammar."""
        matcher = llguidance.LLMatcher(self.ll_tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidRequest(f"the grammar is not valid: {_short(matcher.get_error())}", param="grammar")
        return matcher

    def _checked(self, grammar: str, param: str) -> str:
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, self.ll_tokenizer, limits=self._limits
        )
        if is_error:
            fact = f"{param} cannot be enforced: {_short(' '.join(messages))}"
            raise InvalidRequest(fact, param=param, code="invalid_grammar")
        return grammar

    def _tool_grammar(self, spec: ToolGrammar) -> str:
        if spec.mode == "auto":
            return tool_text_lark(spec.tools, self._dsml, is_single=spec.is_single)
        is_single = spec.is_single or spec.mode == "named"
        return tool_block_lark(spec.tools, self._dsml, is_single=is_single)


class GrammarState:
    """Where one sequence stands in its grammar.

    A grammar can turn out to exceed the limits only while it is followed (a regular expression may need too
    many states). That never raises into the engine's step, where other sequences run: ``error`` tells it, and
    from then on only the end token is allowed.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: str) -> None:
        self.compiler = compiler
        self._matcher = compiler.matcher(grammar)
        self._is_ended = False

    def allowed_mask(self) -> Mask:
        """[V] bool: the ids that may come next; the end token exactly where the text so far is complete."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.zeros(self.compiler.vocab_size, dtype=np.bool_)
        if self._matcher.is_error():
            mask[self.compiler.eos_id] = True
            return mask
        size = self.compiler.ll_tokenizer.vocab_size
        mask[:size] = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)[: mask.size]
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by one token. Raises InvalidRequest when the grammar does not allow it."""
        if self.try_accept([token_id]) != 1 and self.error is None:
            raise InvalidRequest(f"the grammar does not allow token {token_id} here", param="grammar")

    def try_accept(self, token_ids: Sequence[int]) -> int:
        """Advance by as many of the tokens as the grammar allows; says how many. The end token is last."""
        if self._is_ended:
            return 0
        ids = list(token_ids)
        end = self.compiler.eos_id
        body = ids[: ids.index(end)] if end in ids else ids
        count = int(self._matcher.try_consume_tokens(body)) if body else 0
        if len(body) < len(ids) and count == len(body) and self.is_complete:
            # The matcher of a grammar that cannot go on takes no token at all, not even the end.
            self._is_ended = True
            count += 1
        return count

    @property
    def is_complete(self) -> bool:
        """True when the text so far satisfies the grammar."""
        return bool(self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed further, for the answer's error; None while it can."""
        if not self._matcher.is_error():
            return None
        return f"the grammar cannot be followed further: {_short(self._matcher.get_error())}"

    def clone(self) -> "GrammarState":
        """An independent copy at the same place."""
        copy = object.__new__(GrammarState)
        copy.compiler = self.compiler
        copy._matcher = self._matcher.deep_copy()
        copy._is_ended = self._is_ended
        return copy


class DelayedGrammar:
    """A grammar that begins after a token sequence (the end of the reasoning); free until then.

    While it waits only the end token is forbidden: an answer that never began cannot satisfy the grammar.
    """

    def __init__(self, state: GrammarState, after: Sequence[int] | None = None) -> None:
        self._state = state
        self._after = tuple(after or ())
        self._recent: tuple[int, ...] = ()
        self._is_waiting = bool(self._after)

    @property
    def is_waiting(self) -> bool:
        """True until the sequence in ``after`` has been produced."""
        return self._is_waiting

    @property
    def is_complete(self) -> bool:
        """True when the grammar has begun and is satisfied."""
        return not self._is_waiting and self._state.is_complete

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed further; None while it can."""
        return self._state.error

    def allowed_mask(self) -> Mask:
        """[V] bool: the ids that may come next."""
        if not self._is_waiting:
            return self._state.allowed_mask()
        mask = np.ones(self._state.compiler.vocab_size, dtype=np.bool_)
        mask[self._state.compiler.eos_id] = False
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by one token. Raises InvalidRequest when the grammar does not allow it."""
        if self._is_waiting:
            self._wait(token_id)
        else:
            self._state.accept(token_id)

    def try_accept(self, token_ids: Iterable[int]) -> int:
        """Advance by as many of the tokens as are allowed; says how many."""
        count = 0
        for token_id in token_ids:
            if self._is_waiting:
                self._wait(token_id)
            elif self._state.try_accept([token_id]) != 1:
                break
            count += 1
        return count

    def clone(self) -> "DelayedGrammar":
        """An independent copy at the same place."""
        copy = DelayedGrammar(self._state.clone(), self._after)
        copy._recent, copy._is_waiting = self._recent, self._is_waiting
        return copy

    def _wait(self, token_id: int) -> None:
        self._recent = (*self._recent, token_id)[-len(self._after) :]
        self._is_waiting = self._recent != self._after


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(
        dict(schema), overrides={"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
    )


def _short(message: str) -> str:
    message = message.split("\n", 1)[0]
    return message if len(message) <= 300 else message[:300] + " ..."
