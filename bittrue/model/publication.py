"""New weights for a checkpoint in memory: checked on both sides, applied whole or not at all, only once."""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bittrue.errors import PublicationRefused
from bittrue.model.export import tensor_bytes
from bittrue.model.weight_update import Payload, WeightUpdate


@dataclass(frozen=True, slots=True)
class Staged:
    """An update found sound: the bytes of its tensors, and the digests of all, after it."""

    version: str
    counts_from: str
    data: Mapping[str, bytearray]
    digests: dict[str, str]


class Publisher:
    """The side that trains: makes updates out of its published tensors, and remembers the last."""

    def __init__(self) -> None:
        self._version: str | None = None
        self._whole: dict[str, Payload] = {}

    def update(self, tensors: Mapping[str, Tensor], *, is_delta: bool = False) -> WeightUpdate:
        """The update to ``tensors``, whose bytes are copied once; a delta counts from the last one made
        here."""
        base = self._version if is_delta else None
        payloads: dict[str, Payload] = {}
        whole = dict(self._whole)
        for name, tensor in tensors.items():
            data = tensor_bytes(tensor).numpy().tobytes()
            before = whole.get(name)
            if base is not None and before is not None and data == before.data:
                continue
            facts = (_digest(data), str(tensor.dtype), tuple(tensor.shape))
            whole[name] = payloads[name] = Payload(data, *facts, is_delta=False)
            if base is not None and before is not None:
                difference = zlib.compress(_xor(data, before.data), 1)
                payloads[name] = Payload(difference, *facts, is_delta=True)
        self._whole = whole
        self._version = version_of({name: payload.digest for name, payload in whole.items()})
        return WeightUpdate(self._version, base, payloads, None if base is None else whole)


class LiveWeights:
    """The side that serves: the tensors of a checkpoint in memory, at addresses that stay, and their version.

    What is derived from the weights elsewhere (cached rows) is the owner's to let go.
    """

    def __init__(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """``version``: what they are called until the first update."""
        self._tensors = tensors
        self._digests: dict[str, str] | None = None
        self.version = version

    def stage(self, update: WeightUpdate) -> Staged | None:
        """``update``, every payload unpacked and checked; None where the weights are these already. Raises
        PublicationRefused. Nothing is changed."""
        return None if update.version == self.version else self._stage(update)

    def apply(self, staged: Staged) -> None:
        """Makes what was staged the weights, and checks the bytes in memory afterwards."""
        assert staged.counts_from == self.version, "the weights changed since it was staged"
        for name, data in staged.data.items():
            tensor_bytes(self._tensors[name]).copy_(torch.frombuffer(data, dtype=torch.uint8))
        self._digests, self.version = staged.digests, staged.version
        self.check()

    def _stage(self, update: WeightUpdate) -> Staged:
        if update.base not in (None, self.version):
            fact = f"the update counts from version {update.base}, the weights are {self.version}"
            raise PublicationRefused(f"{fact}; send a full update")
        staged = {name: self._staged(name, payload) for name, payload in update.payloads.items()}
        digests = {**self.digests(), **{name: payload.digest for name, payload in update.payloads.items()}}
        found = version_of(digests)
        if found != update.version:
            missing = sorted(self._tensors.keys() - update.payloads.keys())
            fact = f"with these {len(staged)} tensors the weights are {found}, not {update.version}"
            if update.base is None and missing:
                fact += f"; tensor {missing[0]} is missing"
            raise PublicationRefused(f"{fact}; send a full update of every tensor")
        return Staged(found, self.version, staged, digests)

    def digests(self) -> dict[str, str]:
        """Of every tensor's bytes, by name."""
        if self._digests is None:
            self._digests = {name: _digest(_held(tensor)) for name, tensor in self._tensors.items()}
        return self._digests

    def check(self) -> None:
        """Reads every byte again. Raises PublicationRefused naming a tensor that is not as published."""
        for name, digest in self.digests().items():
            if _digest(_held(self._tensors[name])) != digest:
                fact = f"tensor {name} is not in memory what was published"
                raise PublicationRefused(f"{fact}; restart the engine", tensor=name)

    def _staged(self, name: str, payload: Payload) -> bytearray:
        """The bytes of the tensor after the update."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise PublicationRefused(
                f"the model has no tensor {name}; publish the model it serves", tensor=name
            )
        shape = tuple(tensor.shape)
        if (payload.dtype, payload.shape) != (str(tensor.dtype), shape):
            sent, held = f"{payload.dtype} {list(payload.shape)}", f"{tensor.dtype} {list(shape)}"
            fact = f"tensor {name} is {sent}, the model has {held}"
            raise PublicationRefused(f"{fact}; publish the same formats", tensor=name)
        try:
            data = _xor(zlib.decompress(payload.data), _held(tensor)) if payload.is_delta else payload.data
        except (zlib.error, ValueError) as error:
            fact = f"tensor {name} does not unpack ({error})"
            raise PublicationRefused(f"{fact}; send it again", tensor=name) from error
        if len(data) != tensor.nbytes or _digest(data) != payload.digest:
            raise PublicationRefused(f"tensor {name} arrived with other bytes; send it again", tensor=name)
        return bytearray(data)


def version_of(digests: Mapping[str, str]) -> str:
    """The version of weights with these tensors: 32 hex digits."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\0".encode())
    return whole.hexdigest()


def _held(tensor: Tensor) -> bytes:
    return tensor_bytes(tensor).numpy().tobytes()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _xor(a: bytes, b: bytes) -> bytes:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} bytes against {len(b)}")
    return np.bitwise_xor(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)).tobytes()
