"""Example configurations, YAML."""
