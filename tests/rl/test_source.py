"""Sources: what a step asks is a function of seed and step; scores are the verifiers', in order."""

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bittrue.cli.main import run as command
from bittrue.errors import ConfigError, VerifierUnavailable
from bittrue.obs.log import Log
from bittrue.rl.assembly import open_policy
from bittrue.rl.config import RlConfig
from bittrue.rl.problems import Problems
from bittrue.rl.prompt_file import PromptReader, Row
from bittrue.rl.prompts import Prompts
from bittrue.rl.rewards import Control
from bittrue.rl.source import Asked, Source
from bittrue.rl.sources import open_pool, open_sources
from bittrue.rl.types import Rollout, Scored, Span
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.worker_process import descendants
from bittrue.text.tokenizer import THINK_END, Tokenizer
from bittrue.train.metrics import MetricsFile
from bittrue.train.run_file import checked, load_run_file
from bittrue.train.tasks.task import split_of

ROOT = Path(__file__).parents[2]
MINI = ROOT / "models" / "mini"
EXACT = {"kind": "exact", "expected": {"column": "answer"}}
LOG = Log(sys.stderr, "error")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer((MINI / "tokenizer.json").read_bytes(), source="tokenizer.json")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(num_workers=2, limits=Limits(seconds=60.0, cpu_seconds=20)) as found:
        yield found


def rows_of(tokenizer: Tokenizer, folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"thinking": "off", "verifier": EXACT, "max_tokens": 4096, **options}
    return PromptReader(tokenizer, **given).read(path)


def prompts_of(
    tokenizer: Tokenizer, pool: Pool, folder: Path, rows: Sequence[dict[str, Any]], **options: Any
) -> Prompts:
    return Prompts(rows_of(tokenizer, folder, rows, **options), pool, tokenizer, seed=5, repeats=True)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}?", "answer": str(n), "id": f"n{n}"} for n in range(count)]


def rollout_of(
    tokenizer: Tokenizer, asked: Asked, text: str, *, is_cut: bool = False, ends: bool = True
) -> Rollout:
    ids = [
        token
        for part in text.split(THINK_END)
        for token in (tokenizer.special_id(THINK_END), *tokenizer.encode_text(part))
    ][1:]
    ids += [tokenizer.eos_id] * (ends and not is_cut)
    return Rollout(
        prompt_key=asked.prompt.key,
        prompt_ids=np.array(asked.prompt.token_ids, np.int32),
        answer_ids=np.array(ids, np.int32),
        logprobs=np.zeros(len(ids), np.float32),
        spans=(Span(0, len(ids)),) if ids else (),
        finish_reason="length" if is_cut else "stop",
    )


def said(tokenizer: Tokenizer, source: Source, asked: Asked, *texts: str) -> list[Scored]:
    (group,) = source.score([(asked, [rollout_of(tokenizer, asked, text) for text in texts])])
    return group


# ---- what is asked ---------------------------------------------------------------------------------------


