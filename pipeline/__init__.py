"""Run time: sources, the five stages, the wire, the subscriber, profiling."""
