"""flyweight-llm as one of the engines compared. A runtime holds one sequence: a batch is several of them."""

import argparse
from importlib.metadata import version

import numpy as np
from flyweight.deepseek4 import Deepseek4Runtime
from flyweight.v2 import V2Model
from protocol import CHUNK, serve

MAX_OUTPUT = 2048


class Flyweight:
    """Implements protocol.Engine."""

    def __init__(self, model: str, *, kv: str) -> None:
        self.model = V2Model(model)
        self.kv = kv
        self.runtimes: list[Deepseek4Runtime] = []
        self.next_ids: list[int] = []

    def facts(self) -> dict[str, str]:
        return {"version": f"flyweight-llm {version('flyweight-llm')}", "kv": self.kv}

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        runtime = self._runtime(len(token_ids))
        argmax: list[float] = []
        logprob: list[float] = []
        for token, following in zip(token_ids, token_ids[1:], strict=False):
            logits = np.asarray(runtime.forward(token), dtype=np.float64).ravel()
            argmax.append(int(logits.argmax()))
            logprob.append(float(logits[following] - np.logaddexp.reduce(logits)))
        runtime.close()
        return {"argmax": argmax, "logprob": logprob}

    def open(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            runtime = self._runtime(len(prompt))
            self.runtimes.append(runtime)
            # The last token goes through forward, which gives the logits.
            for start in range(0, len(prompt) - 1, CHUNK):
                runtime.prefill(prompt[start : min(start + CHUNK, len(prompt) - 1)])
            self.next_ids.append(int(np.asarray(runtime.forward(prompt[-1])).argmax()))

    def step(self) -> None:
        pairs = zip(self.runtimes, self.next_ids, strict=True)
        self.next_ids = [int(np.asarray(runtime.forward(token)).argmax()) for runtime, token in pairs]

    def close(self) -> None:
        for runtime in self.runtimes:
            runtime.close()
        self.runtimes, self.next_ids = [], []

    def _runtime(self, length: int) -> Deepseek4Runtime:
        return Deepseek4Runtime(self.model, length + MAX_OUTPUT, cache_type_k=self.kv, cache_type_v=self.kv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kv", default="f16")
    arguments = parser.parse_args()
    serve(lambda: Flyweight(arguments.model, kv=arguments.kv))


if __name__ == "__main__":
    main()
