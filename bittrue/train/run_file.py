"""Reads a run file: TOML in sections, every key known, every value of its type."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bittrue.errors import ConfigError


class Section(BaseModel):
    """A table of the run file. Types are taken as written: no text for a number, no 1 for true."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Config = TypeVar("Config", bound=Section)  # a whole file, whose fields are sections


def load_run_file(kind: type[Config], path: Path, overrides: Mapping[str, object] | None = None) -> Config:
    """The run file at ``path``; ``overrides`` replace values by dotted name (``run.steps``).

    Raises ConfigError naming file and place.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    return checked(kind, values, source=str(path))


def checked(kind: type[Config], values: Mapping[str, Any], *, source: str = "run file") -> Config:
    """The checked settings. Raises ConfigError naming the place in ``source``."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(error, source, kind) from error


def sections_of(kind: type[Section]) -> dict[str, type[Section]]:
    """The sections of a whole file, by name."""
    found = {}
    for name, field in kind.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        found[name] = field.annotation
    return found


def setting_help(kind: type[Section]) -> dict[str, tuple[str, str]]:
    """Dotted name -> (default as one would type it, what it is), in the order of the file."""
    rows = {}
    for section, model in sections_of(kind).items():
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = "required" if field.is_required() else json.dumps(default)
            rows[f"{section}.{key}"] = (shown, field.description or "")
    return rows


def _as_config_error(error: ValidationError, source: str, kind: type[Section]) -> ConfigError:
    # An unknown key first: it is often why another one seems to be missing.
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])
    prefix = f"{source}: {place}" if place else source
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{prefix}: unknown key; {_nearest(place, kind)}", field=place)
    if first["type"] == "missing":
        return ConfigError(f"{prefix} is missing", field=place)
    if first["type"] == "value_error":  # our own text
        return ConfigError(f"{prefix}: {first['ctx']['error']}", field=place or None)
    return ConfigError(f"{prefix}: {first['msg']}, got {first['input']!r}", field=place)


def _nearest(place: str, kind: type[Section]) -> str:
    sections = sections_of(kind)
    known = [*sections, *(f"{name}.{key}" for name, model in sections.items() for key in model.model_fields)]
    last = place.rpartition(".")[2]
    # The right key in the wrong table; else one that is spelled almost so.
    close = [name for name in known if name.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(place, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    section = place.partition(".")[0]
    beside = [name for name in known if name.startswith(f"{section}.")] or list(sections)
    return f"known: {', '.join(beside)}"
