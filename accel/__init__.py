"""Optional speed, one technique per file. Each compiled kernel has a reference implementation in PyTorch."""
