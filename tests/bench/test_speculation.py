"""Drafts are measured over texts that are what they claim, and never change them."""

from pathlib import Path

import pytest

from bittrue.bench.engines import Model, ask
from bittrue.bench.recovery import Recovery
from bittrue.bench.result import Measurement
from bittrue.bench.speculation import HOPELESS_IDS, LENGTHS, OFF, FixedLength, Speculation, Texts
from bittrue.model.presets import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("speculation") / "tiny"
    return Model.of(make_checkpoint("tiny", 5, "bf16", place, draft="mtp"))


def quiet(line: str) -> None:
    pass


def test_a_copied_text_is_a_passage_of_the_prompt(model: Model) -> None:
    texts = Texts(model, 2, prompt_tokens=80, output_tokens=40, seed=1)
    with model.engine(max_context=160, threads=1) as engine:
        exact, changed, hopeless = (
            [answer.token_ids for answer in ask(engine, text.prompts, text.params)]
            for text in (texts.copied(changes=False), texts.copied(changes=True), texts.hopeless())
        )
    passages = [prompt[20:60] for prompt in texts.copied(changes=False).prompts]
    assert exact == passages
    differing = [
        sum(a != b for a, b in zip(x, y, strict=True)) for x, y in zip(changed, passages, strict=True)
    ]
    assert 0 < sum(differing) < 16
    assert hopeless[0] != hopeless[1] and len({t for answer in hopeless for t in answer}) <= HOPELESS_IDS


def test_a_fixed_length_never_adapts() -> None:
    control = FixedLength(3)
    for _ in range(20):
        control.observe_step(4, 0.001)
        control.observe_drafts("s", 3, 0)
    assert control.length_for("s", 1) == 3


@pytest.fixture(scope="module")
def found(model: Model) -> list[Measurement]:
    bench = Speculation(model, quiet, prompt_tokens=64, output_tokens=32, rounds=1, threads=1)
    return list(bench.run())


def test_every_way_to_draft_is_held_against_none(found: list[Measurement]) -> None:
    ratios = [m for m in found if m.name == "decode over off"]
    ways = {(m.labels["by"], m.labels["drafts"]) for m in ratios if m.labels["batch"] == 1}
    assert ways == {("ngram", "adaptive"), ("mtp", "adaptive"), *(("ngram", str(k)) for k in LENGTHS)}
    assert OFF not in ways and all(m.median > 0 for m in ratios)
    texts = {m.labels["text"] for m in ratios if m.labels["by"] == "mtp"}
    assert texts == {"of random weights"}  # elsewhere a mask or a bias would tell it the next token


def test_acceptance_is_told_by_place(found: list[Measurement]) -> None:
    fixed = [m for m in found if m.name == "acceptance" and m.has(drafts="4", text="copied, 1 of 16 changed")]
    assert [m.labels["place"] for m in fixed] == [1, 2, 3, 4]
    assert [m.median for m in fixed] == sorted((m.median for m in fixed), reverse=True)
    assert fixed[0].median > 0.5


@pytest.mark.slow
def test_a_killed_engine_comes_back_with_every_stream(model: Model, tmp_path: Path) -> None:
    bench = Recovery(
        model.directory,
        model.vocab_size,
        tmp_path,
        quiet,
        streams=(1, 4),
        prompt_tokens=200,
        output_tokens=700,
        rounds=1,
        threads=1,
    )
    found = list(bench.run())
    tokens = [m for m in found if m.name == "kill to next token"]
    assert [(m.labels["streams"], m.labels["tier"], m.repeats) for m in tokens] == [
        (1, "none", 1),
        (1, "disk", 1),
        (4, "none", 4),
        (4, "disk", 4),
    ]
    ready = [m.median for m in found if m.name == "kill to engine ready"]
    assert all(0 < r <= m.low for r, m in zip(ready, tokens, strict=True))
