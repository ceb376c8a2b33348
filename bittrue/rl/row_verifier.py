"""Who judges the answers to one row of a prompt file: its own verifier, or the run file's."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from bittrue.errors import ConfigError, UsageError
from bittrue.rl.verifiers.frames import Sent
from bittrue.rl.verifiers.reward_function import reward_function

_REWARD_FUNCTION = "reward_function"
_REWARD_FIELDS = frozenset({"kind", "function", "is_strict"})
_COLUMN = "column"


def check_table(table: Mapping[str, Any]) -> None:
    """Raises ConfigError for a verifier's table whose kind is none."""
    kinds = sorted(_kinds())
    if table.get("kind") not in kinds:
        fact = f"{table['kind']!r} is no kind of verifier" if "kind" in table else "a verifier has a kind"
        raise ConfigError(f"{fact}; choose one of {', '.join(kinds)}", field="verifier.kind")


def verifier_of(
    table: Mapping[str, Any], columns: Mapping[str, Any], prompt: str | Sequence[Mapping[str, Any]]
) -> Sent:
    """The verifier that ``table`` describes: its kind and the fields of that kind.

    A value ``{column = "answer"}`` is that of the row's column. A reward function is
    ``{kind = "reward_function", function = "file.py:name"}``, whose path is relative to the working
    directory; it gets the prompt and every column of the row. Raises UsageError (ConfigError among them).
    """
    check_table(table)
    values = {name: _value(name, value, columns) for name, value in table.items()}
    if values["kind"] == _REWARD_FUNCTION:
        return _reward_function(values, columns, prompt)
    try:
        found: Sent = msgspec.convert(values, Sent)
    except msgspec.ValidationError as error:
        raise UsageError(f"verifier {values['kind']!r}: {error}") from error
    return found


def _reward_function(
    values: Mapping[str, Any], columns: Mapping[str, Any], prompt: str | Sequence[Mapping[str, Any]]
) -> Sent:
    unknown = [name for name in values if name not in _REWARD_FIELDS]
    if unknown:
        known = ", ".join(sorted(_REWARD_FIELDS))
        raise UsageError(f"verifier 'reward_function': unknown field {unknown[0]!r}; known: {known}")
    function, is_strict = values.get("function"), values.get("is_strict", True)
    if not isinstance(function, str) or not isinstance(is_strict, bool):
        raise UsageError("verifier 'reward_function': function is file.py:name, is_strict true or false")
    asked = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return reward_function(function, asked, dict(columns), is_strict=is_strict)


def _value(name: str, value: Any, columns: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping) or value.keys() != {_COLUMN}:
        return value
    column = value[_COLUMN]
    if column not in columns:
        has = ", ".join(columns) or "no columns besides the prompt"
        raise UsageError(f"verifier field {name} takes the column {column!r}, and the row has {has}")
    return columns[column]


def _kinds() -> set[str]:
    return {str(kind.__struct_config__.tag) for kind in get_args(Sent)}
