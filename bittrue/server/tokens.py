"""Text to tokens without stalling the streams, and how single tokens are written in answers."""

import asyncio
import time

from bittrue.server.state import ServerState
from bittrue.text.tokenizer import Tokenizer

_LONG_TEXT = 16_384  # characters; longer texts are tokenised in a thread, so that streams do not stall
_LEAST = -9999.0  # OpenAI's stand-in for a probability of zero, which JSON cannot write


async def encode_text(state: ServerState, text: str) -> list[int]:
    """Token ids of plain text. Raises InvalidRequest on text that is not valid Unicode."""
    started_s = time.perf_counter()
    if len(text) > _LONG_TEXT:
        ids = await asyncio.to_thread(state.tokenizer.encode_text, text)
    else:
        ids = state.tokenizer.encode_text(text)
    state.metrics.observe("bittrue_tokenize_seconds", time.perf_counter() - started_s)
    return ids


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; a part of a character is spelt ``bytes:\\xe4``, so that names differ."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
