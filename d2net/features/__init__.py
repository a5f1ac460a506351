"""From videos and sensor files to features."""
