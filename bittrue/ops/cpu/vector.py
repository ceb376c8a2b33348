"""Binds the CPU kernels of norm, rope, quantisation, hyper-connections and sampling."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.cpu.library import ACT_DTYPES, F32, I64, PTR, Kernels, check, dtype_code, pointer

Op = Callable[..., Any]

MAX_STREAMS: Final = 8  # MAX_STREAMS of hyper.cpp
ROW_KINDS: Final = {"f32": 0, "bf16": 1, "fp8": 2, "fp4": 3}  # ROW_F32 ... of rowops.h


def vector_ops(kernels: Kernels) -> dict[str, Op]:
    """The vector ops by name. Raises BackendUnavailable when the library lacks one."""
    return {
        **_norm_ops(kernels),
        **_rope_ops(kernels),
        **_quant_ops(kernels),
        **_row_ops(kernels),
        **_hyper_ops(kernels),
        **_sample_ops(kernels),
    }


def _check_act(op: str, x: Tensor) -> None:
    check(op, "x", x, None, *ACT_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one axis")


def _num_rows(x: Tensor) -> int:
    """How many vectors along the last axis x holds."""
    return x.shape[:-1].numel()


def _norm_ops(kernels: Kernels) -> dict[str, Op]:
    kernel = kernels.bind("rms_norm", PTR, I64, PTR, I64, PTR, I64, I64, F32)

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        _check_act("rms_norm", x)
        if weight is not None:
            check("rms_norm", "weight", weight, (x.shape[-1],), *ACT_DTYPES)
        weight_dtype = 0 if weight is None else dtype_code(weight.dtype)
        out = torch.empty_like(x)
        kernel(
            x.data_ptr(), dtype_code(x.dtype), pointer(weight), weight_dtype, out.data_ptr(),
            _num_rows(x), x.shape[-1], eps,
        )  # fmt: skip
        return out

    return {"rms_norm": rms_norm}


def _rope_ops(kernels: Kernels) -> dict[str, Op]:
    angles_kernel = kernels.bind("rope_angles", PTR, PTR, PTR, PTR, I64, I64)
    rope_kernel = kernels.bind("rope", PTR, I64, PTR, PTR, PTR, I64, I64, I64, I64, I64)

    def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        check("rope_angles", "positions", positions, (None,), torch.int32)
        check("rope_angles", "inv_freq", inv_freq, (None,), torch.float32)
        tokens, half = positions.shape[0], inv_freq.shape[0]
        cos, sin = torch.empty(tokens, half), torch.empty(tokens, half)
        angles_kernel(positions.data_ptr(), inv_freq.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, half)
        return cos, sin

    def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        check("rope", "x", x, (None, None, None), *ACT_DTYPES)
        tokens, heads, dim = x.shape
        check("rope", "cos", cos, (tokens, None), torch.float32)
        check("rope", "sin", sin, tuple(cos.shape), torch.float32)
        rope_dim = 2 * cos.shape[1]
        if rope_dim > dim:
            raise ValueError(f"rope: {rope_dim} features to rotate, but x has {dim}")
        out = torch.empty_like(x)
        rope_kernel(
            x.data_ptr(), dtype_code(x.dtype), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            tokens, heads, dim, rope_dim, int(inverse),
        )  # fmt: skip
        return out

    return {"rope_angles": rope_angles, "rope": rope}


def _quant_ops(kernels: Kernels) -> dict[str, Op]:
    fp8_kernel = kernels.bind("quant_fp8", PTR, I64, PTR, I64, I64, I64)
    fp4_kernel = kernels.bind("quant_fp4", PTR, I64, PTR, I64, I64, I64)
    hadamard_kernel = kernels.bind("hadamard", PTR, I64, PTR, I64, I64)

    def quantised(op: str, kernel: Op, x: Tensor, group: int) -> Tensor:
        _check_act(op, x)
        if group < 1:
            raise ValueError(f"{op}: group must be at least 1, not {group}")
        out = torch.empty_like(x)
        kernel(x.data_ptr(), dtype_code(x.dtype), out.data_ptr(), _num_rows(x), x.shape[-1], group)
        return out

    def quant_fp8(x: Tensor, group: int) -> Tensor:
        return quantised("quant_fp8", fp8_kernel, x, group)

    def quant_fp4(x: Tensor, group: int) -> Tensor:
        return quantised("quant_fp4", fp4_kernel, x, group)

    def hadamard(x: Tensor) -> Tensor:
        _check_act("hadamard", x)
        n = x.shape[-1]
        if n.bit_count() != 1:
            raise ValueError(f"hadamard: the last axis must be a power of two, not {n}")
        out = torch.empty_like(x)
        hadamard_kernel(x.data_ptr(), dtype_code(x.dtype), out.data_ptr(), _num_rows(x), n)
        return out

    return {"quant_fp8": quant_fp8, "quant_fp4": quant_fp4, "hadamard": hadamard}


def _row_ops(kernels: Kernels) -> dict[str, Op]:
    pack_kernel = kernels.bind("pack_rows", PTR, I64, PTR, I64, I64, I64, I64)
    kv_kernel = kernels.bind("kv_rows", PTR, I64, PTR, I64, PTR, PTR, I64, F32, PTR, I64, I64, I64, I64)
    unpack_kernel = kernels.bind("unpack_rows", PTR, PTR, I64, I64, I64, I64)

    def pack_rows(x: Tensor, fmt: RowFormat) -> Tensor:
        check("pack_rows", "x", x, (None, fmt.dim), *ACT_DTYPES)
        out = torch.empty(x.shape[0], fmt.bytes, dtype=torch.uint8)
        row = (ROW_KINDS[fmt.kind], fmt.dim, fmt.rope_dim)
        pack_kernel(x.data_ptr(), dtype_code(x.dtype), out.data_ptr(), x.shape[0], *row)
        return out

    def kv_rows(kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, fmt: RowFormat) -> Tensor:
        check("kv_rows", "kv", kv, (None, fmt.dim), *ACT_DTYPES)
        tokens = kv.shape[0]
        check("kv_rows", "norm", norm, (fmt.dim,), *ACT_DTYPES)
        check("kv_rows", "cos", cos, (tokens, None), torch.float32)
        check("kv_rows", "sin", sin, tuple(cos.shape), torch.float32)
        turned = 2 * cos.shape[1]
        if turned > fmt.dim:
            raise ValueError(f"kv_rows: {turned} features to rotate, but kv has {fmt.dim}")
        out = torch.empty(tokens, fmt.bytes, dtype=torch.uint8)
        kv_kernel(
            kv.data_ptr(), dtype_code(kv.dtype), norm.data_ptr(), dtype_code(norm.dtype), cos.data_ptr(),
            sin.data_ptr(), turned, eps, out.data_ptr(), tokens, ROW_KINDS[fmt.kind], fmt.dim, fmt.rope_dim,
        )  # fmt: skip
        return out

    def unpack_rows(rows: Tensor, fmt: RowFormat) -> Tensor:
        check("unpack_rows", "rows", rows, (None,) * (rows.dim() - 1) + (fmt.bytes,), torch.uint8)
        out = torch.empty(*rows.shape[:-1], fmt.dim)
        row = (ROW_KINDS[fmt.kind], fmt.dim, fmt.rope_dim)
        unpack_kernel(rows.data_ptr(), out.data_ptr(), _num_rows(rows), *row)
        return out

    return {"pack_rows": pack_rows, "kv_rows": kv_rows, "unpack_rows": unpack_rows}


def _hyper_ops(kernels: Kernels) -> dict[str, Op]:
    embed_kernel = kernels.bind("embed", PTR, PTR, I64, I64, PTR, I64, I64, I64, I64)
    pre_kernel = kernels.bind(
        "hc_pre", PTR, I64, PTR, PTR, PTR, PTR, I64, PTR, PTR, PTR, I64, I64, I64, I64, F32, F32
    )
    post_kernel = kernels.bind("hc_post", PTR, PTR, I64, PTR, PTR, PTR, I64, I64, I64)
    head_kernel = kernels.bind("hc_head", PTR, I64, PTR, PTR, PTR, PTR, I64, PTR, I64, I64, I64, F32, F32)

    def embed(token_ids: Tensor, table: Tensor, streams: int, act: torch.dtype) -> Tensor:
        check("embed", "token_ids", token_ids, (None,), torch.int64)
        check("embed", "table", table, (None, None), *ACT_DTYPES)
        tokens, (vocab, dim) = token_ids.shape[0], table.shape
        if not 1 <= streams <= MAX_STREAMS:
            raise ValueError(f"embed: 1 to {MAX_STREAMS} streams, not {streams}")
        out = torch.empty(tokens, streams, dim, dtype=act)
        embed_kernel(
            token_ids.data_ptr(), table.data_ptr(), dtype_code(table.dtype), vocab, out.data_ptr(),
            dtype_code(act), tokens, streams, dim,
        )  # fmt: skip
        return out

    def hc_pre(
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        *,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, m, dim = _check_streams("hc_pre", streams)
        _check_mixing("hc_pre", fn, base, scale, norm, ((2 + m) * m, m, dim))
        x = torch.empty(tokens, dim, dtype=streams.dtype)
        post, comb = torch.empty(tokens, m), torch.empty(tokens, m, m)
        pre_kernel(
            streams.data_ptr(), dtype_code(streams.dtype), fn.data_ptr(), base.data_ptr(), scale.data_ptr(),
            norm.data_ptr(), dtype_code(norm.dtype), x.data_ptr(), post.data_ptr(), comb.data_ptr(),
            tokens, m, dim, iters, eps, norm_eps,
        )  # fmt: skip
        return x, post, comb

    def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        tokens, m, dim = _check_streams("hc_post", streams)
        check("hc_post", "y", y, (tokens, dim), streams.dtype)
        check("hc_post", "post", post, (tokens, m), torch.float32)
        check("hc_post", "comb", comb, (tokens, m, m), torch.float32)
        out = torch.empty_like(streams)
        post_kernel(
            y.data_ptr(), streams.data_ptr(), dtype_code(streams.dtype), post.data_ptr(), comb.data_ptr(),
            out.data_ptr(), tokens, m, dim,
        )  # fmt: skip
        return out

    def hc_head(
        streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *, eps: float, norm_eps: float
    ) -> Tensor:
        tokens, m, dim = _check_streams("hc_head", streams)
        _check_mixing("hc_head", fn, base, scale, norm, (m, m, dim))
        x = torch.empty(tokens, dim, dtype=streams.dtype)
        head_kernel(
            streams.data_ptr(), dtype_code(streams.dtype), fn.data_ptr(), base.data_ptr(), scale.data_ptr(),
            norm.data_ptr(), dtype_code(norm.dtype), x.data_ptr(), tokens, m, dim, eps, norm_eps,
        )  # fmt: skip
        return x

    return {"embed": embed, "hc_pre": hc_pre, "hc_post": hc_post, "hc_head": hc_head}


def _check_streams(op: str, streams: Tensor) -> torch.Size:
    check(op, "streams", streams, (None, None, None), *ACT_DTYPES)
    if not 1 <= streams.shape[1] <= MAX_STREAMS:
        raise ValueError(f"{op}: 1 to {MAX_STREAMS} streams, not {streams.shape[1]}")
    return streams.shape


def _check_mixing(
    op: str, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, sizes: tuple[int, int, int]
) -> None:
    """``sizes``: outputs of fn, streams, features of a stream."""
    outputs, m, dim = sizes
    check(op, "fn", fn, (outputs, m * dim), torch.float32)
    check(op, "base", base, (outputs,), torch.float32)
    check(op, "scale", scale, (1 if outputs == m else 3,), torch.float32)
    check(op, "norm", norm, (dim,), *ACT_DTYPES)


def _sample_ops(kernels: Kernels) -> dict[str, Op]:
    argmax_kernel = kernels.bind("argmax", PTR, PTR, I64, I64)
    log_softmax_kernel = kernels.bind("log_softmax", PTR, PTR, I64, I64)
    gumbel_kernel = kernels.bind("gumbel", PTR, PTR, PTR, I64, I64)

    def argmax(logits: Tensor) -> Tensor:
        check("argmax", "logits", logits, (None, None), torch.float32)
        rows, vocab = logits.shape
        if vocab == 0:
            raise ValueError("argmax: logits must have at least one column")
        out = torch.empty(rows, dtype=torch.int64)
        argmax_kernel(logits.data_ptr(), out.data_ptr(), rows, vocab)
        return out

    def log_softmax(logits: Tensor) -> Tensor:
        check("log_softmax", "logits", logits, (None, None), torch.float32)
        out = torch.empty_like(logits)
        log_softmax_kernel(logits.data_ptr(), out.data_ptr(), logits.shape[0], logits.shape[1])
        return out

    def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        check("gumbel", "seeds", seeds, (None,), torch.int64)
        check("gumbel", "positions", positions, (seeds.shape[0],), torch.int64)
        out = torch.empty(seeds.shape[0], vocab_size)
        gumbel_kernel(seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), seeds.shape[0], vocab_size)
        return out

    return {"argmax": argmax, "log_softmax": log_softmax, "gumbel": gumbel}
