"""The offline commands: build, train, eval, models.

The first three need the builder extra; importing this module does not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import typer

from maskcast.builder import build_command, eval_command, models_command, train_command


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    commands: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
        "build": (build_command.build, build_command.EXAMPLES),
        "train": (train_command.train, train_command.EXAMPLES),
        "eval": (eval_command.evaluate, eval_command.EXAMPLES),
        "models": (models_command.models, models_command.EXAMPLES),
    }
    for name, (command, examples) in commands.items():
        # Typer keeps the line breaks of a docstring; in an epilogue an empty line makes one.
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
        app.command(name, help=text, epilog="\n\n".join(("Examples:", *examples)))(command)
