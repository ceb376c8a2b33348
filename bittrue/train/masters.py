"""Masters: the float32 parameters that are trained, and beside them the checkpoint tensors the ops read.

The ops never see a master. They read what a published checkpoint would hold, rounded or quantised from the
masters by ``publish`` in the formats the config names (spec 2.10, 5.6), so a forward pass of the trainer is a
forward pass of the exported model. Gradients belong to the stored values and are passed straight through to
the masters.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.errors import CheckpointError
from bittrue.model.build import TensorSource, build_mtp, build_parameters
from bittrue.model.deepseek_v4 import Block
from bittrue.model.inventory import DraftKind, TensorSpec, inventory
from bittrue.model.quantize import dequantize, quantize_fp4, quantize_fp8
from bittrue.ops.contracts import ExpertBank, Weight
from bittrue.ops.gradients import BankValues

_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_FORMATS = {"F32": "f32", "BF16": "bf16", "F8_E4M3": "fp8", "I8": "fp4"}
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp4": torch.int8}


# Runs a function on every name: `map`, or the crew's.
Spread = Callable[[Callable[[str], None], Sequence[str]], Iterable[None]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A trained matrix [O, K], or a stack of them [E, O, K]: ``values`` are those of what is stored."""

    master: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Bank:
    """The trained experts of one layer; the order of ``masters`` is w1, w3, w2, then the shared expert's."""

    masters: tuple[Tensor, ...]
    values: BankValues


