"""The console of a run: lines for people, and for the log file."""
import contextlib
import os
import sys
import time
import warnings

import torch
from tqdm import tqdm

from scenes.errors import UserError, first_line, print_any_text
from training.processes import Processes
from training.signals import Stopped

# A rank that fails gives rank 0 this many seconds to report the same problem first.
QUIET_SECONDS = 3.0


class Console:
    """Prints lines and copies them to a log file once there is one.

    Args:
      quiet: print nothing.
    Attributes:
      started_at: when it was made, by `time.perf_counter`.
    """

    def __init__(self, quiet=False):
        self.quiet, self.log_path, self.early_lines = quiet, None, []
        self.started_at = time.perf_counter()

    def say(self, message, file=None):
        """Log a line and print it above a progress bar. A closed console or a full disk behind it does no
        harm."""
        self.log(message)
        if self.quiet:
            return
        file = file or sys.stdout
        try:
            tqdm.write(message, file=file)
            file.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        except RuntimeError:  # a signal handler has interrupted another write
            pass

    def warn(self, message, *_):
        """Print a warning as one line; takes the place of `warnings.showwarning`."""
        self.say(f'run_nerf.py: warning: {message}', sys.stderr)

    def fail(self, error):
        """Print the line that ends a run, and return its exit code: 2 for what the user can fix, 1 otherwise.
        For signal n it prints nothing and returns 128 + n.

        Ranks other than 0 wait first: if rank 0 failed for the same reason, torchrun ends them in that time.
        """
        if isinstance(error, Stopped):
            return error.exit_code
        problem, code = str(error), 2 if isinstance(error, (UserError, OSError)) else 1
        if isinstance(error, OSError):
            problem = f'{error.filename}: {error.strerror}' if error.filename else first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            problem = ('out of GPU memory; lower --netchunk, with hash grids --N_rand_samples or --N_rand, '
                       'and --chunk in rendering')
        if self.quiet:
            time.sleep(QUIET_SECONDS)
            print(f'process {os.environ["RANK"]}: error: {problem}', file=sys.__stderr__)
        self.say(f'run_nerf.py: error: {problem}', sys.stderr)
        return code

    def log_to(self, path):
        """From now on write to this log file, beginning with the lines said so far."""
        self.log_path = path
        for line in self.early_lines:
            self.log(line)

    def log(self, message):
        """Write a line to the log file only."""
        if self.log_path is None:
            self.early_lines.append(message)
            return
        # the disk may be full
        with contextlib.suppress(OSError), open(self.log_path, 'a', encoding='utf-8') as file:
            file.write(message + '\n')


@contextlib.contextmanager
def rank0_console():
    """A `Console` for rank 0, which also prints warnings. Other ranks print nothing inside the block,
    not even argparse's errors."""
    print_any_text()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        console = Console(quiet=not Processes().is_main)
        if console.quiet:
            null = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
            stack.enter_context(contextlib.redirect_stderr(null))
            stack.enter_context(contextlib.redirect_stdout(null))
        warnings.simplefilter('default', UserWarning)
        warnings.showwarning = console.warn
        yield console
