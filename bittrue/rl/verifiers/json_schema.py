"""JSON answers against a schema: the keywords that tools and structured outputs use, and no others."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.json_text import same_json, strict_json
from bittrue.rl.verifiers.verifier import (
    Answers,
    Checker,
    Place,
    Verdict,
    final_text,
    right,
    unparsable,
    wrong,
)

_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples format".split()
)
_MAX_REFERENCES = 50  # followed one inside another
_Rule = Callable[["Schema", Any, Any, Mapping[str, Any]], bool]  # (schema, value, keyword's value, siblings)


class JsonSchema(Checker, frozen=True, tag="json_schema"):
    """Right is one JSON value, and nothing else, that ``schema`` allows. A schema with a keyword that is not
    known here is refused before anything is judged: the keyword could forbid something."""

    schema: dict[str, Any] | bool

    def prepare(self) -> None:
        unknown = sorted(set(unknown_keywords(self.schema)))
        if unknown:
            raise VerifierUnavailable(f"the schema uses {', '.join(unknown)}, which is not supported")

    def judge(self, answers: Answers, place: Place) -> Verdict:
        text = final_text(answers)
        if text is None:
            return unparsable("the last message is no text")
        try:
            value = strict_json(text)
        except ValueError as error:
            return unparsable(f"not JSON: {error}")
        failed = Schema(self.schema).first_failure(value)
        return right() if failed is None else wrong(f"fails {failed}")


class Schema:
    """A schema and the keywords it is read with."""

    def __init__(self, root: Mapping[str, Any] | bool) -> None:
        self._root = root
        self._references = 0

    def first_failure(self, value: Any) -> str | None:
        """The first keyword at the top that forbids ``value``; None where it is allowed."""
        if isinstance(self._root, bool):
            return None if self._root else "false"
        return next((k for k in self._root if not self._holds(k, value, self._root)), None)

    def allows(self, value: Any, schema: Mapping[str, Any] | bool) -> bool:
        if isinstance(schema, bool):
            return schema
        return all(self._holds(keyword, value, schema) for keyword in schema)

    def _holds(self, keyword: str, value: Any, schema: Mapping[str, Any]) -> bool:
        rule = _RULES.get(keyword)
        return True if rule is None else rule(self, value, schema[keyword], schema)

    def refers(self, value: Any, pointer: str) -> bool:
        if self._references >= _MAX_REFERENCES:
            return False
        self._references += 1
        try:
            return self.allows(value, self._target(pointer))
        finally:
            self._references -= 1

    def _target(self, pointer: str) -> Any:
        found: Any = self._root
        for part in pointer.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found


def unknown_keywords(schema: Any) -> Iterator[str]:
    """Every keyword, at any depth, that would not be read; and every reference outside the schema."""
    if not isinstance(schema, dict):
        return
    for keyword, given in schema.items():
        if keyword not in _RULES and keyword not in _ANNOTATIONS:
            yield keyword
        if keyword == "$ref" and not str(given).startswith("#"):
            yield f"$ref {given}"
        if keyword in ("properties", "patternProperties", "$defs", "definitions"):
            inner = list(given.values())
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            inner = given
        elif keyword in ("items", "additionalProperties", "not", "propertyNames", "contains"):
            inner = [given]
        else:
            inner = []
        for each in inner:
            yield from unknown_keywords(each)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any, name: str) -> bool:
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is_number(value) and value == int(value)
        case "number":
            return _is_number(value)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return False


def _type(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    return any(_is_type(value, name) for name in ([given] if isinstance(given, str) else given))


def _properties(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    return all(schema.allows(value[name], inner) for name, inner in given.items() if name in value)


def _pattern_properties(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    pairs = ((name, inner) for name in value for pattern, inner in given.items() if re.search(pattern, name))
    return all(schema.allows(value[name], inner) for name, inner in pairs)


def _additional(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    known, patterns = siblings.get("properties", {}), siblings.get("patternProperties", {})
    return all(
        schema.allows(inner, given)
        for name, inner in value.items()
        if name not in known and not any(re.search(pattern, name) for pattern in patterns)
    )


def _items(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not isinstance(value, list):
        return True
    return all(schema.allows(each, given) for each in value[len(siblings.get("prefixItems", ())) :])


def _prefix_items(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    return not isinstance(value, list) or all(map(schema.allows, value, given))


def _unique(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not given or not isinstance(value, list):
        return True
    return not any(same_json(a, b) for at, a in enumerate(value) for b in value[:at])


def _multiple_of(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
    if not _is_number(value):
        return True
    quotient = value / given if isinstance(value, float) or isinstance(given, float) else None
    return bool(value % given == 0 if quotient is None else quotient == round(quotient))


def _bound(kinds: type | tuple[type, ...], holds: Callable[[Any, Any], bool]) -> _Rule:
    """A rule on values of ``kinds`` alone; no boolean is a number."""

    def rule(schema: Schema, value: Any, given: Any, siblings: Mapping[str, Any]) -> bool:
        return isinstance(value, bool) or not isinstance(value, kinds) or holds(value, given)

    return rule


_NUMBER = (int, float)
_RULES: dict[str, _Rule] = {
    "type": _type,
    "enum": lambda schema, value, given, _: any(same_json(value, each) for each in given),
    "const": lambda schema, value, given, _: same_json(value, given),
    "$ref": lambda schema, value, given, _: schema.refers(value, given),
    "allOf": lambda schema, value, given, _: all(schema.allows(value, each) for each in given),
    "anyOf": lambda schema, value, given, _: any(schema.allows(value, each) for each in given),
    "oneOf": lambda schema, value, given, _: sum(schema.allows(value, each) for each in given) == 1,
    "not": lambda schema, value, given, _: not schema.allows(value, given),
    "properties": _properties,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
    "propertyNames": lambda schema, value, given, _: (
        not isinstance(value, dict) or all(schema.allows(name, given) for name in value)
    ),
    "required": _bound(dict, lambda value, given: set(given) <= value.keys()),
    "minProperties": _bound(dict, lambda value, given: len(value) >= given),
    "maxProperties": _bound(dict, lambda value, given: len(value) <= given),
    "items": _items,
    "prefixItems": _prefix_items,
    "contains": lambda schema, value, given, _: (
        not isinstance(value, list) or any(schema.allows(each, given) for each in value)
    ),
    "minItems": _bound(list, lambda value, given: len(value) >= given),
    "maxItems": _bound(list, lambda value, given: len(value) <= given),
    "uniqueItems": _unique,
    "minLength": _bound(str, lambda value, given: len(value) >= given),
    "maxLength": _bound(str, lambda value, given: len(value) <= given),
    "pattern": _bound(str, lambda value, given: re.search(given, value) is not None),
    "minimum": _bound(_NUMBER, lambda value, given: value >= given),
    "maximum": _bound(_NUMBER, lambda value, given: value <= given),
    "exclusiveMinimum": _bound(_NUMBER, lambda value, given: value > given),
    "exclusiveMaximum": _bound(_NUMBER, lambda value, given: value < given),
    "multipleOf": _multiple_of,
}
