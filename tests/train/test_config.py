import json
from pathlib import Path
from typing import Any

import pytest

from bittrue.errors import ConfigError
from bittrue.train.config import TrainConfig, load_train_config, train_config
from bittrue.train.run_file import setting_help

LEAST = "[data.tasks]\nsort = 1.0\n"


def written(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_file_needs_only_its_data(tmp_path: Path) -> None:
    config = load_train_config(written(tmp_path, LEAST))
    assert config.data.tasks == {"sort": 1.0}
    assert (config.optim.momentum, config.optim.beta2, config.optim.weight_decay) == (0.95, 0.95, 0.1)
    assert (config.loss.mtp, config.loss.mtp_late, config.loss.bias_speed) == (0.3, 0.1, 0.001)


def test_every_section_is_read(tmp_path: Path) -> None:
    text = """
        [model]
        preset = "tiny"
        precision = "fp8"
        [model.config]
        hidden_size = 128
        [data]
        seed = 3
        lengths = { recall = [256, 1024] }
        [data.tasks]
        sort = 1
        recall = 2.5
        [optim]
        lr = 1e-3
        products = "bf16"
        [schedule]
        decay = "linear"
        decay_start = 200
        decay_steps = 50
        [loss]
        index = 0.5
        [spike]
        is_watched = true
        [run]
        out = "runs/a"
        keep = 4
    """
    config = load_train_config(written(tmp_path, text), {"run.steps": 7, "run.out": "b"})
    assert config.model.config == {"hidden_size": 128}
    assert config.data.tasks == {"sort": 1.0, "recall": 2.5}
    assert (config.run.steps, config.run.out, config.run.keep) == (7, "b", 4)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "[optim]\nlerning_rate = 1.0", "optim.lerning_rate: unknown key"),
        (LEAST + "[optim]\nbeta_1 = 0.9", "did you mean optim.beta1?"),
        (LEAST + "[run]\nlr = 0.1", "run.lr: unknown key; did you mean optim.lr?"),
        (LEAST + "[optimizer]\nlr = 0.1", "did you mean optim?"),
        (LEAST + '[optim]\nlr = "0.1"', "optim.lr: Input should be a valid number, got '0.1'"),
        (LEAST + "[optim]\nlr = 0", "optim.lr: Input should be greater than 0, got 0"),
        (LEAST + "[optim]\nlr = nan", "optim.lr"),
        (LEAST + "[run]\nsteps = 1.5", "run.steps"),
        (LEAST + "[run]\nrecompute = 1", "run.recompute"),
        (LEAST + '[model]\nprecision = "int4"', "model.precision: Input should be 'f32', 'bf16'"),
        ("optim = 3\n" + LEAST, "optim: Input should be a valid dictionary"),
        ("[run]\nsteps = 1", "data is missing"),
        ("[data]\nseed = 1", "data: documents come from jsonl or from tasks; neither is given"),
        ('[data]\njsonl = "x"\ntasks = { sort = 1.0 }', "both are given"),
        ("[data]\ntasks = { sort = 0.0 }", "the weight of the task sort is 0.0"),
        (LEAST + "[schedule]\ndecay_steps = 5", "schedule: decay_start is 0, within the 100 warmup_steps"),
        (LEAST + "[spike]\nis_watched = true\nmargin = 500", "needs run.keep of at least 7"),
        (LEAST + "[spike]\nis_watched = true\nwindow = 8", "spike: least is 16, but window = 8 steps are"),
        ("[data", "is not valid TOML"),
    ],
)
def test_a_bad_run_file_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_train_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_run_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the run file /nowhere\.toml"):
        load_train_config(Path("/nowhere.toml"))


def config(**sections: Any) -> TrainConfig:
    return train_config({"data": {"tasks": {"sort": 1.0}}, **sections})


def test_the_digest_is_of_what_the_weights_depend_on() -> None:
    plain = config()
    same = [
        {"run": {"out": "x", "steps": 5, "keep": 9, "log_every": 1, "checkpoint_every": 7}},
        {"run": {"recompute": False, "threads": 2}},
        {"spike": {"delay": 9}},  # nobody watches
    ]
    other: list[dict[str, Any]] = [
        {"optim": {"lr": 1e-3}},
        {"run": {"micro_tokens": 64}},
        {"run": {"level": "maths"}},
        {"data": {"tasks": {"sort": 2.0}}},
        {"spike": {"is_watched": True}},
    ]
    assert [config(**changes).digest == plain.digest for changes in same] == [True] * 3
    assert len({plain.digest, *(config(**changes).digest for changes in other)}) == 6


def test_a_watched_run_depends_on_where_its_checkpoints_are() -> None:
    """A rollback goes to one of them."""
    first = config(spike={"is_watched": True}, run={"checkpoint_every": 50})
    second = config(spike={"is_watched": True}, run={"checkpoint_every": 60})
    assert first.digest != second.digest


def test_the_identity_survives_json() -> None:
    identity = config(data={"tasks": {"recall": 1.0}, "lengths": {"recall": [256, 512]}}).identity()
    assert json.loads(json.dumps(identity)) == identity


def test_every_setting_is_in_the_page_of_training() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    settings = setting_help(TrainConfig).items()
    rows = [f"| `{name}` | `{default}` | {help_line} |" for name, (default, help_line) in settings]
    assert [row for row in rows if row not in text] == []
