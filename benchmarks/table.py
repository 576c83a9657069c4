"""A paper's table in one command: trains and evaluates every scene, and writes the results beside published
figures.

    python benchmarks/table.py --table blender --preset lego_fast             # configs/lego_fast.txt for all
    python benchmarks/table.py --table llff --preset paper --exact_render     # configs/paper/<scene>.txt
    python benchmarks/table.py --table blender --preset paper --shard 3/8     # one of eight jobs of a cluster
    python benchmarks/table.py --preset fast --scenes mine=data/mine other=data/other --jobs 2

A folder in logs/ gets a run for each scene, and results.json, results.md and results.tex. The same command
continues after any interruption: results are kept, and runs resume. Shards share the folder and need nothing
else in common; each writes the table of what is there.
"""
import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT
from results_page import METRICS, latex, markdown, mean_of_scenes

from load_blender import read_frames
from load_llff import image_files
from scenes.errors import UserError, first_line
from scenes.files import make_folder, read_json, write_text
from scenes.views import find_mask
from tools.datasets.sources import SETS
from training.checkpoints import changed_options, load_newest
from training.options import config_parser, integer, values_of
from training.outputs import hash_of_tensors
from training.signals import StopRequest
from training.start import read_starts
from training.time_plan import NEVER

# A run is checked this often for its end, and for a signal to stop, in seconds.
POLL_SECONDS = 0.2
# Runs Python with the given arguments, and with SIGTERM when its parent ends, even by SIGKILL (Linux's
# PR_SET_PDEATHSIG).
END_WITH_PARENT = ('import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); '
                   'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])')


class Task(NamedTuple):
    """A scene of the table, and the options of its run: as words, and parsed."""
    name: str
    words: list
    args: argparse.Namespace

    @property
    def folder(self):
        """The folder of the run."""
        return Path(self.args.basedir, self.name)

    @property
    def metrics(self):
        """The metrics of the test views after the last step, a file."""
        return self.folder / f'testset_{self.args.N_iters:06d}/metrics.json'

    @property
    def console(self):
        """What the last start of the run printed, a file."""
        return self.folder / 'console.txt'

    @property
    def options(self):
        """The options that the result depends on, where they differ from their defaults, by name."""
        values = values_of(self.args, 'networks', 'scene', 'training', 'source', 'rendering')
        values['N_iters'] = self.args.N_iters
        return {key: value for key, value in values.items()
                if key not in ('expname', 'datadir') and value != config_parser().get_default(key)}


# --- a scene ------------------------------------------------------------------------------------------------

def measure(bench, stop, task):
    """Train and evaluate a scene, or continue that, and write `result.json` into its folder: its record, or
    why there is none. Does nothing if it is there and belongs to the newest checkpoint.

    Raises:
      UserError: the folder holds a run that does not belong to this table.
    """
    record = read_record(task)
    if stop.requested or not ('result' in record or Path(task.args.datadir).is_dir()):
        return
    state = newest_state(task)
    if 'result' in record and (state is None or hash_of_networks(state) == record['result']['checkpoint']):
        return
    task.metrics.unlink(missing_ok=True)  # perhaps of other options; frames of the same options are reused
    make_folder(task.folder)
    say(f'{task.name}: running; see {task.console}')
    problem = run(bench, stop, task)
    if stop.requested:
        return
    state = newest_state(task)
    if not problem and not (task.metrics.is_file() and state and state['steps_done'] == task.args.N_iters):
        problem = f'no metrics of test views after step {task.args.N_iters}; see {task.console.name}'
    record = {'problem': problem} if problem else collect(bench, task, state)
    write_text(task.folder / 'result.json', json.dumps(record, indent=1) + '\n')
    say(f'{task.name}: {problem or summary(record["result"]["mean"])}')


def newest_state(task):
    """The newest checkpoint of a run, or None. Raises UserError if it has other options or more steps."""
    _, state = load_newest(task.folder)
    differences = changed_options(task.args, state) if state else []
    if state and state['steps_done'] > task.args.N_iters:
        differences.append(f'N_iters {task.args.N_iters} (was {state["steps_done"]})')
    if differences:
        raise UserError(f'{task.folder}: found a run with other options, {", ".join(differences)}; delete it '
                        'or choose another --out')
    return state


