"""Runs one answer's program inside the sandbox: a script on the standard library alone.

What it is told stands at the head of its standard input: a line with a length, then as many bytes of JSON.
It holds no expected result, so nothing the program reads here can tell it the right answer, and nothing that
it writes can be taken for one.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    told = _told()
    namespace: dict[str, Any] = {"__name__": "__main__" if told["calls"] is None else "answer"}
    if told["calls"] is None:
        sys.argv[:] = ["answer.py"]
        exec(compile(told["source"], "answer.py", "exec"), namespace)
        return
    # What the program prints is not what its functions return.
    results = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        exec(compile(told["source"], "answer.py", "exec"), namespace)
        function = namespace[told["function"]]
        for call in told["calls"]:
            _report(results, {"value": function(*call["args"], **call["kwargs"])})
    except BaseException as error:
        _report(results, {"error": f"{type(error).__name__}: {error}"[:200]})
        raise


def _told() -> dict[str, Any]:
    """Read byte by byte up to the length, then exactly so much: the rest is the program's own input."""
    digits = b""
    while (byte := os.read(0, 1)) != b"\n":
        digits += byte
    body = b""
    while len(body) < int(digits):
        body += os.read(0, int(digits) - len(body))
    found: dict[str, Any] = json.loads(body)
    return found


def _report(results: int, record: dict[str, Any]) -> None:
    line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
    while line:
        line = line[os.write(results, line) :]


if __name__ == "__main__":
    main()
