"""From the fields of a chat request to the options of the prompt."""

from typing import Any, Protocol

from bittrue.server.state import ServerState
from bittrue.text.codec import ChatOptions
from bittrue.text.messages import (
    ThinkingMode,
    parse_response_format,
    parse_thinking,
    parse_tool_choice,
    parse_tools,
)


class PromptFields(Protocol):
    """The fields of a body that shape the prompt beside the messages."""

    tools: list[Any] | None
    tool_choice: Any
    response_format: Any
    reasoning_effort: Any
    thinking: Any
    chat_template_kwargs: dict[str, Any] | None


def chat_options(state: ServerState, body: PromptFields) -> ChatOptions:
    """How the conversation is rendered. Raises InvalidRequest naming the field."""
    tools = parse_tools(body.tools)
    return ChatOptions(
        tools=tools,
        tool_choice=parse_tool_choice(body.tool_choice, tools),
        thinking=_thinking(state, body),
        response_format=parse_response_format(body.response_format),
    )


def _thinking(state: ServerState, body: PromptFields) -> ThinkingMode:
    asked = (body.reasoning_effort, body.thinking, body.chat_template_kwargs)
    if all(value is None for value in asked):
        return ThinkingMode(is_enabled=state.config.thinking)
    return parse_thinking(
        reasoning_effort=body.reasoning_effort,
        thinking=body.thinking,
        chat_template_kwargs=body.chat_template_kwargs,
    )
