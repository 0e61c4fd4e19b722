"""Checkpoints of maskcast, torchvision and detectron2."""
