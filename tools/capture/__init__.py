"""The steps from photos to cameras that `tools/photos.py` takes, one idea a file."""
