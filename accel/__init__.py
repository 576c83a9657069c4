"""Optional speed, one idea a file; every compiled kernel stands beside a reference implementation in PyTorch."""