class Masters:
    """Every trained tensor of a model and its draft module by official name.

    ``named`` [name -> f32 leaf]; the routed experts of a layer are stacked, ``layers.0.ffn.experts.w1``
    [E, I, D]. ``biases``: the routers' selection biases, f32, which no gradient changes. ``tables``: routing
    tables, fixed. ``parameters`` and ``mtp`` are what the model reads.
    """

    def __init__(
        self, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], *, draft: DraftKind = "none"
    ) -> None:
        """``tensors``: every tensor of the inventory by official name, matrices as plain values (no scales).

        Raises CheckpointError where one is missing, foreign or of another shape."""
        self.config, self.draft = config, draft
        self.named: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.tables: dict[str, Tensor] = {}
        self._specs = [spec for spec in inventory(config, draft=draft) if spec.dtype != "F8_E8M0"]
        self._formats: dict[str, str] = {}
        self._stored: dict[str, tuple[Tensor, Tensor | None]] = {}  # by the name of the leaf
        self._values: dict[str, Tensor] = {}  # matrices only
        self._adopt(dict(tensors))
        source = self._source()
        self.parameters = build_parameters(config, source)
        self.mtp = build_mtp(config, source) if draft == "mtp" else None
        self._by_tensor = {id(stored): name for name, (stored, _) in self._stored.items()}
        self._banks: dict[int, Bank] = {}
        for prefix, block in self._blocks():
            self._banks[id(block.ffn.experts)] = self._bank(f"{prefix}.ffn", block.ffn.experts)

    # ---- what the differentiable ops ask -----------------------------------------------------------------

    def leaf(self, stored: Tensor) -> Tensor:
        """The master of a tensor the ops read as it is: a norm, a sink, the embedding."""
        return self.named[self._by_tensor[id(stored)]]

    def matrix(self, weight: Weight) -> Matrix:
        """The master and the values of a matrix outside the routed experts."""
        name = self._by_tensor[id(weight.data)]
        return Matrix(self.named[name], self._values[name])

    def bank(self, bank: ExpertBank) -> Bank:
        return self._banks[id(bank)]

    # ---- what the trainer asks ---------------------------------------------------------------------------

    def publish(self, spread: Spread = map) -> None:
        """Rewrites what the ops read, in place, from the masters: called after the masters changed.
        ``spread`` runs the work on all of them, perhaps side by side."""
        list(spread(self._publish, [name for name in self._stored if self._formats[name] != "f32"]))

    def _publish(self, name: str) -> None:
        data, scale = self._stored[name]
        new_data, new_scale = _stored(self.named[name].detach(), self._formats[name])
        data.copy_(new_data)
        if scale is not None:
            assert new_scale is not None
            scale.view(torch.uint8).copy_(new_scale.view(torch.uint8))
        if name in self._values:
            self._values[name].copy_(_values(data, scale, self._formats[name]))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint these masters stand for, by official name, as it is published."""
        for spec in self._specs:
            if spec.name in self.biases or spec.name in self.tables:
                yield spec.name, (self.biases | self.tables)[spec.name]
                continue
            data, scale = self._part(spec.name)
            yield spec.name, data
            if scale is not None:
                yield spec.name.removesuffix("weight") + "scale", scale

    def load(self, named: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None:
        """Takes over the values of ``named`` and ``biases``, which have the names and shapes of this
        object's; then publishes."""
        with torch.no_grad():
            for name, leaf in self.named.items():
                leaf.copy_(named[name])
            for name, bias in self.biases.items():
                bias.copy_(biases[name])
        self.publish()

    # ---- inside ------------------------------------------------------------------------------------------

    def _adopt(self, given: dict[str, Tensor]) -> None:
        stacks: dict[str, list[Tensor]] = {}
        for spec in self._specs:
            value = given.pop(spec.name, None)
            if value is None or value.shape != _plain_shape(spec):
                fact = "is missing" if value is None else f"has shape {list(value.shape)}"
                raise CheckpointError(f"tensor {spec.name} {fact}", tensor=spec.name)
            if spec.dtype == "I64":
                self.tables[spec.name] = value.clone()
            elif spec.name.endswith("gate.bias"):
                self.biases[spec.name] = value.float().clone()
            elif match := _EXPERT.fullmatch(spec.name):
                stacked = f"{match[1]}.{match[3]}"
                stacks.setdefault(stacked, []).append(value.float())
                self._formats[stacked] = _FORMATS[spec.dtype]
                self.named.setdefault(stacked, value)  # holds its place in the order
            else:
                self.named[spec.name] = value.float().clone()
                self._formats[spec.name] = _FORMATS[spec.dtype]
        if given:
            name = sorted(given)[0]
            raise CheckpointError(f"tensor {name} does not belong to this config", tensor=name)
        self.named |= {name: torch.stack(values) for name, values in stacks.items()}
        for name, master in self.named.items():
            self._store_first(name, master)
            master.requires_grad_()

    def _store_first(self, name: str, master: Tensor) -> None:
        fmt = self._formats[name]
        data, scale = (master.detach(), None) if fmt == "f32" else _stored(master, fmt)
        self._stored[name] = (data, scale)
        if name.endswith(".weight") or master.dim() == 3:
            self._values[name] = data if fmt == "f32" else _values(data, scale, fmt)

    def _source(self) -> TensorSource:
        def tensor(name: str) -> Tensor:
            if name in self.biases:
                return self.biases[name]
            return self.tables[name] if name in self.tables else self._stored[name][0]

        def weight(name: str) -> Weight:
            data, scale = self._part(name)
            return Weight(data, scale, self._format(name))  # type: ignore[arg-type]

        return TensorSource(tensor=tensor, weight=weight)

    def _part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What is stored for an official name: a view into the stack for an expert."""
        match = _EXPERT.fullmatch(name)
        if match is None:
            return self._stored[name]
        data, scale = self._stored[f"{match[1]}.{match[3]}"]
        return data[int(match[2])], None if scale is None else scale[int(match[2])]

    def _format(self, name: str) -> str:
        match = _EXPERT.fullmatch(name)
        return self._formats[name if match is None else f"{match[1]}.{match[3]}"]

    def _blocks(self) -> Iterator[tuple[str, Block]]:
        for i, block in enumerate(self.parameters.blocks):
            yield f"layers.{i}", block
        if self.mtp is not None:
            yield "mtp.0", self.mtp.block

    def _bank(self, prefix: str, bank: ExpertBank) -> Bank:
        routed = [f"{prefix}.experts.{part}" for part in ("w1", "w3", "w2")]
        shared = [f"{prefix}.shared_experts.{part}.weight" for part in ("w1", "w3", "w2")]
        assert bank.shared is not None, "every V4 layer has a shared expert"
        w1, w3, w2 = (self._values[name] for name in routed)
        s1, s3, s2 = (self._values[name] for name in shared)
        return Bank(
            masters=tuple(self.named[name] for name in (*routed, *shared)),
            values=BankValues(w1, w3, w2, (s1, s3, s2)),
        )


def _plain_shape(spec: TensorSpec) -> tuple[int, ...]:
    return (*spec.shape[:-1], spec.shape[-1] * 2) if spec.dtype == "I8" else spec.shape


def _stored(master: Tensor, fmt: str) -> tuple[Tensor, Tensor | None]:
    """[.., O, K] f32 -> data and scale as published, by the rule of 2.9."""
    values = master.detach()
    if fmt in ("f32", "bf16"):
        return values.to(_DTYPES[fmt]), None
    if values.dim() == 3 and fmt == "fp8":  # its blocks must not reach over two experts
        parts = [quantize_fp8(part) for part in values]
        scales = torch.stack([part.scale.view(torch.uint8) for part in parts if part.scale is not None])
        data = torch.stack([part.data.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return data, scales.view(torch.float8_e8m0fnu)
    weight = (quantize_fp4 if fmt == "fp4" else quantize_fp8)(values.flatten(0, -2))
    assert weight.scale is not None
    lead = values.shape[:-1]
    if values.dim() == 3:
        return weight.data.view(*lead, -1), weight.scale.view(*lead, -1)
    return weight.data, weight.scale


def _values(data: Tensor, scale: Tensor | None, fmt: str) -> Tensor:
    """The values of what is stored, f32."""
    if data.dim() == 3 and fmt == "fp8":
        assert scale is not None
        return torch.stack([_values(d, s, fmt) for d, s in zip(data, scale, strict=True)])
    if data.dim() == 3 and fmt == "fp4":
        assert scale is not None
        return _values(data.flatten(0, 1), scale.flatten(0, 1), fmt).view(*data.shape[:-1], -1)
    return dequantize(Weight(data, scale, fmt))  # type: ignore[arg-type]
