"""RunConfig: every knob of a run, once, with its unit, its default and one line of help."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_SUFFIXES = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> Any:
    """``"4GiB"``, ``"512M"`` or an int, as a number of bytes; other types are left for the type check."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", value.lower())
    if match is None:
        raise ValueError(
            f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, KB, MB or GB"
        )
    unit = match.group(2) or ""
    return int(float(match.group(1)) * {**_SUFFIXES, **_BINARY_SUFFIXES}[unit])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class RunConfig(BaseModel):
    """How one run is set up. Flags, TOML files and docs derive from these fields; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    model: str = Field(
        min_length=1, description="Checkpoint directory: config.json, *.safetensors, tokenizer.json."
    )
    served_name: str = Field("", description="Names of the model, by comma; empty = the directory's.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 = every one.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    api_key: str = Field("", description="Keys, by comma, sent as `Authorization: Bearer KEY`; empty = none.")
    admin_key: str = Field("", description="Key of /admin; empty = any API key.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where tensors live.")
    backend: Literal["cpu", "reference"] = Field("cpu", description="Fast kernels, or the slow definition.")
    isa: Literal["auto", "portable", "avx2", "avx512"] = Field("auto", description="CPU instruction set.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 = every core.")
    level: Literal["auto", "maths", "published"] = Field(
        "auto",
        description="Plain maths, or published quantisation; auto = the model's.",
    )
    act: Literal["auto", "f32", "bf16"] = Field(
        "auto", description="Activation dtype; auto = the checkpoint's."
    )
    max_context: int = Field(0, ge=0, description="Tokens of prompt plus output; 0 = the model's limit.")
    kv_memory: Bytes = Field(2**30, ge=2**16, description="Bytes for pages and states.")
    max_step_tokens: int = Field(512, ge=1, description="Most tokens in one engine step.")
    max_running: int = Field(64, ge=1, description="Most sequences in one step.")
    max_queue: int = Field(256, ge=0, description="Most sequences waiting; beyond: 429.")
    prefix_cache: bool = Field(True, description="Start from cached prefixes.")
    snapshot_every: int = Field(
        4096,
        ge=0,
        description="Tokens between kept states (and at ends of prompts, turns); 128 = full, 0 = recompute.",
    )
    cache_isolation: bool = Field(False, description="API keys do not share cached prefixes.")
    host_cache: Bytes = Field(0, ge=0, description="Bytes of main memory for cached prefixes; 0 = none.")
    cache_dir: str = Field("", description="Directory for cached prefixes on disk; empty = none.")
    disk_cache: Bytes = Field(10 * 2**30, ge=0, description="Bytes that cache_dir may take.")
    offload_dir: str = Field(
        "", description="Directory of the file for CSA rows kept off memory; empty = off."
    )
    offload_hot: Bytes = Field(
        2**28, ge=2**16, description="Bytes of offloaded CSA rows that stay in memory."
    )
    kv_canary: Literal["off", "log", "raise"] = Field(
        "off", description="Check cached content on every read."
    )
    speculation: Literal["off", "ngram", "mtp"] = Field(
        "off", description="Draft tokens by looking back, or by the checkpoint's mtp.0."
    )
    max_draft: int = Field(4, ge=1, le=16, description="Most draft tokens per sequence and step.")
    journal_dir: str = Field("", description="Directory of the token journal; empty = in memory only.")
    keep_responses_s: float = Field(
        3600.0, ge=0, description="Seconds that a finished response can be fetched again."
    )
    max_body_bytes: Bytes = Field(32 * 2**20, ge=1024, description="Bytes of a request's body; beyond: 413.")
    max_logprobs: int = Field(20, ge=0, le=1024, description="Most top_logprobs per token.")
    thinking: bool = Field(False, description="Reason first where a chat request does not say.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds to finish after SIGTERM.")
    keepalive_s: float = Field(10.0, gt=0, description="Seconds of silence before a comment line.")
    max_restarts: int = Field(5, ge=0, description="Engine restarts without a token in between.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level of log lines."
    )

    @field_validator("snapshot_every")
    @classmethod
    def _whole_pages(cls, value: int) -> int:
        if value % 128:
            near = max(128, round(value / 128) * 128)
            raise ValueError(f"states are kept at ends of pages, of 128 tokens: {value} is none; use {near}")
        return value

    @field_validator("cache_isolation")
    @classmethod
    def _keys_to_keep_apart(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not str(info.data.get("api_key", "")).replace(",", "").strip():
            raise ValueError("it keeps API keys apart, and there are none; give some with --api-key")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The names clients may use in ``model``."""
        given = tuple(name.strip() for name in self.served_name.split(",") if name.strip())
        return given or (self.model.rstrip("/").rsplit("/", 1)[-1],)

    @property
    def name(self) -> str:
        """The first of the names: how the model is shown."""
        return self.names[0]

    def public(self) -> dict[str, object]:
        """Every resolved knob by name, the keys left out."""
        hidden = {name: "***" if getattr(self, name) else "" for name in ("api_key", "admin_key")}
        return {**self.model_dump(), **hidden}


def knob_help() -> dict[str, str]:
    """One line per knob: what it is, then its default."""
    lines = {}
    for name, field in RunConfig.model_fields.items():
        notes = [" | ".join(knob_choices(name))] if knob_choices(name) else []
        if not field.is_required() and field.default != "":
            notes.append(f"default: {knob_default(name)}")
        lines[name] = f"{field.description} [{'; '.join(notes)}]" if notes else f"{field.description}"
    return lines


def knob_choices(name: str) -> tuple[str, ...]:
    """The values of a knob that has a closed list of them."""
    return tuple(getattr(RunConfig.model_fields[name].annotation, "__args__", ()))


def knob_default(name: str) -> str:
    """The default as one would type it; sizes with their unit."""
    field = RunConfig.model_fields[name]
    value = field.default
    if isinstance(value, bool):
        return "true" if value else "false"
    if any(isinstance(note, BeforeValidator) for note in field.metadata):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    return str(value)
