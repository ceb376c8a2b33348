"""llama.cpp as one of the engines compared, through the C API that llama-cpp-python binds."""

import argparse
import ctypes

import llama_cpp as llama
import numpy as np
from protocol import CHUNK, serve

MAX_OUTPUT = 2048
KV_TYPES = {"f32": 0, "f16": 1}  # ggml_type


@llama.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp writes pages of text per context."""


class LlamaCpp:
    """Implements protocol.Engine."""

    def __init__(self, model: str, *, kv: str, threads: int) -> None:
        llama.llama_backend_init()
        llama.llama_log_set(_silent, ctypes.c_void_p(0))
        params = llama.llama_model_default_params()
        params.use_mmap = True
        self.model = llama.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.kv, self.threads = kv, threads
        self.batch = llama.llama_batch_init(CHUNK, 0, 1)
        self.context = None
        self.next_ids: list[int] = []
        self.position = 0

    def facts(self) -> dict[str, str]:
        return {"version": f"llama-cpp-python {llama.__version__}", "kv": self.kv, "swa_full": "no"}

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        self.context = self._new_context(1, len(token_ids))
        argmax: list[float] = []
        logprob: list[float] = []
        for start in range(0, len(token_ids) - 1, CHUNK):
            end = min(start + CHUNK, len(token_ids) - 1)
            self._decode([(token_ids[i], i, 0, True) for i in range(start, end)])
            for i in range(start, end):
                logits = self._logits(i - start).astype(np.float64)
                argmax.append(int(logits.argmax()))
                logprob.append(float(logits[token_ids[i + 1]] - np.logaddexp.reduce(logits)))
        self.close()
        return {"argmax": argmax, "logprob": logprob}

    def open(self, prompts: list[list[int]]) -> None:
        length = len(prompts[0])
        self.context = self._new_context(len(prompts), length)
        self.next_ids, self.position = [], length
        for sequence, prompt in enumerate(prompts):
            for start in range(0, length, CHUNK):
                end = min(start + CHUNK, length)
                self._decode([(prompt[i], i, sequence, i == length - 1) for i in range(start, end)])
            self.next_ids.append(int(self._logits(end - start - 1).argmax()))

    def step(self) -> None:
        self._decode([(token, self.position, s, True) for s, token in enumerate(self.next_ids)])
        self.next_ids = [int(self._logits(s).argmax()) for s in range(len(self.next_ids))]
        self.position += 1

    def close(self) -> None:
        llama.llama_free(self.context)
        self.context = None

    def _new_context(self, batch: int, length: int) -> object:
        params = llama.llama_context_default_params()
        params.n_ctx = batch * (length + MAX_OUTPUT)
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = KV_TYPES[self.kv]
        params.kv_unified = False
        params.swa_full = (
            False  # else the window layers attend to everything: decode at 32K is 2.8 times slower
        )
        return llama.llama_init_from_model(self.model, params)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Computes (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        code = llama.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returns {code}")

    def _logits(self, i: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        """Logits of entry ``i`` of the last call; overwritten by the next."""
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, i), (self.vocab_size,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--threads", type=int, required=True)
    serve(lambda: LlamaCpp(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
