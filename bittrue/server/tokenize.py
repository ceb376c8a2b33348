"""POST /tokenize and /detokenize: what a prompt becomes, without running it."""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.errors import InvalidRequest
from bittrue.server.answers import json_response
from bittrue.server.chat_prompt import chat_options
from bittrue.server.intake import read_body
from bittrue.server.models import check_model
from bittrue.server.protocol import BodyDecoder, DetokenizeBody, TokenizeBody
from bittrue.server.state import state_of
from bittrue.server.tokens import encode_text
from bittrue.text.messages import parse_messages

_DECODE_TOKENIZE = BodyDecoder(TokenizeBody)
_DECODE_DETOKENIZE = BodyDecoder(DetokenizeBody)


class Tokens(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(msgspec.Struct):
    prompt: str


async def tokenize(request: Request) -> Response:
    """Token ids of plain text, or of a conversation as the chat endpoint would send it to the model."""
    state = state_of(request)
    body: TokenizeBody = _DECODE_TOKENIZE(await read_body(request, state.config.max_body_bytes))
    check_model(state, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give exactly one of prompt and messages", param="prompt")
    if body.prompt is not None:
        ids = await encode_text(state, body.prompt)
    else:
        messages = parse_messages(body.messages)
        encoded = await asyncio.to_thread(state.codec.encode_chat, messages, chat_options(state, body))
        ids = list(encoded.token_ids)
    return json_response(Tokens(ids, len(ids), state.max_context))


async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens spelt out."""
    state = state_of(request)
    body: DetokenizeBody = _DECODE_DETOKENIZE(await read_body(request, state.config.max_body_bytes))
    check_model(state, body.model)
    for index, token_id in enumerate(body.tokens):
        if token_id >= state.vocab_size:
            raise InvalidRequest(
                f"tokens[{index}] is {token_id}; this model's ids are 0 to {state.vocab_size - 1}",
                param=f"tokens[{index}]",
            )
    return json_response(Text(state.tokenizer.decode(body.tokens)))
