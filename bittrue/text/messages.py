"""Chat messages, tools and output formats as plain data, checked where they enter."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from bittrue.errors import InvalidRequest
from bittrue.text.tokenizer import has_surrogate

Role: TypeAlias = Literal["system", "user", "assistant", "tool", "developer", "latest_reminder"]
Effort: TypeAlias = Literal["low", "high", "max"]
Task: TypeAlias = Literal["action", "query", "authority", "domain", "title", "read_url"]
FormatKind: TypeAlias = Literal["text", "json_object", "json_schema", "regex", "lark"]
ToolMode: TypeAlias = Literal["auto", "none", "required", "named"]

_MESSAGE_FIELDS = frozenset(
    "role content name reasoning_content reasoning tool_calls tool_call_id task prefix".split()
)
# What the official client echoes back from an answer, as null or empty.
_ECHOED_FIELDS = frozenset({"refusal", "audio", "annotations", "function_call"})
_EFFORTS: dict[str, Effort] = {
    "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call in an assistant message. ``arguments`` is JSON text as the model or client wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function the model may call. ``parameters`` is its JSON schema (an object)."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message.

    ``tools`` only on a developer message. ``task`` only on a user or assistant message: a quick instruction
    that the next assistant message answers. ``is_prefix`` only on a last assistant message: it is continued.
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    tools: tuple[ToolDefinition, ...] = ()
    task: Task | None = None
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The shape the answer must have. ``schema`` for json_schema; ``pattern`` for regex or lark."""

    kind: FormatKind = "text"
    schema: Mapping[str, Any] | None = None
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: auto, none, required (some tool) or named (exactly ``name``)."""

    mode: ToolMode = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ThinkingMode:
    """Whether the model reasons before it answers, and how hard."""

    is_enabled: bool = False
    effort: Effort = "high"


def checked_text(value: object, param: str) -> str:
    """The value as valid text. Raises InvalidRequest naming ``param``."""
    if not isinstance(value, str):
        raise _bad(param, f"must be a string, not {_type_name(value)}")
    if has_surrogate(value):
        raise _bad(param, "holds a lone surrogate, which is not valid Unicode text")
    return value


def parse_messages(raw: object, *, param: str = "messages") -> tuple[ChatMessage, ...]:
    """Messages in OpenAI's JSON shape -> ChatMessage. Raises InvalidRequest with the field's path."""
    entries = _sequence(raw, param)
    if not entries:
        raise _bad(param, "is empty; send at least one message")
    return tuple(_message(entry, f"{param}[{index}]") for index, entry in enumerate(entries))


def parse_tools(raw: object, *, param: str = "tools") -> tuple[ToolDefinition, ...]:
    """Function tools in OpenAI's JSON shape. Names are unique. None means no tools."""
    if raw is None:
        return ()
    tools = tuple(_tool(entry, f"{param}[{index}]") for index, entry in enumerate(_sequence(raw, param)))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise InvalidRequest(
                f"two tools are named {tool.name!r}", param=f"{param}[{index}].function.name"
            )
        seen.add(tool.name)
    return tools


def parse_tool_choice(
    raw: object, tools: Sequence[ToolDefinition], *, param: str = "tool_choice"
) -> ToolChoice:
    """auto, none, required or {"type": "function", "function": {"name": ...}} with a declared name."""
    if raw is None:
        return ToolChoice()
    if isinstance(raw, str):
        if raw not in ("auto", "none", "required"):
            raise _bad(param, f"must be auto, none, required or a function, not {raw!r}")
        if raw == "required" and not tools:
            raise _bad(param, "is required, but the request declares no tools")
        return ToolChoice(cast(ToolMode, raw))
    choice = _mapping(raw, param)
    _only(choice, {"type", "function"}, param)
    if choice.get("type") != "function":
        raise _bad(f"{param}.type", "must be 'function'")
    function = _mapping(choice.get("function"), f"{param}.function")
    _only(function, {"name"}, f"{param}.function")
    name = checked_text(function.get("name"), f"{param}.function.name")
    if name not in {tool.name for tool in tools}:
        raise InvalidRequest(
            f"{param} names {name!r}, which is not among the tools", param=f"{param}.function.name"
        )
    return ToolChoice("named", name)


