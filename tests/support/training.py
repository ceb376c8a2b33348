"""A tiny trainer for tests: every layer kind, a window of 8, and documents of random tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.model.inventory import DraftKind
from bittrue.model.presets import Precision, checkpoint_files, preset_config
from bittrue.ops.dispatch import select
from bittrue.train.document import Document
from bittrue.train.initial import initial_tensors
from bittrue.train.masters import Masters
from bittrue.train.trainer import Trainer

VOCAB = 322
LEVELS: dict[Precision, tuple[Level, ActDtype]] = {
    "f32": ("maths", "f32"),
    "bf16": ("maths", "bf16"),
    "fp8": ("published", "bf16"),
    "fp4": ("published", "bf16"),
}


def tiny_config(precision: Precision, *, draft: DraftKind = "none", **overrides: Any) -> dict[str, Any]:
    shape = {
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 128],
        "sliding_window": 8,
        "vocab_size": VOCAB,
        "index_topk": 8,
    }
    return preset_config("tiny", precision, draft=draft, **{**shape, **overrides})


def tiny_trainer(
    precision: Precision,
    *,
    draft: DraftKind = "none",
    seed: int = 0,
    backend: str = "cpu",
    micro_tokens: int = 4096,
    recompute: bool = False,
    **overrides: Any,
) -> Trainer:
    config = ModelConfig.from_dict(tiny_config(precision, draft=draft, **overrides))
    masters = Masters(config, initial_tensors(config, seed, draft=draft), draft=draft)
    level, act = LEVELS[precision]
    return Trainer(
        masters, select(backend), level=level, act=act, micro_tokens=micro_tokens, recompute=recompute
    )


def random_documents(lengths: Sequence[int], *, seed: int = 0) -> list[Document]:
    """Documents of random tokens of which the later half are targets."""
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(0, VOCAB, n).astype(np.int32), np.arange(n) >= max(1, n // 2), f"task{n % 2}")
        for n in lengths
    ]


def export(trainer: Trainer, directory: Path) -> Path:
    raw = dict(tiny_config_of(trainer))
    return trainer.export(directory, raw, checkpoint_files(VOCAB))


def tiny_config_of(trainer: Trainer) -> dict[str, Any]:
    precisions = {"f32": "f32", "bf16": "bf16", "fp8": "fp8", "fp4": "fp4"}
    precision: Any = precisions[trainer.masters.config.expert_format]
    return tiny_config(precision, draft=trainer.masters.draft)
