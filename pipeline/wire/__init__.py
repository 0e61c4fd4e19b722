"""Messages over ZeroMQ (docs/wire.md): encoding, publisher, subscriber, keys."""