def run(bench, stop, task):
    """Run run_nerf.py on a scene; returns why it failed, or None. A signal to stop is handed on to it."""
    command = [str(ROOT / 'run_nerf.py'), *task.words]
    if bench.nproc_per_node > 1:
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']
        command = [*torchrun, str(bench.nproc_per_node), *command]
    if sys.platform == 'linux':
        command = ['-c', END_WITH_PARENT, *command]
    threads = max(1, torch.get_num_threads() // (bench.jobs * bench.nproc_per_node))
    with open(task.console, 'w', encoding='utf-8') as console:
        # in a session of its own: otherwise Ctrl-C would reach it twice, which ends it without saving
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=console,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
    told = False
    while process.poll() is None:
        if stop.requested and not told:
            process.terminate()
            told = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
    if process.returncode < 0:
        return f'killed by {signal.Signals(-process.returncode).name}'
    lines = task.console.read_text(encoding='utf-8', errors='replace').splitlines()
    errors = [line.partition('error: ')[2] for line in lines if line.startswith('run_nerf.py: error: ')]
    return [f'exit code {process.returncode}', *errors][-1] if process.returncode else None


def collect(bench, task, state):
    """The record of a finished scene: `result`, which on a CPU, in one process, does not depend on
    interruptions, and what is `measured`, which does."""
    metrics, starts = read_json(task.metrics), read_starts(task.folder)
    seconds = [image.pop('seconds') for image in metrics['images']]
    seconds = [value for value in seconds if value is not None]  # of reused frames
    about = {key: metrics[key] for key in ('step', 'width', 'height', 'views', 'background', 'measured')}
    result = {'options': task.options, 'data': hash_of_data(task.args), 'checkpoint': hash_of_networks(state),
              **about, 'mean': {key: metrics['mean'][key] for key in METRICS}, 'images': metrics['images']}
    start = {key: starts[-1][key] for key in ('commit', 'time', 'torch', 'cuda')}
    threads = starts[-1]['threads']
    hardware = starts[-1]['gpu'] or f'{processor()}, {threads} thread{"s" * (threads > 1)}'
    if bench.nproc_per_node > 1:
        hardware += f', {bench.nproc_per_node} processes'
    measured = {'training_seconds': state.get('seconds'),  # until the last step; older checkpoints do not say
                'frame_seconds': sum(seconds) / len(seconds) if seconds else None,
                'hardware': hardware, 'starts': len(starts), **start}
    return {'result': result, 'measured': measured}


def processor():
    """The name of the processor where the system says it, otherwise CPU."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), 'CPU')


def hash_of_networks(state):
    """The SHA-256 of the networks and the renderer in a checkpoint."""
    parts = [f'{name}_state_dict' for name in ('network_fn', 'network_fine', 'renderer')]
    return hash_of_tensors({part: state[part] for part in parts if state.get(part)})


def hash_of_data(args):
    """The SHA-256 of the names and contents of the files that the loader reads; of all files of the scene if
    it has another layout than those of the NeRF paper, or is downsampled from them."""
    folder = Path(args.datadir)
    if args.dataset_type == 'llff':
        images = image_files(folder, args.factor)
        paths = [folder / 'poses_bounds.npy', *images, *(find_mask(folder, path) for path in images)]
    elif args.dataset_type == 'blender' and args.factor <= 1:
        frames = read_frames(folder, args.testskip, args.llffhold)
        paths = [*folder.glob('transforms*.json'), *frames.paths, *frames.masks]
    else:
        paths = [path for path in folder.rglob('*') if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted({*paths} - {None}):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f'{os.path.relpath(path, folder)} {content}\n'.encode())
    return digest.hexdigest()


# --- the table ----------------------------------------------------------------------------------------------

def read_record(task):
    """The record of a scene from its `result.json`, or why there is none: {'problem': …}."""
    path = task.folder / 'result.json'
    record = read_json(path) if path.is_file() else {'problem': 'not measured yet'}
    if 'result' in record and record['result']['options'] != task.options:
        record = {'problem': 'measured with other options'}
    if 'problem' in record and not Path(task.args.datadir).is_dir():
        record = {'problem': f'no folder {task.args.datadir}'}
    return record


def assemble(bench, tasks, problems):
    """Write results.json, results.md and results.tex from the records of all scenes; returns the content of
    the first. `problems` by name take precedence over the records."""
    records = {task.name: read_record(task) for task in tasks}
    records |= {name: {'problem': problem} for name, problem in problems.items()}
    scenes = {name: record.get('result', record) for name, record in records.items()}
    measured = {name: record['measured'] for name, record in records.items() if 'measured' in record}
    content = {'result': {'table': bench.table or 'scenes', 'preset': Path(bench.preset).stem,
                          'mean': mean_of_scenes(scenes), 'scenes': scenes},
               'measured': {'command': ['benchmarks/table.py', *sys.argv[1:]], 'scenes': measured}}
    write_text(bench.out / 'results.json', json.dumps(content, indent=1) + '\n')
    write_text(bench.out / 'results.md', markdown(content))
    write_text(bench.out / 'results.tex', latex(content))
    return content


def summary(means):
    """The means of a scene in one line."""
    return ', '.join(f'{key.upper()} {means[key]:.4g}' for key in METRICS if means[key] is not None)


def say(line):
    print(line, file=sys.stderr, flush=True)


# --- command line -------------------------------------------------------------------------------------------

def shard_of(text):
    """K and N of K/N, as a type for argparse."""
    numbers = [int(word) if word.isdigit() else 0 for word in text.split('/')]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f'found {text}, expected K/N with K from 1 to N')
    return numbers


def parse():
    """The options of this program, and in `rest` those of run_nerf.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='All other options are those of run_nerf.py, for every scene.')
    add = parser.add_argument
    add('--table', choices=['blender', 'llff'], help='the scenes, and the published figures')
    add('--preset', required=True, help='a config file, the name of one in configs/, or the name of a folder '
                                        'there that has one for each scene')
    add('--scenes', nargs='+', metavar='NAME[=FOLDER]', help='some scenes of the table, or other ones')
    add('--data', type=Path, default=Path('data'), help='folder of the scenes of all tables; default: data')
    add('--out', type=Path, help='default: logs/table_<table>_<preset>')
    add('--shard', type=shard_of, default=(1, 1), metavar='K/N', help='measure the K-th and every N-th scene '
                                                                      'after it')
    add('--jobs', type=integer(1), default=1, help='scenes at once; they share the threads')
    add('--nproc_per_node', type=integer(1), default=1, help='processes for each scene, by torchrun')
    add('--only_write', action='store_true', help='measure nothing, write the table of what is there')
    bench, rest = parser.parse_known_args()
    bench.rest = [word for word in rest if word != '--']
    bench.out = bench.out or Path('logs', f'table_{bench.table or "scenes"}_{Path(bench.preset).stem}')
    return bench


