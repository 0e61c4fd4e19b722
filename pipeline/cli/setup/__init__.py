"""Commands that prepare a run: config, doctor and zones."""
