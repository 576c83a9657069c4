"""How rays and networks are evaluated: the interface of renderers, network queries, and optional speed,
one technique per file. Each compiled kernel has a reference implementation in PyTorch."""
