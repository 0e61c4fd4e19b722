"""Report of a benchmark that goes on after a failed step; needs only the standard library."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Results, which are written to a file after every step.

    Args:
        path: path of the JSON file.
    """

    def __init__(self, path: Path, **results: Any) -> None:
        self._path = path
        self.results: dict[str, Any] = {**results, "failed": {}}

    def step(self, into: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
        """Run a step and record its result, or why it failed; return the result or None."""
        try:
            into[name] = result = work()
        except Exception as error:
            traceback.print_exc()
            self.results["failed"][name] = f"{type(error).__name__}: {error}"
            result = None
        self._path.write_text(json.dumps(self.results, indent=2) + "\n")
        return result
