"""The trainer's forward is the engine's (law L9); its gradients do not depend on how documents are packed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import VOCAB, export, random_documents, tiny_trainer

from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.kv.layout import KVLayout
from bittrue.kv.pool import allocate
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.model.presets import Precision
from bittrue.ops.threads import set_kernel_threads, threads_of
from bittrue.train.differentiable import UNKNOWN
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.pack import num_pages, pack, shifted
from bittrue.train.trainer import Trainer

LENGTHS = (1, 2, 5, 127, 128, 129, 260, 33)
BOTH_LEVELS: tuple[Precision, ...] = ("f32", "fp4")


def engine_of(trainer: Trainer, directory: Path) -> Engine:
    model = export(trainer, directory)
    return Engine(model, prefix_cache=False, kv_memory="32MiB", threads=2, log_level="error")


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: leaf.grad.clone() for name, leaf in trainer.masters.named.items() if leaf.grad is not None}


def step_gradients(
    trainer: Trainer, documents: list[Document], weights: LossWeights
) -> dict[str, torch.Tensor]:
    for leaf in trainer.masters.named.values():
        leaf.grad = None
    trainer.backward(documents, weights)
    return gradients(trainer)


def take_a_step(trainer: Trainer) -> None:
    """One plain gradient step: the parameters are not the initial ones any more."""
    trainer.backward(random_documents((60, 200), seed=5), LossWeights())
    with torch.no_grad():
        for leaf in trainer.masters.named.values():
            if leaf.grad is not None:
                leaf.sub_(0.05 * leaf.grad / leaf.grad.norm().clamp(min=1e-6) * leaf.norm())
    trainer.publish()


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    assert a.keys() == b.keys()
    for name, grad in a.items():
        error = float((grad - b[name]).norm() / grad.norm().clamp(min=1e-12))
        assert error < relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("precision", BOTH_LEVELS)
def test_logprobs_are_those_of_the_engine_packed_alone_and_chunked(
    precision: Precision, tmp_path: Path
) -> None:
    trainer = tiny_trainer(precision, draft="mtp")
    take_a_step(trainer)
    documents = random_documents(LENGTHS)
    engine = engine_of(trainer, tmp_path / "model")
    scores = [torch.tensor(engine.score(d.token_ids.tolist())) for d in documents]
    engine.close()
    packed = trainer.logprobs(documents)
    alone = [trainer.logprobs([d])[0] for d in documents]
    chunked = trainer.logprobs(documents, chunk=37)
    padded = trainer.logprobs([_padded(d, 300) for d in documents])
    for i, score in enumerate(scores):
        assert torch.equal(packed[i], score)
        assert torch.equal(alone[i], score)
        assert torch.equal(chunked[i], score)
        assert torch.equal(padded[i][: len(score)], score)


def _padded(document: Document, length: int) -> Document:
    pad = length - len(document)
    return Document(np.pad(document.token_ids, (0, pad)), np.pad(document.is_target, (0, pad)))


@pytest.mark.parametrize("precision", BOTH_LEVELS)
def test_logprobs_are_those_a_rollout_was_sampled_with(precision: Precision, tmp_path: Path) -> None:
    trainer = tiny_trainer(precision)
    take_a_step(trainer)
    engine = engine_of(trainer, tmp_path / "model")
    prompt = tuple(range(3, 60))
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=7, logprobs=0, ignore_eos=True)
    sampled: list[int] = []
    logprobs: list[float] = []
    for event in engine.stream(prompt, params):
        sampled += event.token_ids
        logprobs += [entry.logprob for entry in event.logprobs or ()]
    engine.close()
    whole = np.array([*prompt, *sampled], dtype=np.int32)
    found = trainer.logprobs([Document(whole, np.ones(len(whole), dtype=bool))])[0]
    assert len(sampled) == 100
    assert torch.equal(found[len(prompt) - 1 :], torch.tensor(logprobs))


@pytest.mark.slow
@pytest.mark.parametrize("precision", BOTH_LEVELS)
def test_logprobs_of_20000_tokens_do_not_differ_in_a_bit(precision: Precision, tmp_path: Path) -> None:
    trainer = tiny_trainer(precision, draft="mtp", sliding_window=8)
    take_a_step(trainer)
    documents = random_documents((6000, 3000, 1000, *(100,) * 40, *(1097,) * 6), seed=3)
    engine = engine_of(trainer, tmp_path / "model")
    found = trainer.logprobs(documents)
    for document, ours in zip(documents, found, strict=True):
        assert torch.equal(torch.tensor(engine.score(document.token_ids.tolist())), ours)
    engine.close()
    assert sum(map(len, found)) >= 20_000


@pytest.mark.slow
@pytest.mark.parametrize("precision", BOTH_LEVELS)
def test_logprobs_of_20000_sampled_tokens_do_not_differ_in_a_bit(
    precision: Precision, tmp_path: Path
) -> None:
    """Rollouts of many at a time, of different lengths, against the trainer and the engine's score."""
    trainer = tiny_trainer(precision, draft="mtp")
    take_a_step(trainer)
    engine = engine_of(trainer, tmp_path / "model")
    rng = np.random.default_rng(11)
    prompts = [rng.integers(0, VOCAB, int(n)).tolist() for n in rng.integers(2, 90, 40)]
    rollouts = {str(i): (list(prompt), list[float]()) for i, prompt in enumerate(prompts)}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=520, temperature=1.0, seed=i, logprobs=0, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt=tuple(prompt), params=params))
    while engine.has_work():
        for event in engine.step():
            ids, logprobs = rollouts[event.request_id]
            ids += event.token_ids
            logprobs += [entry.logprob for entry in event.logprobs]
    wholes = [np.array(ids, dtype=np.int32) for ids, _ in rollouts.values()]
    found = trainer.logprobs([Document(ids, np.ones(len(ids), dtype=bool)) for ids in wholes])
    for ids, ours, (_, sampled) in zip(wholes, found, rollouts.values(), strict=True):
        assert torch.equal(ours[-len(sampled) :], torch.tensor(sampled))
        assert torch.equal(ours, torch.tensor(engine.score(ids.tolist())))
    engine.close()
    assert sum(len(sampled) for _, sampled in rollouts.values()) >= 20_000


