"""The floor of a decode step counts the weights of the checkpoint and the rows of the cache, once each."""

from pathlib import Path

import pytest

from bittrue import Engine
from bittrue.bench.floor import decode_floor
from bittrue.model.presets import make_checkpoint
from bittrue.model.weights import load_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", 0, "fp4", tmp_path_factory.mktemp("floor") / "tiny")


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, kv_memory="32MiB", threads=1)


def test_a_large_batch_reads_every_weight_once(model: Path, engine: Engine) -> None:
    tensors = load_checkpoint(model).tensors
    stored = sum(t.nbytes for name, t in tensors.items() if name != "embed.weight" and "tid2eid" not in name)
    # As many as read every expert; at context 0 there is no cache to read.
    read, _ = decode_floor(engine, 0, 1000)
    assert stored <= read <= 1.01 * stored  # the rotary tables of the compressors are not in the file


def test_one_token_reads_only_the_experts_it_chooses(model: Path, engine: Engine) -> None:
    tensors = load_checkpoint(model).tensors
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    config = engine.config
    spared = experts * (config.num_experts - config.experts_per_token) // config.num_experts
    assert decode_floor(engine, 0, 1000)[0] - decode_floor(engine, 0, 1)[0] == spared


def test_a_longer_context_costs_index_keys_and_hca_rows_and_nothing_else(engine: Engine) -> None:
    near, far = 4096, 4096 + 1280
    grown = decode_floor(engine, far, 1)[0] - decode_floor(engine, near, 1)[0]
    layers = engine.parts.layout.layers
    keys = sum(1280 // 4 * layer.key_format.bytes for layer in layers if layer.key_format is not None)
    rows = sum(1280 // 128 * layer.row_format.bytes for layer in layers if layer.kind == "hca")
    assert near // 4 > engine.config.index_topk
    assert grown == keys + rows
    assert decode_floor(engine, far, 3)[0] - decode_floor(engine, near, 3)[0] == 3 * grown