def parse_response_format(raw: object, *, param: str = "response_format") -> ResponseFormat:
    """text, json_object, json_schema, and (an extension) {"type": "regex"|"lark", "pattern": ...}."""
    if raw is None:
        return ResponseFormat()
    form = _mapping(raw, param)
    kind = form.get("type")
    if kind in ("text", "json_object"):
        _only(form, {"type"}, param)
        return ResponseFormat(cast(FormatKind, kind))
    if kind == "json_schema":
        _only(form, {"type", "json_schema"}, param)
        inner = _mapping(form.get("json_schema"), f"{param}.json_schema")
        _only(inner, {"name", "description", "schema", "strict"}, f"{param}.json_schema")
        schema = _json_object(inner.get("schema"), f"{param}.json_schema.schema")
        return ResponseFormat("json_schema", schema=schema)
    if kind in ("regex", "lark"):
        _only(form, {"type", "pattern"}, param)
        return ResponseFormat(
            cast(FormatKind, kind), pattern=checked_text(form.get("pattern"), f"{param}.pattern")
        )
    raise _bad(f"{param}.type", f"{kind!r} is not one of text, json_object, json_schema, regex, lark")


def parse_thinking(
    *, reasoning_effort: object = None, thinking: object = None, chat_template_kwargs: object = None
) -> ThinkingMode:
    """The thinking mode of a request; off unless one of the three fields asks for it.

    ``reasoning_effort``: none | minimal | low | medium | high | xhigh | max. ``thinking``: a bool or
    {"type": "enabled" | "disabled"}. ``chat_template_kwargs``: {"thinking" or "enable_thinking": bool,
    "reasoning_effort": ...}.
    """
    kwargs: Mapping[str, Any] = {}
    if chat_template_kwargs is not None:
        kwargs = _mapping(chat_template_kwargs, "chat_template_kwargs")
        _only(kwargs, {"thinking", "enable_thinking", "reasoning_effort"}, "chat_template_kwargs")
    effort, effort_param = reasoning_effort, "reasoning_effort"
    if effort is None and kwargs.get("reasoning_effort") is not None:
        effort, effort_param = kwargs["reasoning_effort"], "chat_template_kwargs.reasoning_effort"
    switches = [_switch(thinking, "thinking")]
    switches += [
        _switch(kwargs.get(key), f"chat_template_kwargs.{key}") for key in ("thinking", "enable_thinking")
    ]
    asked = next((switch for switch in switches if switch is not None), None)
    if effort is None:
        return ThinkingMode(bool(asked))
    if effort == "none":
        return ThinkingMode(False)
    if not isinstance(effort, str) or effort not in _EFFORTS:
        known = ", ".join(["none", *_EFFORTS])
        raise InvalidRequest(f"{effort_param} {effort!r} is not one of {known}", param=effort_param)
    return ThinkingMode(asked is not False, _EFFORTS[effort])


def parse_task(raw: object, *, param: str = "task") -> Task | None:
    """A quick-instruction task name."""
    if raw is None:
        return None
    if raw not in get_args(Task):
        raise _bad(param, f"{raw!r} is not one of {', '.join(get_args(Task))}")
    return cast(Task, raw)


def _message(raw: object, path: str) -> ChatMessage:
    entry = _mapping(raw, path)
    _only(entry, _MESSAGE_FIELDS | _ECHOED_FIELDS, path)
    for key in _ECHOED_FIELDS:
        if entry.get(key):
            raise _bad(f"{path}.{key}", "is not supported; leave it out")
    role = entry.get("role")
    if role not in get_args(Role):
        raise _bad(f"{path}.role", f"{role!r} is not one of {', '.join(get_args(Role))}")
    calls = _tool_calls(entry.get("tool_calls"), f"{path}.tool_calls")
    if calls and role != "assistant":
        raise _bad(f"{path}.tool_calls", "belongs to assistant messages only")
    reasoning = entry.get("reasoning_content", entry.get("reasoning"))
    call_id = entry.get("tool_call_id")
    is_prefix = entry.get("prefix")
    if is_prefix is not None and (not isinstance(is_prefix, bool) or role != "assistant"):
        raise _bad(f"{path}.prefix", "must be a bool on an assistant message")
    name = entry.get("name")
    return ChatMessage(
        role=cast(Role, role),
        content=_content(entry.get("content"), f"{path}.content", may_be_absent=role == "assistant"),
        reasoning_content=None if reasoning is None else checked_text(reasoning, f"{path}.reasoning_content"),
        tool_calls=calls,
        tool_call_id=None if call_id is None else checked_text(call_id, f"{path}.tool_call_id"),
        name=None if name is None else checked_text(name, f"{path}.name"),
        task=parse_task(entry.get("task"), param=f"{path}.task"),
        is_prefix=bool(is_prefix),
    )