def test_gradients_of_packed_documents_are_the_sum_of_those_alone() -> None:
    trainer, weights = tiny_trainer("f32", draft="mtp"), LossWeights(mtp=0.3, index=0.0, balance=0.0)
    documents = random_documents((40, 140, 3, 290))
    packed = step_gradients(trainer, documents, weights)
    alone: dict[str, torch.Tensor] = {}
    counts = [int(d.is_target.sum()) for d in documents]
    ahead = [int(d.is_target[2:].sum()) for d in documents]
    for i, document in enumerate(documents):
        share = counts[i] / sum(counts)
        own = LossWeights(mtp=0.3 * (ahead[i] / sum(ahead)) / share, index=0.0, balance=0.0)
        for name, grad in step_gradients(trainer, [document], own).items():
            alone[name] = alone.get(name, torch.zeros(())) + share * grad
    assert_close(packed, alone, 2e-5)


def test_a_second_pass_of_the_draft_module_reads_its_own_streams_one_place_before() -> None:
    trainer, document = tiny_trainer("f32", draft="mtp"), random_documents((90,))[0]
    found = trainer.backward([document], LossWeights(mtp_depth=2)).mtp
    # The same by the serving module, and log-probabilities in float64.
    masters, ops = trainer.masters, trainer.ops
    model = DeepseekV4(masters.config, masters.parameters, ops, level="maths", act="f32")
    assert masters.mtp is not None
    module, batch = Mtp(model, masters.mtp), pack([document.token_ids])
    layout = KVLayout.of(masters.config, level="maths", act="f32", num_draft_layers=1)
    caches = allocate(layout, slots=1, pages=num_pages([len(document)]))
    with torch.no_grad():
        streams = model.forward(batch, caches[:-1])
        passes = []
        for _ in range(2):
            streams = module.forward(MtpInput(shifted(batch), streams, once_each(90, 4)), caches[-1])
            asked = np.flatnonzero(document.is_target[2:])
            logprobs = module.logits(streams[asked]).double().log_softmax(-1)
            chosen = torch.from_numpy(document.token_ids[asked + 2].astype("int64"))
            passes.append(-float(logprobs.gather(1, chosen[:, None]).mean()))
            streams = torch.cat([streams[:1], streams[:-1]])
    assert abs(found - sum(passes) / 2) < 1e-5
    assert abs(passes[0] - passes[1]) > 1e-3


def test_passes_of_the_draft_module_stay_within_their_documents() -> None:
    trainer, weights = tiny_trainer("f32", draft="mtp"), LossWeights(mtp_depth=3)
    documents = random_documents((40, 140, 3, 90))
    packed = trainer.backward(documents, weights).mtp
    counts = [int(d.is_target[2:].sum()) for d in documents]
    alone = [trainer.backward([document], weights).mtp for document in documents]
    mean = sum(count * each for count, each in zip(counts, alone, strict=True)) / sum(counts)
    assert packed == pytest.approx(mean, rel=1e-6)


