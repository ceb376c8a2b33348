"""`bittrue docs`: writes the pages of docs/ that the program itself knows: verbs, knobs, metrics, errors."""

import inspect
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bittrue import errors
from bittrue.cli.main import build_app
from bittrue.config.run import RunConfig, knob_choices, knob_default
from bittrue.obs.metrics import METRICS

_EXIT_CODES = """
## Exit codes

Standard output is the result, standard error the story. 0 yes, 1 no, 2 usage or internal error,
3 inconclusive or missing evidence, 4 integrity; 130 interrupted (Ctrl-C).
A server that SIGTERM or Ctrl-C ends once it serves exits 0.
"""
_CONFIG_HEAD = """\
# Configuration

Every knob of `bittrue serve`, once. A knob is a flag (`--max-context 65536`) or a line of a TOML file given
by `--config` (`max_context = 65536`); a flag wins over the file. An unknown key is an error.
Sizes in bytes may be written as `4GiB` or `512MB`.

| knob | type | default | meaning |
|---|---|---|---|
"""
_METRICS_HEAD = """\
# Metrics

What `/metrics` reports, in the Prometheus text format. Counters end in `_total`; histograms have `_bucket`,
`_sum` and `_count`.

| metric | kind | labels | meaning |
|---|---|---|---|
"""
_ERRORS_HEAD = """\
# Errors

Every failure a caller can meet. The message states the fact and the remedy. A server answers with the
status and the code in OpenAI's error shape (single errors may carry their own); a command ends with the
exit code.

| error | HTTP status | code | exit code | meaning |
|---|---|---|---|---|
"""


def docs(
    folder: Annotated[Path, Parameter(help="Folder of the pages.")] = Path("docs"),
    *,
    check: Annotated[bool, Parameter(help="Write nothing; exit 1 if a page differs.", negative="")] = False,
) -> int:
    """Write the pages that the program itself knows, or check that they are current."""
    stale = []
    for name, page in PAGES.items():
        path, text = folder / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"{folder / name}: {'differs' if check else 'written'}\n")
    return 1 if check and stale else 0


def cli_page() -> str:
    body = build_app().generate_docs(output_format="markdown")
    return "\n".join(line.rstrip() for line in body.strip().splitlines()) + "\n" + _EXIT_CODES


def config_page() -> str:
    rows = []
    for name, field in RunConfig.model_fields.items():
        kind = ", ".join(f"`{choice}`" for choice in knob_choices(name)) or _type_name(field.annotation)
        default = f"`{knob_default(name)}`" if field.default != "" else "none"
        default = "required" if field.is_required() else default
        rows.append(_row(f"`{name}`", kind, default, field.description or ""))
    return _CONFIG_HEAD + "".join(rows)


def metrics_page() -> str:
    rows = (_row(f"`{m.name}`", m.kind, ", ".join(m.labels) or "-", m.help) for m in METRICS)
    return _METRICS_HEAD + "".join(rows)


def errors_page() -> str:
    rows = []
    for name, member in inspect.getmembers(errors, inspect.isclass):
        if issubclass(member, errors.BittrueError):
            # The first paragraph, in the page's spelling of code.
            meaning = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split()).replace("``", "`")
            row = (f"`{name}`", str(member.status), f"`{member.code}`", str(member.exit_code), meaning)
            rows.append(_row(*row))
    return _ERRORS_HEAD + "".join(rows)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type_name(annotation: object) -> str:
    return getattr(annotation, "__name__", str(annotation))


PAGES = {"cli.md": cli_page, "config.md": config_page, "metrics.md": metrics_page, "errors.md": errors_page}