def make_task(bench, name, folder):
    """The `Task` of a scene. Raises UserError if there is no config for it, or if an option of run_nerf.py is
    given that it needs itself."""
    configs = ROOT / 'configs'
    choices = [Path(bench.preset), configs / f'{bench.preset}.txt', configs / bench.preset / f'{name}.txt']
    config = next((path for path in choices if path.is_file()), None)
    if config is None:
        raise UserError(f'--preset: found {bench.preset}, expected one of {", ".join(map(str, choices))}')
    own = {'config': str(config), 'expname': name, 'basedir': str(bench.out), 'datadir': str(folder)}
    words = [word for key, value in own.items() for word in (f'--{key}', value)]
    words += ['--i_video', str(NEVER), *bench.rest]
    args = config_parser().parse_args(words)
    for key, value in {**own, 'minutes': None}.items():  # a table needs a number of steps
        if vars(args)[key] != value:
            raise UserError(f'--{key}: not available here')
    return Task(name, [*words, '--i_testset', str(args.N_iters)], args)


def make_tasks(bench):
    """The `Task`s of all scenes of the table. Raises UserError for unknown or repeated scenes."""
    known = {}
    if bench.table:
        known = {name: bench.data / SETS[bench.table].folder / name for name in SETS[bench.table].scenes}
    given = [text.partition('=')[::2] for text in bench.scenes or known]
    unknown = [name for name, folder in given if not folder and name not in known]
    if unknown or not given or len(dict(given)) < len(given):
        expected = ', '.join([*known, 'NAME=FOLDER'])
        raise UserError(f'--scenes: found {" ".join(bench.scenes or ["none"])}, expected some of {expected}')
    return [make_task(bench, name, folder or known[name]) for name, folder in given]


def main():
    """Run the program; returns 0, 1 if a scene failed, 2 for errors that the user can fix, 128 + n for signal
    n."""
    bench, problems = parse(), {}
    try:
        tasks = make_tasks(bench)
        make_folder(bench.out)
        chosen = [] if bench.only_write else tasks[bench.shard[0] - 1::bench.shard[1]]
        with StopRequest(say) as stop, ThreadPoolExecutor(bench.jobs) as pool:
            futures = {task.name: pool.submit(measure, bench, stop, task) for task in chosen}
        for name, future in futures.items():
            try:
                future.result()
            except (UserError, OSError) as error:
                problems[name] = first_line(error)
        content = assemble(bench, tasks, problems)
    except (UserError, OSError) as error:
        say(f'table.py: error: {first_line(error)}')
        return 2
    print(markdown(content))
    print(f'{bench.out}: results.json, results.md, results.tex')
    return exit_code(content['result']['scenes'], chosen, stop)


def exit_code(scenes, chosen, stop):
    """The exit code of the program, after saying what it means."""
    problems = {name: scene['problem'] for name, scene in scenes.items() if 'problem' in scene}
    failed = [task.name for task in chosen if task.name in problems and Path(task.args.datadir).is_dir()]
    if stop.requested:
        say('run the same command again to continue')
        return stop.exit_code
    if failed or len(problems) == len(scenes):
        named = failed or problems
        say(f'table.py: error: {"; ".join(f"{name}: {problems[name]}" for name in named)}')
        return 1 if failed else 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
