"""TOML file plus flags -> RunConfig; an unknown key or a bad value is a ConfigError that names it."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from bittrue.config.run import RunConfig
from bittrue.errors import ConfigError


def load_run_config(toml_file: Path | None, flags: Mapping[str, object]) -> RunConfig:
    """Defaults, overridden by the TOML file, overridden by flags (values may be text, as typed).

    Raises ConfigError: an unreadable file, or a key (named) that is unknown, missing or has a bad value.
    """
    values: dict[str, object] = {} if toml_file is None else _read_toml(toml_file)
    values.update(flags)
    return _validated(values)


def run_config_from_json(text: str) -> RunConfig:
    """The inverse of ``RunConfig.model_dump_json``. Raises ConfigError."""
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise _as_config_error(error) from error


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _validated(values: Mapping[str, object]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(error) from error


def _as_config_error(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, RunConfig.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(RunConfig.model_fields)}"
        return ConfigError(f"unknown knob {field}; {hint}", field=field)
    if first["type"] == "missing":
        return ConfigError(
            f"the knob {field} has no value; give it in the config file or as a flag", field=field
        )
    if first["type"] == "value_error":  # our own text, which quotes the input
        return ConfigError(f"{field}: {first['ctx']['error']}", field=field)
    return ConfigError(f"{field}: {first['msg']}, got {first['input']!r}", field=field)
