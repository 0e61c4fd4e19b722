"""Messages over ZeroMQ (docs/wire.md), and what both ends need: masks, keys, endpoints."""
