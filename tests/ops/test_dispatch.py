"""Selection of a backend: what was asked for, or an error that says what there is."""

import pytest

from bittrue.errors import BackendUnavailable, ConfigError
from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu import library
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.dispatch import describe, select


def test_every_backend_has_every_op() -> None:
    tables = [select("reference"), *(select("cpu", isa=isa) for isa in available_isas())]
    assert [t.name for t in tables] == ["reference", *(f"cpu:{isa}" for isa in available_isas())]
    for table in tables:
        assert all(callable(getattr(table, op)) for op in OpTable.op_names())


def test_the_best_instruction_set_is_the_default() -> None:
    assert select("cpu").name == f"cpu:{available_isas()[-1]}"


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="reference, cpu"):
        select("gpu")
    with pytest.raises(ConfigError, match="portable, avx2, avx512"):
        select("cpu", isa="sse")


def test_the_reference_takes_no_kernel_options() -> None:
    with pytest.raises(ConfigError, match="no option 'isa'"):
        select("reference", isa="avx2")
    with pytest.raises(ConfigError, match="no option 'threads'"):
        select("reference", threads=2)


def test_threads_are_set_and_described() -> None:
    before = load_kernels().threads
    table = select("cpu", threads=3)
    assert load_kernels().threads == 3
    assert "3 threads" in describe(table) and table.name in describe(table)
    load_kernels().set_threads(before)
    assert describe(select("reference")) == "reference ops in PyTorch"


def test_a_missing_library_says_how_to_build_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "libbittrue_cpu.so")
    with pytest.raises(BackendUnavailable, match="make setup"):
        select("cpu")
    (tmp_path / "libbittrue_cpu.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable, match="cannot be loaded"):
        select("cpu")
