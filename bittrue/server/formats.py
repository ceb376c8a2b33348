"""From what a request wants its answer to look like to the grammar text the engine enforces."""

from typing import Literal

from bittrue.errors import InvalidRequest
from bittrue.server.state import ServerState
from bittrue.text.codec import ChatOptions
from bittrue.text.grammar import ToolGrammar
from bittrue.text.messages import ResponseFormat, ToolChoice, ToolDefinition


def grammar_of(state: ServerState, form: ResponseFormat, guided_regex: str | None) -> str | None:
    """The grammar of a response_format or regex; None = free text. Raises InvalidRequest."""
    if guided_regex is None:
        return state.grammars.compile(form)
    if form.kind != "text":
        raise InvalidRequest("give guided_regex or response_format, not both", param="guided_regex")
    return state.grammars.compile(ResponseFormat("regex", pattern=guided_regex), param="guided_regex")


def chat_grammar(
    state: ServerState, options: ChatOptions, guided_regex: str | None, *, is_single_call: bool
) -> str | None:
    """The grammar of a chat answer: forced or strict tool calls, else the format. Raises InvalidRequest.

    A free choice among tools is constrained when one of them is ``strict``.
    """
    tools, choice = options.tools, options.tool_choice
    form_grammar = grammar_of(state, options.response_format, guided_regex)
    mode = _enforced(tools, choice)
    if mode is None:
        if form_grammar is not None and tools and choice.mode != "none":
            raise _both()
        return form_grammar
    if form_grammar is not None:
        raise _both()
    callable_tools = tuple(tool for tool in tools if mode != "named" or tool.name == choice.name)
    return state.grammars.compile(ToolGrammar(callable_tools, mode, is_single=is_single_call))


def _enforced(
    tools: tuple[ToolDefinition, ...], choice: ToolChoice
) -> Literal["required", "named", "auto"] | None:
    if choice.mode == "required" or choice.mode == "named":
        return choice.mode
    if choice.mode == "auto" and any(tool.is_strict for tool in tools):
        return "auto"
    return None


def _both() -> InvalidRequest:
    return InvalidRequest(
        'an answer cannot follow response_format and call tools; drop one or send tool_choice "none"',
        param="response_format",
    )
