"""The inventory against the published numbers of tensors, parameters and bytes."""

from pathlib import Path

import pytest

from bittrue.config.model import ModelConfig
from bittrue.model.inventory import DraftKind, draft_inventory, draft_kind, inventory

CONFIGS = Path(__file__).parent.parent / "golden" / "configs"


@pytest.mark.parametrize(
    ("name", "draft", "count"),
    [
        ("flash", "none", 67_612),
        ("flash", "mtp", 69_187),
        ("flash_dspark", "dspark", 72_317),
        ("flash_base", "none", 67_612),
        ("pro", "none", 142_773),
        ("pro", "mtp", 145_116),
    ],
)
def test_counts_equal_the_published_ones(name: str, draft: DraftKind, count: int) -> None:
    config = ModelConfig.from_file(CONFIGS / f"{name}.json")
    names = [spec.name for spec in inventory(config, draft=draft)]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize(
    ("name", "parameters_b", "bytes_gb"),
    [
        ("flash", 284.33, 156.0),
        ("pro", 1573.0, 850.7),
        ("flash_base", 284.33, 285.9),
        ("pro_base", 1573.0, 1576.2),
    ],
)
def test_sizes_of_the_main_model_equal_the_published_ones(
    name: str, parameters_b: float, bytes_gb: float
) -> None:
    specs = list(inventory(ModelConfig.from_file(CONFIGS / f"{name}.json")))
    assert round(sum(s.num_parameters for s in specs) / 1e9, 2 if parameters_b < 1000 else 1) == parameters_b
    assert round(sum(s.num_bytes for s in specs) / 1e9, 1) == bytes_gb


@pytest.mark.parametrize(
    ("name", "draft", "parameters_b", "bytes_gb", "digits"),
    [
        ("flash", "mtp", 6.61, 3.59, 2),
        ("pro", "mtp", 25.84, 13.96, 2),
        ("flash_dspark", "dspark", 19.846, 10.863, 3),
    ],
)
def test_sizes_of_the_drafts_equal_the_published_ones(
    name: str, draft: DraftKind, parameters_b: float, bytes_gb: float, digits: int
) -> None:
    specs = list(draft_inventory(ModelConfig.from_file(CONFIGS / f"{name}.json"), draft))
    assert round(sum(s.num_parameters for s in specs) / 1e9, digits) == parameters_b
    assert round(sum(s.num_bytes for s in specs) / 1e9, digits) == bytes_gb


def test_shapes_and_dtypes_follow_the_published_table() -> None:
    flash = ModelConfig.from_file(CONFIGS / "flash_dspark.json")
    specs = {s.name: (s.dtype, s.shape) for s in inventory(flash, draft="dspark")}
    assert specs["embed.weight"] == ("BF16", (129280, 4096))
    assert specs["hc_head_fn"] == ("F32", (4, 16384))
    assert specs["layers.7.hc_attn_fn"] == ("F32", (24, 16384))
    assert specs["layers.0.attn.wq_b.weight"] == ("F8_E4M3", (32768, 1024))
    assert specs["layers.0.attn.wq_b.scale"] == ("F8_E8M0", (256, 8))
    assert specs["layers.0.attn.wo_a.weight"] == ("F8_E4M3", (8192, 4096))
    assert specs["layers.0.attn.wo_b.weight"] == ("F8_E4M3", (4096, 8192))
    assert specs["layers.2.attn.compressor.ape"] == ("F32", (4, 1024))
    assert specs["layers.3.attn.compressor.ape"] == ("F32", (128, 512))
    assert specs["layers.3.attn.compressor.wkv.weight"] == ("BF16", (512, 4096))
    assert specs["layers.2.attn.indexer.wq_b.weight"] == ("F8_E4M3", (8192, 1024))
    assert specs["layers.2.attn.indexer.weights_proj.weight"] == ("BF16", (64, 4096))
    assert specs["layers.2.attn.indexer.compressor.ape"] == ("F32", (4, 256))
    assert specs["layers.2.ffn.gate.tid2eid"] == ("I64", (129280, 6))
    assert specs["layers.3.ffn.gate.bias"] == ("F32", (256,))
    assert specs["layers.3.ffn.experts.255.w1.weight"] == ("I8", (2048, 2048))
    assert specs["layers.3.ffn.experts.255.w1.scale"] == ("F8_E8M0", (2048, 128))
    assert specs["layers.3.ffn.experts.0.w2.weight"] == ("I8", (4096, 1024))
    assert specs["mtp.0.main_proj.weight"] == ("F8_E4M3", (4096, 12288))
    assert specs["mtp.2.markov_head.markov_w2.weight"] == ("BF16", (129280, 256))
    assert specs["mtp.2.confidence_head.proj.weight"] == ("BF16", (1, 4352))
    assert "layers.2.ffn.gate.bias" not in specs and "layers.3.ffn.gate.tid2eid" not in specs
    assert "layers.3.attn.indexer.wq_b.weight" not in specs and "layers.0.attn.compressor.ape" not in specs


def test_the_draft_kind_is_told_by_tensor_names_alone() -> None:
    # Both configs say num_nextn_predict_layers = 1.
    for name, draft in (("flash", "mtp"), ("flash_dspark", "dspark"), ("flash", "none")):
        config = ModelConfig.from_file(CONFIGS / f"{name}.json")
        assert config.num_mtp == 1
        kind: DraftKind = draft  # type: ignore[assignment]
        assert draft_kind(s.name for s in inventory(config, draft=kind)) == draft
