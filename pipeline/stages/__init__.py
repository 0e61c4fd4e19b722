"""The stages of the pipeline, one thread each."""