def _content(raw: object, path: str, *, may_be_absent: bool) -> str:
    """A string, or text parts joined by blank lines as the official encoder joins them."""
    if raw is None and may_be_absent:
        return ""
    if isinstance(raw, str):
        return checked_text(raw, path)
    if not isinstance(raw, list):
        raise _bad(path, f"must be a string or a list of text parts, not {_type_name(raw)}")
    parts = []
    for index, item in enumerate(raw):
        part = _mapping(item, f"{path}[{index}]")
        kind = part.get("type")
        if kind in ("image_url", "input_image", "image"):
            message = f"{path}[{index}] is an image; this model reads text only"
            raise InvalidRequest(message, param=f"{path}[{index}]", code="image_unsupported")
        if kind not in ("text", "input_text", "output_text"):
            raise _bad(f"{path}[{index}].type", f"{kind!r} is not 'text'")
        parts.append(checked_text(part.get("text"), f"{path}[{index}].text"))
    return "\n\n".join(parts)


def _tool_calls(raw: object, path: str) -> tuple[ToolCall, ...]:
    if raw is None:
        return ()
    calls = []
    for index, item in enumerate(_sequence(raw, path)):
        at = f"{path}[{index}]"
        entry = _mapping(item, at)
        _only(entry, {"id", "type", "function", "index"}, at)
        if entry.get("type", "function") != "function":
            raise _bad(f"{at}.type", "must be 'function'")
        function = _mapping(entry.get("function"), f"{at}.function")
        _only(function, {"name", "arguments"}, f"{at}.function")
        arguments = checked_text(function.get("arguments"), f"{at}.function.arguments")
        name = checked_text(function.get("name"), f"{at}.function.name")
        calls.append(ToolCall(checked_text(entry.get("id", ""), f"{at}.id"), name, arguments))
    return tuple(calls)


def _tool(raw: object, path: str) -> ToolDefinition:
    entry = _mapping(raw, path)
    _only(entry, {"type", "function"}, path)
    if entry.get("type") != "function":
        raise _bad(f"{path}.type", "must be 'function'")
    function = _mapping(entry.get("function"), f"{path}.function")
    _only(function, {"name", "description", "parameters", "strict"}, f"{path}.function")
    name = checked_text(function.get("name"), f"{path}.function.name")
    # The name stands between quotes in the prompt and in the model's answer, where a quote would end it.
    if not name or any(char in name for char in '"<>\r\n'):
        raise _bad(f"{path}.function.name", f"{name!r} is empty or holds a quote, < > or a line break")
    parameters = function.get("parameters")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _bad(f"{path}.function.strict", "must be a bool")
    description = function.get("description")
    return ToolDefinition(
        name=name,
        description="" if description is None else checked_text(description, f"{path}.function.description"),
        parameters={} if parameters is None else _json_object(parameters, f"{path}.function.parameters"),
        is_strict=bool(strict),
    )


def _switch(raw: object, param: str) -> bool | None:
    if raw is None or isinstance(raw, bool):
        return raw
    entry = _mapping(raw, param)
    _only(entry, {"type", "budget_tokens"}, param)
    kind = entry.get("type")
    if kind not in ("enabled", "disabled"):
        raise _bad(f"{param}.type", f"must be enabled or disabled, not {kind!r}")
    return bool(kind == "enabled")


def _json_object(raw: object, param: str) -> Mapping[str, Any]:
    """A JSON object whose text can be written as UTF-8."""
    entry = _mapping(raw, param)
    if has_surrogate(json.dumps(entry, ensure_ascii=False)):
        raise _bad(param, "holds a lone surrogate, which is not valid Unicode text")
    return entry


def _mapping(raw: object, param: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise _bad(param, f"must be an object, not {_type_name(raw)}")
    return raw


def _sequence(raw: object, param: str) -> Sequence[object]:
    if not isinstance(raw, list | tuple):
        raise _bad(param, f"must be a list, not {_type_name(raw)}")
    return raw


def _only(entry: Mapping[str, Any], allowed: Set[str], param: str) -> None:
    for key in entry:
        if key not in allowed:
            raise InvalidRequest(f"unknown field {param}.{key}", param=f"{param}.{key}", code="unknown_field")


def _bad(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {message}", param=param)


def _type_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a bool"}
    return names.get(type(value), f"a {type(value).__name__}")
