"""The vector layer: every instruction set gives the same bits, functions stay within 2 ulp."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bittrue.errors import BackendUnavailable, ConfigError
from bittrue.ops.cpu.library import (
    F32,
    I64,
    ISAS,
    LIBRARY_PATH,
    PTR,
    Kernels,
    available_isas,
    check,
    load_kernels,
)

ROOT = Path(__file__).parents[2]

FUNCTIONS = {
    "exp": 0, "log": 1, "log1p": 2, "softplus": 3, "sigmoid": 4, "fma": 5, "max": 6, "min": 7, "select": 8,
    "hsum": 9, "hmax": 10, "fp8_round": 11, "fp4_round": 12, "lanes": 13, "blend": 14, "copysign": 15,
    "div": 16,
}  # fmt: skip


def vector(kernels: Kernels, name: str, a, b=None, c=None, dtype: int = 0) -> np.ndarray:
    a = np.ascontiguousarray(a, np.float32)
    b = a if b is None else np.ascontiguousarray(b, np.float32)
    c = a if c is None else np.ascontiguousarray(c, np.float32)
    out = np.empty(a.size, np.float32 if dtype == 0 else np.uint16)
    run = kernels.bind("probe_vector", I64, PTR, PTR, PTR, PTR, I64, I64)
    run(FUNCTIONS[name], a.ctypes.data, b.ctypes.data, c.ctypes.data, out.ctypes.data, dtype, a.size)
    return out


def samples(n: int = 4099) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n) for _ in range(3))
    special = [0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, 1, -1, 448, 6, 2**-6]
    a[:14], b[7:21], c[30:44] = special, special, special
    return a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    both_nan = np.isnan(x) & np.isnan(y) if x.dtype == np.float32 else np.zeros(x.shape, bool)
    unsigned = np.uint32 if x.dtype == np.float32 else np.uint16
    return bool(np.all((x.view(unsigned) == y.view(unsigned)) | both_nan))


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest distance in units of the last place of the float32 nearest to the exact value."""
    spacing = np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / spacing))


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("dtype", [0, 1])
def test_all_instruction_sets_give_the_same_bits(name: str, dtype: int) -> None:
    a, b, c = samples()
    if name in ("hsum", "hmax", "log1p", "fp8_round"):
        a = np.clip(np.nan_to_num(a), -448, 448)
    if name == "log1p":
        a = np.abs(a)
    want = vector(load_kernels("portable"), name, a, b, c, dtype)
    for isa in available_isas()[1:]:
        assert same_bits(vector(load_kernels(isa), name, a, b, c, dtype), want), isa


@pytest.mark.parametrize("isa", available_isas())
def test_masked_tail_equals_the_full_vector(isa: str) -> None:
    kernels = load_kernels(isa)
    a, b, c = samples(64)
    for name in ("exp", "fma", "fp8_round"):
        full = vector(kernels, name, a, b, c)
        for n in range(1, 33):
            assert same_bits(vector(kernels, name, a[:n], b[:n], c[:n]), full[:n])


