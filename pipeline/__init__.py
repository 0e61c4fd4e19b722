"""Run time: sources, stages, tracking, messages, outputs, monitoring and the commands."""
