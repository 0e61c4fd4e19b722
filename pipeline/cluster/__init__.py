"""Pipelines on several machines, and the gateway that gives subscribers one address."""
