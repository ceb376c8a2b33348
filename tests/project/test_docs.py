"""The docs name everything a reader can meet: verbs, knobs, metrics, ops, errors; named paths exist."""

import inspect
import re
from pathlib import Path

import pytest

from bittrue import errors
from bittrue.cli.docs import PAGES as GENERATED
from bittrue.cli.docs import docs
from bittrue.cli.main import VERBS
from bittrue.config.run import RunConfig
from bittrue.obs.metrics import METRICS
from bittrue.ops.contracts import OpTable

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def words(*names: str) -> set[str]:
    """Identifiers in code spans or fences of the given pages."""
    text = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in names)
    spans = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    return {word for span in spans for word in re.findall(r"[A-Za-z_][A-Za-z0-9_-]*", span)}


def missing(names: set[str], *files: str) -> set[str]:
    return names - words(*files)


def test_every_verb_is_in_the_page_of_the_command_line() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"## bittrue {verb}\n" not in text] == []


def test_every_knob_is_in_the_page_of_the_configuration() -> None:
    assert missing(set(RunConfig.model_fields), "config.md") == set()


def test_every_metric_is_in_the_page_of_metrics() -> None:
    assert missing({metric.name for metric in METRICS}, "metrics.md") == set()


def test_every_op_has_its_rule_in_the_page_of_numerics() -> None:
    assert missing(set(OpTable.op_names()), "numerics.md") == set()


def test_every_error_class_is_in_the_page_of_errors() -> None:
    classes = {
        name
        for name, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, errors.BittrueError)
    }
    assert len(classes) > 5
    assert missing(classes, "errors.md") == set()


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_what_the_program_writes(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATED[name](), "run `make docs`"


def test_check_notices_a_page_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs(tmp_path) == 0
    assert docs(tmp_path, check=True) == 0
    (tmp_path / "config.md").write_text("# Configuration\n", encoding="utf-8")
    capsys.readouterr()
    assert docs(tmp_path, check=True) == 1
    assert capsys.readouterr().out == f"{tmp_path / 'config.md'}: differs\n"
    assert (tmp_path / "config.md").read_text(encoding="utf-8") == "# Configuration\n"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.name)
def test_paths_named_in_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:bittrue|tests|docs|configs|benchmarks)/[A-Za-z0-9_./-]+)`", text))
    links = {target for target in re.findall(r"\]\(([^)#:]+)\)", text)}
    absent = {path for path in named if not (REPOSITORY / path).exists()}
    absent |= {link for link in links if not (page.parent / link).exists()}
    assert absent == set()


def test_a_name_that_no_page_has_is_missing() -> None:
    assert missing({"rms_norm", "no_such_op"}, "numerics.md") == {"no_such_op"}
    assert missing({"transformers"}, "config.md") == {"transformers"}


def test_knobs_stay_within_their_budget() -> None:
    assert len(RunConfig.model_fields) <= 60


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    declared = re.search(r'^version = "([^"]+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert declared is not None and newest is not None
    assert newest[1] == declared[1]
