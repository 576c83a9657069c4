"""What a trained scene is exported to, one form a module."""
