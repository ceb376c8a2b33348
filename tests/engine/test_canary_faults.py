"""The canary finds every planted fault where it is, and nothing in any correct use of the cache."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.cached_runs import CachedRuns, State, Stored
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.errors import KVCorrupted
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.moves import ClearSlot, CopyPage, CopySlot
from bittrue.ops.numeric import first_difference

PARTS = ("window", "csa_rows", "keys", "hca_rows", "csa", "csa_index", "hca_fold", "hca_pending")
NUM_TOKENS = 270  # an open window of both compressors, the third page


@pytest.mark.parametrize(
    ("seed", "precision", "level", "act"), [(1, "f32", "maths", "f32"), (2, "fp4", "published", "bf16")]
)
def test_a_long_mix_of_correct_steps_raises_nothing(
    seed: int, precision: str, level: Level, act: ActDtype
) -> None:
    mix = Mix(CachedRuns(seed, precision, level, act))
    for _ in range(200):
        mix.act()
    assert mix.runs.canary.num_faults == 0
    assert set(mix.done) == set(Mix.ACTIONS) and min(mix.done.values()) >= 3, mix.done


@pytest.fixture
def runs() -> CachedRuns:
    return CachedRuns(9)


def step_fails(runs: CachedRuns, state: State) -> str:
    """The canary's words about the next step of ``state``."""
    state.tokens = state.tokens + runs.random_tokens(1)
    state.done = len(state.tokens) - 1
    with pytest.raises(KVCorrupted) as caught:
        runs.step([state], [1])
    return str(caught.value)


def unit_of(runs: CachedRuns, state: State, part: str) -> tuple[int, int | None, int, str]:
    """(first index, second index, position, place) of one row that the next step can see."""
    page, slot = f"page {state.pages[1]}", f"slot {state.slot}"
    ring = runs.caches_of(part)[0][1].shape[1]
    return {
        "csa_rows": (state.pages[1], 9, 128 + 4 * 9 + 3, page),
        "keys": (state.pages[1], 9, 128 + 4 * 9 + 3, page),
        "hca_rows": (state.pages[1], 0, 255, page),
        "window": (state.slot, (NUM_TOKENS - 15) % ring, NUM_TOKENS - 15, slot),
        "csa": (state.slot, 266 % ring, 266, slot),
        "csa_index": (state.slot, 266 % ring, 266, slot),
        "hca_fold": (state.slot, None, state.fold, slot),
        "hca_pending": (state.slot, 268 % ring, 268, slot),
    }[part]


def cells_of(tensor: Tensor, unit: tuple[int, int | None, int, str]) -> Tensor:
    """The bytes of a row, as a view."""
    row = tensor[unit[0]] if unit[1] is None else tensor[unit[0], unit[1]]
    return row.view(torch.uint8).view(-1)


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_changed_is_found_in_its_layer_and_place(part: str, runs: CachedRuns) -> None:
    runs.run(runs.random_tokens(40))
    state = runs.run(runs.random_tokens(NUM_TOKENS))
    layers = runs.caches_of(part)
    layer, tensor = layers[-1]
    unit = unit_of(runs, state, part)
    for byte in (0, -1):
        cells_of(tensor, unit)[byte] ^= 1
        said = step_fails(runs, state)
        name = part.removeprefix("csa_").removeprefix("hca_") if part.endswith("_rows") else part
        assert f"content of {name} in {unit[3]} (layer {layer}) at position {unit[2]}:" in said
        cells_of(tensor, unit)[byte] ^= 1
        state.tokens.pop()
    state.tokens.append(1)
    runs.step([state], [1])
    assert runs.canary.num_faults == 2


@pytest.mark.parametrize("part", PARTS)
def test_the_row_of_another_sequence_in_one_layer_is_found(part: str, runs: CachedRuns) -> None:
    other, state = (runs.run(runs.random_tokens(NUM_TOKENS)) for _ in range(2))
    layer, tensor = runs.caches_of(part)[0]
    mine, foreign = (unit_of(runs, sequence, part) for sequence in (state, other))
    cells_of(tensor, mine)[:] = cells_of(tensor, foreign)
    said = step_fails(runs, state)
    assert f"in {mine[3]} (layer {layer}) at position {mine[2]}:" in said


