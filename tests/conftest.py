"""Where the tests find recorded values and real scenes, and how they run the script."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('NERF_SHARED', ROOT.parent / 'shared'))
GOLDEN, DATA = SHARED / 'golden', SHARED / 'data'

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f'no recorded values at {GOLDEN}')
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f'no real scenes at {DATA}')


def golden(name):
    """A file of recorded values as a dict of arrays."""
    with np.load(GOLDEN / name) as arrays:
        return {key: arrays[key] for key in arrays}


def run_script(*args, cwd=ROOT, timeout=300):
    """Run `run_nerf.py` as a person would; returns the completed process, its output as text."""
    command = [sys.executable, str(ROOT / 'run_nerf.py'), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def run_python(script, *args, cwd=ROOT, timeout=300):
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
