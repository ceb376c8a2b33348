"""Answers that call tools: which, and with which arguments."""

from typing import Any

import msgspec

from bittrue.rl.verifiers.json_text import same_json, strict_json
from bittrue.rl.verifiers.verifier import Answers, Checker, Place, Verdict, right, unparsable, wrong


class ExpectedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call that must be made, with these arguments and no others."""

    name: str
    arguments: dict[str, Any]


class ToolCalls(Checker, frozen=True, tag="tool_calls"):
    """Right is a last message that makes the ``expected`` calls and no others, in any order unless
    ``is_ordered``. Calls are those that the answer's parser reports: text that looks like one is text."""

    expected: tuple[ExpectedCall, ...]
    is_ordered: bool = False

    def judge(self, answers: Answers, place: Place) -> Verdict:
        if not answers:
            return unparsable("no message")
        made: list[tuple[str, Any]] = []
        for call in answers[-1].tool_calls:
            try:
                made.append((call.name, strict_json(call.arguments)))
            except ValueError as error:
                return unparsable(f"arguments of call {len(made)}: {error}")
        names = sorted(name for name, _ in made) == sorted(call.name for call in self.expected)
        measured = {"names": float(names), "calls": float(len(made))}
        if len(made) != len(self.expected):
            return wrong(f"{len(made)} calls, expected {len(self.expected)}", measured)
        open_calls = list(self.expected)
        for name, arguments in made:
            choice = open_calls[:1] if self.is_ordered else open_calls
            found = next((c for c in choice if c.name == name and same_json(c.arguments, arguments)), None)
            if found is None:
                return wrong(f"a call of {name} that is not expected", measured)
            open_calls.remove(found)
        return right(measured)