def test_exp_is_within_two_ulp_and_reaches_subnormals_and_infinity() -> None:
    kernels = load_kernels()
    x = np.concatenate([np.linspace(-104.5, 88.7, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    assert ulps(vector(kernels, "exp", x), np.exp(x.astype(np.float64))) <= 2
    edges = np.array([0, -0.0, -np.inf, np.inf, 89, 200, -104, -1e30, np.nan], np.float32)
    assert np.array_equal(
        vector(kernels, "exp", edges),
        np.array([1, 1, 0, np.inf, np.inf, np.inf, 0, 0, np.nan]),
        equal_nan=True,
    )


def test_log_is_within_two_ulp_over_all_magnitudes() -> None:
    kernels = load_kernels()
    rng = np.random.default_rng(2)
    bits = rng.integers(1, 0x7F800000, 400_000).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(0.5, 2, 100_001).astype(np.float32)])
    assert ulps(vector(kernels, "log", x), np.log(x.astype(np.float64))) <= 2
    edges = np.array([0, -1, np.inf, np.nan, 1], np.float32)
    assert np.array_equal(
        vector(kernels, "log", edges), np.array([-np.inf, np.nan, np.inf, np.nan, 0]), equal_nan=True
    )


def test_softplus_is_accurate_for_small_and_large_inputs() -> None:
    kernels = load_kernels()
    x = np.linspace(-87, 87, 300_001).astype(np.float32)
    assert ulps(vector(kernels, "softplus", x), np.logaddexp(x.astype(np.float64), 0)) <= 4
    far = np.array([1e4, -1e4, 3e38, -3e38], np.float32)
    assert vector(kernels, "softplus", far).tolist() == [1e4, 0, np.float32(3e38), 0]
    y = np.concatenate([np.geomspace(1e-38, 1e30, 200_001), [0]]).astype(np.float32)
    assert ulps(vector(kernels, "log1p", y), np.log1p(y.astype(np.float64))) <= 2


def test_bf16_store_rounds_to_nearest_even() -> None:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    want = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    for isa in available_isas():
        assert np.array_equal(vector(load_kernels(isa), "max", x, x, dtype=1), want)
        nan = vector(load_kernels(isa), "fma", np.array([np.nan, 1], np.float32), dtype=1)
        assert nan[0] == 0x7FC0


def test_horizontal_sum_is_the_documented_tree() -> None:
    a, _, _ = samples(16 * 50)
    a = np.clip(np.nan_to_num(a), -1e6, 1e6)
    tree = a.reshape(-1, 16).copy()
    for s in (8, 4, 2, 1):
        tree = tree[:, :s] + tree[:, s : 2 * s]
    assert same_bits(vector(load_kernels(), "hsum", a)[::16].copy(), tree[:, 0].copy())


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on this machine")
    return path


def shared_functions(file: Path) -> set[str]:
    """The functions of which the linker keeps one copy for all files: the weak ones."""
    listing = subprocess.run(
        [tool("nm"), "--defined-only", file], capture_output=True, text=True, check=True
    ).stdout
    fields = [line.split() for line in listing.splitlines()]
    return {f[-1] for f in fields if len(f) >= 3 and f[-2] == "W"}


def test_no_instruction_set_brings_code_that_another_would_run() -> None:
    """Of a template of the standard library the linker keeps one copy, which the AVX-512 build may have made.

    Files compiled once, for the least processor, may use such templates; others may not.
    """
    objects = [p for p in ROOT.glob("build/*/CMakeFiles/kernels_*.dir/**/*.o") if p.stat().st_size]
    if not objects:
        pytest.skip("the kernels were built elsewhere: no object files in build/")
    assert {p.name: names for p in objects if (names := shared_functions(p))} == {}


def test_code_that_every_processor_runs_has_no_wide_instruction() -> None:
    """The same, seen in the library as it was linked."""
    shared = shared_functions(LIBRARY_PATH)
    assert shared, "team.cpp uses the standard library: this test reads the wrong file"
    listing = subprocess.run(
        [tool("objdump"), "-d", "--no-show-raw-insn", LIBRARY_PATH],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    inside, checked, wide = "", set(), []
    for line in listing.splitlines():
        if line.endswith(">:"):
            inside = line[line.index("<") + 1 : -2]
        elif inside in shared and "\t" in line:
            checked.add(inside)
            if line.split("\t")[1].startswith("v"):
                wide.append((inside, line))
    assert checked
    assert wide == []


def test_explicit_instruction_set_is_used_and_unknown_ones_are_refused() -> None:
    assert load_kernels("portable").isa == "portable"
    assert load_kernels().isa == available_isas()[-1]
    with pytest.raises(ConfigError, match="avx3"):
        load_kernels("avx3")
    for isa in set(ISAS) - set(available_isas()):
        with pytest.raises(BackendUnavailable, match=isa):
            load_kernels(isa)


def test_missing_kernel_says_that_the_library_is_old() -> None:
    with pytest.raises(BackendUnavailable, match="make setup"):
        load_kernels().bind("no_such_kernel", F32)


def test_thread_count_is_kept_for_every_calling_thread() -> None:
    kernels = load_kernels()
    before = kernels.threads
    kernels.set_threads(3)
    assert kernels.threads == 3
    kernels.set_threads(before)
    with pytest.raises(ConfigError):
        kernels.set_threads(0)


def test_checks_name_the_op_and_the_argument() -> None:
    x = torch.zeros(4, 6)
    check("linear", "x", x, (None, 6), torch.float32)
    with pytest.raises(ValueError, match=r"linear: x must have shape \[\*, 5\], not \[4, 6\]"):
        check("linear", "x", x, (None, 5))
    with pytest.raises(ValueError, match="linear: x must be bfloat16, not float32"):
        check("linear", "x", x, None, torch.bfloat16)
    with pytest.raises(ValueError, match="contiguous"):
        check("linear", "x", x.t(), None)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("fast", [0, 1])
def test_dot_products_are_those_of_their_definition(isa: str, fast: int) -> None:
    """Bytes exactly; pairs of bf16 as two fused multiply-adds, the second of the pair first."""
    rng, n = np.random.default_rng(4), 4096
    kernel = load_kernels(isa).bind("probe_dots", I64, I64, PTR, PTR, PTR, PTR, I64)

    def run(kind: int, sums: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = np.empty(n, np.int32)
        kernel(kind, fast, sums.ctypes.data, a.ctypes.data, b.ctypes.data, out.ctypes.data, n)
        return out

    sums = rng.integers(-(2**20), 2**20, n, dtype=np.int32)
    a = rng.integers(0, 97, (n, 4), dtype=np.uint8)
    b = rng.integers(-48, 49, (n, 4), dtype=np.int8)
    wanted = sums + (a.astype(np.int32) * b.astype(np.int32)).sum(1, dtype=np.int32)
    assert np.array_equal(run(0, sums, a.view(np.int32), b.view(np.int32)), wanted)

    def floats(bits: int, *shape: int) -> np.ndarray:
        values = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)
        return (values.astype(np.float32).view(np.uint32) >> bits << bits).view(np.float32)

    x, y, start = floats(16, n, 2), floats(16, n, 2), floats(0, n)
    pairs = [(v.view(np.uint32)[:, 0] >> 16) | v.view(np.uint32)[:, 1] for v in (x, y)]
    # A product of bf16 is exact in float64. Sums that are not would be rounded twice: left out.
    wanted, exact = start.astype(np.float64), np.ones(n, bool)
    for i in (1, 0):
        product = x[:, i].astype(np.float64) * y[:, i]
        total = wanted + product
        exact &= (total - wanted == product) & (total - product == wanted)
        wanted = total.astype(np.float32).astype(np.float64)
    got = run(1, start.view(np.int32), *(p.astype(np.uint32).view(np.int32) for p in pairs)).view(np.float32)
    assert exact.mean() > 0.5
    assert np.array_equal(got[exact], wanted[exact].astype(np.float32))
