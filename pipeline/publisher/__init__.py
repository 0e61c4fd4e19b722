"""The publisher: XPUB sockets, the peers connected to them, and the limits on those peers."""
