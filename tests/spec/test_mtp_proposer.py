"""Drafts of the module: in any batch, after any chunks and rejections, those of a run from scratch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles.mtp import mtp_drafts, random_mtp
from oracles.random_checkpoint import random_checkpoint
from support.models import random_ids, source_of
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.engine.runner import Runner
from bittrue.kv.layout import KVLayout, pages_for
from bittrue.kv.moves import CopySlot
from bittrue.kv.pool import KVPool, allocate
from bittrue.model.batch import Segment, build_batch
from bittrue.model.build import build_mtp, build_parameters
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.ops.contracts import LayerCache, OpTable
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference
from bittrue.spec.mtp import GRAPH_ROWS, MtpProposer
from bittrue.spec.proposer import DraftView

MAX_DRAFT = 4
PROMPT = 40  # tokens of a script that are known from the start
PAGES_EACH = 3
TOLERANCE = 2e-5  # as for the main model's logits
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "compress_ratios": [4, 128, 0], "num_hash_layers": 1}


@dataclass
class Script:
    """A sequence whose true tokens are given; ``done`` of them are computed and kept."""

    ids: list[int]
    slot: int
    page_ids: tuple[int, ...]
    prompt: int = PROMPT
    done: int = 0
    fold: int = 0

    @property
    def known(self) -> list[int]:
        """The prompt; from its end on also the token that was drawn last."""
        return self.ids[: max(self.prompt, self.done + 1)]


@dataclass
class Machine:
    """A target with a draft module, and caches that start as garbage."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    runner: Runner
    mtp: Mtp
    pool: KVPool
    proposer: MtpProposer
    seen: list[tuple[int, int, Tensor]] = field(default_factory=list)  # (view, place, logits)
    is_greedy: bool = False  # what the views say

    def choose(self, logits: Tensor, views: Sequence[int], place: int) -> list[int]:
        self.seen += [(view, place, row.clone()) for view, row in zip(views, logits, strict=True)]
        best: list[int] = logits.argmax(-1).tolist()
        return best

    def step(
        self, parts: Sequence[tuple[Script, int, int, int]]
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, int, Tensor]]]:
        """One step of (script, true tokens, wrong tokens behind them, drafts wanted); what was drafted, and
        the logits it was chosen from."""
        segments, views, row = [], [], 0
        for script, right, wrong, wants in parts:
            tokens = [*script.ids[script.done : script.done + right], *([7] * wrong)]
            segments.append(Segment(tokens, script.done, script.fold, script.slot, script.page_ids))
            start, script.done = script.done, script.done + right
            script.fold = max(script.fold, start + len(tokens) - MAX_DRAFT)
            name = str(script.slot)
            views.append(
                DraftView(name, script.slot, script.known, start, script.done, row, wants, self.is_greedy)
            )
            row += len(tokens)
        self.seen = []
        drafts = self.proposer.after_step(self.runner.forward(segments), views, self.choose)
        return drafts, self.seen

    def plain_drafts(self, ids: list[int], count: int) -> list[tuple[int, Tensor]]:
        """(draft, its logits): one sequence, everything computed again for every draft."""
        streams, ids, found = self.plain_streams(ids[:-1]), list(ids), []
        for _ in range(count):
            batch = build_batch([Segment(ids[1:], 0, 0, 0, ())])
            given = MtpInput(batch, streams, once_each(*streams.shape[:2]))
            own = self.mtp.forward(given, fresh_caches(self.mtp.model, slots=1)[1][-1])
            logits = self.mtp.logits(own[-1:])[0]
            found.append((int(logits.argmax()), logits))
            ids.append(found[-1][0])
            streams = torch.cat((streams, own[-1:]))
        return found

    def plain_streams(self, ids: list[int]) -> Tensor:
        pages = tuple(range(pages_for(len(ids))))
        caches = fresh_caches(self.mtp.model, slots=1)[1][:-1]
        return self.mtp.model.forward(build_batch([Segment(ids, 0, 0, 0, pages)]), caches)


def fresh_caches(model: DeepseekV4, *, slots: int) -> tuple[KVLayout, list[LayerCache]]:
    act: ActDtype = "f32" if model.act == torch.float32 else "bf16"
    layout = KVLayout.of(model.config, level=model.level, act=act, max_draft=MAX_DRAFT, num_draft_layers=1)
    caches = allocate(layout, pages=slots * PAGES_EACH, slots=slots)
    for cache in caches:
        for part in (cache.window, cache.rows, cache.keys):
            if part is not None:
                part.fill_(0xFF)
        for part in (cache.csa, cache.csa_index, cache.hca_fold, cache.hca_pending):
            if part is not None:
                part.fill_(float("nan"))
    return layout, caches


