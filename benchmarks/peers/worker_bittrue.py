"""bittrue as one of the engines compared: its in-process Engine, as scripts use it."""

import argparse

from protocol import CHUNK, serve

from bittrue import Engine, SamplingParams
from bittrue.engine.types import Request
from bittrue.kv.layout import pages_for

MAX_OUTPUT = 2048  # tokens generated after a prompt, in all turns


class Bittrue:
    """Implements protocol.Engine."""

    def __init__(self, model: str, *, act: str, threads: int, max_context: int, max_batch: int) -> None:
        longest = max_context + MAX_OUTPUT
        knobs = {
            "act": act,
            "threads": threads,
            "max_step_tokens": CHUNK,
            "max_context": longest,
            "prefix_cache": False,
        }
        small = Engine(model, max_running=1, kv_memory=1 << 24, **knobs)
        layout = small.parts.layout
        small.close()
        # Slots come out of a quarter of the budget at most.
        pool = layout.pool_bytes(max_batch * pages_for(longest), max_batch)
        budget = max(pool, 4 * (max_batch + 1) * (layout.slot_bytes + layout.page_bytes)) + (1 << 20)
        self.engine = Engine(model, max_running=max_batch, kv_memory=budget, **knobs)
        self.names: list[str] = []

    def facts(self) -> dict[str, str]:
        facts = self.engine.fingerprint()
        return {"level": facts["level"], "act": facts["act"], "ops": facts["backend"]}

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=2)
        entries = []
        for event in self.engine.stream(token_ids, params):
            entries += [entry for entry in event.prompt_logprobs or () if entry is not None]
        return {
            "argmax": [entry.top[0][0] for entry in entries],
            "logprob": [entry.logprob for entry in entries],
            "margin": [entry.top[0][1] - entry.top[1][1] for entry in entries],
        }

    def open(self, prompts: list[list[int]]) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=MAX_OUTPUT, ignore_eos=True)
        self.names = [f"peer-{i}" for i in range(len(prompts))]
        for name, prompt in zip(self.names, prompts, strict=True):
            self.engine.add(Request(request_id=name, prompt=tuple(prompt), params=params))
        begun: set[str] = set()
        while begun != set(self.names):
            begun |= {event.request_id for event in self.engine.step()}

    def step(self) -> None:
        events = self.engine.step()
        assert len(events) == len(self.names), "a sequence got no token"

    def close(self) -> None:
        for name in self.names:
            self.engine.abort(name)
        self.engine.step()
        self.engine.check()
        self.names = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--act", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    serve(lambda: Bittrue(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
