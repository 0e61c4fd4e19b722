"""Tracking: which instances of different frames are one object, and its zones and lines."""
