"""The real engine that dies of certain requests: by SIGSEGV, before it would draw their sixth token."""

import os
import signal

from bittrue.engine.engine import Engine
from bittrue.engine.types import TokenEvent

POISON = 501  # a token of the prompt
NUM_TOKENS = 5


class PoisonedEngine(Engine):
    """Implements process.ServedEngine."""

    def step(self) -> list[TokenEvent]:
        for output in self._outputs.values():
            if POISON in output.request.prompt and len(output.generated) >= NUM_TOKENS:
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().step()
