"""The memory ledger of an engine: every byte it may come to hold, by kind, from integers alone.

Resident memory counts a page of memory only once it has been touched: the pools are reserved at the start and
become resident as sequences fill them, the weights as they are first read. The ledger is what they grow to.
"""

from dataclasses import dataclass
from typing import Protocol

from bittrue.config.formats import ActDtype, ceil_div
from bittrue.kv.layout import HCA_RATIO, PAGE_TOKENS, KVLayout, PartName, pages_for

# What the engine process holds before any checkpoint: Python, torch and the other libraries, as measured
# (Linux x86-64, CPU build of torch 2.13). The tables of tokenizer and grammar come on top, by vocabulary.
PROCESS_BYTES = 260 << 20
VOCAB_ENTRY_BYTES = 1792

# A token id that waits or is in the cache: an int, and its places in the request, the sequence and the prefix
# tree.
TOKEN_BYTES = 64

# Logits of one block of rows are held at a time: 64 rows of 129,280 ids are 33 MB.
LOGIT_ROWS = 64
_LOGIT_COPIES = 4  # logits, scores, and what sampling sorts
# Tokens of a captured step at most: beyond, the kernels take far longer than the Python between them.
GRAPH_ROWS = 32
GRAPHS = 64  # captured steps held at a time
_GRAPH_LAYER_BYTES = 5 << 10  # of one of them, one layer's calls with their arguments, as measured
GRAPH_BLOCK_BYTES = 1 << 20  # what large pages, touched in part, add to the memory they share
# Work space of the kernels (ops/cpu/csrc): tokens of one pass of the index, places for what its threads find,
# decoded cache rows and weight rows a thread holds.
_INDEX_CELLS, _INDEX_CELLS_PER_THREAD, _INDEX_CELL_BYTES, _INDEX_TOKENS = 2048, 192, 4144, 128
_KEPT_ROWS_BYTES = 1 << 20
_PANEL_ROWS = 64
_PARTS: tuple[PartName, ...] = ("rows", "keys", "window", "csa", "csa_index", "hca_fold", "hca_pending")


class StepShape(Protocol):
    """The widths of a model that a step's buffers have (ModelConfig has them)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_lora_rank(self) -> int: ...
    @property
    def o_groups(self) -> int: ...
    @property
    def o_lora_rank(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def index_num_heads(self) -> int: ...
    @property
    def index_head_dim(self) -> int: ...
    @property
    def index_topk(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_shared_experts(self) -> int: ...
    @property
    def hc_mult(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StepBounds:
    """The largest step there can be. ``threads``: each has work space of its own."""

    max_step_tokens: int
    max_running: int
    max_context: int
    threads: int
    max_draft: int = 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes by kind, which add up to ``total``.

    ``weights``: the mapped files; ``kv_*``: the pages; ``state_*``: the state slots; ``tokens``: the ids of
    the sequences that fill the pages; ``step``: buffers of the largest step;
    ``graphs``: those of captured decode steps; ``process``: the program itself; ``offload_hot``: rows of the
    offload file that stay in memory. ``offload_file_bytes`` is that file: disk, not in the total.
    """

    lines: dict[str, int]
    offload_file_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def memory_ledger(
    layout: KVLayout,
    shape: StepShape,
    *,
    act: ActDtype,
    pages: int,
    slots: int,
    weight_bytes: int,
    bounds: StepBounds,
    offload_hot: int = 0,
) -> Ledger:
    """What an engine with these pools holds when every pool is full and the largest step has run; requests
    that wait in the queue hold their token ids beside it.

    ``weight_bytes``: the checkpoint's files, which are mapped and never copied. ``offload_hot``: the knob;
    what it counts for is never more than the file.
    """
    counts = {"page": pages, "slot": slots}
    parts = {part.name: counts[part.per] for layer in layout.layers for part in layer.parts}
    pools = {
        f"{'kv' if name in ('rows', 'keys') else 'state'}_{name}": layout.part_bytes(name)
        * parts.get(name, 0)
        for name in _PARTS
    }
    lines = {"weights": weight_bytes, **pools}
    lines["tokens"] = pages * PAGE_TOKENS * TOKEN_BYTES
    lines["step"] = step_bytes(shape, act=act, bounds=bounds)
    lines["graphs"] = graph_bytes(shape, act=act, pages=pages, bounds=bounds)
    lines["process"] = PROCESS_BYTES + shape.vocab_size * VOCAB_ENTRY_BYTES
    offloaded = layout.offload_file_bytes(pages)
    if offloaded:
        lines["offload_hot"] = min(offload_hot, offloaded)
    return Ledger(lines, offloaded)