def test_gradients_do_not_depend_on_micro_batches_or_recomputation() -> None:
    documents = random_documents((40, 140, 3, 290, 17))
    plain = step_gradients(tiny_trainer("fp4", draft="mtp"), documents, LossWeights())
    for other in (
        tiny_trainer("fp4", draft="mtp", micro_tokens=150),
        tiny_trainer("fp4", draft="mtp", recompute=True),
    ):
        assert_close(plain, step_gradients(other, documents, LossWeights()), 2e-5)


def test_threads_and_recomputation_change_no_bit() -> None:
    """More workers than micro-batches, as many, fewer, and one: the sums are the same sums."""
    documents = random_documents((40, 140, 3, 290, 17, 1, 2, 64))
    found = []
    for threads, recompute in ((1, False), (2, True), (3, False), (8, True)):
        trainer = tiny_trainer("fp4", draft="mtp", micro_tokens=150, recompute=recompute)
        before = threads_of(trainer.ops)
        set_kernel_threads(trainer.ops, threads)
        try:
            stats = trainer.backward(documents, LossWeights())
        finally:
            set_kernel_threads(trainer.ops, before)
        losses = (stats.main, stats.mtp, stats.index, stats.balance, stats.task_loss)
        found.append((losses, gradients(trainer)))
    for losses, grads in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(grad, found[0][1][name]) for name, grad in grads.items())


def test_gradients_are_the_same_bits_when_computed_again() -> None:
    trainer, documents = tiny_trainer("fp4", draft="mtp"), random_documents((40, 140, 290))
    first = step_gradients(trainer, documents, LossWeights())
    again = step_gradients(trainer, documents, LossWeights())
    assert all(torch.equal(grad, again[name]) for name, grad in first.items())


def test_every_parameter_gets_a_gradient() -> None:
    trainer = tiny_trainer("fp4", draft="mtp")
    grads = step_gradients(trainer, random_documents((40, 300)), LossWeights())
    zero = [name for name, grad in grads.items() if not grad.abs().max() > 0]
    missing = [name for name in trainer.masters.named if name not in grads]
    assert (zero, missing) == ([], [])


def test_the_index_loss_reaches_the_index_alone() -> None:
    trainer, documents = tiny_trainer("f32"), random_documents((200, 90))
    without = step_gradients(trainer, documents, LossWeights(index=0.0, balance=0.0))
    with_index = step_gradients(trainer, documents, LossWeights(index=5.0, balance=0.0))
    changed = {name for name, grad in without.items() if not torch.equal(grad, with_index[name])}
    assert changed and all(".indexer." in name for name in changed)


def test_the_backward_pass_on_the_reference_is_that_on_the_cpu() -> None:
    documents = random_documents((12, 20))
    ours = step_gradients(tiny_trainer("f32", draft="mtp"), documents, LossWeights())
    reference = step_gradients(
        tiny_trainer("f32", draft="mtp", backend="reference"), documents, LossWeights()
    )
    assert_close(reference, ours, 1e-4)


def test_a_dense_index_reads_every_visible_entry() -> None:
    trainer, documents = tiny_trainer("f32"), random_documents((200,))
    sparse = trainer.backward(documents, LossWeights()).main
    trainer.is_dense = True
    dense = trainer.backward(documents, LossWeights()).main
    wide = tiny_trainer("f32", index_topk=64)
    assert dense != sparse
    assert dense == wide.backward(documents, LossWeights()).main


def test_routes_of_today_replayed_change_nothing_and_those_of_other_parameters_do() -> None:
    trainer, documents = tiny_trainer("f32", draft="mtp"), random_documents((40, 90, 7))
    routes = trainer.routes(documents)
    free = step_gradients(trainer, documents, LossWeights())
    for leaf in trainer.masters.named.values():
        leaf.grad = None
    replayed = trainer.backward(documents, LossWeights(), routes=routes)
    assert all(torch.equal(grad, free[name]) for name, grad in gradients(trainer).items())
    foreign = tiny_trainer("f32", draft="mtp", seed=1).routes(documents)
    assert trainer.backward(documents, LossWeights(), routes=foreign).main != replayed.main


def test_biases_move_towards_balance() -> None:
    trainer = tiny_trainer("f32")
    name = next(iter(trainer.masters.biases))
    loads = torch.tensor([9, 1, 5, 5, 5, 5, 5, 5])
    trainer.update_biases({name: loads}, 0.01)
    assert trainer.masters.biases[name].tolist() == pytest.approx([-0.01, 0.01, *(0.0,) * 6])


