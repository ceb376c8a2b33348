"""How single tokens and log-probabilities are written in answers."""

from bittrue.text.tokenizer import Tokenizer

LONG_TEXT = 16_384  # characters; longer texts are tokenised in a thread, so that streams do not stall
_LEAST = -9999.0  # OpenAI's stand-in for a probability of zero, which JSON cannot write


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; a part of a character is spelt ``bytes:\\xe4``, so that names differ."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
