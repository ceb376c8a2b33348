"""ServerState: what every endpoint works with, made once at start-up."""

from dataclasses import dataclass, field

from starlette.requests import Request

from bittrue.config.run import RunConfig
from bittrue.engine.supervisor import EngineClient
from bittrue.kv.layout import PAGE_TOKENS, KVBudget
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.text.codec import Codec
from bittrue.text.grammar import GrammarCompiler
from bittrue.text.tokenizer import Tokenizer


@dataclass(slots=True)
class ServerState:
    """The parts of one server. ``is_draining`` and ``num_active`` are the only things that change."""

    config: RunConfig
    tokenizer: Tokenizer
    codec: Codec
    grammars: GrammarCompiler
    client: EngineClient
    metrics: Metrics
    log: Log
    created: int  # Unix seconds of the start
    is_draining: bool = False
    num_active: int = field(default=0)  # HTTP requests whose answer is not complete

    @property
    def weight_version(self) -> str:
        return self.client.ready.stats.weight_version

    @property
    def max_context(self) -> int:
        """Tokens of prompt plus output one sequence may have: the model's limit, or the KV memory's."""
        return min(self.client.ready.max_context, self._kv_tokens)

    @property
    def is_limited_by_memory(self) -> bool:
        """The KV memory, not the model or --max-context, sets ``max_context``."""
        return self._kv_tokens < self.client.ready.max_context

    @property
    def _kv_tokens(self) -> int:
        return self.client.ready.stats.pages_total * PAGE_TOKENS

    def kv_memory_for(self, num_tokens: int) -> int:
        """The --kv-memory, in bytes, that one sequence of so many tokens needs."""
        memory = self.client.ready.memory
        budget = KVBudget(memory.page_bytes, memory.slot_bytes, self.config.max_running, memory.max_snapshots)
        return budget.needed_for(num_tokens)

    @property
    def vocab_size(self) -> int:
        return self.client.ready.vocab_size


def state_of(request: Request) -> ServerState:
    """The state the application was built with."""
    state: ServerState = request.app.state.bittrue
    return state
