"""report.html of a run: its curves and its facts, one file that needs no other."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bittrue.config.model import ModelConfig
from bittrue.model.inventory import inventory
from bittrue.train.checkpoint import write_file
from bittrue.train.config import TrainConfig
from bittrue.train.metrics import METRICS_FILE, read_metrics
from bittrue.train.page import columns, facts, figures, page, shown
from bittrue.train.plot import Line, Plot, svg

REPORT_FILE = "report.html"


def write_report(
    directory: Path,
    config: TrainConfig,
    model: Mapping[str, Any],
    spikes: Sequence[Mapping[str, Any]],
    *,
    threads: int,
) -> Path:
    """Writes the report of the run in ``directory`` from its metrics. Raises CheckpointError."""
    rows = list(read_metrics(directory / METRICS_FILE))
    path = directory / REPORT_FILE
    write_file(path, report_html(directory.name, config, model, rows, spikes, threads=threads))
    return path


def report_html(
    title: str,
    config: TrainConfig,
    model: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    spikes: Sequence[Mapping[str, Any]],
    *,
    threads: int,
) -> str:
    """The page. ``rows``: lines of the metrics, by step."""
    marks = [int(spike["step"]) for spike in spikes]
    sections = {"Run": facts(dict(_facts(config, model, rows, threads=threads)))}
    sections["Last steps"] = _last_table(rows)
    if spikes:
        sections["Spikes"] = _spike_table(spikes)
    settings = {name: shown(value) for name, value in _settings(config).items()}
    parts = [
        f"<h1>Training run {escape(title)}</h1>",
        figures(svg(plot) for plot in plots(rows, marks)),
        columns(sections),
        f"<h2>Run file</h2>{facts(settings)}",
    ]
    return page(title, parts)


def plots(rows: Sequence[Mapping[str, Any]], marks: Sequence[int] = ()) -> Iterator[Plot]:
    """Every picture of the report."""
    tokens = [float(row["targets"]) for row in rows]
    main, mtp = (_line(rows, key, tokens) for key in ("main", "mtp"))
    shown = [main, mtp] if any(mtp.values) else [main]
    yield Plot("Loss of the next token (main) and of the draft head (mtp), nats a target", shown, True, marks)
    yield Plot("Loss by task, nats a target", _tasks(rows), True, marks)
    yield Plot("Index loss: KL to the attention, nats a token and layer", [_line(rows, "index")], True, marks)
    yield Plot("Balance loss a token and layer, 1 = even", [_line(rows, "balance")], False, marks)
    yield Plot("Busiest expert of each router, share of an even load", _loads(rows, 0), False, marks)
    yield Plot("Idlest expert of each router, share of an even load", _loads(rows, 1), False, marks)
    yield Plot("Gradient norm, before clipping", [_line(rows, "grad_norm")], True, marks)
    yield Plot("Learning rate", [_line(rows, "lr")], False, marks)
    speed = [row["tokens"] / row["seconds"] if row["seconds"] else 0.0 for row in rows]
    seconds = [float(row["seconds"]) for row in rows]
    yield Plot("Tokens/s", [Line("tokens/s", [row["step"] for row in rows], speed, seconds)], False, marks)


def _line(rows: Sequence[Mapping[str, Any]], key: str, weights: Sequence[float] | None = None) -> Line:
    return Line(key, [int(row["step"]) for row in rows], [float(row[key]) for row in rows], weights)


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    names = sorted({name for row in rows for name in row["tasks"]})
    return [_task(rows, name) for name in names]


def _task(rows: Sequence[Mapping[str, Any]], name: str) -> Line:
    found = [(int(row["step"]), *row["tasks"][name]) for row in rows if name in row["tasks"]]
    found = [item for item in found if item[2]]
    means = [total / count for _, total, count in found]
    return Line(name or "(unnamed)", [item[0] for item in found], means, [float(item[2]) for item in found])


def _loads(rows: Sequence[Mapping[str, Any]], place: int) -> list[Line]:
    names = sorted({name for row in rows for name in row["load"]}, key=_in_model)
    return [
        Line(
            name.removesuffix(".ffn.gate.bias"),
            [int(row["step"]) for row in rows if name in row["load"]],
            [float(row["load"][name][place]) for row in rows if name in row["load"]],
        )
        for name in names
    ]


def _in_model(name: str) -> tuple[bool, int]:
    """Layers by their number, then the draft head."""
    part, number = name.split(".")[:2]
    return part == "mtp", int(number)


def _facts(
    config: TrainConfig, model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, threads: int
) -> Iterator[tuple[str, str]]:
    found = ModelConfig.from_dict(model)
    specs = list(inventory(found, draft=config.model.draft))
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    yield "steps", f"{rows[-1]['step'] + 1 if rows else 0:,} of {config.run.steps:,}"
    yield "tokens", f"{tokens:,}"
    yield "targets", f"{sum(row['targets'] for row in rows):,}"
    yield "time in steps", f"{seconds / 3600:.2f} h"
    yield "tokens/s", f"{tokens / seconds:,.0f}" if seconds else "-"
    yield "parameters", f"{sum(spec.num_parameters for spec in specs):,}"
    yield "published size", f"{sum(spec.num_bytes for spec in specs) / 1e6:.1f} MB"
    yield "layers", ", ".join(found.layer_kinds)
    yield "sizes", f"hidden {found.hidden_size}, {found.num_heads} heads of {found.head_dim}"
    yield "experts", f"{found.experts_per_token} of {found.num_experts}, hidden {found.moe_intermediate_size}"
    yield "formats", f"{found.plain_format}, {found.dense_format}, experts {found.expert_format}"
    yield "vocabulary", f"{found.vocab_size:,}"
    yield "CPU threads", str(threads)
    yield "steps anticipated", f"{sum(bool(row.get('anticipating')) for row in rows):,}"
    yield "digest of the run file", config.digest


def _last_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the last steps, by loss and by task."""
    recent = rows[-100:]
    if not recent:
        return "<p>No step yet.</p>"
    cells = [(f"steps {recent[0]['step']} to {recent[-1]['step']}", "mean")]
    for key in ("main", "mtp", "index", "balance", "grad_norm"):
        cells.append((key, f"{sum(row[key] for row in recent) / len(recent):.4f}"))
    for line in _tasks(recent):
        assert line.weights is not None
        total = sum(v * w for v, w in zip(line.values, line.weights, strict=True))
        cells.append((f"task {line.name}", f"{total / sum(line.weights):.4f}"))
    body = "".join(f'<tr><td>{escape(a)}</td><td class="number">{escape(b)}</td></tr>' for a, b in cells)
    return f"<table>{body}</table>"


def _spike_table(spikes: Sequence[Mapping[str, Any]]) -> str:
    head = "<tr><th>step</th><th>what</th><th>back to</th></tr>"
    cells = ([str(spike[key]) for key in ("step", "reason", "back_to")] for spike in spikes)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table>{head}{body}</table>"


def _settings(config: TrainConfig) -> dict[str, object]:
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
    }
