"""NeRF: train a radiance field on the images of a scene, and fly through it.

    python run_nerf.py --config configs/demo.txt                   # train; logs/demo gets checkpoints, views, video
    python run_nerf.py --config configs/demo.txt --render_only     # render the camera path from the newest checkpoint
    tensorboard --logdir logs                                      # watch

Mildenhall et al., "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis", ECCV 2020. The method
stands in the order in which a ray meets it, from the end of this file to its start: `train` → `render` →
`batchify_rays` → `render_rays` → `run_network` → `raw2outputs`.
"""
import sys
import time
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from accel.grid_rays import render_rays_in_grid
from accel.hash_grid import HashGrid
from accel.hash_nerf import HASH_ADAM, HashNeRF
from accel.occupancy import OccupancyGrid
from accel.sparse_backward import InChunks
from checkpoints import changed_options, load_checkpoint, restore, restore_random_state, trained_pixel_centers
from devices import network_chunk, pick_device, pick_precision, rays_at_once, rendering_precision
from errors import UserError, first_line
from health import TrainingFailed, go_back
from options import config_parser
from outputs import Frame, FrameFolder, frames_mark
from ranks import RankLost, Ranks
from reports import Reports
from run_log import Console, forward_warnings, speaking_for_all
from run_nerf_helpers import (
    NeRF,
    get_embedder,
    get_rays,
    img2mse,
    img2mse_any_bkgd,
    ndc_rays,
    sample_pdf,
    uniform_like_numpy,
)
from scene import uses_ndc
from signals import Stopped, StopRequest
from training_run import (
    Follower,
    end_run,
    find_start,
    fit_to_scene,
    name_changes,
    render_fast,
    start_run,
    training_batches,
)

FAR_AWAY = 1e10  # length of the interval behind the last sample of a ray
EMPTY = 1e-10    # a ray of less opacity has met nothing: its disparity is 0
SMALLEST_CHUNK = 256  # rays; where memory does not suffice for these, less will not help


# --- the networks on many points --------------------------------------------------------------------------------

def batchify(fn, chunk):
    """`fn` applied to `chunk` rows at a time; `fn` itself if chunk is None."""
    if chunk is None:
        return fn

    def fn_in_chunks(inputs):
        return torch.cat([fn(part) for part in inputs.split(chunk)])
    return fn_in_chunks


def run_network(inputs, viewdirs, fn, embed_fn, embeddirs_fn, netchunk=1024 * 64, in_chunks=None):
    """Encode points (and directions) and apply the network `fn`, `netchunk` points at a time, encoding included.

    Args:
      inputs: points [N_rays, N_samples, 3].
      viewdirs: unit directions [N_rays, 3], or None.
      fn: network, [N, encoded] -> [N, C].
      embed_fn, embeddirs_fn: encodings of points and of directions.
      netchunk: points in one go.
      in_chunks: a faster `batchify`, as `accel/sparse_backward.py` has it.
    Returns:
      raw [N_rays, N_samples, C].
    """
    points = inputs.reshape(-1, inputs.shape[-1])                                           # [N, 3]
    if viewdirs is not None:
        points = torch.cat([points, viewdirs[:, None].expand(inputs.shape).reshape(-1, 3)], -1)  # [N, 6]

    def encode_and_apply(points):
        encoded = embed_fn(points[:, :3])
        if viewdirs is not None:
            encoded = torch.cat([encoded, embeddirs_fn(points[:, 3:])], -1)
        return fn(encoded)

    if in_chunks is None:
        raw = batchify(encode_and_apply, netchunk)(points)
    else:
        raw = in_chunks(encode_and_apply, netchunk, (fn, embed_fn, embeddirs_fn))(points)
    return raw.reshape(*inputs.shape[:-1], raw.shape[-1])


# --- volume rendering (Sec. 4) ----------------------------------------------------------------------------------

