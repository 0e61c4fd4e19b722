"""The unit for systemd, as systemd itself reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from maskcast import configs

UNIT = Path(configs.__file__).parent / "systemd" / "maskcast@.service"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there, since systemd looks for it."""
    text = UNIT.read_text()
    assert text.count("/usr/local/bin/maskcast run") == 1
    path = tmp_path / UNIT.name
    path.write_text(text.replace("/usr/local/bin/maskcast run", "/bin/true run"))
    return path


def verify(unit: Path) -> str:
    instance = unit.with_name("maskcast@door.service")
    instance.write_text(unit.read_text())
    result = subprocess.run(
        ["systemd-analyze", "verify", str(instance)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in result.stderr.splitlines() if str(unit.parent) in line]
    return "\n".join(complaints) or ("" if result.returncode == 0 else result.stderr)


@needs_systemd
def test_systemd_has_nothing_to_complain_of(unit: Path) -> None:
    assert verify(unit) == ""


@needs_systemd
@pytest.mark.parametrize(
    ("right", "wrong"), [("Restart=on-failure", "Restart=perhaps"), ("RestartSec", "RestartSecs")]
)
def test_what_is_wrong_in_a_unit_would_be_seen(unit: Path, right: str, wrong: str) -> None:
    unit.write_text(unit.read_text().replace(right, wrong))
    assert verify(unit) != ""


@needs_systemd
def test_the_unit_is_hardened(unit: Path) -> None:
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", result.stdout)
    if exposure is None:
        pytest.skip(f"this systemd-analyze cannot judge files: {result.stderr.strip()[:200]}")
    assert float(exposure[1]) < 2.5  # 10 is a service without any protection