def machine(
    *,
    precision: str = "f32",
    level: Level = "maths",
    act: ActDtype = "f32",
    ops: OpTable | None = None,
    slots: int = 6,
) -> Machine:
    raw, tensors = random_checkpoint(4, precision=precision, **SMALL)
    tensors |= random_mtp(5, raw, precision=precision)
    config, source = ModelConfig.from_dict(dict(raw)), source_of(tensors)
    model = DeepseekV4(
        config, build_parameters(config, source), ops or select("cpu", threads=1), level=level, act=act
    )
    layout, caches = fresh_caches(model, slots=slots)
    mtp = Mtp(model, build_mtp(config, source))
    return Machine(
        raw,
        tensors,
        Runner(model, caches[:-1]),
        mtp,
        KVPool(layout, caches),
        MtpProposer(mtp, caches[-1]),
    )


def scripts(count: int, length: int, *, prompt: int = PROMPT) -> list[Script]:
    return [
        Script(
            random_ids(length, 512, seed),
            seed,
            tuple(range(seed * PAGES_EACH, (seed + 1) * PAGES_EACH)),
            prompt,
        )
        for seed in range(count)
    ]


def assert_plain(m: Machine, script: Script, drafts: tuple[int, ...], logits: list[Tensor]) -> None:
    want = m.plain_drafts(script.known, len(drafts))
    assert drafts == tuple(token for token, _ in want)
    for got, (_, expected) in zip(logits, want, strict=True):
        assert first_difference(expected, got) is None, (script.slot, script.done)


