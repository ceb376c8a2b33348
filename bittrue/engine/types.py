"""What crosses the engine's boundary: requests in, tokens out (plain data, no torch; the same structs go
over the wire)."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
# What becomes of sequences under way when the weights change.
Running = Literal["retract", "in_place", "abort"]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens of one sequence are chosen. Ranges are checked where the request enters (server or
    Engine.generate).

    Noise for a token is a function of (seed, absolute position, token id): the same seed gives the same
    tokens in any batch.
    """

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2^63
    max_tokens: int = 16
    min_tokens: int = 0  # no end-of-sequence or stop id is chosen before; stop strings always count
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None = none; n = the chosen token's and the n most likely ones'
    prompt_logprobs: int | None = None  # the same for every prompt token after the first
    grammar: str | None = None  # a llguidance grammar (JSON text); None = free
    # The grammar starts after this token sequence (e.g. </think>); None = at once.
    grammar_after: tuple[int, ...] | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one token under the model (before temperature and masks), and its likeliest
    rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class Choices(msgspec.Struct, frozen=True, kw_only=True):
    """What was chosen for the computed tokens of a sequence, so that training can choose the same.

    ``experts``: ids of the learned routers for the positions from ``first`` on; earlier ones came out of the
    prefix cache. ``rows``: ids of the CSA layers, ascending, for the positions from ``first_row`` on; before
    4 * (index_topk + 1) - 1 every visible row is read. Shapes: tokens, layers, ids of one, bytes of an id
    (unsigned, little-endian). ``engine.record`` reads them.
    """

    first: int
    experts: bytes
    expert_shape: tuple[int, int, int, int]
    first_row: int
    rows: bytes
    row_shape: tuple[int, int, int, int]
    # Generated token from which on, version of the weights. Two that begin with the first: the one before
    # computed rows of the prompt that are read on.
    versions: tuple[tuple[int, str], ...]


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to run. ``resume`` holds tokens already generated (after a crash): they are replayed,
    not sampled."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    resume: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""  # cached prefixes are shared only between requests with the same salt
    records_choices: bool = False  # the last event carries what was chosen for its tokens


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """What one step added to one sequence. The last event of a sequence has a finish_reason; exactly one
    event does."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token id when asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first event; entry 0 is None
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None  # the stop string or stop token id that ended it
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # known tokens that were not computed again
    num_drafted: int = 0  # draft tokens computed for this sequence so far
    num_accepted: int = 0  # of them, those that became output
    queued_s: float | None = None  # first event only: seconds from arrival to the first step
    choices: Choices | None = None  # last event only, where the request asked for it
    error: str | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop a sequence and free its memory; unknown ids are ignored."""

    request_id: str


class PrefillProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far one running sequence is from its next token: ``num_done`` of ``num_total`` known tokens are
    computed."""

    request_id: str
    num_done: int
    num_total: int


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine may come to hold. ``ledger``: bytes by kind (kv/ledger.py).

    ``page_bytes``, ``slot_bytes``: of one page, one state slot; from them and ``max_snapshots`` follows what
    a longer sequence needs.
    """

    ledger: dict[str, int] = {}
    page_bytes: int = 0
    slot_bytes: int = 0
    max_snapshots: int = 0


class CacheCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the prefix cache did since the start. Tokens are counted when a sequence is admitted.

    ``hit_tokens``: by the tier that held the state (device, host, disk), or ``replay`` where the state was
    computed again from stored rows. ``lookup_tokens``: known tokens of all sequences admitted.
    ``tier_events``: "tier.event" -> count, as host.saved, disk.hit, disk.corrupt.
    """

    lookup_tokens: int = 0
    hit_tokens: dict[str, int] = {}
    replayed_tokens: int = 0
    evicted_pages: int = 0
    evicted_snapshots: int = 0
    tier_bytes: dict[str, int] = {}
    tier_events: dict[str, int] = {}


class DraftCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Draft tokens since the start. ``accepted_at[i]``: drafts at place i of their step that became output,
    of ``drafted_at[i]``."""

    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Counters and gauges of the engine at one moment. Pages and slots: free + held + cached = total, always.

    ``prefills``: the running sequences with more than one known token to compute, by rank.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preempted_total: int = 0
    num_steps_total: int = 0
    num_prompt_tokens_total: int = 0
    num_generated_tokens_total: int = 0
    num_prefill_tokens_total: int = 0  # computed tokens that were known: prompts, and what preemption lost
    prefills: tuple[PrefillProgress, ...] = ()
    pages_total: int = 0
    pages_free: int = 0
    pages_held: int = 0
    pages_cached: int = 0  # of the prefix cache alone: given up when a sequence needs them
    slots_total: int = 0
    slots_free: int = 0
    slots_held: int = 0
    slots_cached: int = 0  # snapshots
    num_canary_faults_total: int = 0
    cache: CacheCounters = CacheCounters()
    drafts: DraftCounters = DraftCounters()
    weight_version: str = ""
