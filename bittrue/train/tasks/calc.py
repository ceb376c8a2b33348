"""Arithmetic too large to do in the head: the model calls a calculator and reports its result."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bittrue.text.messages import ChatMessage, ToolCall, ToolDefinition
from bittrue.text.parser import ParsedAnswer
from bittrue.train.tasks.expression import MAX_CHARACTERS, parse_expression
from bittrue.train.tasks.task import Problem

CALCULATOR = ToolDefinition(
    name="calc",
    description="Calculate.",
    parameters={"type": "object", "properties": {"expr": {"type": "string"}}, "required": ["expr"]},
)
ERROR = "error"
LEAST_DIGITS, MOST_DIGITS = 3, 5
_MAX_ARGUMENTS = 2 * MAX_CHARACTERS


@dataclass(frozen=True, slots=True)
class CalcQuestion:
    """Right is one call of the calculator whose expression has the value asked for, then exactly that
    value."""

    prompt: str
    expr: str
    value: int

    @property
    def reference(self) -> tuple[ChatMessage, ...]:
        call = ToolCall("call_0", CALCULATOR.name, json.dumps({"expr": self.expr}))
        return (
            ChatMessage("assistant", tool_calls=(call,)),
            ChatMessage("tool", str(self.value), tool_call_id=call.id),
            ChatMessage("assistant", str(self.value)),
        )

    def follow_up(self, answers: Sequence[ParsedAnswer]) -> ChatMessage | None:
        if len(answers) != 1 or len(answers[0].tool_calls) != 1:
            return None
        call = answers[0].tool_calls[0]
        value = computed(call)
        return ChatMessage("tool", ERROR if value is None else str(value), tool_call_id=call.id)

    def check(self, answers: Sequence[ParsedAnswer]) -> bool:
        if len(answers) != 2 or len(answers[0].tool_calls) != 1 or answers[1].tool_calls:
            return False
        return computed(answers[0].tool_calls[0]) == self.value and answers[1].content == str(self.value)


@dataclass(frozen=True, slots=True)
class Calc:
    """``4821*977=`` -> a call of ``calc`` -> ``<tool_result>4710117</tool_result>`` -> ``4710117``.

    The instructions for tools are about 1,200 bytes, so a conversation asks several such questions.
    """

    name: str = "calc"
    longest: int = 1400
    problems_per_document: tuple[int, int] = (4, 10)
    is_plain: bool = False

    def problem(self, rng: random.Random) -> Problem:
        a, b = _operand(rng), _operand(rng)
        sign = rng.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        expr = f"{a}{sign}{b}"
        canonical = expr if sign == "-" else f"{min(a, b)}{sign}{max(a, b)}"
        # The same sum, asked without a tool, is a problem of add: held out for both or for neither.
        family = {"+": "add", "-": "sub", "*": "calc"}[sign]
        return Problem(family, canonical, (CalcQuestion(f"{expr}=", expr, value),), tools=(CALCULATOR,))


def computed(call: ToolCall) -> int | None:
    """What the calculator finds for a call; None where the call or its expression is malformed."""
    if call.name != CALCULATOR.name or len(call.arguments) > _MAX_ARGUMENTS:
        return None
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or list(arguments) != ["expr"]:
        return None
    expr = arguments["expr"]
    found = parse_expression(expr) if isinstance(expr, str) else None
    return None if found is None else found.value


def _operand(rng: random.Random) -> int:
    digits = rng.randint(LEAST_DIGITS, MOST_DIGITS)
    return rng.randrange(10 ** (digits - 1), 10**digits)
