"""Answers that try to be scored without being right, for each verifier, and what they got."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bittrue.rl.verifiers.code import Call, FunctionTests, ProgramTests, Run
from bittrue.rl.verifiers.exact import Choice, Exact
from bittrue.rl.verifiers.json_schema import JsonSchema
from bittrue.rl.verifiers.mathematics import Mathematics
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.tool_calls import ExpectedCall, ToolCalls
from bittrue.rl.verifiers.verifier import Answers, Outcome, Verifier, answer_of
from bittrue.text.messages import ToolCall
from bittrue.text.parser import ParsedAnswer

_WIDE = {ord("0") + n: ord("０") + n for n in range(10)} | {ord("A") + n: ord("Ａ") + n for n in range(26)}
_ARABIC = {ord("0") + n: ord("٠") + n for n in range(10)}

_CHOICE = (
    "A B C D",
    "ABCD",
    "A\nB\nC\nD",
    "C or D",
    "(A)(B)(C)(D)",
    "not C",
    "A\nC",
    "the answer is any of ABCD",
)
_MATH = (
    "\\boxed{1/2} or \\boxed{1/3}", "\\boxed{\\boxed{1/2}}", "\\boxed{1/2", "1=1/2", "1/3=1/2",
    "1/3 \\approx 1/2",
    "50\\%", "1/2, 1/2", "1/2, 1/3", "1/2 or 1/3", "1/2 1/2", "\\{1/2, 1/3\\}", "[0, 1]", "\\pm 1/2", "x",
    "\\text{any}",
    "1/2 \\neq 1/3", "0.5000001", "\\frac{1}{2}^{9^{9^9}}", "9!!!!!!", "\\infty",
    "\\sum_{n=1}^{10^{100}} \\sin(n!)",
)  # fmt: skip
_FUNCTION = {
    "ends at once": "import os\nos._exit(0)",
    "ends in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "leaves": "import sys\nsys.exit(0)",
    "equal to everything": "class E(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\n"
    "def add(a, b):\n    return E(0)",
    "answers for the harness": "import os\nfor fd in range(1, 99):\n    try:\n"
    "        os.write(fd, b'{\"value\": 0}\\n' * 2)\n    except OSError:\n        pass\nos._exit(0)",
    "looks for what is expected": "import sys\ndef add(a, b):\n    frame = sys._getframe(1)\n"
    "    told = frame.f_locals['told']\n    return told['calls'][0]['expected']",
    "changes the harness": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\n"
    "def add(a, b):\n    return 0",
    "not a number": "def add(a, b):\n    return float('nan')",
    "infinite": "def add(a, b):\n    return 9e999",
    "true for one": "def add(a, b):\n    return a + b == a + b",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(100000):\n        x = [x]\n    return x",
    "says too much": "def add(a, b):\n    return 'x' * 10**8",
    "never ends": "def add(a, b):\n    while True:\n        pass",
    "sleeps": "import time\ndef add(a, b):\n    time.sleep(1e6)",
    "forks": "import os\ndef add(a, b):\n    while True:\n        os.fork()",
    "leaves a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1e6)\n"
    "os._exit(0)",
    "takes all memory": "def add(a, b):\n    return len([0] * 10**11)",
    "fills the directory": "def add(a, b):\n    with open('/tmp/x', 'wb') as f:\n        while True:\n"
    "            f.write(b'x' * 10**6)",
    "writes to the system": "import os\ndef add(a, b):\n    open(os.__file__, 'a').close()\n    return 0",
    "opens a socket": "import socket\ndef add(a, b):\n"
    "    return socket.create_connection(('1.1.1.1', 53), 1) and 0",
    "no function": "x = 3",
    "an endless literal": "add = " + "[" * 1000 + "]" * 1000,
    "exponents": "def add(a, b):\n    return 9**9**9",
}
_PROGRAM = {
    "says everything": "for n in range(100):\n    print(n)",
    "says nothing": "pass",
    "ends at once": "print(7)\nimport os\nos._exit(1)",
    "never stops talking": "while True:\n    print('7' * 1000)",
    "waits for more": "import sys\nsys.stdin.read()\nsys.stdin.read()\nwhile True:\n    pass",
}
_JSON = (
    '{"n": 3', '{"n": 3} {"n": 3}', '{"n": 4, "n": 3}', '{"n": NaN}', '{"n": Infinity}', '{"n": 1e999}',
    '{"n": "3"}',
    '{"n": true}', '{"n": 3.5}', '{"n": 3, "m": 1}', "```json\n{\"n\": 3}\n```",
    "{'n': 3}", '{"n": 3,}', "[]",
    "null",
    '{"n": 1' + "0" * 5000 + "}", "[" * 100_000,
)  # fmt: skip
_CALLS = {
    "none": (),
    "twice": (("get", '{"n": 3}'), ("get", '{"n": 3}')),
    "another name": (("Get", '{"n": 3}'),),
    "one more argument": (("get", '{"n": 3, "m": 4}'),),
    "text for a number": (("get", '{"n": "3"}'),),
    "true for one": (("get", '{"n": true}'),),
    "a key twice": (("get", '{"n": 4, "n": 3}'),),
    "no JSON": (("get", "{n: 3}"),),
    "NaN": (("get", '{"n": NaN}'),),
    "deep": (("get", '{"n": ' * 50_000),),
    "empty": (("get", ""),),
}


@dataclass(frozen=True, slots=True)
class AuditCase:
    """One answer that is not right, whoever judges it."""

    name: str
    verifier: Verifier
    answers: Answers


@dataclass(frozen=True, slots=True)
class AuditRow:
    """What one case got. It ``holds`` with a score of 0, or with none."""

    kind: str
    name: str
    outcome: Outcome
    score: float | None
    seconds: float

    @property
    def holds(self) -> bool:
        return self.score in (0, None) and self.outcome != "right"


def adversarial_texts(oracle: str) -> dict[str, str]:
    """Texts that are no right answer where ``oracle`` is one, by name."""
    texts = {
        "empty": "",
        "spaces": " \n\t ",
        "oracle as substring": f"It is not {oracle}, is it?",
        "oracle with more": f"{oracle} or something else",
        "oracle twice": f"{oracle} {oracle}",
        "oracle many times": f"{oracle}\n" * 500 + "0",
        "invisible space": f"\u200b{oracle}",
        "wide characters": oracle.translate(_WIDE),
        "Arabic digits": oracle.translate(_ARABIC),
        "power tower": "9**9**9",
        "power tower in LaTeX": "9^{9^{9^{9}}}",
        "deep brackets": "(" * 20_000 + "1" + ")" * 20_000,
        "deep fractions": "\\frac{1}{" * 400 + "1" + "}" * 400,
        "injection": "__import__('os').system('touch /tmp/owned')",
        "injection by attributes": "().__class__.__base__.__subclasses__()",
        "injection that leaves": "exit(0)",
        "forged verdict": '{"outcome": "right", "score": 1.0}',
        "forged message": '\x1f\x00\x00\x00{"type":"judged","verdict":{"outcome":"right","score":1}}',
        "format": "%s%n{0.__class__}${HOME}",
        "not a number": "nan",
        "infinity": "inf",
        "out of range": "1e999",
        "None": "None",
        "True": "True",
        "null character": f"\x00{oracle}",
        "half of a character": f"{oracle}\ud800",
        "long": "1" * 100_000,
        "too long": oracle + " " * 300_000,
    }
    return {name: text for name, text in texts.items() if text != oracle}


def cases_for(verifier: Verifier, oracle: str) -> list[AuditCase]:
    """The adversarial texts against any verifier of texts whose right answer is ``oracle``."""
    return [AuditCase(name, verifier, answer_of(text)) for name, text in adversarial_texts(oracle).items()]


def corpus() -> list[AuditCase]:
    """Every case against the verifiers that need nothing of the user's."""
    return list(_corpus())


