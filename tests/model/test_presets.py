"""Presets: every layer kind, the same bytes every time, values in the ranges of a working model."""

import hashlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bittrue.config.model import ModelConfig
from bittrue.errors import UnsupportedModel, UsageError
from bittrue.model.presets import PRESETS, make_checkpoint, preset_config, random_tensors
from bittrue.model.weights import load_checkpoint, weight_digest


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_every_layer_kind_and_both_routers(preset: str) -> None:
    config = ModelConfig.from_dict(preset_config(preset, "fp4"))
    expected = {"csa", "hca"} if preset == "flash4" else {"window", "csa", "hca"}
    assert set(config.layer_kinds) == expected
    assert 0 < config.num_hash_layers < config.num_layers
    assert config.yarn is not None and config.window == 128
    assert config.max_positions == 1048576


def test_flash4_differs_from_flash_in_what_it_says_only() -> None:
    golden = Path(__file__).parents[1] / "golden" / "configs" / "flash.json"
    flash = ModelConfig.from_file(golden)
    small = ModelConfig.from_dict(preset_config("flash4", "fp4"))
    different = {f.name for f in fields(ModelConfig) if getattr(small, f.name) != getattr(flash, f.name)}
    reduced = {"num_layers", "compress_ratios", "num_experts", "num_hash_layers", "vocab_size"}
    assert different <= reduced | {"draft_ratios", "num_mtp"}
    assert small.compress_ratios == (4, 128, 4, 128)


def test_a_preset_is_the_same_bytes_everywhere(tmp_path: Path) -> None:
    # Written down: these may only change with the generator, never with the machine.
    expected = {
        "f32": "fa6585ea646e87b3",
        "bf16": "c6c9a6cc96b5a293",
        "fp8": "324710cb14d5d0aa",
        "fp4": "692e913f6ebb1f19",
    }
    found = {}
    for precision in expected:
        directory = make_checkpoint("tiny", 0, precision, tmp_path / precision)  # type: ignore[arg-type]
        found[precision] = weight_digest(load_checkpoint(directory))[:16]
    assert found == expected
    tokenizer = (tmp_path / "f32" / "tokenizer.json").read_bytes()
    assert hashlib.blake2b(tokenizer, digest_size=8).hexdigest() == "c8cc5d36d305db19"


def test_a_tensor_depends_on_the_seed_and_its_name_only() -> None:
    small = ModelConfig.from_dict(preset_config("tiny", "f32"))
    fewer = ModelConfig.from_dict(preset_config("tiny", "f32", num_hidden_layers=3))
    a, b = dict(random_tensors(small, 4)), dict(random_tensors(fewer, 4))
    assert set(b) < set(a)
    assert all(torch.equal(a[name], b[name]) for name in b)
    c = dict(random_tensors(small, 5))
    different = [name for name in a if not torch.equal(a[name], c[name])]
    assert set(a) - set(different) == {name for name in a if name.endswith("_scale")}


def test_random_values_are_centred_scaled_and_varied() -> None:
    tensors = dict(random_tensors(ModelConfig.from_dict(preset_config("tiny", "f32")), 0))
    embed, head = tensors["embed.weight"], tensors["head.weight"]
    assert abs(embed.mean().item()) < 0.02 and abs(embed.std().item() - 1) < 0.02
    assert abs(head.std().item() - 64**-0.5) < 0.01
    assert len(embed.unique()) > 40_000
    assert abs(torch.corrcoef(torch.stack([embed.flatten(), head.flatten()]))[0, 1].item()) < 0.02
    assert abs(tensors["layers.2.attn_norm.weight"].mean().item() - 1) < 0.1


def test_hash_tables_give_distinct_experts_and_use_all_of_them() -> None:
    config = ModelConfig.from_dict(preset_config("tiny", "f32"))
    table = dict(random_tensors(config, 0))["layers.1.ffn.gate.tid2eid"]
    assert table.shape == (1024, 2) and table.dtype == torch.int64
    assert bool((table[:, 0] != table[:, 1]).all())
    assert table.unique().tolist() == list(range(8))


def test_overrides_reach_the_config_and_bad_ones_are_named(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "m", index_topk=3, num_hidden_layers=4)
    config = load_checkpoint(directory).config
    assert (config.index_topk, config.num_layers) == (3, 4)
    with pytest.raises(UnsupportedModel, match="index_top"):
        make_checkpoint("tiny", 0, "bf16", tmp_path / "n", index_top=3)
    with pytest.raises(UsageError, match="huge"):
        make_checkpoint("huge", 0, "bf16", tmp_path / "n")
    with pytest.raises(UsageError, match="int4"):
        make_checkpoint("tiny", 0, "int4", tmp_path / "n")  # type: ignore[arg-type]
    assert not (tmp_path / "n").exists()
