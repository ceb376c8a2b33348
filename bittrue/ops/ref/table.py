"""The reference OpTable: the definition of every op in plain PyTorch."""

from bittrue.ops.contracts import OpTable
from bittrue.ops.ref import (
    attention,
    compress,
    experts,
    hyper,
    index,
    linear,
    norm,
    quant,
    rope,
    router,
    sample,
    window,
)


def reference_table() -> OpTable:
    """Every op as its reference."""
    return OpTable(
        name="reference",
        embed=hyper.embed,
        rms_norm=norm.rms_norm,
        rope_angles=rope.rope_angles,
        rope=rope.rope,
        quant_fp8=quant.quant_fp8,
        quant_fp4=quant.quant_fp4,
        hadamard=quant.hadamard,
        pack_rows=quant.pack_rows,
        kv_rows=quant.kv_rows,
        unpack_rows=quant.unpack_rows,
        linear=linear.linear,
        linears=linear.linears,
        grouped_linear=linear.grouped_linear,
        experts=experts.experts,
        route_topk=router.route_topk,
        route_hash=router.route_hash,
        hc_pre=hyper.hc_pre,
        hc_post=hyper.hc_post,
        hc_head=hyper.hc_head,
        store_window=window.store_window,
        csa_compress=compress.csa_compress,
        hca_compress=compress.hca_compress,
        index_topk=index.index_topk,
        attention=attention.attention,
        argmax=sample.argmax,
        log_softmax=sample.log_softmax,
        gumbel=sample.gumbel,
    )
