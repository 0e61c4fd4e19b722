"""``maskcast cluster`` and ``maskcast gateway``: sources and publishers on many machines."""
