"""The viewer: pictures of a trained scene, or of one in training, in a browser."""
