"""From a run file to what trains: config.json, first weights, tokenizer, documents and trainer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.errors import CheckpointError, ConfigError
from bittrue.model.convert import open_source, with_precision
from bittrue.model.inventory import DraftKind, TensorSpec, inventory
from bittrue.model.presets import PRESETS, Precision, checkpoint_files, preset_config
from bittrue.model.quantize import dequantize
from bittrue.ops.contracts import OpTable
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.checkpoint import FACTS_FILE, Checkpoints, Snapshot, read_checkpoint
from bittrue.train.config import DataSection, ModelSection, RunSection
from bittrue.train.data import DocumentSource, JsonLines, Stream
from bittrue.train.initial import initial_tensors
from bittrue.train.masters import Masters
from bittrue.train.tasks.catalogue import make_tasks
from bittrue.train.trainer import Trainer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_BEFORE_QAT: Precision = "bf16"
_NEW: Precision = "fp4"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run begins with. ``raw`` is the config.json it will publish, ``files`` go beside it;
    ``masters`` makes the first weights of a config that differs from it in formats alone."""

    raw: Mapping[str, Any]
    draft: DraftKind
    files: Mapping[str, bytes]
    masters: Callable[[ModelConfig], Masters]


def open_origin(section: ModelSection) -> Origin:
    """Random weights of a preset, a published checkpoint, or a checkpoint of a run.

    Raises ConfigError (UnsupportedModel among them) naming the field, CheckpointError naming file or tensor.
    """
    if not section.start:
        return _random(section)
    start = Path(section.start)
    if (start / FACTS_FILE).is_file():
        return _of_run(section, read_checkpoint(start))
    steps = sorted(path for path in start.glob("step-*") if (path / FACTS_FILE).is_file())
    if steps:
        fact = f"{start} is the directory of a run; give one of its checkpoints, such as {steps[-1]}"
        raise ConfigError(f"model.start: {fact}", field="model.start")
    return _published(section, start)


def origin_of(section: ModelSection, checkpoints: Checkpoints) -> Origin:
    """What a run with these checkpoints began with. One that has some does not ask again for what it once
    started from, which may be gone."""
    begun = checkpoints.newest(warn=lambda fact: None) if section.start else None
    return open_origin(section) if begun is None else _of_run(section, begun)


def make_trainer(origin: Origin, ops: OpTable, run: RunSection, *, is_quantised: bool) -> Trainer:
    """A trainer with the first weights, its forward in the published formats or, before that, in bf16."""
    config = ModelConfig.from_dict(origin.raw)
    if not is_quantised and config.default_level == "published":
        config = ModelConfig.from_dict(with_precision(origin.raw, _BEFORE_QAT))
    return Trainer(
        origin.masters(config),
        ops,
        level=config.default_level if run.level == "auto" else run.level,
        act=config.default_act if run.act == "auto" else run.act,
        micro_tokens=run.micro_tokens,
        recompute=run.recompute,
    )


def open_source_of(section: DataSection, tokenizer: Tokenizer, *, tokens_per_step: int) -> DocumentSource:
    """The documents of a run. Raises ConfigError for an unknown task, UsageError naming a line of a file."""
    if section.jsonl:
        return JsonLines(
            Path(section.jsonl),
            tokenizer,
            seed=section.seed,
            tokens_per_step=tokens_per_step,
            max_tokens=section.max_tokens,
        )
    return Stream(
        tokenizer,
        make_tasks(section.tasks, section.lengths),
        seed=section.seed,
        tokens_per_step=tokens_per_step,
        max_tokens=section.max_tokens,
    )


# ---- where weights come from -----------------------------------------------------------------------------


def _random(section: ModelSection) -> Origin:
    if section.preset not in PRESETS:
        fact = f"model.preset is {section.preset!r}; choose one of {', '.join(PRESETS)}"
        raise ConfigError(fact, field="model.preset")
    draft: DraftKind = section.draft
    raw = preset_config(section.preset, section.precision or _NEW, draft=draft, **section.config)
    config = ModelConfig.from_dict(raw)
    files = checkpoint_files(config.vocab_size)

    def masters(config: ModelConfig) -> Masters:
        return Masters(config, initial_tensors(config, section.seed, draft=draft), draft=draft)

    return Origin(raw, draft, files, masters)


def _published(section: ModelSection, start: Path) -> Origin:
    source = open_source(start)
    if source.draft == "dspark":
        fact = f"{start} has a DSpark draft, which is not trained here; start from one without, or with MTP"
        raise CheckpointError(fact, file=str(start))
    raw = _altered(section, source.raw_config)
    names = {spec.name for spec in inventory(ModelConfig.from_dict(source.raw_config), draft=source.draft)}

    def tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        for spec in inventory(config, draft=section.draft):
            if spec.dtype != "F8_E8M0" and spec.name in names:
                yield spec.name, _plain(spec, source.tensor, source.matrix)

    def masters(config: ModelConfig) -> Masters:
        # A draft head that the checkpoint has not starts at random.
        values = dict(initial_tensors(config, section.seed, draft=section.draft))
        values |= dict(tensors(config))
        return Masters(config, values.items(), draft=section.draft)

    return Origin(raw, section.draft, _tokenizer_files(start), masters)


def _of_run(section: ModelSection, saved: Snapshot) -> Origin:
    start = saved.path
    raw = _altered(section, saved.facts["config"])
    named, biases = saved.part("master"), saved.part("bias")

    def masters(config: ModelConfig) -> Masters:
        found = Masters(
            config, initial_tensors(config, section.seed, draft=section.draft), draft=section.draft
        )
        for given, own in ((named, found.named), (biases, found.biases)):
            for name, value in own.items():
                is_new_draft = name.startswith("mtp.") and name not in given
                if not is_new_draft and (name not in given or given[name].shape != value.shape):
                    fact = f"{start}: the weight {name} does not fit the config.json of this run"
                    raise CheckpointError(fact, file=str(start), tensor=name)
        found.load({**found.named, **named}, {**found.biases, **biases})
        return found

    return Origin(raw, section.draft, _tokenizer_files(start.parent), masters)


def _plain(spec: TensorSpec, tensor: Callable[[str], Tensor], matrix: Callable[[str], Any]) -> Tensor:
    if not spec.name.endswith(".weight") or spec.name.endswith("norm.weight"):
        return tensor(spec.name)
    weight = matrix(spec.name)
    return weight.data.float() if weight.scale is None else dequantize(weight).to(torch.float32)


def _altered(section: ModelSection, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the start with the section's precision, draft head and fields."""
    out = dict(raw) if section.precision is None else with_precision(raw, section.precision)
    config = ModelConfig.from_dict(out)
    has_draft = section.draft == "mtp"
    out["compress_ratios"] = [*config.compress_ratios, *([0] if has_draft else [])]
    out["num_nextn_predict_layers"] = int(has_draft)
    out |= section.config
    ModelConfig.from_dict(out)
    return dict(sorted(out.items()))


def _tokenizer_files(directory: Path) -> dict[str, bytes]:
    found = {name: directory / name for name in TOKENIZER_FILES}
    if not found["tokenizer.json"].is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json; copy it there", file=str(directory))
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}
