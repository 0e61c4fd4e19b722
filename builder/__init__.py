"""Offline: checkpoint to portable graphs to engines, training and accuracy. Needs torch."""
