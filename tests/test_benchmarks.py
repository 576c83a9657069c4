"""The benchmarks run and print their figures; what these are is not tested."""
import json

import pytest
import torch
from tiny_runs import FAST_DEMO, ROOT, run_python

TINY = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--netwidth', 8,
        '--netwidth_fine', 8, '--N_rand', 16, '--N_samples', 4, '--N_importance', 4, '--device', 'cpu']


@pytest.mark.slow
@pytest.mark.parametrize('script, options, printed', [
    ('step.py', [*TINY, '--steps', 2, '--warmup', 2], 'sparse fp32'),
    ('render.py', [*TINY, '--frames', 1, '--rows', 8], 'nerf-pytorch'),
    ('processes.py', [*TINY, '--rounds', 1, '--N_iters', 20], 'efficiency'),
    ('contention.py', [*TINY, '--seconds', 0.5, '--rounds', 1, '--warmup', 5], 'busy loops'),
    ('quality.py', [*TINY, '--N_iters', 4, '--seeds', 0, '--evaluations', 2, '--views', 1],
     'means at the end'),
    ('kernels.py', [*FAST_DEMO, '--samples', 4096, '--warmup', 2, '--steps', 2], 'composite with gradient'),
    ('logging_overhead.py', [*TINY, '--i_img', 10, '--i_print', 5, '--blocks', 2], 'added:'),
    ('render_memory.py', ['--frames', 2, '--size', 32], '2 frames of 32×32: peak')])
def test_benchmark(script, options, printed):
    done = run_python(f'benchmarks/{script}', *options)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


# --- gpu.py -------------------------------------------------------------------------------------------------

PARTS = ['kernels', 'step', 'hash', 'vanilla', 'frames', 'resume']
# Runs gpu.py with parts of its own.
ODD_PARTS = '''
import sys, time
sys.path.insert(0, 'benchmarks')
import gpu
def fails(bench):
    "A part."
    yield {'row': 1}
    raise ValueError('broken\\nsecond line')
def hangs(bench):
    "A part."
    yield {'row': 2}
    time.sleep(100)
def works(bench):
    "A part."
    yield {'row': 3}
gpu.PARTS = {'fails': (fails, 9), 'hangs': (hangs, 0.5), 'works': (works, 9)}
sys.exit(gpu.main())
'''


def run_quick(path, *options, script='benchmarks/gpu.py'):
    """Run gpu.py on a CPU; returns the completed process and its results by part."""
    done = run_python(script, '--quick', '--device', 'cpu', '--json', path, *options)
    return done, json.loads(path.read_text())['parts']


@pytest.mark.slow
def test_gpu_continues_and_keeps_what_is_complete(tmp_path):
    path = tmp_path / 'gpu.json'
    done, first = run_quick(path, '--part', 'kernels', 'resume')
    assert done.returncode == 0 and [*first] == ['kernels', 'resume'], done.stderr
    content = json.loads(path.read_text())
    del content['parts']['kernels']['seconds']  # as if it had been killed there
    path.write_text(json.dumps(content))
    done, parts = run_quick(path)
    assert done.returncode == 0 and sorted(parts) == sorted(PARTS), done.stderr
    assert all(part['rows'] and part['seconds'] and 'error' not in part for part in parts.values())
    assert parts['resume'] == first['resume'] and parts['kernels'] != first['kernels']
    assert all(row['resumed differs by'] == 0 for row in parts['resume']['rows'])
    assert all(f'**{part}** (' in done.stdout for part in PARTS)
    _, again = run_quick(path)
    assert again == parts


@pytest.mark.slow
def test_gpu_goes_on_after_a_part_that_fails_or_hangs(tmp_path):
    script = tmp_path / 'odd_parts.py'
    script.write_text(ODD_PARTS)
    done, parts = run_quick(tmp_path / 'gpu.json', script=script)
    assert done.returncode == 1, done.stderr
    assert [part['rows'] for part in parts.values()] == [[{'row': 1}], [{'row': 2}], [{'row': 3}]]
    assert parts['fails']['error'] == 'broken' and parts['hangs']['error'] == 'stopped after 1 s'
    assert 'seconds' in parts['works'] and '**hangs** (' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('options, message', [
    (['--part', 'nothing'], "argument --part: invalid choice: 'nothing'"),
    (['--device', 'cuda'], 'found no CUDA device'),
    (['--device', 'cpu', '--datadir', 'nowhere'], 'nowhere: no such folder')])
def test_gpu_reports_errors_in_one_line(options, message, tmp_path):
    if message == 'found no CUDA device' and torch.cuda.is_available():
        pytest.skip('there is one')
    done = run_python('benchmarks/gpu.py', '--quick', '--json', tmp_path / 'gpu.json', *options)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / 'gpu.json').exists()
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f'benchmarks/gpu.py: error: {message}')
