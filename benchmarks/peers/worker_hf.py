"""Hugging Face transformers as one of the engines compared (its attention for this model is eager)."""

import argparse
from typing import Any

import torch
import transformers
from protocol import CHUNK, serve
from transformers import AutoModelForCausalLM, DynamicCache


class HuggingFace:
    """Implements protocol.Engine."""

    def __init__(self, model: str, *, dtype: str, experts: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), experts_implementation=experts
        ).eval()
        self.experts = experts
        self.cache: Any = None
        self.next_ids: torch.Tensor | None = None

    def facts(self) -> dict[str, str]:
        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return {
            "version": version,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "experts": self.experts,
        }

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        ids = torch.tensor([token_ids])
        cache = DynamicCache(config=self.model.config)
        parts = [
            self.model(ids[:, start : start + CHUNK], past_key_values=cache, use_cache=True).logits[0].float()
            for start in range(0, ids.shape[1], CHUNK)
        ]
        logprobs = torch.cat(parts)[:-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
        return {"argmax": logprobs.argmax(-1).tolist(), "logprob": chosen.tolist()}

    def open(self, prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        self.cache = DynamicCache(config=self.model.config)
        for start in range(0, ids.shape[1], CHUNK):
            self._forward(ids[:, start : start + CHUNK])

    def step(self) -> None:
        assert self.next_ids is not None
        self._forward(self.next_ids)

    def close(self) -> None:
        self.cache = self.next_ids = None

    def _forward(self, ids: torch.Tensor) -> None:
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next_ids = out.logits[:, -1:].argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--threads", type=int, required=True)
    serve(lambda: HuggingFace(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
