"""What a running pipeline says of itself: metrics, health, traces."""
