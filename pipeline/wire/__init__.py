"""Messages over ZeroMQ (docs/wire.md), with their masks, keys, rights, endpoints and recordings."""
