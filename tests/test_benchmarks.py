"""The benchmarks run and print their figures; what these are is not tested."""
import pytest
from tiny_runs import ROOT, run_python

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
    ('logging_overhead.py', [*TINY, '--i_img', 10, '--i_print', 5, '--blocks', 2], 'added:'),
    ('render_memory.py', ['--frames', 2, '--size', 32], '2 frames of 32×32: peak')])
def test_benchmark(script, options, printed):
    done = run_python(f'benchmarks/{script}', *options)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
