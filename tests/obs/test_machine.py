import subprocess
from pathlib import Path

import pytest

from bittrue.obs.machine import Checkout, checkout, cpu_flags, processor, usable_cpus


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a checkout of one commit."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "errors.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package/errors.py")
    git(tmp_path, "commit", "-qm", "one")
    return folder


def test_a_checkout_is_named_by_its_commit_and_by_changes_of_the_package(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert checkout(package) == Checkout(commit, is_dirty=False)
    (package.parent / "notes").write_text("beside the package")
    assert checkout(package) == Checkout(commit, is_dirty=False)
    (package / "errors.py").write_text("x = 2\n")
    assert checkout(package) == Checkout(commit, is_dirty=True)


def test_a_package_that_is_installed_below_another_checkout_is_not_of_its_commit(package: Path) -> None:
    installed = package.parent / "site"
    installed.mkdir()
    (installed / "errors.py").write_text("x = 1\n")
    assert checkout(installed) is None


def test_the_processor_is_named() -> None:
    assert processor() and usable_cpus() >= 1
    assert list(cpu_flags()) == sorted(set(cpu_flags()))
