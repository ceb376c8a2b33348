"""Updates of weights arrive whole, as they were sent, or change nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittrue.errors import PublicationRefused
from bittrue.model.publication import LiveWeights, Publisher
from bittrue.model.weight_update import Payload, WeightUpdate


def tensors(seed: int, *, like: dict[str, Tensor] | None = None, changed: float = 1.0) -> dict[str, Tensor]:
    """A matrix in bytes, one in bf16, a vector in float32; with ``like`` only some of its bytes differ."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "fp4": torch.randint(-128, 128, (64, 32), generator=generator, dtype=torch.int8),
        "bf16": torch.randn(32, 16, generator=generator).bfloat16(),
        "f32": torch.randn(7, generator=generator),
    }
    if like is None:
        return made
    mask = {name: torch.rand(t.shape, generator=generator) < changed for name, t in made.items()}
    return {name: torch.where(mask[name], made[name], like[name]) for name in made}


def applied(live: LiveWeights, update: WeightUpdate) -> None:
    staged = live.stage(update)
    assert staged is not None
    live.apply(staged)


def copy(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_full_update_gives_the_published_bytes_and_a_second_time_nothing() -> None:
    old, new = tensors(0), tensors(1)
    served = copy(old)
    addresses = {name: tensor.data_ptr() for name, tensor in served.items()}
    live, update = LiveWeights(served, "first"), Publisher().update(new)
    applied(live, update)
    assert equal(served, new) and live.version == update.version
    assert {name: tensor.data_ptr() for name, tensor in served.items()} == addresses
    assert live.stage(update) is None
    assert equal(served, new)


def test_deltas_in_a_row_give_the_same_weights_as_full_updates_with_fewer_bytes() -> None:
    first = tensors(0)
    publisher, live = Publisher(), LiveWeights(served := copy(first), "first")
    applied(live, full := publisher.update(first))
    now = first
    for seed in range(1, 4):
        now = tensors(seed, like=now, changed=0.01)
        delta = publisher.update(now, is_delta=True)
        applied(live, delta)
        assert equal(served, now)
        assert delta.version == Publisher().update(now).version == live.version
        assert delta.num_bytes < full.num_bytes / 4
    untouched = publisher.update({**now, "f32": now["f32"] + 1}, is_delta=True)
    assert set(untouched.payloads) == {"f32"}


def test_a_delta_gives_the_full_update_to_its_weights_without_a_copy() -> None:
    first, publisher = tensors(0), Publisher()
    full = publisher.update(first)
    assert full.full() is full
    second = {**first, "f32": first["f32"] + 1}
    delta = publisher.update(second, is_delta=True)
    third = publisher.update(tensors(1), is_delta=True)
    applied(live := LiveWeights(served := tensors(5), "other"), delta.full())
    assert equal(served, second) and live.version == delta.version
    assert delta.full().payloads["fp4"].data is full.payloads["fp4"].data
    applied(live, third.full())
    assert equal(served, tensors(1))
    with pytest.raises(PublicationRefused, match="came without the rest"):
        replace(delta, whole=None).full()


def corrupted(update: WeightUpdate, name: str, **facts: object) -> WeightUpdate:
    payload = replace(update.payloads[name], **facts)  # type: ignore[arg-type]
    return replace(update, payloads={**update.payloads, name: payload})


def flipped(payload: Payload) -> bytes:
    return bytes([payload.data[0] ^ 1]) + payload.data[1:]


def test_what_arrives_otherwise_is_refused_by_name_and_changes_nothing() -> None:
    old, new = tensors(0), tensors(1)
    live, update = LiveWeights(served := copy(old), "first"), Publisher().update(new)
    missing = {name: payload for name, payload in update.payloads.items() if name != "bf16"}
    faults = {
        "other bytes": corrupted(update, "fp4", data=flipped(update.payloads["fp4"])),
        "float32": corrupted(update, "bf16", dtype="torch.float32"),
        r"\[8\]": corrupted(update, "f32", shape=(8,)),
        "does not unpack": corrupted(update, "f32", is_delta=True),
        "no tensor other": replace(update, payloads={**update.payloads, "other": update.payloads["f32"]}),
        "bf16 is missing": replace(update, payloads=missing),
        "counts from version else": replace(update, base="else"),
    }
    for text, fault in faults.items():
        with pytest.raises(PublicationRefused, match=text):
            live.stage(fault)
        assert equal(served, old) and live.version == "first", text


def test_a_delta_to_other_weights_is_refused_even_where_versions_agree() -> None:
    publisher = Publisher()
    base = publisher.update(tensors(0))
    delta = publisher.update(tensors(1), is_delta=True)
    live = LiveWeights(served := tensors(2), base.version)
    with pytest.raises(PublicationRefused, match="other bytes"):
        live.stage(delta)
    assert equal(served, tensors(2))


def test_a_byte_that_changes_in_memory_is_found() -> None:
    live = LiveWeights(served := tensors(0), "first")
    applied(live, Publisher().update(tensors(1)))
    live.check()
    served["bf16"][3, 3] += 1
    with pytest.raises(PublicationRefused, match="tensor bf16"):
        live.check()
