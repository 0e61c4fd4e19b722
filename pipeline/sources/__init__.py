"""Where frames come from: files, streams, cameras, images, a test pattern."""
