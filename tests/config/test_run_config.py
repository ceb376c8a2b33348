from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bittrue.config.load import load_run_config, run_config_from_json
from bittrue.config.run import RunConfig, knob_help, parse_bytes
from bittrue.errors import ConfigError


def written(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, 'model = "a"\nport = 9000\nkv_memory = "2GiB"\n')
    config = load_run_config(path, {"port": "9001"})
    assert (config.model, config.port, config.kv_memory, config.max_running) == ("a", 9001, 2 * 2**30, 64)


@pytest.mark.parametrize("where", ["file", "flags"])
def test_unknown_knob_is_an_error_that_names_it_and_the_nearest(tmp_path: Path, where: str) -> None:
    path = written(tmp_path, "max_contxt = 5\n") if where == "file" else None
    flags = {"model": "a"} if where == "file" else {"model": "a", "max_contxt": "5"}
    with pytest.raises(ConfigError, match="unknown knob max_contxt; did you mean max_context") as caught:
        load_run_config(path, flags)
    assert caught.value.field == "max_contxt"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("device", "tpu"),
        ("kv_memory", "lots"),
        ("kv_memory", "1"),
        ("threads", "-1"),
        ("max_running", "0"),
        ("thinking", "perhaps"),
        ("keepalive_s", "0"),
        ("model", ""),
        ("log_level", "loud"),
        ("drain_timeout_s", "soon"),
    ],
)
def test_bad_value_is_an_error_that_names_the_knob(knob: str, value: str) -> None:
    with pytest.raises(ConfigError, match=knob) as caught:
        load_run_config(None, {"model": "a", knob: value})
    assert caught.value.field == knob


def test_a_bad_size_is_quoted_once_with_the_ways_to_write_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(None, {"model": "m", "kv_memory": "3lb"})
    assert str(caught.value).startswith("kv_memory: '3lb' is not a size; write bytes")
    assert str(caught.value).count("3lb") == 1


def test_missing_model_and_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model has no value"):
        load_run_config(None, {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_run_config(tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_run_config(written(tmp_path, "port = = 1"), {})
    with pytest.raises(ConfigError, match="unknown knob server"):
        load_run_config(written(tmp_path, "[server]\nport = 1\n"), {"model": "a"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("4GiB", 4 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512M", 512 * 10**6),
        ("512MB", 512 * 10**6),
        ("64 kib", 65536),
        ("1e9", 10**9),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes_are_read_with_their_suffix(text: str, size: int) -> None:
    assert parse_bytes(text) == size


KNOBS: dict[str, st.SearchStrategy[Any]] = {
    "served_name": st.text(max_size=5),
    "host": st.sampled_from(["::1", "0.0.0.0"]),
    "port": st.integers(0, 65535),
    "device": st.sampled_from(["cpu", "cuda"]),
    "level": st.sampled_from(["auto", "maths", "published"]),
    "kv_memory": st.integers(2**16, 2**50),
    "thinking": st.booleans(),
    "drain_timeout_s": st.floats(0, 1e6),
    "api_key": st.text(max_size=5),
}


@given(st.fixed_dictionaries({}, optional=KNOBS))
def test_resolved_config_round_trips_as_json(values: dict[str, Any]) -> None:
    config = load_run_config(None, {"model": "a", **values})
    assert run_config_from_json(config.model_dump_json()) == config


def test_json_with_an_unknown_knob_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown knob speed"):
        run_config_from_json('{"model": "a", "speed": 1}')


def test_every_knob_has_one_line_of_help_with_its_default() -> None:
    lines = knob_help()
    assert set(lines) == set(RunConfig.model_fields)
    assert all(0 < len(line) < 110 and "\n" not in line for line in lines.values())
    assert lines["port"].endswith("[default: 8000]")
    assert lines["kv_memory"].endswith("[default: 1GiB]")
    assert lines["level"].endswith("[auto | maths | published; default: auto]")
    assert len(lines) <= 60


def test_shown_config_hides_the_key_and_names_the_model() -> None:
    config = RunConfig(model="/models/tiny/", api_key="s3cret")
    assert "s3cret" not in str(config.public())
    assert config.name == "tiny"
    assert RunConfig(model="x", served_name="y, z").names == ("y", "z")


@pytest.mark.parametrize(("given", "near"), [("100", 128), ("1", 128), ("200", 256), ("4000", 3968)])
def test_a_distance_of_states_that_is_not_whole_pages_is_refused_with_the_nearest(
    given: str, near: int
) -> None:
    with pytest.raises(ConfigError, match=rf"{given} is none; use {near}$") as caught:
        load_run_config(None, {"model": "a", "snapshot_every": given})
    assert caught.value.field == "snapshot_every"
    assert load_run_config(None, {"model": "a", "snapshot_every": str(near)}).snapshot_every == near


@pytest.mark.parametrize("keys", ["", " , "])
def test_isolation_without_keys_is_refused(keys: str) -> None:
    """Nobody could be told from another: everybody would share what was to be kept apart."""
    with pytest.raises(ConfigError, match="--api-key"):
        load_run_config(None, {"model": "a", "cache_isolation": "true", "api_key": keys})
    assert load_run_config(None, {"model": "a", "cache_isolation": "true", "api_key": "k"}).cache_isolation