def test_a_step_asks_the_same_whatever_was_asked_before(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    rows = rows_of(tokenizer, tmp_path, numbered(7))
    for make in (
        lambda seed: Prompts(rows, pool, tokenizer, seed=seed, repeats=True),
        lambda seed: Problems(tokenizer, {"sort": 1.0, "add": 2.0}, seed=seed),
        lambda seed: Control(Prompts(rows, pool, tokenizer, seed=seed, repeats=True), "random", seed=seed),
    ):
        first, second = make(1), make(1)
        second.of_step(3, 2)
        steps = [[each.prompt for each in first.of_step(step, 4)] for step in range(6)]
        assert [[each.prompt for each in second.of_step(step, 4)] for step in reversed(range(6))] == steps[
            ::-1
        ]
        assert steps != [[each.prompt for each in make(2).of_step(step, 4)] for step in range(6)]
        keys = [prompt.key for step in steps for prompt in step]
        assert len(set(keys)) == len(keys)
        assert first.digest() == second.digest() != make(2).digest()


def test_every_row_is_asked_once_before_any_is_asked_again(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    source = prompts_of(tokenizer, pool, tmp_path, numbered(7))
    asked = [each.prompt.token_ids for step in range(7) for each in source.of_step(step, 4)]
    passes = [asked[begin : begin + 7] for begin in range(0, 28, 7)]
    assert all(len(set(each)) == 7 for each in passes)
    assert len({tuple(each) for each in passes}) == 4  # each in an order of its own


def test_held_out_prompts_are_asked_at_most_once(tokenizer: Tokenizer, pool: Pool, tmp_path: Path) -> None:
    source = Prompts(rows_of(tokenizer, tmp_path, numbered(7)), pool, tokenizer, seed=1, repeats=False)
    assert len({each.prompt.token_ids for each in source.of_step(0, 99)}) == 7
    assert len(source.of_step(0, 99)) == 7
    assert source.of_step(0, 3) == source.of_step(0, 99)[:3]


def test_problems_are_of_their_split(tokenizer: Tokenizer) -> None:
    for split in ("train", "validation"):
        source = Problems(tokenizer, {"sort": 1.0, "countdown": 1.0}, seed=1, split=split)
        for asked in source.of_step(2, 30):
            problem: Any = asked.judge
            assert split_of(problem.family, problem.canonical) == split
            assert asked.task in ("sort", "countdown")


# ---- scores ----------------------------------------------------------------------------------------------


def test_problems_are_judged_by_their_checkers(tokenizer: Tokenizer) -> None:
    source = Problems(tokenizer, {"add": 1.0}, seed=1)
    (asked,) = source.of_step(0, 1)
    problem: Any = asked.judge
    answer = problem.questions[0].reference[0].content
    given = [
        rollout_of(tokenizer, asked, answer),
        rollout_of(tokenizer, asked, answer + "0"),
        rollout_of(tokenizer, asked, answer, is_cut=True),
        rollout_of(tokenizer, asked, answer, ends=False),
    ]
    (group,) = source.score([(asked, given)])
    assert [(each.score, each.outcome) for each in group] == [
        (1.0, "right"),
        (0.0, "wrong"),
        (0.0, "unparsable"),
        (0.0, "wrong"),
    ]
    assert [each.rollout for each in group] == given and source.health() is None


def test_groups_of_a_step_are_judged_together_and_come_back_in_order(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    source = prompts_of(tokenizer, pool, tmp_path, numbered(9))
    asked = source.of_step(0, 9)
    texts = [str(n) for n in range(9)]
    pairs = [(each, [rollout_of(tokenizer, each, text) for text in texts]) for each in asked]
    groups = source.score(pairs)
    for (each, rollouts), group in zip(pairs, groups, strict=True):
        row: Any = each.judge
        assert [scored.rollout for scored in group] == rollouts
        assert [scored.score for scored in group] == [float(text == row.verifier.expected) for text in texts]
    health = source.health()
    assert health is not None and health.kinds["exact"].outcomes["right"] >= 9


def test_an_answer_without_an_end_is_unparsable(tokenizer: Tokenizer, pool: Pool, tmp_path: Path) -> None:
    source = prompts_of(tokenizer, pool, tmp_path, numbered(1))
    (asked,) = source.of_step(0, 1)
    cut, open_ = (rollout_of(tokenizer, asked, "0", is_cut=is_cut, ends=False) for is_cut in (True, False))
    (group,) = source.score([(asked, [cut, open_, rollout_of(tokenizer, asked, "0")])])
    assert [(each.score, each.outcome) for each in group] == [(0.0, "unparsable")] * 2 + [(1.0, "right")]


def test_reasoning_is_not_the_answer(tokenizer: Tokenizer, pool: Pool, tmp_path: Path) -> None:
    source = prompts_of(tokenizer, pool, tmp_path, [{"prompt": "?", "answer": "4"}], thinking="low")
    (asked,) = source.of_step(0, 1)
    scored = said(tokenizer, source, asked, f"It is 5.{THINK_END}4", f"4{THINK_END}5", "4")
    assert [each.score for each in scored] == [1.0, 0.0, 0.0]


def test_calls_of_tools_are_parsed_where_the_row_has_tools(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
    verifier = {"kind": "tool_calls", "expected": [{"name": "get", "arguments": {"n": 3}}]}
    row = {"prompt": "Get 3.", "verifier": verifier}
    dsml = tokenizer.special_id("｜DSML｜")
    parts = [
        "\n\n<", "tool_calls>\n<", 'invoke name="get">\n<', 'parameter name="n" string="false">3</',
        "parameter>\n</", "invoke>\n</", "tool_calls>",
    ]  # fmt: skip
    ids = [token for part in parts for token in (dsml, *tokenizer.encode_text(part))][1:] + [tokenizer.eos_id]
    for tools, score in (([tool], 1.0), (None, 0.0)):
        source = prompts_of(tokenizer, pool, tmp_path, [row if tools is None else {**row, "tools": tools}])
        (asked,) = source.of_step(0, 1)
        rollout = Rollout(
            asked.prompt.key,
            np.array(asked.prompt.token_ids, np.int32),
            np.array(ids, np.int32),
            np.zeros(len(ids), np.float32),
            (Span(0, len(ids)),),
            "stop",
        )
        assert source.score([(asked, [rollout])])[0][0].score == score


FUNCTIONS = """
import os, time

def length(prompts, completions, wanted, **columns):
    if completions[0] == "skip":
        return [None]
    if completions[0] == "crash":
        os._exit(1)
    if completions[0] == "hang":
        time.sleep(1e6)
    return [len(completions[0]) / wanted[0]]
"""


def test_what_a_reward_function_says_is_a_score_and_a_sub_score_by_its_name(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    table = {"kind": "reward_function", "function": f"{tmp_path}/rewards.py:length", "is_strict": False}
    row = {"prompt": "?", "wanted": 8}
    with Pool(num_workers=2, limits=Limits(seconds=2.0)) as pool:
        source = prompts_of(tokenizer, pool, tmp_path, [row], verifier=table)
        (asked,) = source.of_step(0, 1)
        scored = said(tokenizer, source, asked, "ab", "abcdefgh", "skip", "crash", "hang")
    assert [(each.score, each.outcome) for each in scored] == [
        (0.25, "wrong"),
        (1.0, "right"),
        (None, "unparsable"),  # no verdict: in no baseline, without an advantage
        (0.0, "crash"),
        (0.0, "timeout"),
    ]
    assert [dict(each.sub_scores) for each in scored] == [{"length": 0.25}, {"length": 1.0}, {}, {}, {}]


def test_a_verifier_that_cannot_run_is_found_before_anything_is_asked_and_named_by_its_row(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    broken = {"kind": "reward_function", "function": f"{tmp_path}/broken.py:f"}
    source = prompts_of(tokenizer, pool, tmp_path, [*numbered(2), {"prompt": "?", "verifier": broken}])
    with pytest.raises(
        VerifierUnavailable, match="(?s)rows.jsonl:3: verifier 'reward_function': .*no_such_module"
    ):
        source.check_verifiers()
    before = pool.health().total.outcomes
    prompts_of(tokenizer, pool, tmp_path, numbered(2)).check_verifiers()
    assert pool.health().total.outcomes == before
    # A reference that is no mathematics is known when an answer comes.
    source = prompts_of(
        tokenizer, pool, tmp_path, [{"prompt": "?", "verifier": {"kind": "math", "expected": ""}}]
    )
    with pytest.raises(VerifierUnavailable, match="rows.jsonl:1: verifier 'math': the reference ''"):
        said(tokenizer, source, source.of_step(0, 1)[0], "1")


# ---- controls --------------------------------------------------------------------------------------------


def step_of(tokenizer: Tokenizer, source: Source, step: int) -> list[tuple[Asked, list[Rollout]]]:
    """Groups of six answers; six of the 180 are right."""
    return [
        (asked, [rollout_of(tokenizer, asked, str(n)) for n in range(6)])
        for asked in source.of_step(step, 30)
    ]


def test_random_rewards_are_a_function_of_seed_step_and_answer(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path
) -> None:
    inner = prompts_of(tokenizer, pool, tmp_path, numbered(30))

    def scores(seed: int, step: int) -> list[float | None]:
        source = Control(inner, "random", seed=seed)
        return [each.score for group in source.score(step_of(tokenizer, source, step)) for each in group]

    first = scores(1, 0)
    assert first == scores(1, 0)
    assert first != scores(2, 0)
    # Another step gives the same answers other rewards.
    source = Control(inner, "random", seed=1)
    pairs = {step: dict(_by_tokens(source, step_of(tokenizer, source, step))) for step in (0, 1)}
    assert pairs[0].keys() == pairs[1].keys() and pairs[0] != pairs[1]
    assert set(first) == {0.0, 1.0} and 60 < sum(score == 1.0 for score in first) < 120


def _by_tokens(source: Source, pairs: Sequence[tuple[Asked, list[Rollout]]]) -> Iterator[tuple[bytes, Any]]:
    for group in source.score(pairs):
        for each in group:
            yield each.rollout.prompt_ids.tobytes() + each.rollout.answer_ids.tobytes(), each.score


@pytest.mark.parametrize("reward", ["random", "shuffled"])
def test_controls_keep_the_true_score_beside_theirs(
    tokenizer: Tokenizer, pool: Pool, tmp_path: Path, reward: Any
) -> None:
    inner = prompts_of(tokenizer, pool, tmp_path, numbered(30))
    source = Control(inner, reward, seed=1)
    pairs = step_of(tokenizer, source, 0)
    true = [each for group in inner.score([(a.judge.asked, r) for a, r in pairs]) for each in group]  # type: ignore[attr-defined]
    found = [each for group in source.score(pairs) for each in group]
    assert [each.rollout for each in found] == [each.rollout for each in true]
    assert [each.sub_scores["verifier"] for each in found] == [each.score for each in true]
    scores = [each.score for each in found]
    assert scores != [each.score for each in true]
    assert all((each.score == 1.0) == (each.outcome == "right") for each in found)
    if reward == "shuffled":
        assert Counter(scores) == Counter(each.score for each in true)
        again = [each.score for group in source.score(pairs) for each in group]
        other = [each.score for group in Control(inner, reward, seed=2).score(pairs) for each in group]
        assert scores == again != other
    assert source.digest() != inner.digest()


# ---- from a run file -------------------------------------------------------------------------------------


def config(**sections: Any) -> RlConfig:
    small: dict[str, Any] = {
        "model": {"start": str(MINI)},
        "data": {"prompts": str(ROOT / "configs" / "rl-math.jsonl"), "seed": 3},
        "rollout": {"prompts": 3, "group": 4, "max_tokens": 16, "kv_memory": "32MiB"},
        "run": {"steps": 3, "threads": 1, "eval_every": 0},
    }
    small["data"]["verifier"] = {"kind": "math", "expected": {"column": "answer"}}
    names = small.keys() | sections.keys()
    return checked(RlConfig, {name: {**small.get(name, {}), **sections.get(name, {})} for name in names})


def test_a_run_file_names_one_source(tmp_path: Path) -> None:
    for data, message in (
        ({"tasks": {"add": 1.0}}, "both tasks and prompts"),
        ({"prompts": ""}, "neither tasks nor prompts"),
        ({"prompts": "", "tasks": {"add": 1.0}}, "held_out, verifier and thinking are of prompts"),
        ({"prompts": "", "verifier": {}, "tasks": {"add": 0.0}}, "weight above 0"),
        ({"reward": "none"}, "data.reward"),
        ({"thinking": "hard"}, "data.thinking"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(data=data)
    for verifiers, message in (
        ({"memory": "1MiB"}, "a worker needs 256MiB"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"workers": 0}, "verifiers.workers"),
        ({"second": 1.0}, r"did you mean verifiers.seconds\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(verifiers=verifiers)
    with pytest.raises(ConfigError, match="missing, which is no folder"):
        open_pool(config(verifiers={"python_path": [str(tmp_path / "missing")]}).verifiers)


def test_the_sources_of_a_run_file(tokenizer: Tokenizer) -> None:
    source, held_out = open_sources(config(data={"reward": "shuffled"}), tokenizer, LOG, max_context=512)
    try:
        assert isinstance(source, Control)
        assert sorted(held_out) == ["add", "sub"]
        assert all(
            isinstance(each, Prompts) for each in held_out.values()
        )  # controls are measured by the truth
        kept = {a.prompt.token_ids for each in held_out.values() for a in each.of_step(0, 99)}
        assert not kept & {asked.prompt.token_ids for asked in source.of_step(0, 60)}
    finally:
        source.close()
        source.close()


def test_a_run_without_held_out_prompts_has_no_measurements(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    data = {"prompts": str(path)}
    with pytest.raises(ConfigError, match="none of the 1 prompts of .* set run.eval_every = 0"):
        open_sources(config(data=data, run={"eval_every": 1}), tokenizer, LOG, max_context=512)
    source, held_out = open_sources(config(data=data), tokenizer, LOG, max_context=512)
    source.close()
    assert held_out == {}


def weights_after(settings: RlConfig, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    with open_policy(settings, out, LOG) as policy, MetricsFile(out / "metrics.jsonl") as metrics:
        policy.run.begin(metrics)
        assert policy.run.go(metrics)
        return {name: leaf.detach().clone() for name, leaf in policy.trainer.masters.named.items()}


SLOW_FUNCTION = """
import time

def places(prompts, completions, answer, **columns):
    time.sleep(0.15)
    return [sum(a == b for a, b in zip(c, answer[0])) / 10 for c in completions]
"""


def partly_solved(folder: Path) -> RlConfig:
    """A run on sums that the bundled model gets wrong in many ways, judged slowly, by places."""
    (folder / "rewards.py").write_text(SLOW_FUNCTION)
    rng = random.Random(0)
    pairs = [(rng.randrange(1000, 10000), rng.randrange(1000, 10000)) for _ in range(20)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"kind": "reward_function", "function": f"{folder}/rewards.py:places", "is_strict": False}
    data = {"prompts": f"{folder}/rows.jsonl", "verifier": table}
    rollout = {"prompts": 6, "group": 8}
    return config(data=data, rollout=rollout, optim={"lr": 1e-3}, verifiers={"seconds": 60.0})


@pytest.mark.slow
def test_a_run_whose_verifiers_are_killed_from_outside_ends_in_the_same_weights(
    tmp_path: Path, pool: Pool
) -> None:
    settings = partly_solved(tmp_path)
    calm = weights_after(settings, tmp_path / "calm")
    here, others = os.getpid(), set(descendants(os.getpid()))
    all_at_work = 2 * (2 if pool.isolation.kind == "limits" else 4)
    is_over, killed = threading.Event(), 0

    def kill_some() -> None:
        nonlocal killed
        rng = random.Random(0)
        while not is_over.wait(0.02):
            found = sorted(set(descendants(here)) - others)
            if len(found) >= all_at_work:
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    killed += 1
                while len(set(descendants(here)) - others) < all_at_work and not is_over.wait(0.02):
                    pass
                is_over.wait(0.5)  # the answer that was hit is judged again, and not hit again

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        disturbed = weights_after(settings, tmp_path / "disturbed")
    finally:
        is_over.set()
        killer.join()
    quiet, loud = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("calm", "disturbed")
    )
    assert killed >= 3 and loud[-1]["verifier/restarts"] >= 2 and quiet[-1]["verifier/restarts"] == 0
    assert len([line for line in quiet if line.get("train/grad_norm", 0.0) > 0]) >= 2
    assert [line["reward/places/mean"] for line in quiet] == [line["reward/places/mean"] for line in loud]
    assert all(bool((calm[name] == disturbed[name]).all()) for name in calm)


@pytest.mark.slow
def test_the_bundled_run_of_a_prompt_file_steps(tmp_path: Path, pool: Pool) -> None:
    if not pool.isolation.is_sandbox:
        pytest.skip(pool.isolation.describe())
    text = (ROOT / "configs" / "rl-math.toml").read_text()
    run = tmp_path / "run.toml"
    run.write_text(text.replace("configs/", f"{ROOT}/configs/").replace("models/", f"{ROOT}/models/"))
    assert load_run_file(RlConfig, run).run.steps == 8
    out = tmp_path / "run"
    assert command(["rl", str(run), "--out", str(out), "--require-sandbox"]) == 0
    assert json.loads((out / "run.json").read_text())["verifiers"]["require_sandbox"] is True
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and {"eval/add/greedy", "eval/sub/greedy"} <= lines[-1].keys()
    assert 0.5 < lines[0]["reward/mean"] <= 1.0
    assert all(line.get("parity/differing", 0.0) == 0.0 for line in lines)
    assert any("parity/differing" in line for line in lines)