def wrong_page(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.pages[1] = other.pages[1]
    return "keys+rows", f"page {other.pages[1]}", 131


def pages_in_the_wrong_order(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.pages[:2] = state.pages[1::-1]
    return "keys+rows", f"page {state.pages[0]}", 3


def wrong_slot(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.slot = other.slot
    return "window", f"slot {other.slot}", NUM_TOKENS - 15


def copied_page(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    runs.move(CopyPage(other.pages[2], state.pages[2]))
    return "keys+rows", f"page {state.pages[2]}", 259


def copied_slot(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    runs.move(CopySlot(other.slot, state.slot))
    return "window", f"slot {state.slot}", NUM_TOKENS - 15


def cleared_slot(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    runs.move(ClearSlot(state.slot))
    return "window", f"slot {state.slot}", NUM_TOKENS - 15


def state_of_an_earlier_position(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.done -= 1
    state.tokens.pop()
    old = runs.snapshot(state)
    state.tokens.append(7)
    runs.step([state], [1])
    runs.move(CopySlot(old.slot, state.slot))
    # The ring still has the row of the token that was last at 269; it was another token's.
    return "window", f"slot {state.slot}", NUM_TOKENS - 1


def fold_elsewhere(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.fold -= 1
    return "hca_fold", f"slot {state.slot}", state.fold


def a_page_never_written(runs: CachedRuns, state: State, other: State) -> tuple[str, str, int]:
    state.pages[0] = runs.new_page()
    return "keys+rows", f"page {state.pages[0]}", 3


@pytest.mark.parametrize(
    "plant",
    [
        wrong_page,
        pages_in_the_wrong_order,
        wrong_slot,
        copied_page,
        copied_slot,
        cleared_slot,
        state_of_an_earlier_position,
        fold_elsewhere,
        a_page_never_written,
    ],
)
def test_what_belongs_to_another_sequence_or_position_is_found(
    plant: Callable[[CachedRuns, State, State], tuple[str, str, int]], runs: CachedRuns
) -> None:
    other, state = (runs.run(runs.random_tokens(NUM_TOKENS)) for _ in range(2))
    part, place, position = plant(runs, state, other)
    said = step_fails(runs, state)
    assert f"identity of {part} in {place} (all layers) at position {position}:" in said, said


@pytest.mark.parametrize(
    "part", ["csa_rows", "hca_rows", "window", "csa", "csa_index", "hca_fold", "hca_pending"]
)
def test_a_copy_that_forgot_one_part_is_found(part: str, runs: CachedRuns) -> None:
    state = runs.run(runs.random_tokens(NUM_TOKENS))
    tensors = [tensor for _, tensor in runs.caches_of(part)]
    before = [tensor.clone() for tensor in tensors]
    copy = runs.snapshot(state)
    if part.endswith("_rows"):
        runs.move(CopyPage(state.pages[1], copy.pages[2]))
        copy.pages[1] = copy.pages[2]
        copy.pages[2] = state.pages[2]
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)
    name = part.removeprefix("csa_").removeprefix("hca_") if part.endswith("_rows") else part
    assert f"content of {name} in " in step_fails(runs, copy)


def test_a_ring_short_of_rows_is_found(runs: CachedRuns) -> None:
    state = runs.run(runs.random_tokens(NUM_TOKENS))
    state.tokens.append(3)
    runs.step([state], [1], [runs.max_draft + 2])
    state.fold = state.done
    said = step_fails(runs, state)
    assert f"identity of window in slot {state.slot} (all layers) at position {NUM_TOKENS - 14}:" in said


@pytest.mark.parametrize("kept", [200, 259, 260, 290])
def test_a_replay_that_begins_too_late_is_found_and_no_other(kept: int) -> None:
    for late in range(20):
        runs = CachedRuns(3)
        tokens = runs.random_tokens(390)
        rows = runs.run(tokens[:300])
        state = runs.recompute(rows, tokens, kept, late)
        exact = runs.expected(tokens)[kept:]
        try:
            got = torch.cat([runs.step([state], [n]) for n in (30, len(tokens) - state.done - 30)])
        except KVCorrupted as error:
            assert "replay of " in str(error) and f"slot {state.slot}" in str(error)
            break
        assert first_difference(exact, got[-len(exact) :]) is None, (kept, late, "not noticed")
    else:
        pytest.fail("20 tokens too few were not noticed")
    # The last one that passed was as late as can be: without the canary the next one has other bits.
    blind = CachedRuns(3)
    rows = blind.run(blind.random_tokens(390)[:300])
    state = blind.recompute(rows, tokens, kept, late)
    blind.canary.mode = "log"
    got = blind.step([state], [len(tokens) - state.done])
    assert first_difference(exact, got[-len(exact) :]) is not None, "a false alarm"


def test_a_replay_that_would_overwrite_rows_is_found(runs: CachedRuns) -> None:
    tokens = runs.random_tokens(280)
    state = runs.recompute(runs.run(tokens), [*tokens, 5], 270)
    state.kept = 0
    with pytest.raises(KVCorrupted, match="found a cleared state"):
        runs.step([state], [5])


def test_blobs_of_other_tokens_are_found(runs: CachedRuns) -> None:
    one, other = (runs.store(runs.run(runs.random_tokens(NUM_TOKENS))) for _ in range(2))
    mixed = Stored(one.tokens, [one.pages[0], other.pages[1]], one.state, one.fold)
    with pytest.raises(
        KVCorrupted, match=r"keys\+rows in page .* position 131: .*a loaded blob of other tokens"
    ):
        runs.step([runs.load(mixed, [*one.tokens, 1])], [1])
    mixed = Stored(one.tokens, one.pages, other.state, one.fold)
    with pytest.raises(KVCorrupted, match="a loaded blob of other tokens"):
        runs.step([runs.load(mixed, [*one.tokens, 1])], [1])


def test_a_blob_whose_tokens_agree_but_not_those_before_is_found(runs: CachedRuns) -> None:
    page = runs.random_tokens(PAGE_TOKENS)
    one, other = (runs.store(runs.run([*runs.random_tokens(PAGE_TOKENS), *page])) for _ in range(2))
    mixed = Stored(one.tokens, [one.pages[0], other.pages[1]], one.state, one.fold)
    with pytest.raises(KVCorrupted, match="position 131: .*a loaded blob of other tokens"):
        runs.step([runs.load(mixed, [*one.tokens, 1])], [1])


def test_a_blob_that_was_not_loaded_whole_is_found(runs: CachedRuns) -> None:
    stored = runs.store(runs.run(runs.random_tokens(NUM_TOKENS)))
    state = runs.load(stored, stored.tokens)
    _, rows = runs.caches_of("csa_rows")[1]
    rows[state.pages[0], 3] ^= 1
    assert f"content of rows in page {state.pages[0]}" in step_fails(runs, state)


def test_in_mode_log_a_fault_is_one_line_and_the_run_goes_on() -> None:
    runs = CachedRuns(4, mode="log")
    state = runs.run(runs.random_tokens(NUM_TOKENS))
    _, rows = runs.caches_of("csa_rows")[0]
    rows[state.pages[0], 3] ^= 1
    rows[state.pages[0], 8] ^= 1
    for _ in range(5):
        state.tokens.append(1)
        runs.step([state], [1])
    lines = runs.lines.getvalue().splitlines()
    assert len(lines) == runs.canary.num_faults == 1
    assert "ERROR" in lines[0] and "kv_canary" in lines[0]
    for field in ("kind=content", "part=rows", "layer=1", f'place="page {state.pages[0]}"', "position=15"):
        assert field in lines[0]


class Mix:
    """Random correct actions; every token's streams are compared with a run that caches nothing."""

    ACTIONS = (
        *("step",) * 14,
        *("fresh", "fresh", "drop", "drop", "drop", "snapshot", "snapshot"),
        *("resume", "resume", "recompute", "recompute", "store", "load", "load"),
    )

    def __init__(self, runs: CachedRuns) -> None:
        self.runs, self.rng = runs, runs.rng
        self.live: list[State] = []
        self.snapshots: list[State] = []
        self.stored: list[Stored] = []
        self.done: Counter[str] = Counter()
        self.streams: dict[tuple[int, ...], Tensor] = {}

    def act(self) -> None:
        while not getattr(self, name := self.rng.choice(self.ACTIONS))():
            pass
        self.done[name] += 1

    @property
    def has_room(self) -> bool:
        return len(self.runs.free_slots) >= 2 and self.runs.num_free_pages >= 6

    def tail(self) -> list[int]:
        return self.runs.random_tokens(self.rng.choice((1, 3, 40, 150)))

    def step(self) -> bool:
        chosen = self.rng.sample(self.live, self.rng.randint(1, len(self.live))) if self.live else []
        counts, wrong = [], []
        for state in chosen:
            if state.done == len(state.tokens):
                if self.runs.num_free_pages < 4 or state.done > 500:
                    return False
                state.tokens = state.tokens + self.tail()
            counts.append(min(len(state.tokens) - state.done, self.rng.choice((1, 1, 2, 7, 60, 130))))
            may_draft = state.done + counts[-1] >= state.kept
            wrong.append(self.rng.randint(0, self.runs.max_draft) if may_draft else 0)
        if not chosen:
            return False
        starts = [state.done for state in chosen]
        streams = torch.split(self.runs.step(chosen, counts, wrong), counts)
        for state, start, got in zip(chosen, starts, streams, strict=True):
            exact = max(start, state.kept)
            want = self.expected(state.tokens)[exact : state.done]
            assert first_difference(want, got[exact - start :]) is None, "this run itself is not correct"
        return True

    def expected(self, tokens: list[int]) -> Tensor:
        key = tuple(tokens)
        if key not in self.streams:
            self.streams[key] = self.runs.expected(tokens)
        return self.streams[key]

    def fresh(self) -> bool:
        if self.has_room:
            self.live.append(self.runs.begin(self.runs.random_tokens(self.rng.choice((3, 130, 300)))))
        return self.has_room

    def drop(self) -> bool:
        states = self.rng.choice((self.live, self.snapshots))
        if len(states) < 2:
            return False
        self.runs.drop(states.pop(self.rng.randrange(len(states))))
        return True

    def snapshot(self) -> bool:
        states = [state for state in self.live if state.done >= max(1, state.kept)]
        if not states or not self.has_room:
            return False
        self.snapshots.append(self.runs.snapshot(self.rng.choice(states)))
        return True

    def resume(self) -> bool:
        computed = [state for state in self.live + self.snapshots if state.done >= state.kept]
        pairs = [
            (snapshot, rows)
            for snapshot in self.snapshots
            for rows in computed
            if rows.done >= snapshot.done and rows.tokens[: snapshot.done] == snapshot.tokens
        ]
        if not pairs or not self.has_room:
            return False
        snapshot, rows = self.rng.choice(pairs)
        kept = self.rng.randint(snapshot.done, rows.done)
        self.live.append(self.runs.resume(snapshot, rows, rows.tokens[:kept] + self.tail(), kept))
        return True

    def recompute(self) -> bool:
        rows = [state for state in self.live + self.snapshots if state.done >= max(1, state.kept)]
        if not rows or not self.has_room:
            return False
        source = self.rng.choice(rows)
        kept = self.rng.randint(1, source.done)
        self.live.append(self.runs.recompute(source, source.tokens[:kept] + self.tail(), kept))
        return True

    def store(self) -> bool:
        states = [state for state in self.live + self.snapshots if state.done >= max(1, state.kept)]
        if states:
            self.stored.append(self.runs.store(self.rng.choice(states)))
        return bool(states)

    def load(self) -> bool:
        if not self.stored or not self.has_room:
            return False
        stored = self.rng.choice(self.stored)
        self.live.append(self.runs.load(stored, stored.tokens + self.tail()))
        return True
