"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(metavar="BUNDLE", help="A bundle's folder, or default.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="End after so many frames of each source.")
]
ServerKey = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The publisher's .key, if it has keys.")
]
ClientKey = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Your .key_secret, see keys new.")
]
