"""What `tools/export.py` writes for other programs, one kind of file in each module."""
