"""What accompanies a training run: its log, its checkpoints, and the watch over its health."""
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from accel.bounds import box_of_rays, find_bounds
from accel.fast_rays import FastRays
from accel.grid_rays import GridBatches
from accel.hash_grid import HashGrid
from accel.occupancy import RESOLUTION as OCCUPANCY_RESOLUTION
from accel.occupancy import OccupancyGrid
from accel.sparse_backward import InChunks
from checkpoints import (
    NETWORK_OPTIONS,
    SCENE_OPTIONS,
    CheckpointKeeper,
    adopt_options,
    changed_options,
    load_checkpoint,
    save_checkpoint,
)
from devices import network_chunk, pick_precision
from errors import UserError
from health import Health
from run_log import RunLog, describe_run, prepare_folder
from scene import RayBatcher, load_scene, scene_of_checkpoint


def camera(scene, render_kwargs):
    """What a renderer needs to know of the scene beside the networks, as plain numbers and tensors for a checkpoint."""
    known = {key: render_kwargs[key] for key in ('ndc', 'lindisp', 'pixel_centers', 'white_bkgd')}
    return {**known, **scene.cameras()}


def find_start(args, ranks):
    """The checkpoint to start from and the scene, in each process.

    Returns:
      path and state of the checkpoint, or None for both; a `Scene`.
    Raises:
      UserError: options, data or checkpoint that cannot be used.
    """
    path, state = ranks.from_first(partial(load_checkpoint, args))
    if args.render_only:
        if state is None:
            raise UserError(f'--render_only: found no checkpoint in {Path(args.basedir, args.expname or "")}; '
                            'train first, or give --ft_path FILE')
        adopt_options(args, state)
        if not args.expname:
            raise UserError(f'{path}: found no name of the experiment in it; give --expname NAME')
    torch.manual_seed(args.seed)
    cameras_suffice = args.render_only and not args.render_test and not changed_options(args, state, SCENE_OPTIONS)
    if cameras_suffice and state['camera']:
        scene = scene_of_checkpoint(args, state['camera'])
    else:
        scene = ranks.first_before_others(partial(load_scene, args))  # which may make reduced images
    return path, state, scene


def name_changes(args, scene, path, state):
    """Warn of what is other than in the checkpoint."""
    changed = changed_options(args, state, NETWORK_OPTIONS if args.render_only else None)
    if not args.render_only and not scene.has_cameras_of(state['camera']):
        changed.append('another scene')
    if changed:
        warnings.warn(f'options differ from those of {path}: {", ".join(changed)}', stacklevel=3)


def fit_to_scene(render_kwargs, scene, aabb=None):
    """Give new networks with a hash encoding or an occupancy grid the box of the scene.

    Args:
      render_kwargs: with the networks.
      aabb: the box, where it is known: six numbers.
    """
    networks = [network for network in (render_kwargs['network_fn'], render_kwargs['network_fine']) if network is not None]
    grids = [module for network in networks for module in network.modules() if isinstance(module, (HashGrid, OccupancyGrid))]
    if grids:
        box, possible = find_bounds(scene, render_kwargs['ndc'], OCCUPANCY_RESOLUTION, aabb)
    for grid in grids:
        grid.restrict(box, *([possible] if isinstance(grid, OccupancyGrid) else []))


def render_fast(args, scene, render_kwargs, render_rays):
    """Let `render_kwargs` leave out what cannot be seen, unless the options say otherwise or a grid does so already.

    Args:
      render_rays: the function of run_nerf.py.
    """
    if args.exact_render or args.occupancy_grid:
        return
    query, device = render_kwargs['network_query_fn'], next(render_kwargs['network_fn'].parameters()).device
    names = [pick_precision(args.precision, device, max(args.netwidth, args.netwidth_fine))]
    names += ['fp32'] if names[0] == 'bf16' and args.precision == 'auto' else []
    queries = [partial(query, in_chunks=InChunks(args.backward, name, network_chunk)) for name in names]
    box = box_of_rays(scene, render_kwargs['ndc'], scene.poses)
    render_kwargs['ray_renderer'] = FastRays(render_rays, queries, box)


def training_batches(args, scene, render_kwargs, ranks):
    """What draws the rays of each step, in this process."""
    share, device = ranks.share(args.N_rand), next(render_kwargs['network_fn'].parameters()).device
    batches = RayBatcher(scene, share, args.no_batching, args.precrop_iters, args.precrop_frac,
                         render_kwargs['pixel_centers'], device, args.random_bkgd)
    batches.share = share / args.N_rand
    if not args.occupancy_grid:
        return batches
    return GridBatches(batches, render_kwargs, args.N_rand_samples * batches.share, args.seed)


def start_run(args, scene, path, state, render_kwargs, start, optimizer, console, ranks):
    """Open the log and the folder of a run.

    Args:
      args: the options.  scene: a `Scene`.  console: a `Console`.  ranks: a `Ranks`; the first one alone writes.
      path, state: the checkpoint that the run goes on from, or None.
      render_kwargs: with the networks.
      start: steps done so far.
    Returns:
      a `RunLog`, a `CheckpointKeeper`, a `Health`.
    """
    networks = {'coarse': render_kwargs['network_fn'], 'fine': render_kwargs['network_fine']}
    networks = {name: network for name, network in networks.items() if network is not None}
    device = next(networks['coarse'].parameters()).device
    folder = Path(args.basedir, args.expname)
    if ranks.first:
        prepare_folder(folder, args, start, device)
        console.log_to(folder / 'log.txt')
        console.say(describe_run(args, scene, device, networks, folder, start, ranks.size))

    health = Health(networks, optimizer, args.seed, not args.no_restart, console.say)
    in_chunks = render_kwargs['network_query_fn'].keywords['in_chunks']
    if state is not None and state['health']:
        health.load_state_dict(state['health'])
        in_chunks.load_state_dict(state['with_gradient'], networks)

    def write(path, step):
        save_checkpoint(path, step, networks['coarse'], networks.get('fine'), optimizer, args, camera(scene, render_kwargs),
                        health.state_dict(), in_chunks.state_dict(networks))
    keeper = CheckpointKeeper(folder, args.i_weights, args.save_minutes, args.N_iters, write, console.say, newest=path,
                              idle=not ranks.first)
    return RunLog(args, folder, start, device, console, idle=not ranks.first), keeper, health


def end_run(log, keeper, ranks, stop):
    """Save what is not saved and say where everything is; the exit code. Where another process has ended, what is done is
    saved by one that is left."""
    if ranks.first:
        log.finish(keeper)
    elif ((ranks.lost or stop.signal) and log.done > log.start and ranks.should_save(keeper.path(log.done))
          and keeper.save(log.done)):
        print(f'process {ranks.index}: saved {keeper.newest}', file=sys.__stderr__)
    if ranks.stopping or not stop.signal:
        ranks.leave()
    return stop.exit_code or int(ranks.lost)


class Follower:
    """In the place of `Reports` in a process that is not the first: it renders what the first one asks for.

    Args:
      ranks: a `Ranks`.
      render: a function (pose, …) that renders a frame.
    """

    def __init__(self, ranks, render):
        self.ranks, self.render = ranks, render

    def write_due(self, log, step, missing=False):
        self.ranks.serve(self.render)

    def render_only(self, start):
        self.ranks.serve(self.render)

    def done(self):
        pass
