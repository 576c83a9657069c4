"""The start of a training run: its folder and header, and the objects that it needs in addition to the
method."""
import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from scenes.cameras import sizes_of
from scenes.checks import check_scene
from scenes.depths import sparse_depths
from scenes.errors import UserError
from scenes.files import make_folder, remove_partial_files, write_text
from scenes.rays import RaySampler
from scenes.report import text_report, write_report
from scenes.scene import uses_ndc
from training.checkpoints import Checkpoints, checkpoint_parts, networks_of, restore
from training.logger import Logger
from training.options import plain_options
from training.processes import Processes
from training.safeguards import Safeguards
from training.time_plan import TimePlan

# Before the first step with an occupancy grid, rays are expected to have this fraction of --N_samples
# samples.
EXPECTED_FRACTION = 0.25


def start_run(args, scene, checkpoint, render_kwargs, optimizer, start, frames, console, processes):
    """What a training run needs in addition to the method, restored from the checkpoint that it
    resumes. Called in all processes.

    Args:
      args: the options.
      scene: a `Scene`.
      checkpoint: its path and content, or None for both.
      render_kwargs: of training, for `render`.
      optimizer: the optimizer of all that is trained.
      start: number of steps done.
      frames: a `FrameRenderer`.
      console: a `Console`.
      processes: a `Processes`.
    Returns:
      `TimePlan`, `Logger`, `RaySampler`, `Safeguards`, `Checkpoints`.
    Raises:
      UserError: as `ray_sampler` does; there are too many views for --appearance or --refine_poses, or the
        folder of the run cannot be written to.
    """
    networks, device = networks_of(render_kwargs), next(render_kwargs['network_fn'].parameters()).device
    rays = ray_sampler(args, scene, render_kwargs['pixel_centers'], device, processes)
    views, network = len(rays.views.poses), render_kwargs['network_fn']
    for option, module in (('--appearance', network.appearance), ('--refine_poses', network.poses)):
        rows = views if module is None else len(next(module.parameters()))
        if views > rows:
            raise UserError(f'{option}: found {views} views from the first training view to the last, '
                            f'expected at most {rows}')
    path, state = checkpoint
    plan = TimePlan(args, scene, state, start, frames, processes, console)
    logger = open_run(args, scene, networks, start, device, console, processes)
    followers = {'renderer': render_kwargs['renderer'], 'ray_sampler': rays}
    safeguards = Safeguards(networks, optimizer, args.seed, not args.no_restart, console.say, followers)
    if state is not None:
        restore(path, state, {'ray_sampler': rays, 'safeguards': safeguards})
    processes.seed_per_rank(args.seed, start)
    parts = checkpoint_parts(render_kwargs, optimizer, ray_sampler=rays, safeguards=safeguards)
    camera = {'pixel_centers': render_kwargs['pixel_centers'], **scene.checkpoint_fields()}
    checkpoints = Checkpoints(Path(args.basedir, args.expname), parts, args, camera, path, start, console.say,
                              processes.is_main, plan.seconds_taken)
    return plan, logger, rays, safeguards, checkpoints


def report_on_scene(args, scene, say):
    """`--check_data`: check a `Scene`, print what was found, and write `report.html` and `report.json` to the
    folder of the run; returns the exit code, 1 if there is an error."""
    folder = Path(args.basedir, args.expname)
    box = None if args.contract else args.aabb  # what is outside of it is contracted, not lost
    report = check_scene(scene, args.expname, uses_ndc(args), box)
    if Processes().is_main:
        write_report(report, folder)
    say(f'{text_report(report)}\nThe report is {folder / "report.html"}')
    return int(any(finding['level'] == 'error' for finding in report['findings']))


