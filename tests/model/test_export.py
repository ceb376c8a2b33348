"""Writing checkpoints: the same bytes back, in any number of files, whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bittrue.errors import CheckpointError
from bittrue.model.export import save_checkpoint
from bittrue.model.presets import Precision, make_checkpoint
from bittrue.model.weights import load_checkpoint, weight_digest

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("max_shard_bytes", [30_000, 200_000, 1 << 30])
@pytest.mark.parametrize("precision", ["f32", "bf16", "fp8", "fp4"])
def test_export_and_import_are_bit_exact(tmp_path: Path, precision: Precision, max_shard_bytes: int) -> None:
    first = load_checkpoint(make_checkpoint("tiny", 3, precision, tmp_path / "a", draft="mtp"))
    items = dict(first.all_tensors())
    save_checkpoint(tmp_path / "b", first.raw_config, items, max_shard_bytes=max_shard_bytes)
    second = load_checkpoint(tmp_path / "b")
    assert dict(second.all_tensors()).keys() == items.keys()
    for name, tensor in second.all_tensors():
        assert (tensor.dtype, tensor.shape) == (items[name].dtype, items[name].shape)
    assert weight_digest(second) == weight_digest(first)
    assert second.raw_config == first.raw_config


def test_the_safetensors_library_reads_the_same_tensors(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 3, "fp4", tmp_path / "a")
    ours = load_checkpoint(directory)
    with safe_open(directory / "model.safetensors", "pt") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        for name, tensor in ours.tensors.items():
            found = theirs.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_shards_keep_to_their_size_and_are_indexed(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "a", max_shard_bytes=140_000)
    index = json.loads((directory / INDEX).read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    tensors = load_checkpoint(directory).tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        assert sum(t.nbytes for n, t in tensors.items() if index["weight_map"][n] == file) <= 140_000


def test_one_shard_has_the_single_name_and_no_index(tmp_path: Path) -> None:
    directory = make_checkpoint("tiny", 0, "bf16", tmp_path / "a")
    assert (directory / "model.safetensors").exists()
    assert not (directory / INDEX).exists()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(tmp_path / "a", {}, {})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["precious"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    make_checkpoint("tiny", 0, "bf16", tmp_path / "a")
    load_checkpoint(tmp_path / "a")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def items() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(1000)
        yield "b", torch.zeros(1000)
        raise CheckpointError("the source broke")

    with pytest.raises(CheckpointError, match="the source broke"):
        save_checkpoint(tmp_path / "a", {}, items(), max_shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    twice = [("a", torch.zeros(4)), ("a", torch.ones(4))]
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "a", {}, twice)
    assert caught.value.tensor == "a"
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_views_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path / "a", {}, {"columns": base.t(), "row": base[1]})
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("columns"), base.t())
        assert torch.equal(file.get_tensor("row"), base[1])
