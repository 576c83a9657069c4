"""Scenes in memory: cameras, images, bounds, and the random rays that training samples."""
