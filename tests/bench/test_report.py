"""The page says what the stored results say: targets, tables, sources; and the picture shows every line."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from bittrue.bench.pictures import pictures
from bittrue.bench.plot import panels, svg
from bittrue.bench.report import page
from bittrue.bench.result import Benchmark, Label, Measurement, Result, measured, read_results, write_result
from bittrue.bench.targets import targets

ROOT = Path(__file__).parents[2]


def stored(benchmark: Benchmark, found: list[Measurement], **config: Label) -> Result:
    return Result(
        benchmark, "CPU", 2, "abc", "2026-01-02T03:04:05+00:00", f"make {benchmark}", config, tuple(found)
    )


def drafted(labels: dict[str, Label]) -> Iterator[Measurement]:
    """What one way to draft gives on one text."""
    yield measured("decode", "tokens/s", [250.0], labels)
    if labels["by"] != "none":
        yield measured("decode over off", "ratio", [1.25], labels)
        yield measured("whole answers over off", "ratio", [1.1], labels)
        yield measured("acceptance length", "ratio", [1.75], labels)
        yield measured("acceptance", "ratio", [0.5], {**labels, "place": 1, "drafted": 2000})


def trained(labels: dict[str, Label], speed: float, ratio: float | None) -> Iterator[Measurement]:
    if ratio is None:
        yield measured("training", "tokens/s", [speed], {**labels, "experts": "eager", "pass": 1024})
    else:
        yield measured("training", "tokens/s", [speed], labels)
        yield measured("training over transformers", "ratio", [ratio], {**labels, "over": "fastest"})


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Result]:
    """As they come back from files."""
    peers = [
        measured("prefill", "tokens/s", [100.0], {"engine": "bittrue", "batch": 1, "context": 4096}),
        *(
            measured("decode", "tokens/s", [speed], {"engine": engine, "batch": 1, "context": context})
            for engine, speeds in (("bittrue", (900.0, 800.0)), ("other", (300.0, 500.0)))
            for context, speed in zip((256, 4096), speeds, strict=True)
        ),
        measured(
            "decode over fastest peer",
            "ratio",
            [2.9, 3.0, 3.1],
            {"batch": 1, "context": 256, "peer": "other"},
        ),
        measured("decode over fastest peer", "ratio", [1.6], {"batch": 1, "context": 4096, "peer": "other"}),
        measured(
            "same likeliest token", "ratio", [0.75], {"engine": "other", "tokens": 500, "agrees": False}
        ),
        measured(
            "log-probability error", "ratio", [0.02], {"engine": "other", "tokens": 500, "agrees": False}
        ),
    ]
    frontier = [
        measured("prefill", "tokens/s", [50.0], {"context": 4096, "filled": False}),
        *(
            m
            for context, speed in ((4096, 20.0), (917504, 13.0))
            for m in (
                measured(
                    "decode", "tokens/s", [speed], {"context": context, "batch": 1, "filled": context > 5000}
                ),
                measured("resident over ledger", "ratio", [0.9], {"context": context, "batch": 1}),
            )
        ),
        measured("decode over decode at 4096", "ratio", [0.65], {"context": 917504, "batch": 1}),
    ]
    ops = [
        measured("copy", "s", [0.5], {}, num_bytes=10**10),
        measured("read", "s", [0.5], {}, num_bytes=10**10),
        measured("torch product", "s", [0.5], {}, flops=10**11),
        measured("linear, one row", "s", [0.5], {"format": "fp4", "case": "1x1"}, num_bytes=9 * 10**9),
        measured("linear, share of bandwidth", "ratio", [0.79], {"format": "fp4", "of": "copy"}),
        measured("linear, share of bandwidth", "ratio", [0.99], {"format": "fp4", "of": "read"}),
    ]
    server = [measured("start to first token", "s", [3.5], {})]
    way = {"from": "disk, not in memory"}
    place = {"strategy": "full", "tokens": 512, "states": 5, "tier": "host"}
    cache = [
        measured("time to first token", "s", [2.0], {"from": "cold", "tokens": 512, "cached": 0}),
        measured("time to first token", "s", [0.4], {**way, "tokens": 512, "cached": 511}),
        measured("first token over cold", "ratio", [0.2], {**way, "tokens": 512}),
        measured("bytes per cached token", "bytes", [1627.4], place),
        measured("cached bytes over arithmetic", "ratio", [1.0], place),
        measured("bytes per token by arithmetic", "bytes", [1621.0], {"strategy": "full"}),
        measured("bytes per token by arithmetic", "bytes", [43026.0], {"shape": "flash", "strategy": "full"}),
        measured("bytes of a state", "bytes", [5057536], {"shape": "flash"}),
        measured("decode step", "s", [0.5], {"cache": "off", "batch": 8}),
        measured("prefill without a hit", "s", [4.0], {"cache": "off", "tokens": 512}),
        measured("prefill without a hit", "s", [4.1], {"cache": "on", "tokens": 512}),
        measured("prefill without a hit, over off", "ratio", [1.01], {"cache": "on", "tokens": 512}),
        measured("decode step, over off", "ratio", [1.5], {"cache": "on", "batch": 8}),
    ]
    agent = [
        measured("token hit rate", "ratio", [0.961], {"of": "cache", "requests": 3}),
        measured("token hit rate after the first request", "ratio", [0.98], {"of": "cache", "requests": 3}),
        measured("session", "s", [7.0], {"cache": "on", "requests": 3}),
    ]
    adaptive = {"text": "random, of 32 tokens", "by": "ngram", "drafts": "adaptive", "batch": 1}
    speculation = [
        measured("decode", "tokens/s", [100.0], adaptive),
        measured("decode over off", "ratio", [0.99], adaptive),
        measured("acceptance", "ratio", [0.25], {**adaptive, "place": 1, "drafted": 1000}),
    ]
    many = {"streams": 32, "tier": "disk"}
    recovery = [
        measured("kill to engine ready", "s", [1.0], many),
        measured("kill to next token", "s", [2.0, 3.0, 4.0], many),
    ]
    drawn = {"task": "countdown", "temperature": 1.0, "right": 60}
    tasks = [
        Measurement("right answers", "ratio", 0.96, 0.94, 0.97, 1000, {
            "task": "recall", "temperature": 0.0, "tokens": 4096, "right": 960}),
        Measurement("right answers", "ratio", 0.6, 0.5, 0.69, 100, drawn),
        Measurement("accepted drafts", "ratio", 0.75, 0.7, 0.8, 400, {"text": "short tasks", "place": 2}),
    ]  # fmt: skip
    on_tasks = [
        m
        for text in ("tasks", "sort")
        for way in ({"by": "none", "drafts": "off"}, {"by": "mtp", "drafts": "up to 4"},
                    {"by": "mtp", "drafts": "4"})
        for m in drafted({"text": text, "batch": 1, **way})
    ]  # fmt: skip
    training = [
        m
        for by, speed, ratio in (("transformers, fastest", 100.0, None), ("bittrue, published", 350.0, 3.5))
        for m in trained({"by": by, "length": 64}, speed, ratio)
    ]
    way = {"experts": "eager", "passes": 2}
    rl_peer = [
        measured("tried step", "s", [3.0], way),
        *(
            m
            for by, labels in (("bittrue", {}), ("trl", way))
            for m in (
                measured("step", "s", [1.0], {"by": by, **labels}),
                measured("tokens of an answer", "count", [8.25], {"by": by}),
                measured("answers trained on", "ratio", [0.75], {"by": by}),
            )
        ),
        measured("step, TRL over bittrue", "ratio", [2.5, 2.75, 3.5], {}),
    ]
    flash = {"index_heads": 64, "index_topk": 512}
    for name, result in {
        "frontier.json": stored("frontier", frontier, model="flash4", threads=2, **flash),
        "ops.json": stored("ops", ops, threads=2),
        "peers-t256.json": stored("peers", peers, preset="t256", threads=2),
        "server.json": stored("server", server, model="tiny", threads=2),
        "cache.json": stored("cache", cache, model="t256", threads=2),
        "agent.json": stored("agent", agent, model="t256", threads=2),
        "speculation.json": stored("speculation", speculation, model="t256", threads=2),
        "recovery.json": stored("recovery", recovery, model="t256", threads=2),
        "speculation-mini.json": stored("speculation", on_tasks, model="mini", tasks=10, threads=2),
        "tasks-mini.json": stored("tasks", tasks, model="mini", split="test", threads=2),
        "training-mini.json": stored("training", training, preset="mini", tokens=4096, threads=2),
        "rl-trl.json": stored("rl-trl", rl_peer, model="mini", task="sort", prompts=3, group=4, max_tokens=5),
    }.items():
        write_result(tmp_path / name, result)
    return read_results(tmp_path)


def verdicts(results: dict[str, Result]) -> dict[str, bool | None]:
    return {target.measure: target.is_met for target in targets(results)}


def test_targets_are_judged_by_the_stored_medians(results: dict[str, Result]) -> None:
    found = verdicts(results)
    assert found["decode, batch 1, context 256, over the fastest peer (t256)"] is True  # 3.0, at least 2
    assert found["decode, batch 1, context 4,096, over the fastest peer (t256)"] is False  # 1.6
    assert found["decode, batch 8, context 4,096, over the fastest peer"] is None
    assert found["decode at 917,504 over decode at 4,096, Flash's index (flash4)"] is True
    assert (
        found["linear, one row, fp4, share of copy bandwidth"] is False
    )  # 0.79: of the copy, not of the read
    assert found["linear, one row, bf16, share of copy bandwidth"] is None
    assert found["server start to first token (tiny)"] is False  # at most 3 s
    first = "first token of a cached prompt from"
    assert found[f"{first} disk, not in memory, over cold (t256)"] is False  # 0.2, at most 0.15
    assert found[f"{first} host, over cold"] is None
    assert found["bytes of a cached prompt, over the arithmetic (t256)"] is True
    assert found["prefill without a hit, cache on over off (t256)"] is True  # 1.01, at most 1.02
    assert found["decode step, batch 8, cache on over off (t256)"] is False
    assert found["token hit rate of an agent's session (t256)"] is True
    assert found["decode with drafts of ngram that are wrong, batch 1, over off (t256)"] is True
    assert found["decode with drafts of mtp on the tasks, batch 1, over off (mini)"] is True
    assert found["recall at 4,096 tokens, right answers (mini)"] is True
    assert found["recall at 32,768 tokens, right answers"] is None
    assert found["countdown, right answers, drawn (mini)"] is True
    assert found["countdown, right answers, drawn, headroom (mini)"] is False  # 0.6, at most 0.5
    assert found["training, documents of 64 tokens, over the fastest of transformers (mini)"] is True
    assert found["training, documents of 256 tokens, over the fastest of transformers"] is None
    assert found["steps of reinforcement learning a second, over TRL's (mini)"] is False  # 2.75, at least 3


def test_every_target_is_listed_when_nothing_is_stored() -> None:
    found = verdicts({})
    assert len(found) == 6 + 2 + 3 + 6 + 2 + 8 + 1 + 5 + 10 + 3 + 7 + 1 + 2 + 5 + 2
    assert set(found.values()) == {None}
    assert "not measured" in page({})


def test_a_preset_without_flashs_index_says_nothing_about_long_contexts(results: dict[str, Result]) -> None:
    config = {**results["frontier.json"].config, "index_topk": 128}
    other = Result(**{**fields_of(results["frontier.json"]), "config": config})
    found = verdicts({**results, "frontier.json": other})
    assert found["decode at 917,504 over decode at 4,096, Flash's index"] is None


def fields_of(result: Result) -> dict[str, object]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}


def test_the_page_holds_every_number_with_its_source(results: dict[str, Result]) -> None:
    text = page(results)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert ["decode, batch 1, context 256, over the fastest peer (t256)", "at least 2.00",
            "3.00 (2.90 to 3.10)", "yes", "`peers-t256.json`"] in rows  # fmt: skip
    assert [
        "server start to first token (tiny)",
        "at most 3.00 s",
        "3.50 s",
        "**no**",
        "`server.json`",
    ] in rows
    header = next(row for row in rows if row[0] == "t256: engine")
    assert header[1:] == ["decode, batch 1, 256", "decode, batch 1, 4,096", "prefill, batch 1, 4,096"]
    assert ["other", "300", "500", ""] in rows
    assert ["other (another model: a bar for speed only)", "500", "75.0%", "2.0e-02"] in rows
    assert next(row for row in rows if row[0] == "917,504")[1] == "random"
    assert next(row for row in rows if row[0] == "4,096")[1:3] == ["computed", "50"]
    assert ["1x1", "18.0", "0.79", "0.99"] in rows
    assert ["disk, not in memory", "0.40 s", "0.20", "511 of 512"] in rows
    assert ["full", "5", "1,627", "1.0000 to 1.0000", "1,621"] in rows
    assert ["flash", "43,026", "5,057,536", "", ""] in rows
    assert ["prefill without a hit, tokens 512", "4.00 s", "1.01"] in rows
    assert ["decode step, batch 8", "0.50 s", "1.50"] in rows
    assert ["cache", "96.1%", "98.0%"] in rows
    assert ["random, of 32 tokens", "1", "ngram", "adaptive", "0.99", "100", "25% of 1,000"] in rows
    assert ["32", "yes", "1.00 s", "3.00 s (2.00 s to 4.00 s)", ""] in rows
    assert ["recall at 4,096 tokens", "right answers, greedy", "1,000", "960", "96.0%",
            "94.0% - 97.0%"] in rows  # fmt: skip
    assert ["short tasks", "accepted drafts at 2", "400", "300", "75.0%", "70.0% - 80.0%"] in rows
    assert ["mtp", "up to 4", "1.25", "250", "1.10", "1.75", "50% of 2,000"] in rows
    assert ["sort", "1.25", "1.25", "1.75", "50% of 2,000", "", "", ""] in rows
    assert ["transformers, fastest", "100 (eager, 1,024 tokens a pass)"] in rows
    assert ["**bittrue, published, over transformers, fastest**", "3.50"] in rows
    head = next(row for row in rows if row[0].startswith("mini, sort, 3 x 4 answers of up to 5 tokens"))
    assert head[1:] == ["step", "rollout", "train", "publish", "tokens of an answer", "right answers",
                        "answers trained on"]  # fmt: skip
    assert ["trl (eager, 2 passes)", "1.00 s", "", "", "", "8.2", "", "75%"] in rows
    assert ["**trl over bittrue**", "2.75 (2.50 to 3.50)", "", "", "", "", "", ""] in rows
    assert ["trl, tried before (eager, 2 passes)", "3.00 s", "", "", "", "", "", ""] in rows
    sources = [row for row in rows if row[1:2] == ["`make peers`"]]
    assert sources == [["`peers-t256.json`", "`make peers`", "`abc`", "2026-01-02", "CPU, 2 cores",
                        "preset t256, threads 2"]]  # fmt: skip


def test_the_picture_has_a_line_for_every_engine_and_frontier(results: dict[str, Result]) -> None:
    shown = panels(results)
    assert [panel.title for panel in shown] == ["t256", "flash4"]
    assert shown[0].lines == {
        "bittrue": [(256, 900.0), (4096, 800.0)],
        "other": [(256, 300.0), (4096, 500.0)],
    }
    root = ElementTree.fromstring(svg(results))
    space = {"s": "http://www.w3.org/2000/svg"}
    lines = root.findall(".//s:polyline", space)
    assert len(lines) == 3
    texts = {text.text for text in root.findall(".//s:text", space)}
    assert {"bittrue", "other", "bittrue, frontier", "256", "1M"} <= texts
    # More tokens/s is higher up, a longer context further right.
    (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in lines[0].get("points", "").split())
    assert x1 < x2 and y1 < y2
    assert ElementTree.fromstring(svg({})) is not None


def test_the_page_is_what_the_stored_results_say() -> None:
    results = read_results(ROOT / "benchmarks" / "results")
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page(results), (
        "run `make bench-report`"
    )
    for name, picture in pictures(results).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == picture, "run `make bench-report`"
