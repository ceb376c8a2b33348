"""Trainer: losses and gradients of packed documents, computed by the engine's own model and ops."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bittrue.config.formats import ActDtype, Level
from bittrue.kv.layout import KVLayout
from bittrue.kv.pool import allocate
from bittrue.model.deepseek_v4 import TORCH_DTYPE, Angles, Block, DeepseekV4
from bittrue.model.export import save_checkpoint
from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.ops.contracts import Batch, LayerCache, OpTable
from bittrue.ops.dispatch import select_gradients
from bittrue.train.autograd import Step, TokenLogprob
from bittrue.train.crew import Crew
from bittrue.train.differentiable import DifferentiableOps, Replay
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights, Targets, count, targets
from bittrue.train.masters import Masters
from bittrue.train.pack import behind, num_pages, pack, shifted, split

# Expert ids [tokens of all documents, k] i16 by the name of the router's bias; UNKNOWN where a token is to
# choose for itself.
Routes = dict[str, Tensor]
# Ids of the rows read [tokens of all documents, k] i32 for each CSA layer, ascending, -1 padded; UNKNOWN in
# the first place where a token is to choose for itself.
Rows = Sequence[Tensor]


class Objective(Protocol):
    """What a step minimises, of the log-probabilities of its targets. ``leaves``: parameters of its own,
    which get gradients as the masters do."""

    @property
    def leaves(self) -> Sequence[Tensor]: ...

    def __call__(self, logprobs: Tensor, logits: Tensor, hidden: Tensor, first: int) -> Tensor:
        """A scalar: the share of the targets ``first`` .. ``first + n - 1``, in the order of the documents.
        ``logprobs`` [n] f32, ``logits`` [n, V] f32, ``hidden`` [n, D] act: what the head read. Called for
        disjoint shares, by several threads at once."""
        ...


@dataclass(frozen=True, slots=True)
class _Likelihood:
    """The mean negative log-probability of the targets."""

    num_targets: int
    leaves: Sequence[Tensor] = ()

    def __call__(self, logprobs: Tensor, logits: Tensor, hidden: Tensor, first: int) -> Tensor:
        return logprobs.sum() * (-1.0 / self.num_targets)


@dataclass(slots=True)
class StepStats:
    """What one step measured. Losses are means: ``main`` and ``mtp`` in nats a target, ``index`` in nats a
    token and layer, ``balance`` a token and layer (1 is perfect balance). ``loads`` [E] i64: how often each
    expert was chosen, by the name of its router's bias. ``task_loss``: sum in nats and number of targets.
    ``choices``: of each micro-batch in order, where they were asked for."""

    main: float = 0.0
    mtp: float = 0.0
    index: float = 0.0
    balance: float = 0.0
    num_tokens: int = 0
    num_targets: int = 0
    loads: dict[str, Tensor] = field(default_factory=dict)
    task_loss: dict[str, tuple[float, int]] = field(default_factory=dict)
    choices: "list[Choice]" = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the pass over a run of documents chose, or was made to choose."""

    routes: Routes
    rows: list[Tensor]

    @classmethod
    def joined(cls, parts: "Sequence[Choice]") -> "Choice":
        """Of all documents, from that of each run of them."""
        names = parts[0].routes if parts else {}
        routes = {name: torch.cat([part.routes[name] for part in parts]) for name in names}
        return cls(routes, [_stacked(layer) for layer in zip(*(part.rows for part in parts), strict=True)])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of short documents, which see fewer than k, are padded to the others' width."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=-1) for p in parts])


