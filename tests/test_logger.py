"""What users see of a run: lines, log file and TensorBoard, also where nothing can be written."""
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from scenes.cameras import Camera
from training import logger as logger_module
from training.console import Console
from training.logger import Logger, TensorBoard
from training.options import config_parser
from training.processes import Processes
from training.safeguards import Measures
from training.start import describe_run

CPU = torch.device('cpu')
SAFEGUARDS = SimpleNamespace(restarts=2, bad_steps=3)


def options(tmp_path, *args):
    return config_parser().parse_args(['--config', str(ROOT / 'configs/demo.txt'), '--basedir', str(tmp_path),
                                       *map(str, args)])


def measures_of(**losses):
    """Those of a step with these losses, where the losses of networks are the errors of their colours."""
    measures, losses = Measures(), {name: torch.tensor(loss) for name, loss in losses.items()}
    errors = {name: losses[name] for name in ('coarse', 'fine') if name in losses}
    measures.add(1.0, losses, errors, {}, torch.tensor(0.5))
    return measures


def run_steps(logger, measures, num_rays=64):
    for step in logger.steps():
        logger.finish_step(step, num_rays, measures, 1e-3, SAFEGUARDS)


def recorded(folder):
    """dict tag -> [(step, value)] of all of TensorBoard's files in `folder`."""
    found = {}
    for path in sorted(folder.glob('events*'), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), {'tensors': 0, 'scalars': 0}).Reload()
        for tag in events.Tags()['scalars']:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


# --- TensorBoard and lines ----------------------------------------------------------------------------------

def test_every_term_of_the_loss_is_logged(tmp_path, capsys):
    logger = Logger(options(tmp_path, '--N_iters', 5, '--i_print', 2), tmp_path, 0, CPU, Console())
    run_steps(logger, measures_of(coarse=0.1, fine=0.01, distortion=0.002))
    logger.image(5, 'view', torch.zeros(4, 6, 3, device='cpu'))
    logger.tensorboard.close()
    found = recorded(tmp_path)
    assert [step for step, _ in found['train/loss']] == [2, 4, 5]
    expected = {'train/loss': 0.112, 'loss/coarse': 0.1, 'loss/fine': 0.01, 'loss/distortion': 0.002,
                'psnr/train coarse': 10, 'psnr/train fine': 20, 'train/learning rate': 1e-3,
                'health/restarts': 2, 'health/skipped steps': 3}
    assert {tag: found[tag][-1][1] for tag in expected} == pytest.approx(expected)
    others = {'speed/rays per second', 'speed/seconds per step', 'health/memory, GiB'}
    assert found.keys() == expected.keys() | others
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines] == ['step 2/5', 'step 4/5', 'step 5/5']
    assert lines[0].startswith('step 2/5: loss 0.1120, PSNR 20.00, ') and lines[0].endswith(' rays/s')


def test_the_psnr_is_that_of_the_colours_whatever_the_loss(tmp_path, capsys):
    logger, measures = Logger(options(tmp_path, '--N_iters', 1), tmp_path, 0, CPU, Console()), Measures()
    errors = {'coarse': torch.tensor(0.1), 'fine': torch.tensor(0.01)}
    measures.add(1.0, {'charbonnier': torch.tensor(0.3)}, errors, {}, torch.tensor(0.5))
    run_steps(logger, measures)
    logger.tensorboard.close()
    found = recorded(tmp_path)
    assert found['psnr/train fine'][0][1] == pytest.approx(20)
    assert found['loss/charbonnier'][0][1] == pytest.approx(0.3)
    assert 'loss 0.3000, PSNR 20.00' in capsys.readouterr().out


def test_without_a_folder_nothing_is_written_or_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = Logger(options(tmp_path, '--N_iters', 5, '--i_print', 1), None, 0, CPU, Console(quiet=True))
    run_steps(logger, measures_of(coarse=0.1))
    logger.scalars(5, {'a': 1.0})
    assert logger.steps_done == 5 and capsys.readouterr() == ('', '') and not list(tmp_path.iterdir())


def test_measures_are_read_only_when_they_are_shown(tmp_path):
    class Scalar:
        reads = 0

        def __float__(self):
            Scalar.reads += 1
            return 0.1
    logger = Logger(options(tmp_path, '--N_iters', 100, '--i_print', 50), tmp_path, 0, CPU, Console())
    run_steps(logger, SimpleNamespace(losses={'coarse': Scalar(), 'fine': Scalar()},
                                      errors={'coarse': Scalar()}))
    assert Scalar.reads == 2 * 3


def test_only_training_counts_for_the_speed(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logger_module.time, 'perf_counter', lambda: now[0])
    logger = Logger(options(tmp_path, '--N_iters', 4, '--i_print', 2), tmp_path, 0, CPU, Console())
    for step in logger.steps():
        now[0] += 0.5
        logger.finish_step(step, 100, measures_of(coarse=0.1), 1e-3, SAFEGUARDS)
        now[0] += 100.0  # evaluation
    assert capsys.readouterr().out.count(' 200 rays/s') == 2