def step_bytes(shape: StepShape, *, act: ActDtype, bounds: StepBounds) -> int:
    """A bound on the buffers of one step: activations, and the kernels' work space, which is kept.

    Linear in ``max_step_tokens`` and in the model's widths; of the context it depends only where one token
    lists what it reads (HCA rows, page ids).
    """
    tokens = min(bounds.max_step_tokens, bounds.max_running * bounds.max_context)
    rows = min(LOGIT_ROWS, bounds.max_running * (1 + bounds.max_draft))
    logits = rows * shape.vocab_size * 4 * _LOGIT_COPIES
    page_table = 2 * 4 * bounds.max_running * pages_for(bounds.max_context)
    cells = max(_INDEX_CELLS, _INDEX_CELLS_PER_THREAD * bounds.threads)
    found = cells * (16 * shape.index_topk + _INDEX_CELL_BYTES)
    found += _INDEX_TOKENS * shape.index_num_heads * (2 * shape.index_head_dim + 3) * 4
    threads = bounds.threads * _thread_bytes(shape, bounds.max_context)
    return tokens * _token_bytes(shape, act) + logits + page_table + found + threads


def graph_bytes(shape: StepShape, *, act: ActDtype, pages: int, bounds: StepBounds) -> int:
    """What captured steps keep: the results of one layer and a page table, which all layers and all captures
    share, and each its list of calls."""
    rows = min(GRAPH_ROWS, bounds.max_step_tokens)
    table = min(GRAPH_ROWS, bounds.max_running) * min(pages, pages_for(bounds.max_context)) * 4
    calls = GRAPHS * shape.num_layers * _GRAPH_LAYER_BYTES
    return GRAPH_BLOCK_BYTES + rows * (_token_bytes(shape, act) + shape.vocab_size * 4) + table + calls


def _token_bytes(shape: StepShape, act: ActDtype) -> int:
    """Of one token, what a layer's sub-layers hold."""
    in_act = (2 if act == "bf16" else 4) * (_attention_width(shape) + _experts_width(shape))
    return in_act + 4 * _f32_width(shape)


def _attention_width(shape: StepShape) -> int:
    """Activations per token that live at once in an attention sub-layer."""
    queries = 3 * shape.num_heads * shape.head_dim  # projected, rotated, and what attention returns
    low_rank = 2 * shape.q_lora_rank + shape.o_groups * shape.o_lora_rank + 4 * shape.head_dim
    index_queries = 2 * shape.index_num_heads * shape.index_head_dim
    return 3 * shape.hc_mult * shape.hidden_size + 3 * shape.hidden_size + queries + low_rank + index_queries


def _experts_width(shape: StepShape) -> int:
    """The same for the experts: gate, up and result of every chosen one, and of the shared ones."""
    chosen = shape.experts_per_token * (2 * shape.moe_intermediate_size + shape.hidden_size)
    return chosen + shape.num_shared_experts * 4 * shape.moe_intermediate_size


def _f32_width(shape: StepShape) -> int:
    """What is f32 whatever the activations are: widened inputs, compressor inputs, scores, expert sums."""
    widened = shape.hidden_size + shape.experts_per_token * shape.moe_intermediate_size
    widened += max(shape.hidden_size, shape.o_groups * shape.o_lora_rank, shape.num_heads * shape.head_dim)
    compressors = 2 * 2 * (shape.head_dim + shape.index_head_dim)
    index = shape.index_num_heads * (shape.index_head_dim + 1) + shape.index_topk
    return widened + compressors + index + 2 * shape.num_experts + 2 * shape.hidden_size


def _thread_bytes(shape: StepShape, max_context: int) -> int:
    """Work space of one thread: the rows one token attends to, their probabilities, decoded weights."""
    most_rows = shape.window + max(shape.index_topk, ceil_div(max_context, HCA_RATIO))
    heads = ceil_div(shape.num_heads, 16) * 16
    attention = most_rows * (8 + 4 * heads) + _KEPT_ROWS_BYTES + 8 * heads * shape.head_dim
    widest = max(shape.hidden_size, shape.moe_intermediate_size, shape.num_heads * shape.head_dim)
    return attention + _PANEL_ROWS * widest * 4
