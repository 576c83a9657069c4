"""What a run needs beside the method: options, checkpoints, logs, evaluation, processes, safeguards."""
