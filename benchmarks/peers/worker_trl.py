"""TRL's GRPOTrainer with the model of transformers, trained on the project's tasks by their checkers.

Problems and checkers are bittrue's own, which has to be importable. Prompts are text to TRL: each has to
become the tokens that it has for bittrue, or nothing runs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
import trl
from datasets import Dataset
from protocol import answer, open_answers
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from worker_hf import HuggingFace

from bittrue.rl.problems import Asked, Problems
from bittrue.text.tokenizer import Tokenizer

Step = dict[str, float]
# Takes what the steps of the last block took and did, and gives the number of the next block's; 0: no more.
NextBlock = Callable[[list[Step]], int]


class Task:
    """The problems of every step in order, as TRL asks for them, and their checker as its reward function."""

    def __init__(self, model: Path, tasks: dict[str, float], *, seed: int, steps: int, prompts: int) -> None:
        own = Tokenizer.from_file(model / "tokenizer.json")
        self._problems = Problems(own, tasks, seed=seed)
        self._asked = [each for step in range(steps) for each in self._problems.of_step(step, prompts)]
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        texts = [own.decode(each.prompt.token_ids) for each in self._asked]
        for text, each in zip(texts, self._asked, strict=True):
            if tuple(self.tokenizer(text=text)["input_ids"]) != each.prompt.token_ids:
                raise SystemExit(f"the tokenizer of transformers gives {text!r} other tokens")
        self.dataset = Dataset.from_dict({"prompt": texts, "place": list(range(len(texts)))})
        self.scores: list[float] = []  # of the step's answers

    def __call__(self, completion_ids: list[list[int]], place: list[int], **rest: Any) -> list[float]:
        pairs = zip(place, completion_ids, strict=True)
        self.scores = [self._score(self._asked[at], ids) for at, ids in pairs]
        return self.scores

    def _score(self, asked: Asked, token_ids: list[int]) -> float:
        return float(self._problems.is_right(asked.judge, token_ids))


class TimedTrainer(GRPOTrainer):
    """Takes the time of sampling and scoring, and counts what was sampled."""

    rollout_s = 0.0
    answer_tokens = 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start_s = time.perf_counter()
        found = super()._generate_and_score_completions(inputs)
        self.rollout_s = time.perf_counter() - start_s
        self.answer_tokens = int(found["completion_mask"].sum())
        return found


class Clock(TrainerCallback):
    """Takes every step's time, from where the one before ended to behind its optimiser. Between blocks of
    steps the clock stands still."""

    def __init__(self, trainer: TimedTrainer, task: Task, next_block: NextBlock) -> None:
        self._trainer, self._task, self._next_block = trainer, task, next_block
        self._done: list[Step] = []
        self._left = next_block([])
        self._start_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seconds, scores = time.perf_counter() - self._start_s, self._task.scores
        self._done.append(
            {
                "seconds": seconds,
                "rollout_seconds": self._trainer.rollout_s,
                "train_seconds": seconds - self._trainer.rollout_s,
                "answer_length": self._trainer.answer_tokens / len(scores),
                "reward": sum(scores) / len(scores),
                "taught": 1.0,
            }
        )
        if len(self._done) == self._left:
            self._left = self._next_block(self._done)
            self._done = []
            control.should_training_stop = self._left == 0
        self._start_s = time.perf_counter()


class Trl:
    """One model; every trainer begins with the same weights."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self._options = options
        self._task = Task(
            model,
            json.loads(options.tasks),
            seed=options.seed,
            steps=options.steps,
            prompts=options.prompts,
        )
        self.engine = HuggingFace(str(model), dtype="float32", experts="eager", threads=options.threads)
        torch.set_grad_enabled(True)
        self._first = {name: each.clone() for name, each in self.engine.model.state_dict().items()}

    def facts(self) -> dict[str, str]:
        version = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
        return {"version": version, "dtype": "float32", "attention": "eager"}

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        with torch.no_grad():
            return self.engine.score(token_ids)

    def train(self, experts: str, passes: int, next_block: NextBlock) -> None:
        """Trains for as long as blocks come. ``passes``: the parts of a step's answers that go forward and
        backward at a time."""
        model = self.engine.model
        model.load_state_dict(self._first)
        model.set_experts_implementation(experts)
        with tempfile.TemporaryDirectory() as folder:
            trainer = TimedTrainer(
                model=model,
                reward_funcs=[self._task],
                args=self._arguments(folder, passes),
                train_dataset=self._task.dataset,
                processing_class=self._task.tokenizer,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(Clock(trainer, self._task, next_block))
            trainer.train()

    def _arguments(self, folder: str, passes: int) -> GRPOConfig:
        options = self._options
        answers = options.prompts * options.group
        return GRPOConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=answers // passes,
            gradient_accumulation_steps=passes,
            num_generations=options.group,
            max_completion_length=options.max_tokens,
            temperature=1.0,
            epsilon=options.clip_low,
            epsilon_high=options.clip_high,
            beta=0.0,
            router_aux_loss_coef=0.0,  # it asks for a number of experts by a name that this config has not
            learning_rate=options.lr,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            max_grad_norm=options.clip,
            shuffle_dataset=False,
            seed=options.seed,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", required=True, help="JSON: weights by name")
    for name in ("threads", "seed", "steps", "prompts", "group", "max-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "clip", "clip-low", "clip-high", "beta1", "beta2"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


def main() -> None:
    answers = open_answers()
    options = parse()
    peer = Trl(options.model, options)
    answer(answers, peer.facts())
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        do = question.pop("do")
        if do == "score":
            answer(answers, peer.score(**question))
        elif do == "try":
            steps = question.pop("steps")
            answer(answers, {"steps": tried(peer, steps, **question)})
        elif do == "train":
            peer.train(**question, next_block=lambda done: next_of_driver(answers, done))
        else:
            raise ValueError(f"the driver asks for {do!r}")


def tried(peer: Trl, steps: int, **way: Any) -> list[Step]:
    """``steps`` steps of a new run. One before them is dropped: it finds memory and sets up threads."""
    found: list[Step] = []

    def next_block(done: list[Step]) -> int:
        found.extend(done)
        return 0 if done else 1 + steps

    peer.train(**way, next_block=next_block)
    return found[1:]


def next_of_driver(answers: TextIO, done: list[Step]) -> int:
    """Answers with ``done``. The driver's next question is for steps, or it has closed its end."""
    answer(answers, {"steps": done})
    line = sys.stdin.readline()
    return int(json.loads(line)["count"]) if line else 0


if __name__ == "__main__":
    main()