def ray_sampler(args, scene, pixel_centers, device, processes):
    """The `RaySampler` that draws this process's rays of each step.

    Raises:
      UserError: there are no depths for --lambda_depth.
    """
    N_rand = processes.own_rays(args.N_rand)
    N_rand_samples = args.N_rand_samples * N_rand / args.N_rand if args.occupancy_grid else None
    depths = None
    if args.lambda_depth > 0:
        try:
            depths = sparse_depths(args.datadir, scene)
        except UserError as error:
            raise UserError(f'--lambda_depth: {error}') from None
        depths = depths._replace(weight=args.lambda_depth * depths.weight)
    return RaySampler(scene, N_rand, args.no_batching, args.precrop_iters, args.precrop_frac, pixel_centers,
                      device, args.random_bkgd, N_rand_samples, EXPECTED_FRACTION * args.N_samples, depths)


def open_run(args, scene, networks, start, device, console, processes):
    """Prepare the folder of a run and print its header; returns its `Logger`. Arguments are those of
    `start_run`, and the device that trains."""
    folder = Path(args.basedir, args.expname)
    processes.from_rank0(partial(prepare_folder, folder, args, start, device))
    if not processes.is_main:
        return Logger(args, None, start, device, console)
    console.log_to(folder / 'log.txt')
    console.say(describe_run(args, scene, device, networks, folder, start, processes.size))
    return Logger(args, folder, start, device, console)


def describe_run(args, scene, device, networks, folder, start, num_processes=1):
    """The header of a run, a few lines; arguments as in `open_run`, and the number of processes."""
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    views = f'{len(scene.i_train)} train, {len(scene.i_val)} val, {len(scene.i_test)} test'
    fine = f' + {args.N_importance} fine' if args.N_importance else ''
    samples, rays = f'{args.N_samples} coarse{fine} samples', f'{args.N_rand} a step'
    if args.occupancy_grid:
        samples = f'{args.N_samples} steps along the diagonal of the box'
        rays = f'{args.N_rand_samples} samples a step, up to {args.N_rand} rays'
    lines = {
        'scene': f'{args.datadir} ({args.dataset_type})',
        'images': f'{views}, {sizes_of(scene.cameras)}, near {scene.near:.3g}, far {scene.far:.3g}',
        'rays': f'{rays} from {"one image" if args.no_batching else "all images"}, {samples}',
        'networks': ' + '.join(f'{name} {size:,}' for name, size in sizes.items()) + ' parameters',
        'device': str(device) if num_processes == 1 else f'{num_processes} processes, {device.type} each',
        'logs': f'{folder} ({f"resumes after step {start}" if start else "a new run"})',
    }
    return '\n'.join([args.expname] + [f'  {name:9} {text}' for name, text in lines.items()])


def prepare_folder(folder, args, start, device):
    """Create `folder`, write `args.txt`, `config.txt` and `run.json` there, and remove temporary files.

    Raises:
      UserError: it cannot be written to.
    """
    make_folder(folder)
    remove_partial_files(folder)
    try:
        write_text(folder / 'args.txt', ''.join(f'{key} = {value}\n' for key, value in plain_options(args)))
        if args.config is not None:
            write_text(folder / 'config.txt', Path(args.config).read_text(encoding='utf-8-sig'))
        starts = [*read_starts(folder), describe_start(args, start, device)]
        write_text(folder / 'run.json', json.dumps(starts, indent=1) + '\n')
    except OSError as error:
        raise UserError(f'{folder}: cannot write there ({error.strerror})') from None


def read_starts(folder):
    """The records of earlier starts of a run from `run.json`; none if it is missing or damaged."""
    try:
        starts = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
        return starts if isinstance(starts, list) else []
    except (OSError, ValueError):
        return []


def describe_start(args, start, device):
    """A record for `run.json`: command, code and software of this start."""
    try:
        command = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'command': sys.argv, 'commit': commit,
        'seed': args.seed, 'after_step': start, 'host': platform.node(), 'device': str(device),
        'gpu': torch.cuda.get_device_name(device) if device.type == 'cuda' else None,
        'threads': torch.get_num_threads(), 'python': platform.python_version(), 'torch': torch.__version__,
        'numpy': np.__version__, 'cuda': torch.version.cuda,
    }