def test_loads_count_every_choice_once_also_when_recomputed() -> None:
    documents = random_documents((40, 90))
    plain = tiny_trainer("f32", draft="mtp")
    again = tiny_trainer("f32", draft="mtp", recompute=True)
    loads = plain.backward(documents, LossWeights()).loads
    assert set(loads) == set(plain.masters.biases)
    assert all(int(load.sum()) == 130 * 2 for load in loads.values())
    recomputed = again.backward(documents, LossWeights()).loads
    assert all(torch.equal(load, recomputed[name]) for name, load in loads.items())


def test_the_balance_is_a_mean_over_routers_that_took_part() -> None:
    """The draft module's has no part without its loss, nor have documents without targets."""
    documents = random_documents((40, 90))
    without = tiny_trainer("f32", draft="mtp").backward(documents, LossWeights(mtp=0.0))
    alone = tiny_trainer("f32").backward(documents, LossWeights())
    assert without.balance == alone.balance > 0.9
    silent = Document(documents[0].token_ids, np.zeros(40, dtype=bool))
    apart = tiny_trainer("f32", micro_tokens=90).backward([silent, documents[1]], LossWeights())
    assert apart.balance == tiny_trainer("f32").backward(documents[1:], LossWeights()).balance


def test_a_step_lowers_the_loss_of_its_documents() -> None:
    trainer, documents = tiny_trainer("fp4", draft="mtp"), random_documents((60, 200), seed=5)
    before = trainer.backward(documents, LossWeights())
    take_a_step(trainer)
    after = trainer.backward(documents, LossWeights())
    assert after.main < before.main and after.mtp < before.mtp
    assert VOCAB == trainer.masters.config.vocab_size


def test_rows_of_today_replayed_change_nothing_and_shuffled_ones_do() -> None:
    trainer = tiny_trainer("f32", draft="mtp", index_topk=4)
    documents = random_documents((40, 90, 7))
    routes, rows = trainer.chosen(documents)
    free = step_gradients(trainer, documents, LossWeights())
    for leaf in trainer.masters.named.values():
        leaf.grad = None
    replayed = trainer.backward(documents, LossWeights(), routes=routes, rows=rows)
    assert all(torch.equal(grad, free[name]) for name, grad in gradients(trainer).items())
    unknown = [torch.full_like(ids, UNKNOWN) for ids in rows]
    assert trainer.backward(documents, LossWeights(), rows=unknown).main == replayed.main
    # The same numbers of rows, as far back as each token can see, but others.
    other = [torch.where(ids >= 0, torch.arange(ids.shape[1], dtype=torch.int32), -1) for ids in rows]
    assert trainer.backward(documents, LossWeights(), rows=other).main != replayed.main


def test_recomputing_leaves_torchs_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock and the interpreter's, taken in two orders by two threads, once stopped a run for ever."""
    trainer = tiny_trainer("f32", micro_tokens=60, recompute=True)
    documents, nothing = random_documents((40, 90)), LossWeights(mtp=0.0, index=0.0, balance=0.0)
    step_gradients(trainer, documents, nothing)  # torch imports what it needs

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the state of torch's generator was asked for")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    step_gradients(trainer, documents, nothing)


def test_an_objective_takes_the_place_of_the_mean_loss() -> None:
    documents, nothing = random_documents((40, 90, 7)), LossWeights(mtp=0.0, index=0.0, balance=0.0)
    trainer = tiny_trainer("f32", micro_tokens=60)
    plain = step_gradients(trainer, documents, nothing)
    number = sum(int(d.is_target[1:].sum()) for d in documents)
    told = torch.full((number,), torch.nan)

    hidden_states = trainer.hidden(documents)
    scale = torch.tensor(2.0, requires_grad=True)

    class TwiceTheMean:
        leaves = (scale,)

        def __call__(
            self, logprobs: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor, first: int
        ) -> torch.Tensor:
            here = slice(first, first + len(logprobs))
            told[here] = logprobs.detach()
            assert torch.equal(hidden, hidden_states[here])
            assert torch.equal(logits, trainer.project(hidden_states[here]))
            return logprobs.sum() * (-scale / number)

    for leaf in trainer.masters.named.values():
        leaf.grad = None
    trainer.backward(documents, nothing, objective=TwiceTheMean())
    assert all(torch.equal(grad, 2 * plain[name]) for name, grad in gradients(trainer).items())
    assert scale.grad is not None  # a leaf of the objective's own: the loss is proportional to it
    assert float(scale.grad) == pytest.approx(-float(told.double().sum()) / number, rel=1e-6)
    # The targets are told in the order of the documents, with the bits `logprobs` gives them.
    whole = trainer.logprobs(documents)
    expected = [row[torch.from_numpy(d.is_target[1:])] for row, d in zip(whole, documents, strict=True)]
    assert torch.equal(told, torch.cat(expected))