def raw2outputs(raw, z_vals, rays_d, raw_noise_std=0, white_bkgd=False, pytest=False):
    """Composite the samples of each ray, Eq. 3: C = sum_i T_i (1 - exp(-sigma_i delta_i)) c_i.

    Args:
      raw: network output [N_rays, N_samples, 4 or more]: colour logits, then density before its ReLU.
      z_vals: positions of the samples along the ray, [N_rays, N_samples], ascending.
      rays_d: ray directions [N_rays, 3]; their length scales the intervals.
      raw_noise_std: standard deviation of noise added to the density.
      white_bkgd: put white behind the scene.
      pytest: NumPy's fixed random numbers in place of torch's.
    Returns:
      rgb_map [N_rays, 3]; disp_map [N_rays], inverse of the mean depth, 0 for an empty ray; acc_map [N_rays], opacity;
      weights [N_rays, N_samples]; depth_map [N_rays], sum of weights times z_vals.
    """
    dists = z_vals[..., 1:] - z_vals[..., :-1]
    dists = torch.cat([dists, torch.full_like(z_vals[..., :1], FAR_AWAY)], -1)               # [N_rays, N_samples]
    dists = dists * torch.norm(rays_d[..., None, :], dim=-1)

    rgb = torch.sigmoid(raw[..., :3])
    sigma = raw[..., 3]
    if raw_noise_std > 0:
        noise = uniform_like_numpy(sigma.shape, sigma) if pytest else torch.randn_like(sigma)
        sigma = sigma + noise * raw_noise_std

    # T_i = exp(-sum_{j<i} sigma_j delta_j): a sum in the exponent, where a product of (1 - alpha) would lose gradients
    optical_depth = F.relu(sigma) * dists
    alpha = 1.0 - torch.exp(-optical_depth)
    before = torch.cumsum(optical_depth[..., :-1], -1)
    transmittance = torch.exp(-torch.cat([torch.zeros_like(optical_depth[..., :1]), before], -1))
    weights = alpha * transmittance                                                          # [N_rays, N_samples]

    rgb_map = torch.sum(weights[..., None] * rgb, -2)
    depth_map = torch.sum(weights * z_vals, -1)
    acc_map = torch.sum(weights, -1)
    empty = acc_map < EMPTY
    mean_depth = depth_map / torch.where(empty, torch.ones_like(acc_map), acc_map)
    disp_map = 1.0 / torch.clamp(torch.where(empty, torch.ones_like(mean_depth), mean_depth), min=1e-10)
    disp_map = torch.where(empty, torch.zeros_like(disp_map), disp_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[..., None])
    return rgb_map, disp_map, acc_map, weights, depth_map


def stratified_samples(near, far, N_samples, lindisp, perturb, pytest):
    """One sample in each of N_samples equal intervals between near and far [N_rays, 1], Eq. 2: at its lower end, or
    anywhere in it with `perturb`; equal in depth, or in disparity with `lindisp`. Returns z_vals [N_rays, N_samples]."""
    t_vals = torch.linspace(0.0, 1.0, N_samples, dtype=near.dtype, device=near.device)
    if lindisp:
        z_vals = 1.0 / (1.0 / near * (1.0 - t_vals) + 1.0 / far * t_vals)
    else:
        z_vals = near * (1.0 - t_vals) + far * t_vals
    if perturb > 0:
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        upper = torch.cat([mids, z_vals[..., -1:]], -1)
        lower = torch.cat([z_vals[..., :1], mids], -1)
        t_rand = uniform_like_numpy(z_vals.shape, z_vals) if pytest else torch.rand_like(z_vals)
        z_vals = lower + (upper - lower) * t_rand
    return z_vals


