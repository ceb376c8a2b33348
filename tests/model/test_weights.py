"""Reading a checkpoint: what is mapped, and every way it can be broken names the file and the tensor."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bittrue.errors import CheckpointError, UnsupportedModel
from bittrue.model.inventory import DraftKind
from bittrue.model.presets import Precision, make_checkpoint, random_tensors
from bittrue.model.tensor_file import read_header
from bittrue.model.weights import (
    Checkpoint,
    _value_fault,
    load_checkpoint,
    weight,
    weight_digest,
    weight_version,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 in one file; fp4 in shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint("tiny", 0, "bf16", root / "single")
    make_checkpoint("tiny", 0, "fp4", root / "sharded", max_shard_bytes=100_000)
    return root


@pytest.fixture
def copy(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(sources / name, tmp_path / name))

    return make


def refused(directory: Path, *, verify: bool = True) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory, verify=verify)
    return caught.value


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("draft", ["none", "mtp", "dspark"])
@pytest.mark.parametrize("precision", ["f32", "bf16", "fp8", "fp4"])
def test_a_checkpoint_reads_back_as_written(tmp_path: Path, precision: Precision, draft: DraftKind) -> None:
    directory = make_checkpoint("tiny", 5, precision, tmp_path / "m", draft=draft, max_shard_bytes=200_000)
    checkpoint = load_checkpoint(directory)
    written = dict(random_tensors(checkpoint.config, 5, draft=draft))
    assert checkpoint.draft_kind == draft
    assert not set(checkpoint.tensors) & set(checkpoint.draft_tensors)
    assert set(checkpoint.tensors) | set(checkpoint.draft_tensors) == set(written)
    for name, tensor in written.items():
        found = checkpoint.tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert bool(checkpoint.draft_tensors) == (draft != "none")


def test_tensors_are_mapped_and_not_copied(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "m", vocab_size=50_000)
    before = resident_bytes()
    checkpoint = load_checkpoint(directory, verify=False)
    embed = checkpoint.tensor("embed.weight")
    assert embed.nbytes > 6_000_000
    assert resident_bytes() - before < 2_000_000
    # One mapping holds all tensors of a file.
    assert embed.untyped_storage().data_ptr() == checkpoint.tensor("head.weight").untyped_storage().data_ptr()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_writing_to_a_tensor_leaves_the_file_alone(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    before = (directory / "model.safetensors").read_bytes()
    load_checkpoint(directory).tensor("embed.weight").zero_()
    assert (directory / "model.safetensors").read_bytes() == before


def test_matrices_come_packed_with_their_scale(sources: Path) -> None:
    checkpoint = load_checkpoint(sources / "sharded")
    dense = weight(checkpoint, "layers.0.attn.wq_a.weight")
    expert = weight(checkpoint, "layers.0.ffn.experts.3.w2.weight")
    plain = weight(checkpoint, "head.weight")
    assert (dense.format, dense.data.dtype, dense.shape) == ("fp8", torch.float8_e4m3fn, (32, 64))
    assert (expert.format, expert.data.dtype, expert.shape) == ("fp4", torch.int8, (64, 32))
    assert dense.scale is not None and expert.scale is not None
    assert (dense.scale.shape, expert.scale.shape) == ((1, 1), (64, 1))
    assert (plain.format, plain.scale) == ("bf16", None)
    with pytest.raises(CheckpointError, match=r"layers\.9\.attn\.wq_a\.weight"):
        weight(checkpoint, "layers.9.attn.wq_a.weight")


def test_config_json_is_kept_as_read(sources: Path) -> None:
    raw = json.loads((sources / "single" / "config.json").read_text())
    assert load_checkpoint(sources / "single").raw_config == raw


def test_norms_may_be_float32_in_a_bf16_checkpoint(copy: Callable[[str], Path]) -> None:
    directory = copy("single")

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("norm.weight")]:
            tensors[name] = tensors[name].float()

    rewrite(directory, widen)
    assert load_checkpoint(directory).tensor("norm.weight").dtype == torch.float32


@pytest.mark.parametrize("verify", [True, False])
def test_progress_ends_at_the_total(sources: Path, verify: bool) -> None:
    seen: list[tuple[int, int, str]] = []
    load_checkpoint(sources / "sharded", verify=verify, progress=lambda *p: seen.append(p))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert len({total for _, total, _ in seen}) == 1


def test_a_missing_directory_config_or_weight_file_is_named(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    assert str(tmp_path / "nowhere") in str(refused(tmp_path / "nowhere"))
    directory = copy("single")
    (directory / "model.safetensors").rename(directory / "weights.bin")
    assert "model.safetensors" in str(refused(directory))
    (directory / "config.json").unlink()
    assert refused(directory).file == str(directory / "config.json")


def test_a_missing_shard_is_named(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    error = refused(directory)
    assert error.file == str(shard)
    assert shard.name in str(error) and "1 of" in str(error)


def test_an_index_that_leads_out_of_the_directory_is_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["embed.weight"] = "../single/model.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    error = refused(directory)
    assert (error.file, error.tensor) == (str(directory / INDEX), "embed.weight")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_a_broken_index_is_named(copy: Callable[[str], Path], content: str) -> None:
    directory = copy("sharded")
    (directory / INDEX).write_text(content)
    assert refused(directory).file == str(directory / INDEX)


def test_a_tensor_in_two_shards_or_in_another_than_indexed_is_named(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**load_file(second), name: tensors[name]}, second)
    error = refused(directory)
    assert error.tensor == name
    assert first.name in str(error) and second.name in str(error)
    save_file({n: t for n, t in tensors.items() if n != name}, first)
    error = refused(directory)
    assert (error.tensor, error.file) == (name, str(first))


def test_a_file_cut_anywhere_is_an_error_naming_it(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for length in (
        0,
        5,
        8,
        200,
        header_end - 1,
        header_end,
        header_end + 10,
        len(whole) // 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        error = refused(directory)
        assert error.file == str(path), length
        assert (error.tensor is not None) == (length >= header_end), length
    path.write_bytes(whole + b"\0")
    assert refused(directory).file == str(path)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F9"},
        {"dtype": "F32"},
        {"shape": [64, -1]},
        {"shape": [65]},
        {"shape": "64"},
        {"data_offsets": [10, 4]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [0, 128]},
        {"more": 1},
    ],
)
def test_a_malformed_header_entry_names_its_tensor(
    copy: Callable[[str], Path], entry: dict[str, Any]
) -> None:
    directory = copy("single")
    path = directory / "model.safetensors"
    edit_header(path, lambda header: header["norm.weight"].update(entry))
    error = refused(directory)
    assert error.file == str(path)
    # An overlap may be noticed at the tensor that really lies there.
    assert error.tensor == "norm.weight" or entry.get("data_offsets") == [0, 128]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"a": 3}'])
def test_a_header_that_is_no_header_names_the_file(copy: Callable[[str], Path], text: bytes) -> None:
    directory = copy("single")
    path = directory / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert refused(directory).file == str(path)


def test_a_missing_tensor_is_named_with_the_count(copy: Callable[[str], Path]) -> None:
    directory = copy("single")

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("layers.3.ffn.experts.")]:
            del tensors[name]

    rewrite(directory, drop)
    error = refused(directory)
    assert error.tensor == "layers.3.ffn.experts.0.w1.weight"
    assert "24 of 304" in str(error) and "20 more" in str(error)


def test_an_extra_tensor_is_named(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    path = rewrite(directory, lambda tensors: tensors.update({"layers.0.attn.bias": torch.zeros(3)}))
    error = refused(directory)
    assert (error.file, error.tensor) == (str(path), "layers.0.attn.bias")


@pytest.mark.parametrize(
    ("name", "tensor", "fact"),
    [
        ("layers.1.attn.wkv.weight", torch.zeros(64, 32, dtype=torch.bfloat16), r"\[64, 32\].*\[32, 64\]"),
        ("layers.1.attn.wkv.weight", torch.zeros(32, 64), "F32.*BF16"),
        ("layers.1.attn.attn_sink", torch.zeros(4, dtype=torch.bfloat16), "BF16.*F32"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(1024, 2, dtype=torch.int32), "I32.*I64"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(
    copy: Callable[[str], Path], name: str, tensor: Tensor, fact: str
) -> None:
    directory = copy("single")
    path = rewrite(directory, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(CheckpointError, match=fact) as caught:
        load_checkpoint(directory, verify=False)
    assert (caught.value.file, caught.value.tensor) == (str(path), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["embed.weight", "layers.2.attn.compressor.ape"])
def test_nan_and_infinity_are_named(copy: Callable[[str], Path], name: str, value: float) -> None:
    directory = copy("single")
    path = rewrite(directory, lambda tensors: tensors[name][3].fill_(value))
    error = refused(directory)
    assert (error.file, error.tensor) == (str(path), name)
    load_checkpoint(directory, verify=False)


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("layers.0.attn.wq_a.weight", 0x7F),
        ("layers.0.attn.wq_a.weight", 0xFF),
        ("layers.0.attn.wq_a.scale", 0xFF),
        ("layers.4.ffn.experts.7.w3.scale", 0xFF),
    ],
)
def test_nan_bytes_of_packed_formats_are_named(tmp_path: Path, name: str, byte: int) -> None:
    directory = make_checkpoint("tiny", 0, "fp4", tmp_path / "m")
    path = rewrite(directory, lambda tensors: tensors[name].view(torch.uint8)[-1].fill_(byte))
    error = refused(directory)
    assert (error.file, error.tensor) == (str(path), name)


@pytest.mark.parametrize("expert", [-1, 8])
def test_an_expert_id_out_of_range_is_named(copy: Callable[[str], Path], expert: int) -> None:
    directory = copy("single")
    name = "layers.1.ffn.gate.tid2eid"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][1023, 1] = expert

    path = rewrite(directory, change)
    error = refused(directory)
    assert (error.file, error.tensor) == (str(path), name)
    assert str(expert) in str(error)


def test_the_names_of_transformers_are_refused_with_the_remedy(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("head.weight")}))
    error = refused(directory)
    assert "bittrue convert" in str(error)
    assert error.tensor == "lm_head.weight"


def test_a_model_not_run_here_is_refused_by_its_config(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "scoring_func": "sigmoid"}))
    with pytest.raises(UnsupportedModel, match="scoring_func"):
        load_checkpoint(directory)


def test_dspark_weights_with_a_config_that_lacks_its_fields_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "m", draft="dspark")
    raw = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in raw.items() if not key.startswith("dspark")}
    (directory / "config.json").write_text(json.dumps(kept))
    assert "dspark_block_size" in str(refused(directory))


def test_an_unaligned_tensor_is_read_right(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "m")
    path = directory / "model.safetensors"
    whole = load_checkpoint(directory)
    expected = {name: tensor.clone() for name, tensor in whole.tensors.items()}
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end] + b" "  # one more blank moves every tensor to an odd offset
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    moved = load_checkpoint(directory)
    assert all(torch.equal(moved.tensor(name), tensor) for name, tensor in expected.items())


def test_digest_and_version_tell_weights_apart_and_ignore_the_files(tmp_path: Path) -> None:
    one = make_checkpoint("tiny", 0, "fp4", tmp_path / "one")
    split = make_checkpoint("tiny", 0, "fp4", tmp_path / "split", max_shard_bytes=50_000)
    other = make_checkpoint("tiny", 1, "fp4", tmp_path / "other")
    for identity in (weight_digest, weight_version):
        a, b, c = (identity(load_checkpoint(d)) for d in (one, split, other))
        assert a == b != c


def test_the_digest_sees_every_byte(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    before = weight_digest(load_checkpoint(directory))
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    for at in (len(raw) - 1, len(raw) // 2, len(raw) - 70_001):
        raw[at] ^= 1
        path.write_bytes(raw)
        assert weight_digest(load_checkpoint(directory, verify=False)) != before
        raw[at] ^= 1


def test_the_version_sees_a_new_training_step_where_only_some_tensors_are_sampled(sources: Path) -> None:
    base = load_checkpoint(sources / "single")

    def with_tensors(value: float) -> Checkpoint:
        large = torch.full((40_000,), value)
        return replace(base, tensors={f"layers.{i}.w1.weight": large for i in range(3000)})

    assert weight_version(with_tensors(1.0)) == weight_version(with_tensors(1.0))
    assert weight_version(with_tensors(1.0)) != weight_version(with_tensors(1.25))


def test_files_known_to_be_sound_are_not_searched_again_until_they_change(
    copy: Callable[[str], Path],
) -> None:
    directory = copy("single")
    stamp = load_checkpoint(directory).stamp
    assert load_checkpoint(directory, verify=False).stamp == stamp
    # The bytes change behind the file's back: size, time and inode stay. Only a search would see it.
    path = directory / "model.safetensors"
    known = path.stat()
    offset = next(e.begin for e in read_header(path) if e.name == "embed.weight")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 4)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    load_checkpoint(directory, verified=stamp)
    assert refused(directory).tensor == "embed.weight"
    # Any sign of a change, in any file, and the values are searched.
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        load_checkpoint(directory, verified=stamp)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    os.utime(directory / "config.json", ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        load_checkpoint(directory, verified=stamp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_search_tells_numbers_from_the_rest_by_their_bits(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    work = np.empty(8, np.uint64)
    numbers = [0.0, -0.0, 1.5, -1.5, info.max, info.min, info.tiny, -info.smallest_normal / 4]
    assert _value_fault(torch.tensor(numbers, dtype=torch.float64).to(dtype), 4, work) is None
    for bad in (float("nan"), float("inf"), float("-inf")):
        for at in range(3):
            piece = torch.zeros(3, dtype=dtype)
            piece[at] = bad
            assert _value_fault(piece, 4, work) == "NaN or infinity"
            assert _value_fault(-piece, 4, work) == "NaN or infinity"
