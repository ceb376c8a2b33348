"""Text becomes ids and ids text, exactly, and no text becomes a special token."""

import json
import random
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_support import real_tokenizer, real_tokenizer_path

from bittrue.errors import CheckpointError, InvalidRequest
from bittrue.text.detokenize import Detokenizer
from bittrue.text.small_tokenizer import small_tokenizer_json
from bittrue.text.tokenizer import Tokenizer


def test_the_real_vocabulary_is_read_whole() -> None:
    tok = real_tokenizer()
    assert tok.vocab_size == 129_280
    assert (tok.bos_id, tok.eos_id) == (0, 1)
    assert len(tok.added_ids) == 1283
    assert tok.special_id("<｜User｜>") == 128803 and tok.special_id("</think>") == 128822
    assert tok.digest == "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


def test_no_spelling_of_an_added_token_becomes_one() -> None:
    tok = real_tokenizer()
    contents = [token.content for token in tok.added]
    for content in contents:
        for text in (content, f" {content}\n", f"x{content}y", content * 2):
            ids = tok.encode_text(text)
            assert not tok.added_ids.intersection(ids), content
            assert tok.decode(ids) == text
    everything = "".join(contents)
    assert not tok.added_ids.intersection(tok.encode_text(everything))


def test_the_library_switch_alone_would_let_markers_through() -> None:
    """Why the added vocabulary is removed: encode_special_tokens leaves </think> and others live."""
    library = tokenizers.Tokenizer.from_file(str(real_tokenizer_path()))
    library.encode_special_tokens = True
    assert real_tokenizer().special_id("</think>") in library.encode("</think>").ids


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("a\r\n\tb  c   ")
@example("\u0000\ufffd\u200b")
def test_text_survives_the_round_trip(text: str) -> None:
    tok = real_tokenizer()
    ids = tok.encode_text(text)
    assert tok.decode(ids) == text
    assert not tok.added_ids.intersection(ids)


def test_plain_text_gives_the_ids_of_the_library() -> None:
    library = tokenizers.Tokenizer.from_file(str(real_tokenizer_path()))
    text = Path(tokenizers.__file__).read_text(encoding="utf-8") + "中文，日本語 🙂 Ærø 1234567"
    assert real_tokenizer().encode_text(text) == library.encode(text, add_special_tokens=False).ids


def test_decoding_any_ids_equals_the_library() -> None:
    tok = real_tokenizer()
    library = tokenizers.Tokenizer.from_file(str(real_tokenizer_path()))
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tok.vocab_size) for _ in range(rng.randrange(12))]
        assert tok.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert tok.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


def test_ids_outside_the_vocabulary_have_no_bytes() -> None:
    tok = real_tokenizer()
    assert tok.token_bytes(-1) == tok.token_bytes(129_280) == b""
    assert tok.decode([10**6, -5]) == ""


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        real_tokenizer().encode_text("a\ud83d")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 129_279), max_size=30), st.randoms(use_true_random=False), st.booleans())
def test_detokenising_in_pieces_equals_decoding_at_once(
    ids: list[int], rng: random.Random, skip_special: bool
) -> None:
    tok = real_tokenizer()
    pieces = Detokenizer(tok, skip_special=skip_special)
    text, at = "", 0
    while at < len(ids):
        step = rng.randint(0, 4)
        text += pieces.feed(ids[at : at + step])
        at += step
    assert text + pieces.flush() == tok.decode(ids, skip_special=skip_special)


def test_no_piece_splits_a_character() -> None:
    tok = real_tokenizer()
    text = "naïve 中文 👩‍👩‍👧‍👦 🇩🇪 𝔘𝔫𝔦"
    for token_ids in (tok.encode_text(text), [i for b in text.encode() for i in _byte(tok, b)]):
        pieces = Detokenizer(tok)
        told = ""
        for token_id in token_ids:
            told += pieces.feed([token_id])
            assert text.startswith(told)
        assert told == text and pieces.flush() == ""


def _byte(tok: Tokenizer, value: int) -> list[int]:
    return [tok.all_token_bytes().index(bytes([value]))]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tok = real_tokenizer()
    pieces = Detokenizer(tok)
    assert pieces.feed([_byte(tok, 0xE4)[0], _byte(tok, 0xB8)[0]]) == ""
    assert pieces.flush() == "\ufffd"
    assert pieces.feed(tok.encode_text("next")) == "next"


def test_a_small_vocabulary_keeps_the_same_promises(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer_json(512), encoding="utf-8")
    tok = Tokenizer.from_file(path)
    assert tok.vocab_size == 512
    for token in tok.added:
        assert not tok.added_ids.intersection(tok.encode_text(token.content))
    assert tok.decode(tok.encode_text("héllo 中")) == "héllo 中"


@pytest.mark.parametrize(
    "damage",
    [
        lambda doc: b"{",
        lambda doc: b"[]",
        lambda doc: json.dumps({**doc, "decoder": {"type": "WordPiece"}}).encode(),
        lambda doc: json.dumps({**doc, "model": {"type": "Unigram"}}).encode(),
        lambda doc: json.dumps({**doc, "added_tokens": doc["added_tokens"][:2]}).encode(),
        lambda doc: json.dumps({**doc, "added_tokens": [{"id": 1}]}).encode(),
        lambda doc: json.dumps({**doc, "added_tokens": [*doc["added_tokens"], _letter(doc)]}).encode(),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(json.loads(small_tokenizer_json(512))))  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_file(path)
    assert "tokenizer.json" in str(caught.value)


def _letter(doc: dict[str, dict[str, dict[str, int]]]) -> dict[str, object]:
    """An added token that plain text reaches: the letter a."""
    return {"id": doc["model"]["vocab"]["a"], "content": "a", "special": False}


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_tokenising_a_long_text_lets_other_threads_run() -> None:
    tok = Tokenizer(small_tokenizer_json(512).encode(), source="small")
    text = "hello world, how are you? " * 40_000
    beats, is_done = 0, threading.Event()
    is_beating = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not is_done.wait(0.001):
            beats += 1
            is_beating.set()

    other = threading.Thread(target=beat)
    other.start()
    is_beating.wait()
    before = beats
    ids = tok.encode_text(text)  # a good part of a second
    during = beats - before
    is_done.set()
    other.join()
    assert tok.decode(ids) == text
    assert during >= 10  # one, if the call kept the interpreter to itself