def render_rays(ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False, perturb=0.,
                N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0., verbose=False, pytest=False):
    """Render rays: coarse samples, then fine ones where the coarse network found weight (Sec. 5.2).

    Args:
      ray_batch: [N_rays, 8 or 11]: rays_o, rays_d, near, far, and viewdirs where they are used.
      network_fn, network_fine: coarse and fine network; the coarse one does both if network_fine is None.
      network_query_fn: (pts, viewdirs, network) -> raw.
      N_samples, N_importance: coarse samples a ray, and fine ones beside them.
      retraw: return the last network's raw output too.
      lindisp, perturb: see `stratified_samples`.
      white_bkgd, raw_noise_std, pytest: see `raw2outputs`.
      verbose: say so if an output is not finite.
    Returns:
      dict: rgb_map, disp_map, acc_map; raw if retraw; with N_importance also rgb0, disp0, acc0 of the coarse network
      and z_std [N_rays], the spread of the fine samples.
    """
    rays_o, rays_d = ray_batch[:, 0:3], ray_batch[:, 3:6]
    near, far = ray_batch[:, 6:7], ray_batch[:, 7:8]
    viewdirs = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None

    def query(z_vals, network):
        pts = rays_o[:, None] + rays_d[:, None] * z_vals[..., None]  # [N_rays, N_samples, 3]
        raw = network_query_fn(pts, viewdirs, network)
        return raw, raw2outputs(raw, z_vals, rays_d, raw_noise_std, white_bkgd, pytest=pytest)

    z_vals = stratified_samples(near, far, N_samples, lindisp, perturb, pytest)
    z_vals = z_vals.expand(len(ray_batch), N_samples)
    raw, (rgb_map, disp_map, acc_map, weights, _) = query(z_vals, network_fn)
    ret = {}
    if N_importance > 0:
        ret = {'rgb0': rgb_map, 'disp0': disp_map, 'acc0': acc_map}
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        z_samples = sample_pdf(mids, weights[..., 1:-1].detach(), N_importance, det=(perturb == 0.), pytest=pytest)
        ret['z_std'] = torch.std(z_samples, dim=-1, unbiased=False)
        z_vals, _ = torch.sort(torch.cat([z_vals, z_samples], -1), -1)
        raw, (rgb_map, disp_map, acc_map, _, _) = query(z_vals, network_fn if network_fine is None else network_fine)

    ret.update(rgb_map=rgb_map, disp_map=disp_map, acc_map=acc_map)
    if retraw:
        ret['raw'] = raw
    if verbose:
        for key, value in ret.items():
            if not torch.isfinite(value).all():
                print(f'render_rays: {key} has NaN or infinity')
    return ret


