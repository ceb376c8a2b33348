"""Grammar text for tool calls in DSML, made from the tools' JSON schemas."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bittrue.errors import InvalidRequest
from bittrue.text.messages import ToolDefinition

# As the model's own encoder writes JSON, so that a call rendered again gives the same tokens.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_UNSUPPORTED_AT_TOP = ("anyOf", "oneOf", "allOf", "not", "$ref", "patternProperties")


def tool_block_lark(tools: Sequence[ToolDefinition], dsml: str, *, is_single: bool) -> str:
    """A blank line and one tool block: every answer is a call. ``dsml`` names the marker token, <[id]>."""
    return "\n".join([f'start: "\\n\\n<" {dsml} block_rest', *_rules(tools, dsml, is_single=is_single)])


def tool_text_lark(tools: Sequence[ToolDefinition], dsml: str, *, is_single: bool) -> str:
    """Free text, then perhaps one tool block: whatever is called is called in the right shape."""
    start = f'start: text ("<" {dsml} block_rest)?'
    return "\n".join([start, 'text: (/[^<]+/ | "<")*', *_rules(tools, dsml, is_single=is_single)])


def _rules(tools: Sequence[ToolDefinition], dsml: str, *, is_single: bool) -> list[str]:
    if not tools:
        raise InvalidRequest("a tool call is required, but the request declares no tools", param="tools")
    repeat = "" if is_single else "+"
    rules = [f'block_rest: "tool_calls>\\n" call{repeat} "</" {dsml} "tool_calls>"']
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    # A value may hold any text but the marker itself, which only a closing tag brings.
    rules.append('value: (/[^<]+/ | "<" | "</")*')
    for index, tool in enumerate(tools):
        rules += _tool_rules(index, tool, dsml)
    return rules


def _tool_rules(index: int, tool: ToolDefinition, dsml: str) -> list[str]:
    path = f"tools[{index}].function.parameters"
    schema = tool.parameters
    bad = [key for key in _UNSUPPORTED_AT_TOP if key in schema]
    if (
        bad
        or schema.get("type", "object") != "object"
        or not isinstance(schema.get("properties", {}), Mapping)
    ):
        raise InvalidRequest(
            f"{path} must be an object with plain properties to force a call of {tool.name!r}"
            + (f"; {bad[0]} is not supported at its top level" if bad else ""),
            param=path,
        )
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = schema.get("required", ())
    opening = _text(f'invoke name="{tool.name}">\n')
    parts, rules = [], []
    for position, (name, value_schema) in enumerate(properties.items()):
        if not name or any(char in name for char in '"<>\r\n'):
            raise InvalidRequest(f"{path}: the property name {name!r} cannot be written in DSML", param=path)
        rule = f"param_{index}_{position}"
        parts.append(rule if name in required else f"{rule}?")
        rules += _parameter_rules(rule, name, _with_definitions(value_schema, schema), dsml, path)
    head = f'call_{index}: "<" {dsml} {opening} {" ".join(parts)} "</" {dsml} "invoke>\\n"'
    return [head, *rules]


def _parameter_rules(rule: str, name: str, schema: object, dsml: str, path: str) -> list[str]:
    close = f'"</" {dsml} "parameter>\\n"'
    rules, forms = [], []
    if _may_be_string(schema):
        forms.append(f"{rule}_s")
        opening = _text(f'parameter name="{name}" string="true">')
        rules.append(f'{rule}_s: "<" {dsml} {opening} {_string_value(schema, path)} {close}')
    if _may_be_other(schema):
        forms.append(f"{rule}_j")
        opening = _text(f'parameter name="{name}" string="false">')
        rules.append(f'{rule}_j: "<" {dsml} {opening} {rule}_v {close}')
        rules.append(f"{rule}_v: %json {json.dumps(_other_than_string(schema), ensure_ascii=False)}")
    if not forms:
        raise InvalidRequest(f"{path}: no value fits the property {name!r}", param=path)
    return [f"{rule}: {' | '.join(forms)}", *rules]


def _string_value(schema: object, path: str) -> str:
    """Raw text: one of the listed strings, or anything; pattern and length are not enforced."""
    listed = _listed(schema)
    if listed is None:
        return "value"
    strings = [item for item in listed if isinstance(item, str)]
    if any("</" in item for item in strings):
        raise InvalidRequest(f"{path}: a listed value holds '</', which cannot be forced in DSML", param=path)
    return "(" + " | ".join(_text(item) for item in strings) + ")"


def _may_be_string(schema: object) -> bool:
    listed = _listed(schema)
    if listed is not None:
        return any(isinstance(item, str) for item in listed)
    return "string" in _types(schema)


def _may_be_other(schema: object) -> bool:
    listed = _listed(schema)
    if listed is not None:
        return any(not isinstance(item, str) for item in listed)
    return bool(_types(schema) - {"string"})


_ALL_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})


def _types(schema: object) -> frozenset[str]:
    """The JSON types a schema may allow (never too few)."""
    if not isinstance(schema, Mapping):
        return _ALL_TYPES
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(str(item) for item in declared)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return frozenset().union(*(_types(_resolved(branch, schema)) for branch in schema[key]))
    target = _resolved(schema, schema)
    return _ALL_TYPES if target is schema else _types(target)


def _listed(schema: object) -> list[Any] | None:
    if isinstance(schema, Mapping):
        if "const" in schema:
            return [schema["const"]]
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
    return None


def _other_than_string(schema: object) -> object:
    """The schema for values written as JSON: strings are written raw, so here they are left out."""
    if not isinstance(schema, Mapping):
        narrowed: dict[str, Any] = {}
    else:
        narrowed = dict(schema)
    listed = _listed(schema)
    if listed is not None:
        narrowed.pop("const", None)
        narrowed["enum"] = [item for item in listed if not isinstance(item, str)]
    declared = narrowed.get("type")
    if isinstance(declared, list):
        narrowed["type"] = [item for item in declared if item != "string"]
    elif declared is None and not {"anyOf", "oneOf", "allOf", "$ref", "enum"} & narrowed.keys():
        narrowed["type"] = sorted(_ALL_TYPES - {"string", "integer"})
    return {**narrowed, "x-guidance": _JSON_STYLE}


def _with_definitions(schema: object, root: Mapping[str, Any]) -> object:
    """A property's schema with the definitions its references point to."""
    if not isinstance(schema, Mapping):
        return schema
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**shared, **schema}


def _resolved(schema: object, root: Mapping[str, Any]) -> object:
    """The target of a local reference, with the definitions; the schema itself when it is none."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    target: object = root
    for step in reference[2:].split("/"):
        target = target.get(step) if isinstance(target, Mapping) else None
    return _with_definitions(target, root) if isinstance(target, Mapping) else schema


def _text(text: str) -> str:
    """A literal in grammar syntax."""
    return json.dumps(text, ensure_ascii=False)
