"""Accuracy on annotated images: COCO average precision, precision and recall."""
