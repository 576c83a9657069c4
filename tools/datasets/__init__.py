"""Parts of tools/download.py."""
