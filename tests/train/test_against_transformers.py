"""Gradients of the whole model against those of Hugging Face transformers in float32."""

import numpy as np
import torch
from oracles.hf import build_hf, deterministic_topk, hf_state
from support.training import LEVELS, VOCAB

from bittrue.config.model import ModelConfig
from bittrue.model.presets import preset_config, random_tensors
from bittrue.ops.dispatch import select
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.masters import Masters
from bittrue.train.trainer import Trainer

LENGTH = 300  # two closed HCA windows, and more entries than the index may choose
RELATIVE = 1e-4


def official_gradients(masters: Masters) -> dict[str, torch.Tensor]:
    """By official name, the routed experts one by one."""
    found: dict[str, torch.Tensor] = {}
    for name, leaf in masters.named.items():
        assert leaf.grad is not None
        if leaf.dim() == 3:
            prefix, part = name.rsplit(".", 1)
            found |= {f"{prefix}.{e}.{part}.weight": grad for e, grad in enumerate(leaf.grad)}
        else:
            found[name] = leaf.grad
    return found


def test_gradients_are_those_of_transformers_where_it_has_them() -> None:
    raw = preset_config("tiny", "f32", vocab_size=VOCAB, index_topk=8)
    config = ModelConfig.from_dict(raw)
    tensors = dict(random_tensors(config, 3))
    masters = Masters(config, tensors.items())
    level, act = LEVELS["f32"]
    trainer = Trainer(masters, select("cpu"), level=level, act=act)
    ids = np.random.default_rng(0).integers(0, VOCAB, LENGTH).astype(np.int32)
    weights = LossWeights(mtp=0.0, index=0.0, balance=0.0)
    stats = trainer.backward([Document(ids, np.arange(LENGTH) > 0)], weights)

    oracle = build_hf(raw, tensors).requires_grad_(True)
    with deterministic_topk(oracle):
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = oracle(tokens[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
        loss.backward()

    untrained = {name: tensor for name, tensor in tensors.items() if name not in official_gradients(masters)}
    ours = hf_state(raw, official_gradients(masters) | untrained)
    errors = {
        name: float((ours[name] - p.grad).norm() / p.grad.norm())
        for name, p in oracle.named_parameters()
        if p.grad is not None
    }
    without = [name for name, p in oracle.named_parameters() if p.grad is None]
    assert abs(stats.main - float(loss.detach())) < 1e-5
    assert all(".indexer." in name for name in without) and len(errors) > 100
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < RELATIVE, f"{worst}: {errors[worst]:.1e}"
