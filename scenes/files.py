"""Reading and writing files: clear errors when reading, atomic replacement when writing."""
import json
import os
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scenes.errors import UserError, first_line

# Incomplete files and folders have this in their names until they are renamed.
PARTIAL = '.part'


def read_json(path):
    """The content of a JSON file.

    Raises:
      UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON ({first_line(error)})') from None


def read_array(path):
    """The numbers in a .npy file as float64. Pickled objects are refused, so no code in the file can run.

    Raises:
      UserError: the file is missing or is not an array of numbers.
    """
    try:
        with open(path, 'rb') as file:
            return np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except Exception as error:  # a malformed header raises errors of many types
        raise UserError(f'{path}: not a readable .npy file of numbers ({first_line(error)})') from None


def partial_path(path):
    """The temporary path beside `path` for content that this thread has not completed yet."""
    own = '' if threading.current_thread() is threading.main_thread() else f'-{threading.get_ident()}'
    return path.with_name(f'.{path.stem}{PARTIAL}{os.getpid()}{own}{path.suffix}')


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    The content is flushed to disk before the rename, and the temporary file is removed when the block fails.
    So a file under its final name is complete, even if the process or the machine dies.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        yield partial
        with open(partial, 'r+b') as file:  # Windows writes only what may be written
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path):
    """Yield a new temporary folder beside `path`, and rename it to `path` when the block succeeds, in place
    of any folder there. The temporary folder is removed when the block fails."""
    path = Path(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial_files(folder):
    """Remove the temporary files and folders that this process, and others that have ended, left in `folder`
    and its subfolders."""
    for path in list(Path(folder).rglob(f'.*{PARTIAL}*')):
        pid = re.search(rf'{re.escape(PARTIAL)}(\d+)', path.name)
        if pid and int(pid[1]) != os.getpid() and is_running(int(pid[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(pid):
    """Whether the process `pid` of this machine is running; on Windows always true."""
    if os.name == 'nt':  # there `kill` would send it Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding='utf-8')


def make_folder(path):
    """Create the folder `path` and its parents where they are missing; returns it as a `Path`.

    Raises:
      UserError: the folder cannot be created.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path}: cannot create this folder ({error.strerror})') from None
    return Path(path)
