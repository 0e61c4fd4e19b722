"""Training: data, losses, recipe, loop."""
