"""``maskcast keys``: makes key pairs and sets which sources a client may see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    keys = typer.Typer(help="Make keys for encryption, and set clients' rights.")
    keys.command("new")(new_keys)
    keys.command("allow")(allow_key)
    app.add_typer(keys, name="keys", no_args_is_help=True)


def new_keys(
    name: Annotated[
        Path, typer.Argument(help="Path without extension: keys/server makes keys/server.key.")
    ],
) -> None:
    """Make a key pair: NAME.key for everyone, NAME.key_secret for its owner alone.

    The publisher and each subscriber need a pair of their own.
    """
    from maskcast.pipeline.wire.curve import new_keys as write_new_keys

    public, secret = write_new_keys(name)
    typer.echo(f"{public}: public key, for the other end of the connection")
    typer.echo(f"{secret}: secret key, for this end only")


def allow_key(
    key: Annotated[
        Path,
        typer.Argument(metavar="FILE.KEY", help="The client's .key file."),
    ],
    sources: Annotated[
        str, typer.Option(metavar="NAME,...", help="Sources it may see: door,yard* or * for all.")
    ],
    control: Annotated[
        bool, typer.Option("--control", help="It may also add and remove these sources.")
    ] = False,
) -> None:
    """Write a client's rights to a file next to its key; they apply within a second.

    Example:
      maskcast keys allow clients/alice.key --sources 'door,yard*'
    """
    from maskcast.pipeline.wire.curve import read_public_key
    from maskcast.pipeline.wire.rights import make_rights, write_rights

    read_public_key(key)
    rights = make_rights([name.strip() for name in sources.split(",")], control=control)
    what = "sees and controls" if control else "sees"
    typer.echo(f"{write_rights(key, rights)}: {what} {', '.join(rights.sources)}")
