"""Text to token ids and back, where user text can never become a special token."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from bittrue.errors import CheckpointError, InvalidRequest

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
TASK_TOKENS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
REQUIRED_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the learned merges. ``is_hidden``: the file marks it special, so text omits it."""

    id: int
    content: str
    is_hidden: bool


class Tokenizer:
    """A byte-level BPE vocabulary of a checkpoint's tokenizer.json.

    Text is tokenised without the added vocabulary: ids of added tokens (markers such as ``<｜User｜>``,
    ``</think>`` or ``｜DSML｜``) enter a prompt only by name, through ``special_id``. Immutable; threads may
    share it.
    """

    def __init__(self, document: bytes, *, source: str) -> None:
        parsed = _parse(document, source)
        self.document = document  # the file's bytes, for engines that read tokenizer.json themselves
        self.digest: str = hashlib.sha256(document).hexdigest()
        self.added: tuple[AddedToken, ...] = _added_tokens(parsed, source)
        self._id_of = {token.content: token.id for token in self.added}
        self.added_ids: frozenset[int] = frozenset(self._id_of.values())
        self.hidden_ids: frozenset[int] = frozenset(t.id for t in self.added if t.is_hidden)
        self._bytes = _token_bytes(parsed, self.added)
        self.vocab_size: int = len(self._bytes)  # ids 0 to vocab_size - 1; a model may have more rows
        # The library's encode_special_tokens frees only tokens marked special; </think> and ｜DSML｜ are not.
        # Without any added vocabulary no spelling can match.
        parsed["added_tokens"] = []
        parsed["post_processor"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(parsed, ensure_ascii=False))
        self._plain.no_truncation()
        self._plain.no_padding()
        self._prove_no_added_token_from_text(source)
        missing = [name for name in REQUIRED_TOKENS if name not in self._id_of]
        if missing:
            raise CheckpointError(f"{source} lacks the special tokens {', '.join(missing)}", file=source)
        self.bos_id: int = self._id_of[BOS]
        self.eos_id: int = self._id_of[EOS]

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json. Raises CheckpointError when missing, malformed or not byte-level BPE."""
        try:
            document = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", file=str(path)) from error
        return cls(document, source=str(path))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; never an added token. Raises InvalidRequest on lone surrogates."""
        try:
            # The batch call lets other threads run meanwhile; without offsets it takes a fifth of the time.
            ids: list[int] = self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        except (UnicodeEncodeError, TypeError) as error:
            if has_surrogate(text):
                raise InvalidRequest("the text holds a lone surrogate, which no UTF-8 can carry") from error
            raise

    def special_id(self, name: str) -> int:
        """Id of an added token by its spelling. Raises CheckpointError when the vocabulary lacks it."""
        found = self._id_of.get(name)
        if found is None:
            raise CheckpointError(f"the tokenizer has no special token {name!r}")
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for ids the vocabulary does not name."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids, incomplete UTF-8 as U+FFFD.

        ``skip_special`` leaves out tokens the file marks special (begin, end, padding, images); markers such
        as ``</think>`` stay.
        """
        hidden = self.hidden_ids if skip_special else frozenset()
        joined = b"".join(self.token_bytes(i) for i in ids if i not in hidden)
        return joined.decode("utf-8", errors="replace")

    def all_token_bytes(self) -> Sequence[bytes]:
        """Bytes of every id in order."""
        return self._bytes

    def _prove_no_added_token_from_text(self, source: str) -> None:
        for token in self.added:
            leaked = self.added_ids.intersection(self.encode_text(token.content))
            if leaked:
                raise CheckpointError(
                    f"{source}: the text {token.content!r} merges into the special token {min(leaked)}; "
                    "user text could forge it",
                    file=source,
                )


def has_surrogate(text: str) -> bool:
    """True when the text holds a lone surrogate code point and so has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _parse(document: bytes, source: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(document)
    except ValueError as error:
        raise CheckpointError(f"{source} is not JSON: {error}", file=source) from error
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{source} does not hold a BPE vocabulary", file=source)
    decoder = parsed.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise CheckpointError(f"{source} is not byte-level: its decoder must be ByteLevel", file=source)
    return parsed


def _added_tokens(parsed: dict[str, Any], source: str) -> tuple[AddedToken, ...]:
    entries = parsed.get("added_tokens", [])
    try:
        tokens = [AddedToken(int(e["id"]), str(e["content"]), bool(e["special"])) for e in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: a malformed entry in added_tokens ({error})", file=source) from None
    return tuple(sorted(tokens, key=lambda token: token.id))


def _token_bytes(parsed: dict[str, Any], added: Sequence[AddedToken]) -> tuple[bytes, ...]:
    byte_of_char = {char: value for value, char in enumerate(_byte_alphabet())}
    vocab: dict[str, int] = parsed["model"]["vocab"]
    size = max([*vocab.values(), *(token.id for token in added)]) + 1
    table = [b""] * size
    for piece, token_id in vocab.items():
        if all(char in byte_of_char for char in piece):
            table[token_id] = bytes(byte_of_char[char] for char in piece)
        else:
            table[token_id] = piece.encode("utf-8")
    for token in added:
        table[token.id] = token.content.encode("utf-8")
    return tuple(table)


def _byte_alphabet() -> list[str]:
    """The character byte-level BPE writes for each byte: printable Latin-1 as is, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, next_code = [], 0x100
    for value in range(256):
        if value in printable:
            alphabet.append(chr(value))
        else:
            alphabet.append(chr(next_code))
            next_code += 1
    return alphabet
