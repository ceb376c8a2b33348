"""Drafts are measured over texts that are what they claim, and never change them."""

from pathlib import Path

import pytest

from bittrue.bench.engines import Model, ask
from bittrue.bench.recovery import Recovery
from bittrue.bench.result import Measurement
from bittrue.bench.speculation import HOPELESS_IDS, LENGTHS, OFF, FixedLength, Speculation, Texts
from bittrue.bench.speculation_tasks import MIX, TaskSpeculation, Turn, take_turn
from bittrue.bench.tasks import Voice, held_out
from bittrue.cli.main import run
from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import KVCorrupted
from bittrue.model.presets import make_checkpoint
from bittrue.train.tasks.catalogue import all_tasks


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


# ---- on tasks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With the tokenizer of the trained model."""
    place = tmp_path_factory.mktemp("speculation") / "small"
    return Model.of(make_checkpoint("tiny", 0, "bf16", place, vocab_size=322, draft="mtp"))


@pytest.fixture(scope="module")
def on_tasks(small: Model) -> list[Measurement]:
    return list(TaskSpeculation(small, quiet, tasks=("sort", "add"), count=1, rounds=2, threads=1).run())


def test_every_way_answers_the_tasks(on_tasks: list[Measurement]) -> None:
    ratios = [m for m in on_tasks if m.name == "decode over off"]
    lengths = [drafts for k in (1, 2, 3, 4) for drafts in (f"up to {k}", str(k))]
    ways = [("ngram", "up to 4"), *(("mtp", drafts) for drafts in lengths)]
    for text in (MIX, "sort", "add"):
        assert [(m.labels["by"], m.labels["drafts"]) for m in ratios if m.has(text=text)] == ways
    assert all(m.repeats == 2 and m.median > 0 for m in ratios)


def test_drafts_of_the_mix_are_those_of_its_tasks(on_tasks: list[Measurement]) -> None:
    fixed = [m for m in on_tasks if m.name == "acceptance" and m.has(by="mtp", drafts="2", place=1)]
    mix, *parts = (m.labels["drafted"] for m in fixed)
    assert [m.labels["text"] for m in fixed] == [MIX, "sort", "add"]
    assert mix == sum(map(int, parts)) > 100
    assert next(m for m in on_tasks if m.name == "acceptance length" and m.has(drafts="2")).median >= 1


def test_a_turn_counts_what_was_said(small: Model) -> None:
    problems = held_out(all_tasks()["sort"], 2, split="test", seed=0)
    voice = Voice(small.loaded.tokenizer)
    with small.engine(max_context=512, max_running=1, threads=1, prefix_cache=False) as engine:
        turn = take_turn(engine, problems, voice)
        prompts = [voice.renderer.prompt(problem) for problem in problems]
        assert turn.said == [
            event
            for prompt in prompts
            for event in engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=80))[0]
        ]
    assert turn.tokens == turn.steps == len(turn.said) - len(problems)
    assert 0 < turn.decode_s < turn.whole_s and turn.drafts.drafted_at == ()


def test_a_changed_answer_is_no_speed(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Engine] = []

    def other(engine: Engine, problems: object, voice: object) -> Turn:
        calls.append(engine)
        return Turn(tokens=1, steps=1, decode_s=1.0, whole_s=1.0, said=[len(calls)])

    monkeypatch.setattr("bittrue.bench.speculation_tasks.take_turn", other)
    bench = TaskSpeculation(small, quiet, tasks=("sort",), count=1, rounds=1, threads=1)
    with pytest.raises(KVCorrupted, match="changed answers to sort"):
        list(bench.run())


def test_tasks_are_counted(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "speculation", str(model.directory), "--tasks", "-1"]) == 2
    assert "--tasks is -1; it must be at least 1" in capsys.readouterr().err


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
