import subprocess
import sys
import time
from pathlib import Path

import pytest

from bittrue.cli.main import VERBS, run
from bittrue.config.run import RunConfig


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bittrue.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_names_every_verb_fits_a_screen_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from bittrue.cli.main import run\n"
        "status = run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'starlette', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - started_s
    assert done.returncode == 0, done.stderr
    assert all(verb.split()[0] in done.stdout for verb in VERBS)
    assert len(done.stdout.splitlines()) <= 40
    assert seconds < 10  # about 0.3 s on an idle machine


def test_serve_help_has_a_flag_for_every_knob_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from bittrue.cli.main import run\n"
        "run(['serve', '--help'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for knob in RunConfig.model_fields:
        assert f"--{knob.replace('_', '-')}" in done.stdout, knob


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "serv"),
        (["serve", "x", "--max-contxt", "5"], "max-contxt"),
        (["serve", "x", "--port", "banana"], "port"),
        (["serve"], "model"),
        (["serve", "/nowhere/at/all"], "is not a directory"),
        (["ops", "chek"], "chek"),
        (["serve", "x", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["verify", "x", "--max-tokens", "1"], "--max-tokens is 1"),
        (["verify", "x", "--rounds", "0"], "--rounds is 0"),
        (["convert", "/proc/nothing", "--random", "0"], "cannot write /proc/nothing"),
    ],
)
def test_bad_usage_exits_2_with_one_line_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_version_is_printed() -> None:
    done = program("--version")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_flags_and_file_reach_the_server(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('served_name = "from-file"\nport = 0\n')
    done = program("serve", str(tmp_path / "none"), "--config", str(file), "--max-running", "3")
    assert done.returncode == 2
    assert "served_name=from-file" in done.stderr
    assert "max_running=3" in done.stderr
    assert done.stdout == ""
