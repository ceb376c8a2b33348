"""JSON as answers must write it: standard, bounded, each key once; and when two values are the same."""

import json
import math
from typing import Any, NoReturn

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


def strict_json(text: str) -> Json:
    """The value of a text that is one JSON document. Raises ValueError, also for NaN, infinities, numbers out
    of range, repeated keys and nesting deeper than Python's recursion."""
    try:
        value: Json = json.loads(
            text, parse_constant=_no_number, object_pairs_hook=_distinct, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return type(one) is type(other) and bool(one == other)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found
