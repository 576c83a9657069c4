"""What a run needs in addition to the method: options, checkpoints, logging, evaluation, processes,
safeguards."""
