"""The publisher: an XPUB socket, who is connected to it, and what they may send."""
