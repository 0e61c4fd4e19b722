"""The configuration of a pipeline: its values, the reader of its files, and units."""
