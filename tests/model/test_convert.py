"""Converting: names of transformers there and back, exact and rounding changes of precision, the command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from bittrue.cli.convert import convert
from bittrue.errors import CheckpointError, UnsupportedModel, UsageError
from bittrue.model.convert import open_source, to_hf, to_official
from bittrue.model.hf_names import official_config
from bittrue.model.presets import Precision, make_checkpoint
from bittrue.model.quantize import dequantize
from bittrue.model.weights import load_checkpoint, weight, weight_digest


def digest(directory: Path) -> str:
    return weight_digest(load_checkpoint(directory))


def hf_model(directory: Path, dtype: torch.dtype) -> DeepseekV4ForCausalLM:
    model, info = DeepseekV4ForCausalLM.from_pretrained(str(directory), dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(("precision", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_names_go_to_transformers_and_back_without_a_bit_lost(
    tmp_path: Path, precision: Precision, dtype: torch.dtype
) -> None:
    official = make_checkpoint("tiny", 0, precision, tmp_path / "official")
    to_hf(open_source(official), tmp_path / "hf")
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    model = hf_model(tmp_path / "hf", dtype)
    assert names == set(model.state_dict())
    to_official(open_source(tmp_path / "hf"), tmp_path / "back")
    assert digest(tmp_path / "back") == digest(official)


@pytest.mark.parametrize("loaded_from", ["official", "hf"])
@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_becomes_official(
    tmp_path: Path, loaded_from: str, original_format: bool
) -> None:
    official = make_checkpoint("tiny", 0, "f32", tmp_path / "official")
    to_hf(open_source(official), tmp_path / "hf")
    model = hf_model(tmp_path / loaded_from, torch.float32)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_format)
    to_official(open_source(tmp_path / "saved"), tmp_path / "back")
    assert digest(tmp_path / "back") == digest(official)
    assert load_checkpoint(tmp_path / "back").config == load_checkpoint(official).config


def test_both_namings_give_transformers_the_same_model(tmp_path: Path) -> None:
    official = make_checkpoint("tiny", 0, "f32", tmp_path / "official")
    to_hf(open_source(official), tmp_path / "hf")
    ids = torch.arange(3, 140)[None]
    with torch.no_grad():
        logits = [hf_model(tmp_path / d, torch.float32)(ids).logits for d in ("official", "hf")]
    assert torch.equal(logits[0], logits[1])


def test_packed_weights_go_to_transformers_as_the_values_they_hold(tmp_path: Path) -> None:
    official = make_checkpoint("tiny", 0, "fp4", tmp_path / "official", draft="mtp")
    to_hf(open_source(official), tmp_path / "hf")
    checkpoint = load_checkpoint(official)
    state = hf_model(tmp_path / "hf", torch.bfloat16).state_dict()
    w1, w2, w3 = (
        dequantize(weight(checkpoint, f"layers.4.ffn.experts.5.{w}.weight")) for w in ("w1", "w2", "w3")
    )
    assert torch.equal(state["model.layers.4.mlp.experts.gate_up_proj"][5].float(), torch.cat([w1, w3]))
    assert torch.equal(state["model.layers.4.mlp.experts.down_proj"][5].float(), w2)
    wq_b = dequantize(weight(checkpoint, "layers.4.attn.indexer.wq_b.weight"))
    assert torch.equal(state["model.layers.4.self_attn.compressor.indexer.q_b_proj.weight"].float(), wq_b)


def test_a_config_of_transformers_becomes_the_published_one(tmp_path: Path) -> None:
    official = make_checkpoint("tiny", 0, "f32", tmp_path / "official")
    hf_model(official, torch.float32).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    published = json.loads((official / "config.json").read_text())
    translated = official_config(saved)
    for key in (
        "compress_ratios",
        "num_hash_layers",
        "qk_rope_head_dim",
        "rope_theta",
        "compress_rope_theta",
    ):
        assert translated[key] == published[key]
    assert official_config(published) == published
    with pytest.raises(UnsupportedModel, match="layer_types"):
        official_config({**saved, "layer_types": ["full_attention"]})
    with pytest.raises(UnsupportedModel, match="mlp_layer_types"):
        official_config({**saved, "mlp_layer_types": ["moe", "hash_moe"] * 3})


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_a_broken_checkpoint_of_transformers_names_the_tensor(tmp_path: Path, fault: str) -> None:
    to_hf(open_source(make_checkpoint("tiny", 0, "bf16", tmp_path / "official")), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = "model.layers.3.mlp.experts.gate_up_proj"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "model.layers.3.mlp.experts.bias"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:, :, :-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        to_official(open_source(tmp_path / "hf"), tmp_path / "back")
    assert caught.value.tensor == name
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("target", ["f32", "bf16", "fp8", "fp4"])
def test_rounding_from_f32_gives_the_preset_of_that_precision(tmp_path: Path, target: Precision) -> None:
    source = make_checkpoint("tiny", 0, "f32", tmp_path / "f32", draft="dspark")
    direct = make_checkpoint("tiny", 0, target, tmp_path / "direct", draft="dspark")
    to_official(open_source(source), tmp_path / "converted", precision=target)
    assert digest(tmp_path / "converted") == digest(direct)
    assert load_checkpoint(tmp_path / "converted").config == load_checkpoint(direct).config


@pytest.mark.parametrize(
    ("source", "target"), [("fp4", "fp8"), ("fp4", "bf16"), ("fp8", "bf16"), ("fp8", "f32")]
)
def test_unpacking_keeps_every_value(tmp_path: Path, source: Precision, target: Precision) -> None:
    make_checkpoint("tiny", 0, source, tmp_path / "a", draft="mtp")
    to_official(open_source(tmp_path / "a"), tmp_path / "b", precision=target)
    a, b = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    assert {b.config.dense_format, b.config.expert_format} == {target}
    num_compared = 0
    for name, _ in b.all_tensors():
        if name.endswith(".weight") and b.tensor(name).dim() == 2:
            assert torch.equal(dequantize(weight(a, name)), dequantize(weight(b, name))), name
            num_compared += 1
    assert num_compared > 150


def test_an_inexact_step_to_fp8_names_the_tensor_and_writes_nothing(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "fp4", tmp_path / "a")
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = "layers.5.ffn.experts.2.w3"
    tensors[f"{name}.scale"].view(torch.uint8)[0, 0] += 20
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        to_official(open_source(directory), tmp_path / "b", precision="fp8")
    assert caught.value.tensor == f"{name}.weight"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_without_a_precision_every_byte_is_kept(tmp_path: Path) -> None:
    make_checkpoint("tiny", 0, "fp4", tmp_path / "a", draft="mtp")
    to_official(open_source(tmp_path / "a"), tmp_path / "b", max_shard_bytes=100_000)
    assert digest(tmp_path / "b") == digest(tmp_path / "a")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text()) == json.loads(
            (tmp_path / "a" / name).read_text()
        )


def test_the_command_makes_converts_and_prints_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tmp_path / "random", random=7, precision="fp4", vocab_size=2048)
    convert(tmp_path / "random", tmp_path / "fp8", precision="fp8")
    convert(tmp_path / "fp8", tmp_path / "hf", to="hf")
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / name) for name in ("random", "fp8", "hf")]
    assert load_checkpoint(tmp_path / "fp8").config.expert_format == "fp8"
    assert load_checkpoint(tmp_path / "random").config.vocab_size == 2048


def test_the_command_refuses_what_does_not_fit_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for call in (
        lambda: convert(out),
        lambda: convert(out, out, random=1),
        lambda: convert(out, random=-1),
        lambda: convert(out, random=1, preset="huge"),
        lambda: convert(out, random=1, max_shard_bytes=0),
        lambda: convert(out, random=1, vocab_size=100),
        lambda: convert(out, tmp_path / "b", to="hf", precision="fp8"),
    ):
        with pytest.raises(UsageError):
            call()
    assert list(tmp_path.iterdir()) == []
