"""The shipped stream configurations, YAML."""
