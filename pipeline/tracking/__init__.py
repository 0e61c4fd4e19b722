"""Tracking: track ids for objects across frames, and the zones and lines that they pass."""
