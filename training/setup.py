"""Builds what surrounds the method: finds and loads the checkpoint, fits grids to the scene, makes the renderer of frames,
and starts a training run with its logger, ray sampler, safeguards and checkpoints."""
from functools import partial
from pathlib import Path

from accel.fast_renderer import FastRenderer
from accel.hash_grid import HashGrid
from accel.network_query import NetworkQuery
from accel.occupancy import RESOLUTION, OccupancyGrid
from scenes.bounds import box_of_rays, find_bounds
from scenes.errors import UserError
from scenes.rays import RaySampler
from training.checkpoints import (
    Checkpoints,
    adopt_options,
    changed_options,
    load_checkpoint,
    restore,
    restore_random_state,
    trained_pixel_centers,
)
from training.devices import pick_precision
from training.logger import open_run
from training.options import options_that_affect, plain_options
from training.safeguards import Safeguards

# Before the first step, a ray is expected to have this share of the samples along the diagonal of the grid's box.
EXPECTED_SHARE = 0.25


def find_checkpoint(args, processes):
    """Path and content of the checkpoint to start from, or (None, None); with --render_only its options are adopted.

    Raises:
      UserError: a damaged checkpoint; --render_only without one.
    """
    path, state = processes.from_rank0(partial(load_checkpoint, args))
    if args.render_only:
        if state is None:
            raise UserError(f'--render_only: found no checkpoint in {Path(args.basedir, args.expname or "")}; '
                            'train first, or give --ft_path FILE')
        adopt_options(args, state)
        if not args.expname:
            raise UserError(f'{path}: found no name of the experiment in it; give --expname NAME')
    return path, state


def networks_of(render_kwargs):
    """The networks in the arguments of `render`, by name: {'coarse': …, 'fine': …} or {'coarse': …}."""
    networks = {'coarse': render_kwargs['network_fn'], 'fine': render_kwargs['network_fine']}
    return {name: network for name, network in networks.items() if network is not None}


def checkpoint_parts(render_kwargs, optimizer, **others):
    """What a checkpoint holds, by name: networks, renderer, optimizer and others; None for a part that does not exist."""
    return {'network_fn': render_kwargs['network_fn'], 'network_fine': render_kwargs['network_fine'],
            'renderer': render_kwargs['renderer'], 'optimizer': optimizer, **others}


def load_into(args, path, state, render_kwargs, optimizer):
    """Load a checkpoint into networks, renderer, optimizer and torch's random state; returns the number of steps done.
    Rays go through the pixel centres or corners that it was trained with.

    Raises:
      UserError: it fits other networks.
    """
    parts = checkpoint_parts(render_kwargs, None if args.render_only else optimizer)
    restore(path, state, parts, changed_options(args, state))
    restore_random_state(state, args.seed)
    render_kwargs['pixel_centers'] = trained_pixel_centers(args, path, state)
    return state['steps_done']


def fit_to_scene(args, scene, render_kwargs):
    """Give new networks with a hash encoding and a new occupancy grid the box of the scene."""
    boxed = [module for part in (*networks_of(render_kwargs).values(), render_kwargs['renderer'])
             for module in part.modules() if isinstance(module, (HashGrid, OccupancyGrid))]
    if boxed:
        box, possible = find_bounds(scene, render_kwargs['ndc'], RESOLUTION, args.aabb)
    for module in boxed:
        module.set_box(box, *([possible] if isinstance(module, OccupancyGrid) else []))


def fast_renderer(args, scene, render_kwargs, say):
    """What renders frames: a `FastRenderer`, or the renderer of `render_kwargs` if it is not dense or the options call for
    exact frames."""
    if args.exact_render or not render_kwargs['renderer'].dense:
        return render_kwargs['renderer']
    exact_query, queries = render_kwargs['network_query_fn'], []
    device = next(render_kwargs['network_fn'].parameters()).device
    fast = pick_precision(args.precision, device, max(args.netwidth, args.netwidth_fine))
    if fast != exact_query.precision:
        queries = [NetworkQuery(args.netchunk, fast)]
    box = box_of_rays(scene, render_kwargs['ndc'], scene.poses)
    return FastRenderer(render_kwargs['renderer'], [*queries, exact_query], box, say)


def frame_settings(args):
    """The options that affect frames, as a dict."""
    affecting = options_that_affect('networks', 'scene', 'rendering')
    return {name: value for name, value in plain_options(args) if name in affecting}


def camera(scene, render_kwargs):
    """What rendering needs to know of the scene beside the networks, as plain numbers and tensors for a checkpoint."""
    return {**{key: render_kwargs[key] for key in ('ndc', 'lindisp', 'pixel_centers', 'white_bkgd')}, **scene.cameras()}


def start_run(args, scene, path, state, render_kwargs, optimizer, start, console, processes):
    """What a training run needs beside the method, restored from the checkpoint that it resumes.

    Args:
      path, state: the checkpoint, or None for both.
      render_kwargs: of training, for `render`.
      start: number of steps done.
    Returns:
      `Logger`, `RaySampler`, `Safeguards`, `Checkpoints`.
    """
    networks, device = networks_of(render_kwargs), next(render_kwargs['network_fn'].parameters()).device
    logger = open_run(args, scene, networks, start, device, console, processes)
    rays = ray_sampler(args, scene, render_kwargs, device, processes)
    safeguards = Safeguards(networks, optimizer, args.seed, not args.no_restart, console.say, render_kwargs['renderer'])
    if state is not None:
        restore(path, state, {'ray_sampler': rays, 'safeguards': safeguards})
    processes.seed_per_rank(args.seed, start)
    parts = checkpoint_parts(render_kwargs, optimizer, ray_sampler=rays, safeguards=safeguards)
    checkpoints = Checkpoints(Path(args.basedir, args.expname), parts, args, camera(scene, render_kwargs), path,
                              console.say, processes.is_main)
    return logger, rays, safeguards, checkpoints


def ray_sampler(args, scene, render_kwargs, device, processes):
    """What draws this process's rays of each step."""
    N_rand = processes.share(args.N_rand)
    N_rand_samples = args.N_rand_samples * N_rand / args.N_rand if args.occupancy_grid else None
    return RaySampler(scene, N_rand, args.no_batching, args.precrop_iters, args.precrop_frac,
                      render_kwargs['pixel_centers'], device, args.random_bkgd, N_rand_samples,
                      first_guess=EXPECTED_SHARE * args.N_samples)