def test_a_killed_run_keeps_what_was_logged(tmp_path):
    script = f'''
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_logger import *
folder = Path({str(tmp_path)!r})
logger = Logger(options(folder, '--N_iters', 12, '--i_print', 4), folder, 0, CPU, Console())
for step in logger.steps():
    logger.finish_step(step, 64, measures_of(coarse=0.1), 1e-3, SAFEGUARDS)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [step for step, _ in recorded(tmp_path)['train/loss']] == [4, 8]


# --- disks and consoles that fail ---------------------------------------------------------------------------

FULL_DISK = f'''
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from training import logger
from training.console import Console
from training.logger import SummaryWriter, TensorBoard
folder, retry, lift_at = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
logger.TENSORBOARD_RETRY_SECONDS = retry
board = TensorBoard(folder, Console().say)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))  # stands for a full disk
for step in range(1, 401):
    if step == lift_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    board.call(SummaryWriter.add_scalar, 'a', step, step)
    if step % 10 == 0:
        board.call(SummaryWriter.flush)
board.close()
print('trained on')
'''


def run_with_full_disk(folder, retry, lift_at):
    done = subprocess.run([sys.executable, '-c', FULL_DISK, str(folder), str(retry), str(lift_at)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == '' and done.stdout.endswith('trained on\n'), done
    return done.stdout.splitlines()[:-1]


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    (line,) = run_with_full_disk(tmp_path, retry=60, lift_at=10 ** 9)
    assert line.startswith('TensorBoard: cannot write (') and 'File too large' in line
    (path,) = tmp_path.glob('events*')
    assert path.stat().st_size <= 3000


def test_writing_resumes_in_a_new_file(tmp_path):
    lines = run_with_full_disk(tmp_path, retry=0, lift_at=200)
    assert 1 <= len(lines) == len(list(tmp_path.glob('events*'))) - 1
    steps = [step for step, _ in recorded(tmp_path)['a']]
    assert steps[-200:] == list(range(201, 401)) and steps[:40] == list(range(1, 41))


def test_a_folder_that_is_gone_does_not_end_a_run(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    board = TensorBoard(tmp_path / 'file', Console().say)
    for step in range(5):
        board.call(SummaryWriter.add_scalar, 'a', step, step)
    board.close()
    assert capsys.readouterr().out.count('TensorBoard: cannot write') == 1


def test_the_log_file_begins_with_the_first_lines(tmp_path, capsys):
    console = Console()
    console.say('before')
    console.log_to(tmp_path / 'log.txt')
    console.say('after')
    console.log('in the file only')
    assert (tmp_path / 'log.txt').read_text() == 'before\nafter\nin the file only\n'
    assert capsys.readouterr().out == 'before\nafter\n'
    console.log_to(tmp_path / 'gone/log.txt')
    console.say('still printed')
    assert capsys.readouterr().out == 'still printed\n'


# --- the lines around a run ---------------------------------------------------------------------------------

@pytest.mark.parametrize('saved, expected', [(True, 'checkpoint  000003.tar\n'), (False, 'NOT SAVED')])
def test_the_end_of_a_run(tmp_path, capsys, saved, expected):
    logger = Logger(options(tmp_path, '--N_iters', 3), tmp_path, 0, CPU, Console())
    run_steps(logger, measures_of(coarse=0.1))
    logger.record_output('video', 'somewhere.mp4')
    logger.finish('000003.tar', saved, Processes(1))
    out = capsys.readouterr().out
    assert '3 steps done, 0 min' in out and expected in out and 'somewhere.mp4' in out and '--logdir' in out


def test_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    logger = Logger(options(tmp_path, '--N_iters', 3), tmp_path, 3, CPU, Console())
    run_steps(logger, measures_of(coarse=0.1))
    logger.finish(None, True, Processes(1))
    assert 'nothing to do: 3 steps are done' in capsys.readouterr().out


def test_a_lost_process_is_reported(tmp_path, capsys):
    logger, processes = Logger(options(tmp_path, '--N_iters', 3), tmp_path, 0, CPU, Console()), Processes(1)
    run_steps(logger, measures_of(coarse=0.1))
    processes.lost = True
    logger.finish('000003.tar', True, processes)
    out = capsys.readouterr().out
    assert 'another process of this run has ended' in out and '000003.tar' in out


def test_the_header_of_a_run(tmp_path):
    scene = SimpleNamespace(i_train=[0, 1], i_val=[2], i_test=[3], near=2.0, far=6.0,
                            cameras=[Camera(30, 40, np.eye(3))] * 4)
    networks = {'coarse': torch.nn.Linear(3, 1000), 'fine': torch.nn.Linear(3, 2)}
    header = describe_run(options(tmp_path), scene, CPU, networks, tmp_path, 0)
    assert 'a new run' in header and 'coarse 4,000 + fine 8 parameters' in header
    assert '2 train, 1 val' in header
    assert 'resumes after step 7' in describe_run(options(tmp_path), scene, CPU, networks, tmp_path, 7)
    assert '2 processes, cpu each' in describe_run(options(tmp_path), scene, CPU, networks, tmp_path, 0, 2)