def _corpus() -> Iterator[AuditCase]:
    yield from cases_for(Exact("42"), "42")
    yield from cases_for(Choice("C"), "C")
    for text in _CHOICE:
        yield AuditCase(repr(text), Choice("C"), answer_of(text))
    half = Mathematics("\\frac{1}{2}")
    yield from cases_for(half, "1/2")
    for text in _MATH:
        yield AuditCase(text, half, answer_of(text))
    function = FunctionTests("add", (Call(3, (1, 2)), Call(9, (4, 5))))
    yield from cases_for(function, "3")
    for name, text in _FUNCTION.items():
        yield AuditCase(name, function, answer_of(text))
    program = ProgramTests((Run("3 4\n", "7\n"),))
    yield from cases_for(program, "7")
    for name, text in _PROGRAM.items():
        yield AuditCase(name, program, answer_of(text))
    number = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    schema = JsonSchema({**number, "additionalProperties": False})
    yield from cases_for(schema, '{"n": 3}')
    for text in _JSON:
        yield AuditCase(text[:40], schema, answer_of(text))
    calls = ToolCalls((ExpectedCall("get", {"n": 3}),))
    yield from cases_for(calls, '{"name": "get", "arguments": {"n": 3}}')
    for name, made in _CALLS.items():
        tool_calls = tuple(ToolCall(f"call_{n}", *call) for n, call in enumerate(made))
        yield AuditCase(name, calls, (ParsedAnswer(None, "", tool_calls),))


def run_audit(pool: Pool, cases: Sequence[AuditCase]) -> list[AuditRow]:
    """What every case gets from a pool."""
    verdicts = pool.judge_all([(case.verifier, case.answers) for case in cases])
    return [
        AuditRow(case.verifier.kind, case.name, verdict.outcome, verdict.score, verdict.seconds)
        for case, verdict in zip(cases, verdicts, strict=True)
    ]


def audit_table(rows: Sequence[AuditRow]) -> str:
    """The rows as text, those that do not hold marked."""
    lines = [f"{'kind':16} {'outcome':10} {'score':>5} {'seconds':>8}  case"]
    for row in rows:
        mark = "" if row.holds else "  <- SCORED"
        score = "none" if row.score is None else f"{row.score:.2f}"
        numbers = f"{score:>5} {row.seconds:8.3f}"
        lines.append(f"{row.kind:16} {row.outcome:10} {numbers}  {row.name!r}{mark}")
    return "\n".join(lines)
