"""The package as users install it: a wheel in its own environment, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
USER_PROGRAM = Path(__file__).with_name("user_program.py")

# The environment must not see the checkout.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    parts = [str(part) for part in command]
    done = subprocess.run(
        parts, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist of this checkout and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("build")
    source, output = folder / "source", folder / "dist"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=folder)
    return output


class Installed:
    """An environment that holds the wheel and what it depends on, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self.command = folder / "bin" / "maskcast"
        (self.site_packages,) = (folder / "lib").glob("python*/site-packages")

    @property
    def distribution(self) -> Distribution:
        (info,) = self.site_packages.glob("maskcast-*.dist-info")
        return Distribution.at(info)


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    (wheel,) = distributions.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    environment = Installed(folder)
    command = [environment.python, "-m", "pip", "--disable-pip-version-check", "install", wheel]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("the dependencies cannot be downloaded: no package index is reachable")
    assert done.returncode == 0, done.stderr
    return environment


def test_the_sdist_is_complete(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {Path(name).relative_to(archive.getnames()[0]) for name in archive.getnames()}
    tracked = {
        path.relative_to(ROOT)
        for folder in ("benchmarks", "builder", "configs", "docs", "engines", "pipeline", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "bundles" not in path.parts
    }
    assert not tracked - names
    assert {Path(name) for name in ("Makefile", "CHANGELOG.md", "CONTRIBUTING.md")} <= names


def test_the_wheel_has_the_page_of_the_view(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    folder = Path("pipeline/clients/view/page")
    page = {f"maskcast/{folder / file.name}" for file in (ROOT / folder).iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        assert page <= set(archive.namelist())
    assert len(page) >= 7


def test_only_maskcast_is_installed_in_site_packages(installed: Installed) -> None:
    files = installed.distribution.files
    assert files is not None
    tops = {file.parts[0] for file in files if file.parts[0] != ".."}
    assert tops == {"maskcast", f"maskcast-{installed.distribution.version}.dist-info"}


def test_the_command_runs_without_torch(installed: Installed, tmp_path: Path) -> None:
    assert run(installed.command, "--version", cwd=tmp_path).startswith("maskcast ")
    code = "import importlib.util, maskcast; print(importlib.util.find_spec('torch'))"
    assert run(installed.python, "-c", code, cwd=tmp_path) == "None\n"


def test_the_demo_runs_from_the_wheel(installed: Installed, tmp_path: Path, make_clip: Any) -> None:
    clip = make_clip("street.mp4", frames=8, width=320, height=240)
    (tmp_path / "here").mkdir()
    shown = run(installed.command, "demo", clip, "--limit", "5", cwd=tmp_path / "here")
    assert "5 frames" in shown
    assert (tmp_path / "here" / "demo.mp4").stat().st_size


def test_folders_and_modules_of_the_user_are_left_alone(
    installed: Installed, tmp_path: Path
) -> None:
    for name in ("pipeline", "engines", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
    (tmp_path / "builder.py").write_text("raise SystemExit('builder was imported')")
    code = (
        "import maskcast;"
        "[getattr(maskcast, name) for name in maskcast.__all__];"
        "import maskcast.pipeline.cli.commands, maskcast.builder.commands, maskcast.configs"
    )
    run(installed.python, "-c", code, cwd=tmp_path)
    run(installed.python, "-m", "maskcast", "run", "--help", cwd=tmp_path)
    run(installed.command, "--version", cwd=tmp_path)


def test_mypy_knows_the_types_of_a_users_program(installed: Installed, tmp_path: Path) -> None:
    program = shutil.copy(USER_PROGRAM, tmp_path)
    run(
        *(sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.python),
        *("--cache-dir", tmp_path / "cache", program),
        cwd=tmp_path,
    )


def test_pyright_knows_the_types_of_a_users_program(installed: Installed, tmp_path: Path) -> None:
    program = shutil.copy(USER_PROGRAM, tmp_path)
    command = (Path(sys.executable).with_name("pyright"), "--pythonpath", installed.python, program)
    run(*command, cwd=tmp_path)
