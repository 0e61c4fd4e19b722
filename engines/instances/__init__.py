"""What was found in a frame: instances, keypoints, and the forms of masks."""
