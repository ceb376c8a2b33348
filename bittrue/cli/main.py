"""The program `bittrue`: finds the verb, runs it, turns errors into exit codes."""

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from cyclopts import App, CycloptsError

from bittrue.errors import BittrueError

# [group] verb -> where it is (imported only when it runs: help needs no torch), and its line of help.
VERBS = {
    "serve": ("bittrue.cli.serve:serve", "Serve a checkpoint over HTTP."),
    "verify": ("bittrue.cli.verify:verify", "Check the laws on a checkpoint and this machine."),
    "rl": ("bittrue.cli.rl:rl", "Train a policy by verified rewards as a run file says."),
    "replay": ("bittrue.cli.replay:replay", "Run recorded steps again and compare the weights."),
    "train": ("bittrue.cli.train:train", "Train a model as a run file says, or go on with a run."),
    "convert": ("bittrue.cli.convert:convert", "Convert checkpoints, or make a small random one."),
    "ops check": ("bittrue.cli.ops:check", "Check every kernel against the reference."),
    "bench ops": ("bittrue.cli.bench:ops", "Time every op."),
    "bench frontier": ("bittrue.cli.bench:frontier", "Measure speed and memory against context."),
    "bench serving": ("bittrue.cli.bench:serving", "Measure a server under load."),
    "bench server": ("bittrue.cli.bench:server", "Measure what the server itself costs."),
    "bench cache": ("bittrue.cli.bench_cache:cache", "Measure what the prefix cache gains and costs."),
    "bench agent": ("bittrue.cli.bench_cache:agent", "Measure an agent's session with the prefix cache."),
    "bench speculation": ("bittrue.cli.bench_cache:speculation", "Measure what drafts gain."),
    "bench recovery": ("bittrue.cli.bench_cache:recovery", "Measure recovery from a killed engine."),
    "bench tasks": ("bittrue.cli.bench_tasks:tasks", "Measure what share of answers is right."),
    "docs": ("bittrue.cli.docs:docs", "Write the pages of docs/ the program itself knows."),
}
_GROUP_HELP = {"ops": "Look at the arithmetic by itself.", "bench": "Measure speed."}
EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def build_app() -> App:
    app = App(
        name="bittrue",
        help="Serve and train DeepSeek-V4 so that every fast path returns exactly the bits of the slow path.",
        version=_version,
    )
    groups: dict[str, App] = {}
    for words, (target, help_line) in VERBS.items():
        *group, verb = words.split()
        place = app
        for name in group:
            if name not in groups:
                groups[name] = App(name=name, help=_GROUP_HELP[name])
                app.command(groups[name])
            place = groups[name]
        place.command(target, name=verb, help=help_line)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line. 0 yes, 1 no, 2 usage or internal error, 3 inconclusive, 4 integrity."""
    try:
        result = build_app()(
            list(arguments), exit_on_error=False, print_error=False, result_action="return_value"
        )
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        sys.stderr.write(f"bittrue: {error}\n")
        return EXIT_USAGE
    except BittrueError as error:
        sys.stderr.write(f"bittrue: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001  the program's top
        traceback.print_exc()
        return EXIT_USAGE


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def _version() -> str:
    try:
        return version("bittrue")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
