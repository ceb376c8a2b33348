"""What the engine process really holds against what its ledger says."""

import asyncio
import io
import random
import tracemalloc
from pathlib import Path

import pytest

from bittrue.config.run import RunConfig
from bittrue.engine.launch import DEFAULT_FACTORY, EngineProcess
from bittrue.engine.sequence import Sequence
from bittrue.engine.supervisor import EngineClient
from bittrue.engine.types import Request, SamplingParams
from bittrue.engine.wire import HEADER_BYTES, decode_to_engine, frame
from bittrue.kv.layout import pages_for
from bittrue.kv.ledger import PROCESS_BYTES, TOKEN_BYTES
from bittrue.kv.pages import PagePool, SlotPool
from bittrue.kv.prefix import PrefixTree
from bittrue.model.presets import make_checkpoint
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.obs.resident import Resident, resident

STEP_TOKENS = 1024
TOUCHING = "standins.touching_engine:TouchingEngine"


@pytest.fixture(scope="module", params=["tiny", "t256"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, 3, "bf16", tmp_path_factory.mktemp("memory") / request.param)


async def measured(config: RunConfig, factory: str) -> tuple[dict[str, int], Resident, Resident]:
    """(ledger, resident at the start, resident after the largest steps) of an engine process."""
    client = EngineClient(config, Log(io.StringIO()), Metrics())
    with EngineProcess.start(config, factory=factory) as process:
        ready = await client.start(process)
        try:
            begun = resident(process.pid)
            await run_large_steps(client)
            ended = resident(process.pid)
        finally:
            await client.close()
    assert begun is not None and ended is not None
    return ready.memory.ledger, begun, ended


async def run_large_steps(client: EngineClient) -> None:
    """Full steps of one long prompt, then of many short ones, then decodes together."""
    draw = random.Random(0)
    sizes = [3 * STEP_TOKENS] + [STEP_TOKENS // 8] * 16
    requests = [
        Request(
            request_id=f"r{i}",
            prompt=tuple(draw.randrange(10, 1000) for _ in range(size)),
            params=SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, ignore_eos=True),
        )
        for i, size in enumerate(sizes)
    ]
    with client.open(requests) as channel:
        while channel.unfinished:
            await channel.next_events()


def knobs(directory: Path) -> RunConfig:
    return RunConfig(model=str(directory), kv_memory=768 << 20, max_step_tokens=STEP_TOKENS, max_running=32)


def test_resident_memory_is_what_the_ledger_says_once_all_of_it_is_touched(directory: Path) -> None:
    ledger, _, ended = asyncio.run(measured(knobs(directory), TOUCHING))
    pools = sum(count for kind, count in ledger.items() if kind.startswith(("kv_", "state_")))
    assert 0.99 * (768 << 20) < pools <= 768 << 20
    # The pools are touched, not filled with sequences: their token ids are not there.
    expected = sum(ledger.values()) - ledger["tokens"]
    assert abs(ended.bytes - expected) < 0.05 * expected, (ended, ledger)


def test_pools_are_not_touched_for_nothing_and_weights_are_not_copied(directory: Path) -> None:
    ledger, begun, ended = asyncio.run(measured(knobs(directory), DEFAULT_FACTORY))
    weights = ledger["weights"]
    assert weights == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    # Weights are pages of their file; a copy would be memory of the process's own.
    assert begun.file_bytes > weights
    slack = 0.05 * ledger["process"]
    assert begun.own_bytes < ledger["process"] - (80 << 20) + slack, "libraries alone are 80 MiB of files"
    assert begun.bytes < weights + ledger["process"] + slack
    # A few pages and slots, the buffers of a step: far from the 768 MiB of the pools.
    assert ended.bytes - begun.bytes < ledger["step"] + (32 << 20)


def test_a_token_of_a_sequence_takes_what_the_ledger_counts_for_it() -> None:
    count = 200_000
    prompt = tuple(range(1000, 1000 + count))  # ids that no table of small integers holds
    data = frame(Request(request_id="r", prompt=prompt, params=SamplingParams()))[HEADER_BYTES:]
    tracemalloc.start()
    try:
        request = decode_to_engine(data)
        assert isinstance(request, Request)
        sequence = Sequence.of(request, arrival=0, now=0.0)
        pages = PagePool(pages_for(count))
        tree = PrefixTree(pages, SlotPool(1))
        tree.insert(b"space", [], sequence.tokens, pages.allocate(pages.total) or ())
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(sequence.tokens) == count
    assert 0.8 * TOKEN_BYTES < held / count <= TOKEN_BYTES


def test_the_stated_constant_is_that_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert f"{PROCESS_BYTES >> 20} MiB for Python" in page and f"{TOKEN_BYTES} per token" in page
