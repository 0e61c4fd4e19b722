"""Inference: the bundle on disk, Instances, and the engines that run a bundle."""