VARIANTS: dict[str, dict[str, Any]] = {
    "maths-f32": {},
    "published-fp4": {"precision": "fp4", "level": "published", "act": "bf16"},
    "not captured": {"ops": select("cpu", threads=1).with_ops()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_those_of_a_run_from_scratch(variant: str) -> None:
    # Any subset advances in a step: prompts in chunks, decoding with and without accepted drafts, some of
    # which were right, any number of drafts wanted; now and then a sequence moves to another slot.
    m, rng = machine(**VARIANTS[variant]), random.Random(variant)
    live, free, num_checked = scripts(4, 260), [4, 5], 0
    live[0].prompt, live[1].prompt = 3, 170
    for step in range(90):
        parts = []
        for script in rng.sample(live, rng.randint(1, len(live))):
            if script.done < script.prompt:
                right = min(script.prompt - script.done, rng.choice((1, 2, 5, 30, 140)))
                parts.append((script, right, 0, 0))
            else:
                right = 1 + rng.randrange(MAX_DRAFT + 1)
                parts.append((script, right, rng.randrange(MAX_DRAFT + 2 - right), 0))
        parts = [p for p in parts if p[0].done + p[1] < len(p[0].ids)]
        # At the end of a prompt a token is drawn too.
        parts = [
            (s, right, wrong, rng.randrange(MAX_DRAFT + 1) if s.done + right >= s.prompt else 0)
            for s, right, wrong, _ in parts
        ]
        if not parts:
            continue
        drafts, seen = m.step(parts)
        assert [len(found) for found in drafts] == [wants for *_, wants in parts]
        for index, (script, *_) in enumerate(parts):
            if drafts[index] and (step % 4 == 0 or script.done > 128):
                own = [row for view, _, row in sorted(seen, key=lambda s: s[1]) if view == index]
                assert_plain(m, script, drafts[index], own)
                num_checked += 1
        if rng.random() < 0.2:
            moved = rng.choice(live)
            free.append(moved.slot)
            target = free.pop(0)
            m.pool.apply([CopySlot(moved.slot, target)])
            moved.slot = target
    assert num_checked >= 20
    assert max(script.done for script in live) > 140  # the ring has come round


def test_drafts_equal_the_simulation_from_scratch() -> None:
    m = machine()
    script = scripts(1, 150)[0]
    for right in (33, 7, 1, 3, 90):
        wants = MAX_DRAFT if script.done + right >= script.prompt else 0
        drafts, seen = m.step([(script, right, 2 if wants else 0, wants)])
        if not wants:
            continue
        streams = m.plain_streams(script.known[:-1])
        want = mtp_drafts(m.raw, m.tensors, streams, script.known, MAX_DRAFT)
        assert drafts[0] == tuple(token for token, _ in want)
        for (_, _, got), (_, expected) in zip(seen, want, strict=True):
            assert float((got - expected).abs().max()) <= TOLERANCE


def test_more_sequences_than_a_captured_call_holds_draft_the_same() -> None:
    count = GRAPH_ROWS + 3
    m = machine(slots=count)
    live = scripts(count, 12, prompt=6)
    m.step([(s, 6, 0, 0) for s in live])
    drafts, seen = m.step([(s, 1 + s.slot % 2, 0, 1 + s.slot % MAX_DRAFT) for s in live])
    for index in (0, 1, GRAPH_ROWS, count - 1):
        own = [row for view, _, row in seen if view == index]
        assert_plain(m, live[index], drafts[index], own)


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
@pytest.mark.parametrize("precision,level,act", [("f32", "maths", "f32"), ("fp4", "published", "bf16")])
def test_a_greedy_sequence_alone_is_drafted_for_in_one_replay_and_gets_the_same(
    accepted: int, precision: str, level: Level, act: ActDtype
) -> None:
    one_by_one, at_once = (machine(precision=precision, level=level, act=act) for _ in range(2))
    at_once.is_greedy = True
    found = []
    for m in (one_by_one, at_once):
        m.proposer._cache.window.fill_(0)
        script = scripts(1, 60)[0]
        drafts = [m.step([(script, PROMPT, 0, 0)])[0]]
        for wants in (3, 1, MAX_DRAFT):
            drafts.append(m.step([(script, 1 + accepted, MAX_DRAFT - accepted, wants)])[0])
        found.append((drafts, m.proposer._cache.window.clone()))
    assert not at_once.seen and one_by_one.seen, "one of them asked the engine for each draft"
    assert [len(d[0]) for d in found[0][0]] == [0, 3, 1, MAX_DRAFT]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_draft_chosen_otherwise_is_what_the_next_is_made_from() -> None:
    m = machine()
    script = scripts(1, 60)[0]
    m.step([(script, PROMPT, 0, 0)])
    given: list[Tensor] = []

    def second(logits: Tensor, views: Sequence[int], place: int) -> list[int]:
        given.append(logits.clone())
        return [int(logits[0].topk(2).indices[1])]

    streams = m.runner.forward([Segment(script.ids[PROMPT : PROMPT + 1], PROMPT, PROMPT, 0, script.page_ids)])
    script.done += 1
    view = DraftView("0", 0, script.known, PROMPT, PROMPT + 1, 0, 3)
    drafts = m.proposer.after_step(streams, [view], second)[0]
    want = mtp_drafts(
        m.raw,
        m.tensors,
        m.plain_streams(script.known[:-1]),
        script.known,
        3,
        lambda logits: int(logits.topk(2).indices[1]),
    )
    assert drafts == tuple(token for token, _ in want)


def test_the_streams_of_a_step_are_read_before_anything_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    # They may lie in memory that the module's replays write to.
    m = machine()
    live = scripts(2, 60)
    m.step([(s, PROMPT, 0, 0) for s in live])
    held: list[Tensor] = []
    forward, store = m.runner.forward, m.proposer._store

    def forward_held(segments: Sequence[Segment]) -> Tensor:
        held[:] = [forward(segments)]
        return held[0]

    def store_over(rows: Sequence[Any], streams: Tensor) -> None:
        held[0].fill_(float("nan"))
        store(rows, streams)

    monkeypatch.setattr(m.runner, "forward", forward_held)
    monkeypatch.setattr(m.proposer, "_store", store_over)
    for wants in ((0, 3), (2, 0)):
        drafts, seen = m.step([(s, 1, 0, count) for s, count in zip(live, wants, strict=True)])
        index = wants.index(max(wants))
        assert_plain(m, live[index], drafts[index], [row for _, _, row in seen])


def test_a_prefill_that_wants_drafts_is_a_bug() -> None:
    m = machine()
    with pytest.raises(AssertionError, match="prefill"):
        m.step([(scripts(1, 60)[0], 5, 0, 1)])


@pytest.mark.parametrize("fault", ["slot", "position", "token", "stale"])
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = machine()
    live = scripts(2, 150)
    honest = m.proposer._store

    def faulty(rows: Sequence[Any], streams: Tensor) -> None:
        if fault == "stale":
            return
        wrong = {
            "slot": [row._replace(slot=5) for row in rows],
            "position": [row._replace(position=row.position + 1) for row in rows],
            "token": [row._replace(next_id=0) for row in rows],
        }[fault]
        honest(wrong, streams)

    monkeypatch.setattr(m.proposer, "_store", faulty)
    m.step([(s, PROMPT, 0, 0) for s in live])
    drafts, seen = m.step([(s, 1, 0, 2) for s in live])
    with pytest.raises(AssertionError):
        assert_plain(m, live[0], drafts[0], [row for view, _, row in seen if view == 0])
