"""Sources of frames: files, streams, cameras, images, a test pattern."""
