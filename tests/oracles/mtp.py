"""An independent simulation of the classic draft module (spec 2.8): whole sequences in plain torch, no cache.

Its layer is the oracle's own window layer, read under the name of the layer behind the main ones; what is new
is how its input is mixed and that it has a head collapse and a norm of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from oracles.published import (
    Arithmetic,
    Source,
    Trace,
    attention,
    experts,
    hyper_head,
    hyper_post,
    hyper_pre,
)
from oracles.random_checkpoint import Writer, write_attention, write_experts, write_hyper
from torch import Tensor

Choose = Callable[[Tensor], int]


def random_mtp(seed: int, config: Mapping[str, Any], *, precision: str = "f32") -> dict[str, Tensor]:
    """Tensors ``mtp.0.*`` for a config of ``random_checkpoint``."""
    writer = Writer(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1), precision)
    fields, hidden, streams = dict(config), config["hidden_size"], config["hc_mult"]
    for part in ("attn", "ffn"):
        write_hyper(writer, f"mtp.0.hc_{part}", (2 + streams) * streams, streams * hidden, 3)
        writer.norm(f"mtp.0.{part}_norm.weight", hidden)
    write_attention(writer, fields, "mtp.0.attn.", 0)
    write_experts(writer, fields, "mtp.0.ffn.", fields["num_hidden_layers"])
    for name in ("e_proj", "h_proj"):
        writer.linear(f"mtp.0.{name}", hidden, hidden)
    for name in ("enorm", "hnorm", "norm"):
        writer.norm(f"mtp.0.{name}.weight", hidden)
    write_hyper(writer, "mtp.0.hc_head", streams, streams * hidden, 1)
    return writer.tensors


def mtp_forward(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    streams: Tensor,
    next_ids: list[int],
    *,
    level: str = "maths",
    act: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(streams [T, M, D], logits [T, V]) at positions 0..T-1, from the last block's ``streams`` there and the
    tokens that follow each."""
    arith = Arithmetic(level == "published", act, compute)
    layer = config["num_hidden_layers"]
    renamed = {name.replace("mtp.0.", f"layers.{layer}."): value for name, value in tensors.items()}
    fields = {**config, "compress_ratios": [*config["compress_ratios"][:layer], 0]}
    source = Source(fields, renamed, arith)
    p, eps = f"layers.{layer}.", config["rms_norm_eps"]
    with torch.no_grad():
        embedded = arith.round(source.vector("embed.weight")[torch.tensor(next_ids)])
        e = arith.rms(embedded, source.vector(f"{p}enorm.weight"), eps)
        e = arith.round(arith.linear(e, source.matrix(f"{p}e_proj")))
        h = arith.rms(streams.to(compute), source.vector(f"{p}hnorm.weight"), eps)
        h = arith.round(arith.linear(h, source.matrix(f"{p}h_proj")))
        x = arith.round(e[:, None, :] + h)
        for part in ("attn", "ffn"):
            y, post, comb = hyper_pre(source, x, f"{p}hc_{part}")
            y = arith.rms(y, source.vector(f"{p}{part}_norm.weight"), eps)
            if part == "attn":
                y = attention(source, y, layer, Trace())
            else:
                y = experts(source, y, torch.tensor(next_ids), layer, Trace())
            x = hyper_post(arith, y, x, post, comb)
        own = {name.replace(f"{p}hc_head", "hc_head"): value for name, value in renamed.items()}
        hidden = hyper_head(Source(fields, own, arith), x)
        hidden = arith.rms(hidden, source.vector(f"{p}norm.weight"), eps)
        return x, (hidden @ source.vector("head.weight").T).to(torch.float32)


def mtp_drafts(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    streams: Tensor,
    ids: list[int],
    count: int,
    choose: Choose = lambda logits: int(logits.argmax()),
) -> list[tuple[int, Tensor]]:
    """(draft, its logits [V]) ``count`` times after the known ``ids``. All but the last of them are computed:
    ``streams`` [len(ids) - 1, M, D]. Every guess runs the whole sequence again, at the maths level in f32."""
    ids, found = list(ids), []
    for _ in range(count):
        own, logits = mtp_forward(config, tensors, streams, ids[1:])
        found.append((choose(logits[-1]), logits[-1]))
        ids.append(found[-1][0])
        streams = torch.cat((streams, own[-1:]))
    return found
