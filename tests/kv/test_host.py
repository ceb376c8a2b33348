"""The host tier keeps within its budget; what goes first is what a plain search finds."""

from hypothesis import given, settings
from hypothesis import strategies as st
from support.blobs import SPACE, chain, state

from bittrue.kv.host import HostTier
from bittrue.kv.identity import BlobName
from bittrue.kv.recency import Entry, Recency


def test_a_blob_comes_back_as_it_was_given_without_a_copy() -> None:
    host, (page,) = HostTier(100), chain(1)
    data = b"rows" * 10
    assert host.put(SPACE, page, data)
    assert host.get(SPACE, page) is data
    assert host.get(b"other".ljust(20), page) is None
    assert host.num_bytes == 40


def test_the_end_of_a_chain_goes_before_its_beginning() -> None:
    host, pages = HostTier(40), chain(4)
    for page in pages:
        assert host.put(SPACE, page, bytes(10))
    (other,) = chain(1, first_token=9)
    assert host.put(SPACE, other, bytes(10))
    assert [host.has(SPACE, page) for page in pages] == [True, True, True, False]
    assert host.has(SPACE, other)


def test_a_state_goes_before_its_page() -> None:
    host, (page,) = HostTier(40), chain(1)
    names = [page, state(page.digest, 3), state(page.digest, 9)]
    for name in names:
        assert host.put(SPACE, name, bytes(10))
    assert host.put(SPACE, chain(1, first_token=9)[0], bytes(25))
    assert [host.has(SPACE, name) for name in names] == [True, False, False]


def test_a_use_lets_others_go_first() -> None:
    host, names = HostTier(30), [chain(1, first_token=first)[0] for first in range(5)]
    for name in names[:3]:
        assert host.put(SPACE, name, bytes(10))
    assert host.get(SPACE, names[0]) is not None
    host.touch(SPACE, names[1])
    for name in names[3:]:
        assert host.put(SPACE, name, bytes(10))
    assert [host.has(SPACE, name) for name in names] == [False, True, False, True, True]


def test_a_chain_larger_than_the_budget_keeps_its_beginning() -> None:
    host, pages = HostTier(35), chain(10)
    held = [host.put(SPACE, page, bytes(10)) for page in pages]
    assert held == [True] * 3 + [False] * 7
    assert host.counters["host.refused"] == 7 and host.counters["host.evicted"] == 0
    assert not host.put(SPACE, state(pages[-1].digest, 5), bytes(1))


def test_what_hangs_on_a_refused_page_is_taken_once_the_page_is() -> None:
    host, pages = HostTier(20), chain(3)
    assert [host.put(SPACE, page, bytes(10)) for page in pages] == [True, True, False]
    assert not host.put(SPACE, state(pages[2].digest, 1), bytes(1))
    host.flush(None)
    assert host.put(SPACE, pages[2], bytes(10))
    assert host.put(SPACE, state(pages[2].digest, 1), bytes(1))


def test_a_blob_larger_than_the_budget_costs_nobody_its_place() -> None:
    host, (page,) = HostTier(20), chain(1)
    assert host.put(SPACE, page, bytes(20))
    assert not host.put(SPACE, chain(1, first_token=9)[0], bytes(21))
    assert host.has(SPACE, page)


def test_states_are_listed_below_their_parent_until_they_go() -> None:
    host, (page,) = HostTier(100), chain(1)
    names = [state(page.digest, offset) for offset in (5, 0, 127)]
    for name in (*names, state(SPACE, 5)):
        host.put(SPACE, name, bytes(10))
    assert sorted(host.states(SPACE, page.digest)) == sorted((name.offset, name.digest) for name in names)
    host.flush(SPACE)
    assert host.states(SPACE, page.digest) == [] and host.num_bytes == 0


def test_a_flush_of_one_namespace_leaves_the_others() -> None:
    host, pages, other = HostTier(100), chain(2), b"other".ljust(20)
    for page in pages:
        host.put(SPACE, page, bytes(10))
    host.put(other, state(other, 1), bytes(10))
    assert host.flush(SPACE) == 2
    assert host.num_bytes == 10 and host.has(other, state(other, 1))


# A small tree of names: pages and states below each other, so that sequences of events meet.
TREE = [*chain(3), *chain(2, first_token=5), state(SPACE, 1)]
TREE += [state(page.digest, offset) for page in TREE[:2] for offset in (0, 7)]

EVENTS = ["add", "touch", "pop", "remove"]


def spare(held: dict[BlobName, tuple[int, int]]) -> BlobName:
    """The one that should go: the least recently used that nothing hangs on, by looking at all."""
    free = [
        name
        for name in held
        if name.kind == "state" or not any(other.parent == name.digest for other in held)
    ]
    return min(free, key=lambda name: held[name][1])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "touch", "pop", "remove"]), st.sampled_from(TREE)), max_size=60
    )
)
def test_the_order_of_going_is_that_of_a_plain_search(events: list[tuple[str, BlobName]]) -> None:
    order, held, clock = Recency(), {}, 0
    for event, name in events:
        clock += 1
        if event == "add" and name not in held:
            order.add(Entry((SPACE, name), clock, clock))
            held[name] = (clock, clock)
        elif event == "touch":
            order.touch((SPACE, name), clock)
            if name in held:
                held[name] = (held[name][0], clock)
        elif event in ("pop", "remove") and held:
            oldest = order.oldest()
            assert oldest is not None and oldest.key[1] == spare(held)
            gone = oldest.key[1] if event == "pop" else name
            assert (order.remove((SPACE, gone)) is None) == (gone not in held)
            held.pop(gone, None)
        assert order.num_bytes == sum(size for size, _ in held.values())
    assert len(order) == len(held)
