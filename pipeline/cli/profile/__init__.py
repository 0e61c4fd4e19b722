"""``maskcast profile``: measures a pipeline and reports where its time goes."""
