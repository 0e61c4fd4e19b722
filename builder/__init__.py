"""Offline tools: build bundles, train networks and measure accuracy."""
