"""What a sequence keeps in the KV memory, taken out of an engine, put back, or made of random rows.

It lets a benchmark decode at any context at once, again and again, without a prefill each time. A placed
sequence is an ordinary one: the scheduler admits it and owns its slot and pages; only the computation of its
prompt is left out, and its rows are copied in instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.engine.engine import Engine
from bittrue.engine.scheduler import Scheduler
from bittrue.engine.types import Request, SamplingParams
from bittrue.kv.layout import CachePart, LayerLayout, pages_for
from bittrue.ops.case import generator
from bittrue.ops.contracts import OpTable

_FILL_ROWS = 8192  # random rows made at a time: bounds the memory of a fill


@dataclass(frozen=True, slots=True)
class SequenceImage:
    """The cache of ``len(token_ids) - 1`` computed tokens; the last token is the next step's.

    ``parts`` holds one tensor per part of every layer, in the order of the layout: [pages, ...] or, for
    state, the content of the slot. ``is_filled``: random rows, which no prefill computed.
    """

    token_ids: tuple[int, ...]
    parts: tuple[Tensor, ...]
    is_filled: bool

    @property
    def num_computed(self) -> int:
        return len(self.token_ids) - 1

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def capture(engine: Engine, seq_id: str) -> SequenceImage:
    """A copy of what a decoding sequence holds. The sequence goes on."""
    sequence = _scheduler(engine).sequence(seq_id)
    assert sequence.num_remaining == 1, "only a sequence that decodes is worth an image"
    places = _places(engine, seq_id, pages_for(sequence.num_computed))
    return SequenceImage(tuple(sequence.tokens), tuple(t[index].clone() for t, index in places), False)


def random_image(engine: Engine, token_ids: Sequence[int], *, seed: int) -> SequenceImage:
    """An image of ``len(token_ids) - 1`` tokens whose rows are random: bell-shaped features of variance 1, as
    a normalised row has them, packed by the engine's own ``pack_rows``."""
    source = generator(seed)
    ops, act = engine.parts.runner.model.ops, engine.parts.runner.model.act
    num_pages = pages_for(len(token_ids) - 1)
    made = [
        _random_part(layer, part, num_pages, ops, act, source)
        for layer in engine.parts.layout.layers
        for part in layer.parts
    ]
    return SequenceImage(tuple(token_ids), tuple(made), True)


def place(engine: Engine, images: Sequence[SequenceImage], *, max_tokens: int) -> list[str]:
    """Makes every image a sequence of an idle engine: ids of sequences that decode from the next step on.

    They are greedy, ignore the end token and may generate ``max_tokens`` tokens.
    """
    assert not engine.has_work(), "images are placed into an idle engine"
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    requests = [
        Request(request_id=f"image-{i}", prompt=image.token_ids, params=params)
        for i, image in enumerate(images)
    ]
    for request in requests:
        engine.add(request)
    _admit_all(_scheduler(engine))
    for request, image in zip(requests, images, strict=True):
        _settle(engine, request.request_id, image)
    return [request.request_id for request in requests]


def _settle(engine: Engine, seq_id: str, image: SequenceImage) -> None:
    """Gives an admitted sequence the pages and the content of its image."""
    scheduler = _scheduler(engine)
    sequence = scheduler.sequence(seq_id)
    assert sequence.status == "running", "the engine has too few slots for its images"
    assert scheduler.kv.extend(seq_id, image.num_computed), "the engine has too few pages for its images"
    sequence.num_computed = image.num_computed
    sequence.fold = max(0, image.num_computed - scheduler.limits.max_draft)
    places = _places(engine, seq_id, pages_for(image.num_computed))
    for (tensor, index), content in zip(places, image.parts, strict=True):
        tensor[index] = content


def _admit_all(scheduler: Scheduler) -> None:
    """Admits every waiting sequence by a step of one token that is planned and committed, not computed.

    One token ends no prompt of two or more, so nothing has to be sampled.
    """
    limits = scheduler.limits
    scheduler.limits = replace(limits, max_step_tokens=1)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, ())
    scheduler.limits = limits


def _places(engine: Engine, seq_id: str, num_pages: int) -> Iterator[tuple[Tensor, Tensor | int]]:
    """(tensor of a part, index of this sequence's content in it) in the order of the layout."""
    kv = _scheduler(engine).kv
    pages, slot = torch.tensor(kv.page_ids(seq_id)[:num_pages]), kv.slot(seq_id)
    for layer, cache in zip(engine.parts.layout.layers, engine.parts.runner.caches, strict=True):
        for part in layer.parts:
            tensor: Tensor = getattr(cache, part.name)
            yield tensor, pages if part.per == "page" else slot


def _scheduler(engine: Engine) -> Scheduler:
    # The engine does not publish it: nothing but a benchmark has a reason to skip a computation.
    return engine._scheduler


def _random_part(
    layer: LayerLayout,
    part: CachePart,
    num_pages: int,
    ops: OpTable,
    act: torch.dtype,
    source: torch.Generator,
) -> Tensor:
    if part.dtype == "u8":
        form = layer.key_format if part.name == "keys" else layer.row_format
        assert form is not None and part.shape[-1] == form.bytes
        count = part.shape[0] * (num_pages if part.per == "page" else 1)
        rows = _random_rows(count, form, ops, act, source)
        return rows.view(num_pages, *part.shape) if part.per == "page" else rows.view(part.shape)
    values = torch.randn(part.shape, generator=source)
    if part.name == "hca_fold":
        values[1] = values[1].abs() + 1  # the sum of exp(gate - maximum): 1 at least
    return values


def _random_rows(
    count: int, form: RowFormat, ops: OpTable, act: torch.dtype, source: torch.Generator
) -> Tensor:
    """[count, form.bytes] u8."""
    blocks = [
        ops.pack_rows(torch.randn(min(_FILL_ROWS, count - i), form.dim, generator=source).to(act), form)
        for i in range(0, count, _FILL_ROWS)
    ]
    return torch.cat(blocks) if blocks else torch.empty(0, form.bytes, dtype=torch.uint8)
