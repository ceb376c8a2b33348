"""`bittrue serve MODEL`: an OpenAI-compatible server on one checkpoint."""

import sys
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bittrue.config.load import load_run_config
from bittrue.config.run import RunConfig, knob_help
from bittrue.engine.launch import EngineProcess
from bittrue.obs.log import Log

# One flag per knob. Values stay text: RunConfig alone knows types and ranges.
_Flags: Any = make_dataclass(
    "_Flags",
    [
        (name, Annotated[str | None, Parameter(help=help_line, show_default=False)], field(default=None))
        for name, help_line in knob_help().items()
        if name != "model"
    ],
    namespace={"__module__": __name__},  # a class of this file: the flags of others are not flattened
)
_NO_FLAGS = _Flags()


def serve(
    model: Annotated[str | None, Parameter(help=RunConfig.model_fields["model"].description)] = None,
    *,
    config: Annotated[Path | None, Parameter(help="TOML file of knobs; flags win over it.")] = None,
    flags: Annotated[_Flags, Parameter(name="*")] = _NO_FLAGS,
) -> int:
    """Serve MODEL over HTTP: /v1/chat/completions, /v1/completions, /generate and the rest.

    Stops on SIGTERM or Ctrl-C once unfinished answers are complete.
    """
    given = {knob: value for knob, value in vars(flags).items() if value is not None}
    if model is not None:
        given["model"] = model
    resolved = load_run_config(config, given)
    Log(sys.stderr, resolved.log_level).info("config", **resolved.public())
    with EngineProcess.start(resolved) as engine:
        # Imported while the engine process loads: the two take their time side by side.
        from bittrue.server.run import run_server

        return run_server(resolved, engine)
