"""The run-time commands: run, watch, profile, demo, ctl, keys."""
