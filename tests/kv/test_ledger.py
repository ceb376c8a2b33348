"""The ledger's sums, and that no line grows with what it should not."""

from dataclasses import asdict, dataclass, replace

import pytest

from bittrue.config.formats import ActDtype, Level
from bittrue.kv.layout import KVLayout, LayerKind
from bittrue.kv.ledger import PROCESS_BYTES, StepBounds, graph_bytes, memory_ledger, step_bytes

KIND: dict[int, LayerKind] = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class Shape:
    """DeepSeek-V4-Flash, as spec 1.2 gives it."""

    compress_ratios: tuple[int, ...] = (0, 0) + (4, 128) * 20 + (4,)
    vocab_size: int = 129_280
    hidden_size: int = 4096
    num_heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    window: int = 128
    index_num_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    num_experts: int = 256
    experts_per_token: int = 6
    moe_intermediate_size: int = 2048
    num_shared_experts: int = 1
    hc_mult: int = 4

    @property
    def num_layers(self) -> int:
        return len(self.compress_ratios)

    def layer_kind(self, layer: int) -> LayerKind:
        return KIND[self.compress_ratios[layer]]


BOUNDS = StepBounds(max_step_tokens=512, max_running=64, max_context=1 << 20, threads=16)


@pytest.mark.parametrize(("level", "act"), [("published", "bf16"), ("maths", "bf16"), ("maths", "f32")])
def test_lines_add_up_to_the_pools_the_weights_and_the_rest(level: Level, act: ActDtype) -> None:
    layout = KVLayout.of(Shape(), level=level, act=act, max_draft=3)
    ledger = memory_ledger(
        layout, Shape(), act=act, pages=1000, slots=7, weight_bytes=160 << 30, bounds=BOUNDS
    )
    lines = ledger.lines
    pools = sum(count for kind, count in lines.items() if kind.startswith(("kv_", "state_")))
    assert pools == layout.pool_bytes(1000, 7)
    assert lines["weights"] == 160 << 30
    assert lines["tokens"] == 64 * 128_000
    assert lines["step"] == step_bytes(Shape(), act=act, bounds=BOUNDS)
    assert lines["graphs"] == graph_bytes(Shape(), act=act, pages=1000, bounds=BOUNDS)
    assert lines["process"] == PROCESS_BYTES + 129_280 * 1792
    assert ledger.total == sum(lines.values())
    assert all(count > 0 for count in lines.values())


def test_a_model_of_window_layers_has_no_pages_to_hold() -> None:
    shape = Shape(compress_ratios=(0, 0))
    layout = KVLayout.of(shape, level="published", act="bf16")
    lines = memory_ledger(layout, shape, act="bf16", pages=10, slots=2, weight_bytes=5, bounds=BOUNDS).lines
    assert lines["kv_rows"] == lines["kv_keys"] == lines["state_csa"] == lines["state_hca_fold"] == 0
    assert lines["state_window"] == 2 * 2 * 128 * 584


def test_the_buffers_of_a_step_grow_with_its_tokens_and_hardly_with_the_context() -> None:
    def at(**changes: int) -> int:
        return step_bytes(Shape(), act="bf16", bounds=replace(BOUNDS, **changes))

    per_token = (at(max_step_tokens=2048) - at(max_step_tokens=1024)) / 1024
    assert at(max_step_tokens=4096) - at(max_step_tokens=2048) == 2048 * per_token
    # Flash, one token: about a megabyte of queries, expert rows and streams.
    assert 0.4e6 < per_token < 2e6
    # A million tokens of context against 4096: page ids, and lists of rows by thread. No more.
    assert at(max_context=1 << 20) - at(max_context=4096) < 60 << 20
    assert at(max_context=1 << 20) < 1 << 30


def test_captured_steps_hold_the_results_of_one_layer_and_the_calls_of_all() -> None:
    def at(pages: int = 1000, layers: int = 43, **changes: int) -> int:
        shape = replace(Shape(), compress_ratios=(4,) * layers)
        return graph_bytes(shape, act="bf16", pages=pages, bounds=replace(BOUNDS, **changes))

    per_token = (at(max_step_tokens=9) - at(max_step_tokens=1)) / 8
    assert 0.4e6 < per_token < 3e6
    assert at(max_step_tokens=32) == at()  # larger steps are not captured
    # One page table: a row per sequence, as wide as a sequence can have pages.
    assert at(max_running=8, pages=100_000) - at(max_running=8, pages=0) == 8 * 8192 * 4
    # Twice the layers: 64 lists of calls that are twice as long, and nothing else.
    assert at(layers=86) - at(layers=43) == 64 * 43 * (5 << 10)


def test_wider_activations_and_more_threads_take_more() -> None:
    base = step_bytes(Shape(), act="bf16", bounds=BOUNDS)
    assert base < step_bytes(Shape(), act="f32", bounds=BOUNDS) < 2 * base
    assert step_bytes(Shape(), act="bf16", bounds=replace(BOUNDS, threads=17)) > base
    for name, value in asdict(Shape()).items():
        if isinstance(value, int) and name != "rope_dim":
            wider = replace(Shape(), **{name: 2 * value})
            assert step_bytes(wider, act="bf16", bounds=BOUNDS) >= base, name
