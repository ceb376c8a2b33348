"""The program in an answer."""

import ast
import re

_FENCED = re.compile(r"^```[ \t]*(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def python_source(text: str) -> str | None:
    """The last fenced block of Python, or the whole text where none is; None where that is no Python."""
    blocks = [
        body
        for language, body in _FENCED.findall(text)
        if language.lower() in ("", "python", "py", "python3")
    ]
    source = blocks[-1] if blocks else text
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return source if tree.body else None
