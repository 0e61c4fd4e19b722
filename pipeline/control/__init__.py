"""The control socket: adds and removes sources of a running pipeline (docs/wire.md)."""