class _Recomputed(DeepseekV4):
    """The model whose blocks keep their input alone, and compute the rest again in the backward pass."""

    def block(self, streams: Tensor, batch: Batch, block: Block, cache: LayerCache, angles: Angles) -> Tensor:
        if not torch.is_grad_enabled():
            return super().block(streams, batch, block, cache, angles)
        # Nothing here is random, and torch's generator has one lock that threads can hold against each other
        # and the interpreter's.
        result: Tensor = checkpoint(
            super().block,
            streams,
            batch,
            block,
            cache,
            angles,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return result


@dataclass(frozen=True, slots=True)
class _Totals:
    """Numbers of a whole step, which every micro-batch's share is of."""

    num_tokens: int
    num_targets: int
    num_ahead: int  # targets of the draft module
    weights: LossWeights
    objective: Objective
    keeps_choices: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of a step's documents that is computed at once: the place of its first target among all, and the
    choices it repeats."""

    documents: Sequence[Document]
    first_target: int
    routes: Routes
    rows: Rows


class _Memory:
    """Caches for the passes under way; those of a pass that ended serve another."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._free: list[tuple[int, int, list[LayerCache]]] = []  # slots, pages

    @contextmanager
    def of(self, documents: Sequence[Document]) -> Iterator[Sequence[LayerCache]]:
        """Caches with room for these documents."""
        slots, pages = len(documents), num_pages([len(d) for d in documents])
        try:
            room = self._free.pop()  # a list's pop is one operation: threads need no lock
        except IndexError:
            room = (0, 0, [])
        if slots > room[0] or pages > room[1]:
            size = (max(slots, room[0]), max(pages, room[1]))
            room = (*size, allocate(self._layout, slots=size[0], pages=size[1]))
        try:
            yield room[2]
        finally:
            self._free.append(room)


class Trainer:
    """Gradients of the masters for lists of documents, and their log-probabilities.

    ``micro_tokens`` bounds what is in memory at once; results depend on it only as sums of gradients are
    rounded in another order. ``recompute`` keeps one tensor a block instead of all activations.
    """

    def __init__(
        self,
        masters: Masters,
        ops: OpTable,
        *,
        level: Level,
        act: ActDtype,
        micro_tokens: int = 4096,
        recompute: bool = False,
    ) -> None:
        self.masters = masters
        self.ops = ops
        self.is_dense = False
        self._grads = select_gradients(ops)
        self._act = TORCH_DTYPE[act]
        self._micro_tokens = micro_tokens
        kind = _Recomputed if recompute else DeepseekV4
        config = masters.config
        self._model = kind(config, masters.parameters, ops, level=level, act=act)
        self._mtp = None if masters.mtp is None else Mtp(self._model, masters.mtp)
        self._memory = _Memory(
            KVLayout.of(config, level=level, act=act, num_draft_layers=int(masters.mtp is not None))
        )
        self.crew = Crew(ops)
        self._bias_names = {id(bias): name for name, bias in masters.biases.items()}

    # ---- gradients ---------------------------------------------------------------------------------------

    def backward(
        self,
        documents: Sequence[Document],
        weights: LossWeights,
        *,
        routes: Routes | None = None,
        rows: Rows | None = None,
        objective: Objective | None = None,
        keeps_choices: bool = False,
    ) -> StepStats:
        """Adds the gradients of the step's loss to the masters' ``grad``. ``routes`` and ``rows``: choices
        made before for the same documents, as ``chosen`` gives them. ``objective``: in place of the mean
        negative log-probability of the targets; the other losses are added to it."""
        num_targets, num_ahead = count(documents, ahead=1), count(documents, ahead=2)
        objective = objective or _Likelihood(num_targets)
        totals = _Totals(sum(map(len, documents)), num_targets, num_ahead, weights, objective, keeps_choices)
        stats = StepStats(num_tokens=totals.num_tokens, num_targets=num_targets)
        parts = self._parts(documents, routes or {}, rows or ())
        for found, gradients in self.crew.map(lambda part: self._micro_batch(part, totals), parts):
            _merge(stats, found)
            for leaf, gradient in zip(self._leaves(objective), gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        self._mean(stats, totals.num_ahead)
        return stats

    def _parts(self, documents: Sequence[Document], routes: Routes, rows: Rows) -> list[_Part]:
        parts, begin, target = [], 0, 0
        for run in split([len(d) for d in documents], self._micro_tokens):
            part = documents[run.start : run.stop]
            here = slice(begin, begin + sum(map(len, part)))
            own_routes = {name: ids[here] for name, ids in routes.items()}
            parts.append(_Part(part, target, own_routes, [ids[here] for ids in rows]))
            begin, target = here.stop, target + count(part, ahead=1)
        return parts

    def _micro_batch(self, part: _Part, totals: _Totals) -> tuple[StepStats, Sequence[Tensor | None]]:
        """What a run of documents adds to the step: sums of its losses, and its gradients of all leaves."""
        step = Step(self.ops, self._grads, self._act)
        step.index_scale = totals.weights.index / totals.num_tokens
        step.balance_scale = totals.weights.balance / totals.num_tokens
        stats, leaves = StepStats(), self._leaves(totals.objective)
        with self._memory.of(part.documents) as caches:
            loss = self._losses(part, step, totals, stats, caches)
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if loss is not None:
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        stats.index, stats.balance = step.index_loss, step.balance_loss
        stats.loads = {self._bias_names[key]: load for key, load in step.loads.items()}
        return stats, gradients

    def _losses(
        self, part: _Part, step: Step, totals: _Totals, stats: StepStats, caches: Sequence[LayerCache]
    ) -> Tensor | None:
        """The scalar whose gradient is this micro-batch's share; None where nothing is a target."""
        documents = part.documents
        main, ahead = targets(documents, ahead=1), targets(documents, ahead=2)
        if len(main.rows) == 0:
            return None
        replay = self._replay(part, caches)
        ops = DifferentiableOps(self.masters, step, is_dense=self.is_dense, replay=replay)
        model = self._model.on(ops.table())
        batch = pack([d.token_ids for d in documents])
        streams = self._forward(model, ops, batch, caches)
        if totals.keeps_choices:
            stats.choices.append(self._choice(ops))
        hidden = model.hidden(streams.index_select(0, main.rows))
        logits = model.project(hidden)
        logprobs = _token_logprobs(logits, main, step)
        _add_task_losses(stats, documents, main, logprobs)
        stats.main = -float(logprobs.detach().sum())
        loss = totals.objective(logprobs, logits, hidden, part.first_target)
        if self._mtp is None or not totals.weights.mtp or len(ahead.rows) == 0:
            return loss
        weights = totals.weights
        heads = MtpInput(shifted(batch), streams, once_each(batch.num_tokens, streams.shape[1]))
        module = self._mtp.on(ops.table())
        passes = _draft_passes(module, heads, caches[-1], behind(batch), weights.mtp_depth)
        guesses = (module.logits(own.index_select(0, ahead.rows)) for own in passes)
        drafted = torch.stack([_token_logprobs(each, ahead, step).sum() for each in guesses]).sum()
        stats.mtp = -float(drafted.detach()) / weights.mtp_depth
        return loss + drafted * (-weights.mtp / (weights.mtp_depth * totals.num_ahead))

    def _leaves(self, objective: Objective) -> list[Tensor]:
        return [*self.masters.named.values(), *objective.leaves]

    def _forward(
        self, model: DeepseekV4, ops: DifferentiableOps, batch: Batch, caches: Sequence[LayerCache]
    ) -> Tensor:
        ops.begin(batch)
        return model.forward(batch, caches[: self.masters.config.num_layers])

    def _mean(self, stats: StepStats, num_ahead: int) -> None:
        config = self.masters.config
        num_csa = sum(config.layer_kind(i) == "csa" for i in range(config.num_layers))
        stats.main /= max(stats.num_targets, 1)
        stats.mtp /= max(num_ahead, 1)
        stats.index /= max(stats.num_tokens * num_csa, 1)
        # Of the routers that took part: the draft module may not, nor a micro-batch without targets.
        chosen = sum(int(load.sum()) for load in stats.loads.values())
        stats.balance /= max(chosen // config.experts_per_token, 1)

    # ---- routing -----------------------------------------------------------------------------------------

    def routes(self, documents: Sequence[Document]) -> Routes:
        """The experts today's parameters choose for these documents, in every learned router: what
        ``backward`` takes as ``routes`` at a later step (anticipatory routing, spec 5.5)."""
        return self.chosen(documents)[0]

    @torch.no_grad()
    def chosen(
        self, documents: Sequence[Document], *, routes: Routes | None = None, rows: Rows | None = None
    ) -> tuple[Routes, Rows]:
        """The experts and rows today's parameters choose for these documents, where ``routes`` and ``rows``
        (as for ``backward``) leave a choice."""
        parts = []
        for part in self._parts(documents, routes or {}, rows or ()):
            step = Step(self.ops, self._grads, self._act)
            batch = pack([d.token_ids for d in part.documents])
            with self._memory.of(part.documents) as caches:
                replay = self._replay(part, caches)
                ops = DifferentiableOps(self.masters, step, is_dense=self.is_dense, replay=replay)
                streams = self._forward(self._model.on(ops.table()), ops, batch, caches)
                if self._mtp is not None:
                    given = MtpInput(shifted(batch), streams, once_each(batch.num_tokens, streams.shape[1]))
                    self._mtp.on(ops.table()).forward(given, caches[-1])
            parts.append(self._choice(ops))
        found = Choice.joined(parts)
        return found.routes, found.rows

    def _choice(self, ops: DifferentiableOps) -> Choice:
        routes = {self._bias_names[key]: ids.to(torch.int16) for key, ids in ops.chosen.items()}
        return Choice(routes, list(ops.chosen_rows.values()))

    def _replay(self, part: _Part, caches: Sequence[LayerCache]) -> Replay:
        keys = [cache.keys for cache in caches if cache.kind == "csa"]
        experts = {
            key: part.routes[name].int() for key, name in self._bias_names.items() if name in part.routes
        }
        return Replay(experts, {id(k): ids for k, ids in zip(keys, part.rows, strict=False)})

    @torch.no_grad()
    def update_biases(self, loads: Mapping[str, Tensor], speed: float) -> None:
        """Makes experts chosen less than the mean more likely to be chosen, others less (spec 5.5)."""
        for name, load in loads.items():
            mean = load.double().mean()
            self.masters.biases[name].add_(torch.sign(mean - load.double()).float(), alpha=speed)

    # ---- log-probabilities -------------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(
        self,
        documents: Sequence[Document],
        *,
        chunk: int | None = None,
        routes: Routes | None = None,
        rows: Rows | None = None,
    ) -> list[Tensor]:
        """Log-probability of every token after the first of each document, given those before it, in nats:
        [n - 1] f32 each, the values ``Engine.score`` gives. ``chunk``: tokens of a document taken at a time.
        ``routes`` and ``rows`` as for ``backward``, of whole documents.
        """
        assert chunk is None or not (routes or rows), "choices are those of whole documents"
        results: list[Tensor] = []
        for part in self._parts(documents, routes or {}, rows or ()):
            with self._memory.of(part.documents) as caches:
                results += self._chunked(part, chunk, caches)
        return results

    def _chunked(self, part: _Part, chunk: int | None, caches: Sequence[LayerCache]) -> list[Tensor]:
        documents, replay = part.documents, self._replay(part, caches)
        lengths = [len(d) for d in documents]
        size = chunk or max(lengths)
        found: list[list[Tensor]] = [[] for _ in documents]
        for start in range(0, max(lengths), size):
            step = Step(self.ops, self._grads, self._act)
            ops = DifferentiableOps(self.masters, step, replay=replay)
            model = self._model.on(ops.table())
            begins = [min(start, length) for length in lengths]
            pieces = [d.token_ids[b : b + size] for d, b in zip(documents, begins, strict=True)]
            batch = pack(pieces, starts=begins, totals=lengths)
            streams = self._forward(model, ops, batch, caches)
            row = 0
            for i, (document, begin) in enumerate(zip(documents, begins, strict=True)):
                following = document.token_ids[begin + 1 : begin + 1 + size]
                rows = torch.arange(row, row + len(following))
                row += len(pieces[i])
                if len(following):
                    logits = model.logits(streams.index_select(0, rows))
                    ids = torch.from_numpy(following.astype("int64"))
                    found[i].append(TokenLogprob.apply(logits, step, ids))  # type: ignore[no-untyped-call]
        return [torch.cat(parts) if parts else torch.zeros(0) for parts in found]

    # ---- hidden states -----------------------------------------------------------------------------------

    @torch.no_grad()
    def hidden(self, documents: Sequence[Document]) -> Tensor:
        """What the head reads for every target, in the order of ``Objective``: [N, D] act."""
        found: list[Tensor] = []
        for run in split([len(d) for d in documents], self._micro_tokens):
            part = documents[run.start : run.stop]
            ops = DifferentiableOps(self.masters, Step(self.ops, self._grads, self._act))
            model = self._model.on(ops.table())
            with self._memory.of(part) as caches:
                streams = self._forward(model, ops, pack([d.token_ids for d in part]), caches)
            found.append(model.hidden(streams.index_select(0, targets(part, ahead=1).rows)))
        return torch.cat(found)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] f32 of what ``hidden`` gave."""
        return self._model.project(hidden)

    # ---- the checkpoint ----------------------------------------------------------------------------------

    def publish(self) -> None:
        """Rewrites what the ops read from the masters, after these changed."""
        self.masters.publish(self.crew.map)

    def export(
        self, directory: str | Path, raw_config: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> Path:
        """Writes the published checkpoint: the very tensors this trainer's forward reads."""
        return save_checkpoint(directory, raw_config, self.masters.tensors(), files=files)


def _draft_passes(
    module: Mtp, given: MtpInput, cache: LayerCache, before: Tensor, depth: int
) -> Iterator[Tensor]:
    """Streams of the draft module's passes over whole documents, ``depth`` of them.

    The first reads the model's streams, as a first draft does. Every other guesses the same tokens from the
    streams its predecessor made in the row ``before`` each, as further drafts are; its window holds rows of
    its own pass, where a draft's holds those of earlier ones.
    """
    own = module.forward(given, cache)
    yield own
    for _ in range(depth - 1):
        own = module.forward(replace(given, streams=own.index_select(0, before)), cache)
        yield own


def _merge(stats: StepStats, part: StepStats) -> None:
    stats.main += part.main
    stats.mtp += part.mtp
    stats.index += part.index
    stats.balance += part.balance
    stats.choices += part.choices
    for name, load in part.loads.items():
        stats.loads[name] = stats.loads.get(name, 0) + load
    for task, (total, number) in part.task_loss.items():
        before = stats.task_loss.get(task, (0.0, 0))
        stats.task_loss[task] = (before[0] + total, before[1] + number)


def _token_logprobs(logits: Tensor, found: Targets, step: Step) -> Tensor:
    result: Tensor = TokenLogprob.apply(logits, step, found.token_ids)  # type: ignore[no-untyped-call]
    return result


def _add_task_losses(
    stats: StepStats, documents: Sequence[Document], found: Targets, logprobs: Tensor
) -> None:
    sums = torch.zeros(len(documents)).index_add_(0, found.documents, logprobs.detach())
    counts = torch.bincount(found.documents, minlength=len(documents))
    for document, total, number in zip(documents, sums.tolist(), counts.tolist(), strict=True):
        before = stats.task_loss.get(document.task, (0.0, 0))
        stats.task_loss[document.task] = (before[0] - total, before[1] + number)
