"""The bundled model: its parts, its size, and that it really answers."""

import json
from pathlib import Path

import pytest

from bittrue.bench.engines import Model
from bittrue.bench.tasks import TaskBench
from bittrue.cli.main import run
from bittrue.config.model import ModelConfig
from bittrue.model.weights import load_checkpoint
from bittrue.text.tokenizer import Tokenizer

MINI = Path(__file__).parents[2] / "models" / "mini"
MOST_BYTES = 16 * 2**20


def test_it_has_every_kind_of_layer_and_the_published_formats() -> None:
    checkpoint = load_checkpoint(MINI)
    config = checkpoint.config
    kinds = {config.layer_kind(i) for i in range(config.num_layers)}
    assert kinds == {"window", "csa", "hca"}
    assert set(config.compress_ratios) == {0, 4, 128}
    assert (config.window, config.hc_mult) == (128, 4)
    assert 0 < config.num_hash_layers < config.num_layers
    assert (config.expert_format, config.dense_format) == ("fp4", "fp8")
    assert checkpoint.draft_kind == "mtp"
    assert config.default_level == "published"


def test_it_is_small_and_says_how_it_was_made() -> None:
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    text = (MINI / "README.md").read_text(encoding="utf-8")
    root = MINI.parents[1]
    runs = [word for word in text.split() if word.startswith("configs/") and word.endswith(".toml")]
    assert runs and all((root / name).is_file() for name in runs)


def test_its_tokens_are_bytes_and_the_special_tokens_of_v4() -> None:
    tokenizer = Tokenizer.from_file(MINI / "tokenizer.json")
    text = "a+b é 数"
    assert len(tokenizer.encode_text(text)) == len(text.encode())
    merges = json.loads((MINI / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges == []
    assert ModelConfig.from_dict(json.loads((MINI / "config.json").read_text())).vocab_size == 322


def test_it_answers_held_out_problems() -> None:
    bench = TaskBench(Model.of(MINI), lambda line: None, tasks=("sort", "reverse"), count=40, threads=1)
    shares = {m.labels["task"]: m.median for m in bench.run() if m.name == "right answers"}
    assert shares["sort"] > 0.85 and shares["reverse"] > 0.85


@pytest.mark.slow
def test_it_finds_records_far_beyond_its_window() -> None:
    bench = TaskBench(
        Model.of(MINI), lambda line: None, tasks=("recall",), recall_tokens=(4096, 16384), count=60, threads=2
    )
    shares = {m.labels["tokens"]: m.median for m in bench.run() if m.name == "right answers"}
    assert shares[4096] > 0.85 and shares[16384] > 0.85


@pytest.mark.slow
def test_the_laws_hold_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(MINI)]) == 0