def batchify_rays(rays_flat, chunk=1024 * 32, ray_renderer=render_rays, **kwargs):
    """`render_rays`, or what takes its place, on `chunk` rays at a time; the results are joined, key by key."""
    if hasattr(ray_renderer, 'choose'):
        ray_renderer = ray_renderer.choose(rays_flat, **kwargs)
    parts = [ray_renderer(rays, **kwargs) for rays in rays_flat.split(chunk)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def render(H, W, K, chunk=1024 * 32, rays=None, c2w=None, ndc=True, near=0., far=1., use_viewdirs=False,
           c2w_staticcam=None, pixel_centers=False, **kwargs):
    """Render rays, or the whole image of a camera.

    Args:
      H, W, K: image size and intrinsics [3, 3], in pixels.
      chunk: rays in one go.
      rays: origins and directions, [2, ..., 3]; or
      c2w: a camera to world matrix [3, 4], for all pixels of its image.
      ndc: take the rays to normalised device coordinates (forward-facing scenes).
      near, far: bounds along the rays.
      use_viewdirs: give the networks the direction too.
      c2w_staticcam: cast the rays of this camera, seen with the view directions of `c2w`.
      pixel_centers: rays of a camera go through the centres of the pixels.
      kwargs: for `render_rays`.
    Returns:
      [rgb_map, disp_map, acc_map, extras]: [..., 3], [...], [...] and a dict of what else `render_rays` returns.
    """
    rays_o, rays_d = rays if c2w is None else get_rays(H, W, K, c2w, pixel_centers)
    viewdirs = F.normalize(rays_d, dim=-1)
    if use_viewdirs and c2w_staticcam is not None:
        rays_o, rays_d = get_rays(H, W, K, c2w_staticcam, pixel_centers)
    shape = rays_d.shape[:-1]
    if ndc:
        rays_o, rays_d = ndc_rays(H, W, K[0][0], 1.0, rays_o, rays_d)

    bounds = torch.ones_like(rays_d[..., :1])
    columns = [rays_o, rays_d, near * bounds, far * bounds] + ([viewdirs] if use_viewdirs else [])
    flat = torch.cat([column.reshape(-1, column.shape[-1]) for column in columns], -1).float()  # [N_rays, 8 or 11]
    results = batchify_rays(flat, chunk, **kwargs)
    results = {key: value.reshape(*shape, *value.shape[1:]) for key, value in results.items()}
    return [results.pop('rgb_map'), results.pop('disp_map'), results.pop('acc_map'), results]


def samples_of_a_ray(render_kwargs):
    """How many samples are composited together; where a grid chooses them, it takes care of that itself."""
    chosen_by_grid = hasattr(render_kwargs['network_fn'], 'occupancy')
    return 1 if chosen_by_grid else render_kwargs['N_samples'] + render_kwargs['N_importance']


# --- frames -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def render_frame(pose, hwf, K, chunk, render_kwargs, render_factor=0, stride=1):
    """Render the image of one camera into a `Frame`, or every `stride`-th of its pixels, both ways.

    Args:
      pose: c2w [3 or 4, 4 or more].
      hwf: [H, W, focal]; K: intrinsics [3, 3]. `render_factor` divides all of them (0 as 1).
      chunk: rays in one go.
      render_kwargs: for `render`.
    """
    H, W, K = int(hwf[0]), int(hwf[1]), np.array(K, np.float64)
    if render_factor > 1:
        H, W, K[:2] = H // render_factor, W // render_factor, K[:2] / render_factor
    device = next(render_kwargs['network_fn'].parameters()).device
    c2w = torch.as_tensor(pose, dtype=torch.float32, device=device)[:3, :4]
    chunk = rays_at_once(chunk, samples_of_a_ray(render_kwargs), device)
    began = time.perf_counter()
    rays = [part[::stride, ::stride] for part in get_rays(H, W, K, c2w, render_kwargs.get('pixel_centers', False))]
    rgb, disp, acc, extras = render(H, W, K, chunk=chunk, rays=rays, **render_kwargs)
    maps = [None if part is None else part.cpu().numpy() for part in (rgb, disp, acc, extras.get('rgb0'))]
    return Frame(*maps, seconds=time.perf_counter() - began)


def frame_renderer(chunk, render_kwargs):
    """A function (pose, hwf, K, render_factor, stride) that renders a `Frame`. Where CUDA's memory does not suffice, it
    halves the chunk from there on."""
    def render_one(pose, hwf, K, render_factor, stride=1):
        nonlocal chunk
        while True:
            try:
                return render_frame(pose, hwf, K, chunk, render_kwargs, render_factor, stride)
            except torch.OutOfMemoryError:
                if chunk <= SMALLEST_CHUNK:
                    raise
                chunk //= 2
                warnings.warn(f'out of memory in rendering: going on with --chunk {chunk}', stacklevel=2)
                torch.cuda.empty_cache()
    return render_one


def render_frames(render_poses, hwf, K, chunk, render_kwargs, render_factor=0, store=None, ranks=None):
    """Render camera after camera: yields a `Frame` at a time, and keeps none.

    Args:
      render_poses: c2w matrices [N, 3 or 4, 4 or more].
      store: a `FrameFolder`: frames that it has are not rendered again, and new ones are saved there.
      ranks: a `Ranks`: the processes that render, each another frame.
      others: as in `render_frame`.
    """
    ranks, render_one = ranks or Ranks(1), frame_renderer(chunk, render_kwargs)
    progress = tqdm(render_poses, desc='frames', unit='frame', disable=None, leave=False, dynamic_ncols=True)
    ahead = []
    for index, _ in enumerate(progress):
        frame = stored = store.load(index) if store and not ahead else None
        if frame is None:
            ahead = ahead or ranks.each(render_one, render_poses[index:index + ranks.size], hwf, K, render_factor)
            frame = ahead.pop(0)
        if store and stored is None:
            store.save(index, frame)
        yield frame


def render_path(render_poses, hwf, K, chunk, render_kwargs, gt_imgs=None, savedir=None, render_factor=0):
    """Render a camera path into arrays; for long paths `render_frames` needs the memory of one frame only.

    Args:
      gt_imgs: images [N, H, W, 3] in [0, 1] to compare with: prints the PSNR of each frame.
      savedir: folder for `000.png`, `001.png`, …; one that was interrupted goes on with the frames that are missing.
      others: as in `render_frame`.
    Returns:
      rgbs [N, H, W, 3], disps [N, H, W].
    """
    store = None
    if savedir is not None:
        mark = frames_mark(render_poses, hwf, K, render_kwargs, render_factor)
        store = FrameFolder(savedir, mark, render_kwargs.get('far', 1.0))
    rgbs, disps = [], []
    for index, frame in enumerate(render_frames(render_poses, hwf, K, chunk, render_kwargs, render_factor, store)):
        rgbs.append(frame.rgb)
        disps.append(frame.disp)
        if gt_imgs is not None and render_factor <= 1:
            error = np.mean((frame.rgb - np.asarray(gt_imgs[index])) ** 2)
            tqdm.write(f'frame {index}: PSNR {-10 * np.log10(error):.2f}')
    return np.stack(rgbs), np.stack(disps)


# --- set-up -----------------------------------------------------------------------------------------------------

def build_networks(args, device):
    """New networks and their encodings.

    Returns:
      network_fn, network_fine: the latter is None without fine samples.
      embed_fn, embeddirs_fn: encodings of points and of directions, the latter None where these are not used.
    """
    hashed = args.i_embed == 1  # a network that encodes its input itself
    i_views = args.i_embed_views if args.i_embed_views is not None else 2 if hashed else args.i_embed
    embed_fn, input_ch = get_embedder(args.multires, -1 if hashed else args.i_embed)
    embeddirs_fn, input_ch_views = get_embedder(args.multires_views, i_views) if args.use_viewdirs else (None, 0)

    def build(depth, width):
        if hashed:
            grid = HashGrid(args.n_levels, args.finest_res, args.log2_hashmap_size, args.n_features)
            network = HashNeRF(grid, input_ch_views)
        else:
            network = NeRF(D=depth, W=width, input_ch=input_ch, input_ch_views=input_ch_views, skips=[4],
                           output_ch=5 if args.N_importance > 0 else 4, use_viewdirs=args.use_viewdirs)
        if args.occupancy_grid:
            network.occupancy = OccupancyGrid()
        return network.to(device)

    network_fn = build(args.netdepth, args.netwidth)
    network_fine = build(args.netdepth_fine, args.netwidth_fine) if args.N_importance > 0 else None
    return network_fn, network_fine, embed_fn, embeddirs_fn


def create_nerf(args, checkpoint=None):
    """Build networks and optimizer, and load the checkpoint that the options name or the experiment has.

    Args:
      args: the options.
      checkpoint: path and content, where `load_checkpoint(args)` was called before.
    Returns:
      render_kwargs_train, render_kwargs_test: for `render`, but for near and far.
      start: steps done so far.
      grad_vars: parameters to optimise.
      optimizer: Adam.
    Raises:
      UserError: a checkpoint that is damaged or fits other networks.
    """
    device, hashed = pick_device(args.device), args.i_embed == 1
    width = max(args.netwidth, args.netwidth_fine)
    network_fn, network_fine, embed_fn, embeddirs_fn = build_networks(args, device)

    def query_fn(precision):
        return partial(run_network, embed_fn=embed_fn, embeddirs_fn=embeddirs_fn, netchunk=args.netchunk,
                       in_chunks=InChunks(args.backward, precision, None if hashed else network_chunk))

    grad_vars = [p for network in (network_fn, network_fine) if network is not None for p in network.parameters()]
    optimizer = torch.optim.Adam(grad_vars, lr=args.lrate, **(HASH_ADAM if hashed else {'betas': (0.9, 0.999)}))
    # the fused step does not count as a change of the parameters, by which rendering knows what is to be baked anew
    for parameter in grad_vars:
        optimizer.register_step_post_hook(lambda *_, parameter=parameter: torch.autograd.graph.increment_version(parameter))

    start, pixel_centers = 0, args.pixel_centers
    path, state = load_checkpoint(args) if checkpoint is None else checkpoint
    if state is not None:
        restore(path, state, network_fn, network_fine, None if args.render_only else optimizer, changed_options(args, state))
        restore_random_state(state, args.seed)
        start = state['steps_done']
        pixel_centers = trained_pixel_centers(args, path, state)

    ndc = uses_ndc(args)
    render_kwargs_train = {
        'ray_renderer': render_rays_in_grid if args.occupancy_grid else render_rays,
        'network_query_fn': query_fn(pick_precision(args.precision, device, width)),
        'network_fn': network_fn, 'network_fine': network_fine,
        'N_samples': args.N_samples, 'N_importance': args.N_importance, 'perturb': args.perturb,
        'raw_noise_std': args.raw_noise_std, 'white_bkgd': args.white_bkgd, 'use_viewdirs': args.use_viewdirs,
        'ndc': ndc, 'lindisp': args.lindisp and not ndc, 'pixel_centers': pixel_centers,
    }
    exact = query_fn('fp32' if hashed and args.precision == 'auto' else rendering_precision(args.precision, device, width))
    render_kwargs_test = {**render_kwargs_train, 'network_query_fn': exact, 'perturb': 0., 'raw_noise_std': 0.}
    return render_kwargs_train, render_kwargs_test, start, grad_vars, optimizer


# --- training ---------------------------------------------------------------------------------------------------

def color_error(rgb, acc, target, bkgd):
    """Mean squared error of colours [N, 3] with opacity [N] on `bkgd`; over all backgrounds where `target` has alpha."""
    return img2mse(rgb, target) if target.shape[-1] == 3 else img2mse_any_bkgd(rgb, acc, target, bkgd)


def network_outputs(rgb, acc, extras, target, bkgd=0.):
    """Of the networks, coarse and fine or coarse alone: mean squared errors and mean opacities, [1 or 2] each. The sum of
    the errors is the loss, Eq. 6; `target` is [N, 3], or with alpha [N, 4]."""
    outputs = ([(extras['rgb0'], extras['acc0'])] if 'rgb0' in extras else []) + [(rgb, acc)]
    errors = [color_error(rgb, acc, target, bkgd) for rgb, acc in outputs]
    return torch.stack(errors), torch.stack([acc.mean() for _, acc in outputs])


def loss_and_gradient(hwf, K, chunk, batch_rays, target, render_kwargs):
    """Render a batch and go back from its loss, Eq. 6, to the parameters' gradients, which are added to. Large batches go in
    parts, so that their samples need not be in memory together.

    Args:
      hwf, K, chunk, render_kwargs: for `render`.
      batch_rays: [2, N, 3].
      target: colours [N, 3], or colours on the background of `render_kwargs` and alpha [N, 4].
    Returns:
      errors, opacities: as of `network_outputs`, without a gradient.
      background: the error of an empty picture, a scalar.
    """
    bkgd = float(render_kwargs['white_bkgd'])
    rays = rays_at_once(len(target), samples_of_a_ray(render_kwargs), target.device)
    outputs = 0
    for part_rays, part_target in zip(batch_rays.split(rays, 1), target.split(rays)):
        rgb, _, acc, extras = render(*hwf[:2], K, chunk, part_rays, **render_kwargs)
        part = torch.stack(network_outputs(rgb, acc, extras, part_target, bkgd)) * (len(part_target) / len(target))
        part[0].sum().backward()
        outputs = outputs + part.detach()
    empty = torch.full_like(target[:, :3], bkgd), torch.zeros_like(target[:, 0])
    return *outputs, color_error(*empty, target, bkgd)


def set_learning_rate(optimizer, lrate, lrate_decay, step):
    """Exponential decay to a tenth in each 1000 · lrate_decay steps; returns the rate of step `step`, counted from 0."""
    lrate = lrate * 0.1 ** (step / (1000 * lrate_decay))
    for group in optimizer.param_groups:
        group['lr'] = lrate
    return lrate


def prepare(args, ranks):
    """Checkpoint, scene, networks: what both training and rendering need, in each process.

    Returns:
      scene, path and state of the checkpoint or None, and what `create_nerf` returns.
    Raises:
      UserError: options, data or checkpoint that cannot be used.
    """
    path, state, scene = find_start(args, ranks)
    built = create_nerf(args, (path, state))
    for kwargs in built[:2]:
        kwargs.update(near=scene.near, far=scene.far)
    render_fast(args, scene, built[1], render_rays)
    if state is None:
        fit_to_scene(built[0], scene, args.aabb)
    else:
        name_changes(args, scene, path, state)
    return scene, path, state, *built


def make_reports(args, scene, render_kwargs, say, ranks):
    """What renders the scene to files, with the networks of `render_kwargs`."""
    if not ranks.first:
        return Follower(ranks, frame_renderer(args.chunk, render_kwargs))
    factor = args.render_factor if args.render_only else 0
    ray_renderer = render_kwargs['ray_renderer']
    if hasattr(ray_renderer, 'say'):
        ray_renderer.say = say

    def frames(poses, store=None):
        return render_frames(poses, scene.hwf, scene.K, args.chunk, render_kwargs, factor, store, ranks)

    def held_out(pose, stride):
        exact = {**render_kwargs, 'ray_renderer': getattr(ray_renderer, 'render_rays', ray_renderer)}
        return frame_renderer(args.chunk, exact)(pose, scene.hwf, scene.K, 0, stride)

    def mark(poses):
        return frames_mark(poses, scene.hwf, scene.K, render_kwargs, factor)
    device = next(render_kwargs['network_fn'].parameters()).device
    return Reports(args, scene, frames, held_out, mark, device, say, ranks.release)


def train(args, console=None):
    """Train as the options say and write what they ask for on the way, or render only. Returns the exit code.

    Raises:
      UserError: options, data or checkpoint that cannot be used.
      TrainingFailed: the numbers stay NaN or infinite.
      Stopped: a signal came while there was nothing to save.
    """
    console = console or Console()
    forward_warnings(console)
    with StopRequest(console.say) as stop, Ranks() as ranks:
        scene, path, state, render_kwargs_train, render_kwargs_test, start, grad_vars, optimizer = prepare(args, ranks)
        reports = make_reports(args, scene, render_kwargs_test, console.say, ranks)
        if args.render_only:
            reports.render_only(start)
            ranks.leave()
            return 0

        log, keeper, health = start_run(args, scene, path, state, render_kwargs_train, start, optimizer, console, ranks)
        batches = training_batches(args, scene, render_kwargs_train, ranks)
        ranks.part_ways(args.seed, start)
        stop.interruptible, stop.patient = False, not ranks.first
        with ranks.until_lost(console.say, stop):
            if start > 0:
                stop.unless_stopped(reports.write_due, log, start, True, otherwise=reports.done)
            for step in log.steps():
                batch_rays, target = batches.draw(step)
                optimizer.zero_grad()
                measures = loss_and_gradient(scene.hwf, scene.K, args.chunk, batch_rays, target, render_kwargs_train)
                ranks.average(grad_vars, measures, batches.share, stop.signal)
                errors, opacities, background = measures

                lrate = set_learning_rate(optimizer, args.lrate * health.lrate_scale, args.lrate_decay, step - 1)
                if health.step_is_finite(errors.sum()):
                    optimizer.step()
                elif health.must_return:
                    log.rewind(go_back(args, keeper, health, optimizer, ranks))
                    continue
                health.watch(step, errors, opacities, background)
                log.step_done(step, len(target) / batches.share, errors, lrate, health)

                if keeper.due(step, well=not health.bad_in_a_row):
                    keeper.save(step)
                if not ranks.stopping:
                    stop.unless_stopped(reports.write_due, log, step, otherwise=reports.done)
                if ranks.end_now(stop):
                    break
        return end_run(log, keeper, ranks, stop)


def main(argv=None):
    with speaking_for_all() as console:
        args = config_parser().parse_args(argv)
        try:
            with warnings.catch_warnings():
                return train(args, console)
        except UserError as error:
            problem, code = str(error), 2
        except OSError as error:
            problem, code = f'{error.filename}: {error.strerror}' if error.filename else first_line(error), 2
        except (TrainingFailed, RankLost) as error:
            problem, code = str(error), 1
        except torch.OutOfMemoryError:
            problem, code = 'out of memory; lower --netchunk, and --chunk in rendering', 1
        except Stopped as stopped:
            return stopped.args[0]
        console.fail(problem)
        return code


if __name__ == '__main__':
    sys.exit(main())
