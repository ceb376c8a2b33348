"""What a turn leaves in the rings of the draft module: whoever goes on from it drafts from true rows."""

from pathlib import Path

import pytest
import torch
from support.small import small_checkpoint
from torch import Tensor

from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.spec.control import DraftControl

MAX_DRAFT = 4
PROMPT = [(5 * i + 7) % 500 for i in range(30)]


def drafts_of_a_second_turn(
    model: Path, fill: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[int, ...]]]:
    """The drafts of each step, where every byte of the draft rings was ``fill`` before the first turn."""
    wanted = 0
    monkeypatch.setattr(DraftControl, "length_for", lambda *_, **__: wanted)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    knobs = {"threads": 1, "max_context": 256, "kv_memory": "4MiB"}
    engine = Engine(model, speculation="mtp", max_draft=MAX_DRAFT, **knobs)
    ring = engine.parts.runner.draft_caches[0].window
    assert isinstance(ring, Tensor)
    ring.view(torch.uint8).fill_(fill)
    (first,) = engine.generate([PROMPT], params)
    proposer = engine.parts.proposer
    assert proposer is not None
    seen: list[list[tuple[int, ...]]] = []
    propose = proposer.after_step

    def watched(*given: object) -> list[tuple[int, ...]]:
        seen.append(propose(*given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(proposer, "after_step", watched)
    wanted = MAX_DRAFT
    second = [*PROMPT, *first, 9]
    events = list(engine.stream(second, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)))
    assert events[0].num_cached_tokens == len(second) - 2, "the second turn did not go on from the first"
    engine.close()
    return seen


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_drafts_of_a_second_turn_read_no_row_that_the_first_did_not_write(
    num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_checkpoint(tmp_path, draft="mtp")
    zeros, ones = (drafts_of_a_second_turn(model, fill, num_tokens, monkeypatch) for fill in (0, 0x7F))
    assert any(zeros) and zeros == ones
