"""Files written from a run: annotated video and JSON lines."""
