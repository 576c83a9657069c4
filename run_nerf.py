"""NeRF: train a radiance field on the images of a scene, and fly through it.

    python run_nerf.py --config configs/demo.txt                # train; logs/demo gets checkpoints and videos
    python run_nerf.py --config configs/demo.txt --render_only  # render a video from the newest checkpoint
    tensorboard --logdir logs                                   # watch

Mildenhall et al., "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis", ECCV 2020. Read
this file from the bottom up to follow a ray: `train` → `render` → `batchify_rays` → `render_rays` →
`network_query_fn` (`accel/network_query.py`) → `raw2outputs`.
"""
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from accel.appearance import ColorCorrection
from accel.fast_renderer import FastRenderer
from accel.fused_rays import fused
from accel.grid_renderer import GridRenderer
from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from accel.network_query import NetworkQuery
from accel.occupancy import RESOLUTION
from accel.packed import can_composite_dense, composite_dense
from accel.poses import PoseOffsets
from accel.proposals import ProposalRenderer
from accel.renderer import Renderer, join
from load_blender import load_blender_scene
from load_llff import load_llff_scene
from run_nerf_helpers import (  # noqa: F401 - batchify and run_network are names of nerf-pytorch's run_nerf.py
    EncodedNeRF,
    batchify,
    color_error,
    disparity,
    fixed_uniform,
    get_embedder,
    get_rays,
    img2mse,
    mse2psnr,
    ndc_rays,
    run_network,
    sample_pdf,
    split_rays,
    stratified_samples,
    weights_of,
)
from scenes.bounds import box_of_rays, fit_bounds
from scenes.cameras import Camera
from scenes.colmap import load_colmap_scene
from scenes.errors import UserError
from scenes.rays import camera_rays
from scenes.scene import finish_scene, scene_from_checkpoint, uses_ndc
from training.allocator import keep_freed_memory
from training.checkpoints import changed_options, find_checkpoint, load_checkpoint, load_into, warn_of_changes
from training.console import rank0_console
from training.devices import MemoryLimit, pick_device, pick_precision, rendering_precision
from training.evaluation import Evaluator
from training.frames import FrameRenderer
from training.optimizer import adam, set_learning_rate
from training.options import config_parser, values_of
from training.outputs import Frame, FrameFolder
from training.processes import Processes, ProcessLost
from training.safeguards import Measures, TrainingFailed
from training.signals import Stopped, StopRequest
from training.start import report_on_scene, start_run
from training.threads import yield_when_busy
from viewing.live import LiveViewer

# The interval behind the last sample of a ray has this length, so that any density there is opaque.
LAST_INTERVAL = 1e10
# Loaders by --dataset_type: functions of the options that return a `Scene`.
SCENE_LOADERS = {'blender': load_blender_scene, 'llff': load_llff_scene, 'colmap': load_colmap_scene}


# --- volume rendering (Sec. 4) ------------------------------------------------------------------------------

def raw2outputs(raw, z_vals, rays_d, raw_noise_std=0, white_bkgd=False, pytest=False):
    """Composite the samples of each ray, Eq. 3: C = sum_i T_i (1 - exp(-sigma_i delta_i)) c_i.

    Args:
      raw: network output [N_rays, N_samples, 4 or more]: colour logits, then density before its ReLU.
      z_vals: positions of the samples along the ray, [N_rays, N_samples], ascending.
      rays_d: ray directions [N_rays, 3]; their length scales the intervals.
      raw_noise_std: standard deviation of noise added to the density.
      white_bkgd: composite on white.
      pytest: use NumPy's fixed random numbers in place of torch's.
    Returns:
      rgb_map [N_rays, 3]; disp_map [N_rays], the inverse of the mean depth, 0 for an empty ray; acc_map
      [N_rays], opacity; weights [N_rays, N_samples]; depth_map [N_rays], the sum of weights times z_vals.
    """
    if raw_noise_std > 0:
        sigma = raw[..., 3:4]
        noise = fixed_uniform(sigma.shape, sigma) if pytest else torch.randn_like(sigma)
        raw = torch.cat([raw[..., :3], sigma + noise * raw_noise_std], -1)

    if can_composite_dense(raw, z_vals, rays_d):  # the same in two kernels, with the gradient
        rgb_map, acc_map, depth_map, weights = composite_dense(raw, z_vals, rays_d, LAST_INTERVAL)
    else:
        dists = z_vals[..., 1:] - z_vals[..., :-1]
        dists = torch.cat([dists, torch.full_like(z_vals[..., :1], LAST_INTERVAL)], -1)
        dists = dists * torch.norm(rays_d[..., None, :], dim=-1)                       # [N_rays, N_samples]
        rgb, sigma = torch.sigmoid(raw[..., :3]), raw[..., 3]
        weights = weights_of(F.relu(sigma) * dists)                                    # [N_rays, N_samples]

        rgb_map = torch.sum(weights[..., None] * rgb, -2)
        depth_map = torch.sum(weights * z_vals, -1)
        acc_map = torch.sum(weights, -1)
    disp_map = disparity(depth_map, acc_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[..., None])
    return rgb_map, disp_map, acc_map, weights, depth_map


def render_rays(ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False, perturb=0.,
                N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0., verbose=False,
                pytest=False, retsamples=False):
    """Render rays: coarse samples, then fine samples where the weights of the coarse ones are (Sec. 5.2).

    Args:
      ray_batch: [N_rays, 8 or 11]: rays_o, rays_d, near, far, and viewdirs where they are used.
      network_fn, network_fine: coarse and fine network; the former is used for both if network_fine is None.
      network_query_fn: (pts, viewdirs, network) -> raw.
      N_samples, N_importance: coarse samples per ray, and additional fine samples.
      retraw: return the last network's raw output too.
      lindisp, perturb: see `stratified_samples`; white_bkgd, raw_noise_std, pytest: see `raw2outputs`.
      verbose: print a line if an output is not finite.
      retsamples: return the samples too, for losses on them.
    Returns:
      dict: rgb_map, disp_map, acc_map; raw if retraw; with N_importance also rgb0, disp0, acc0 of the coarse
      network and z_std [N_rays], the standard deviation of the fine samples' z_vals; with retsamples weights,
      z_vals [N_rays, N_samples] and depth_map, with N_importance also weights0, z_vals0.
    """
    rays_o, rays_d, near, far, viewdirs = split_rays(ray_batch)

    def query(z_vals, network):
        pts = rays_o[:, None] + rays_d[:, None] * z_vals[..., None]  # [N_rays, N_samples, 3]
        raw = network_query_fn(pts, viewdirs, network)
        return raw, raw2outputs(raw, z_vals, rays_d, raw_noise_std, white_bkgd, pytest=pytest)

    z_vals = stratified_samples(near, far, N_samples, lindisp, perturb, pytest)        # [N_rays, N_samples]
    raw, (rgb_map, disp_map, acc_map, weights, depth_map) = query(z_vals, network_fn)
    ret = {}
    if N_importance > 0:
        ret = {'rgb0': rgb_map, 'disp0': disp_map, 'acc0': acc_map}
        if retsamples:
            ret.update(weights0=weights, z_vals0=z_vals)
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        z_samples = sample_pdf(mids, weights[..., 1:-1].detach(), N_importance, perturb == 0., pytest)
        ret['z_std'] = torch.std(z_samples, dim=-1, unbiased=False)
        z_vals, _ = torch.sort(torch.cat([z_vals, z_samples], -1), -1)
        network = network_fn if network_fine is None else network_fine
        raw, (rgb_map, disp_map, acc_map, weights, depth_map) = query(z_vals, network)

    ret.update(rgb_map=rgb_map, disp_map=disp_map, acc_map=acc_map)
    if retraw:
        ret['raw'] = raw
    if retsamples:
        ret.update(weights=weights, z_vals=z_vals, depth_map=depth_map)
    if verbose:
        for key, value in ret.items():
            if not torch.isfinite(value).all():
                print(f'render_rays: {key} has NaN or infinity')
    return ret


class ExactRenderer(Renderer):
    """The paper's hierarchical sampling, every sample of every ray: `render_rays` as a `Renderer`."""
    dense = True
    render_rays = staticmethod(render_rays)


# This renderer is used unless another one is given.
EXACT = ExactRenderer()


def batchify_rays(rays_flat, chunk=1024 * 32, renderer=EXACT, **kwargs):
    """`render_rays` of `renderer` on `chunk` rays [., 8 or 11] at a time; the results are concatenated."""
    renderer = renderer.for_rays(rays_flat, chunk, **kwargs)
    return join([renderer.render_rays(rays, **kwargs) for rays in rays_flat.split(chunk)])


def render(H, W, K, chunk=1024 * 32, rays=None, c2w=None, ndc=True, near=0., far=1., use_viewdirs=False,
           c2w_staticcam=None, pixel_centers=False, **kwargs):
    """Render rays, or the whole image of a camera.

    Args:
      H, W, K: image size and intrinsics [3, 3], in pixels.
      chunk: rays to render at once.
      rays: origins and directions, [2, ..., 3]; or
      c2w: a camera-to-world matrix [3, 4], for all pixels of its image.
      ndc: transform the rays to normalised device coordinates (forward-facing scenes).
      near, far: bounds along the rays.
      use_viewdirs: give the networks the direction too.
      c2w_staticcam: cast the rays of this camera with the view directions of `c2w`.
      pixel_centers: cast the rays of a camera through the centres of the pixels.
      kwargs: for `batchify_rays` and `render_rays`.
    Returns:
      [rgb_map, disp_map, acc_map, extras]: [..., 3], [...], [...], and a dict of the other results.
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
    rays_flat = torch.cat([column.reshape(-1, column.shape[-1]) for column in columns], -1).float()
    extras = batchify_rays(rays_flat, chunk, **kwargs)
    extras = {key: value.reshape(*shape, *value.shape[1:]) if torch.is_tensor(value) else value
              for key, value in extras.items()}
    return [extras.pop('rgb_map'), extras.pop('disp_map'), extras.pop('acc_map'), extras]


# --- frames -------------------------------------------------------------------------------------------------

@torch.no_grad()
def render_frame(pose, hwf, K, chunk, render_kwargs, render_factor=0, stride=1, camera=None):
    """Render the image of one camera into a `Frame`.

    Args:
      pose: c2w [3 or 4, 4 or more]; hwf: [H, W, focal]; K: intrinsics [3, 3].
      chunk: rays to render at once; render_kwargs: for `render`.
      render_factor: divides image size and intrinsics (0 as 1).
      stride: render only every `stride`-th pixel of both axes.
      camera: a `Camera`, which may have lens distortion, in place of hwf and K. These define NDC in any case.
    """
    camera = (camera or Camera(*map(int, hwf[:2]), np.array(K, np.float64))).reduced(max(render_factor, 1))
    device = next(render_kwargs['network_fn'].parameters()).device
    c2w = torch.as_tensor(pose, dtype=torch.float32, device=device)[:3, :4]
    started = time.perf_counter()
    rays = camera_rays(camera, c2w, render_kwargs.get('pixel_centers', False))
    rays = [part[::stride, ::stride] for part in rays]
    rgb, disp, acc, extras = render(*hwf[:2], K, chunk, rays, **render_kwargs)  # NDC of all views is the same
    maps = [None if part is None else part.cpu().numpy() for part in (rgb, disp, acc, extras.get('rgb0'))]
    return Frame(*maps, seconds=time.perf_counter() - started)


class ImageRenderer(FrameRenderer):
    """Renders the frames of a scene with `render`."""
    render_frame, render_rays = staticmethod(render_frame), staticmethod(render)


def render_path(render_poses, hwf, K, chunk, render_kwargs, gt_imgs=None, savedir=None, render_factor=0):
    """Render a camera path to rgbs [N, H, W, 3], disps [N, H, W]; for long paths use an `ImageRenderer`.

    Args:
      gt_imgs: images [N, H, W, 3] in [0, 1] to compare with: prints the PSNR of each frame of full size.
      savedir: folder for `000.png`, `001.png`, …; frames of an interrupted call are reused.
      others: as for `render_frame`.
    """
    frames, store = ImageRenderer(hwf, K, chunk, render_kwargs, render_factor), None
    if savedir is not None:
        store = FrameFolder(savedir, frames.fingerprint(render_poses), render_kwargs.get('far', 1.0))
    rgbs, disps = [], []
    for index, frame in enumerate(frames.render_path(render_poses, store)):
        rgbs.append(frame.rgb)
        disps.append(frame.disp)
        if gt_imgs is not None and render_factor <= 1:
            mse = img2mse(*(torch.as_tensor(np.asarray(image)) for image in (frame.rgb, gt_imgs[index])))
            tqdm.write(f'frame {index}: PSNR {mse2psnr(mse).item():.2f}')
    return np.stack(rgbs), np.stack(disps)


# --- set-up -------------------------------------------------------------------------------------------------

def create_network(args, depth, width):
    """Build the `RadianceField` that the options select. Raises UserError for an unknown encoding."""
    def embedder(option, multires, i):
        try:
            return get_embedder(multires, i)
        except ValueError as error:
            raise UserError(f'--{option}: {error}; --i_embed 1 is the hash grid') from None
    if args.i_embed == 1:
        encoding = HashGrid(args.n_levels, args.finest_res, args.log2_hashmap_size, args.n_features,
                            args.contract)
    else:
        encoding, input_ch = embedder('i_embed', args.multires, args.i_embed)
    default = 2 if args.i_embed == 1 else args.i_embed
    i_views = default if args.i_embed_views is None else args.i_embed_views
    views = embedder('i_embed_views', args.multires_views, i_views) if args.use_viewdirs else (None, 0)
    if args.i_embed == 1:
        return HashNeRF(encoding, *views)
    return EncodedNeRF(encoding, views[0], D=depth, W=width, input_ch=input_ch, input_ch_views=views[1],
                       skips=[4], output_ch=5 if args.N_importance > 0 else 4, use_viewdirs=args.use_viewdirs)


def create_nerf(args, checkpoint=None):
    """Build networks, renderer and optimizer, and load the checkpoint that the options name or the run has.

    Args:
      args: the options.
      checkpoint: path and content, if `load_checkpoint(args)` was called before.
    Returns:
      render_kwargs_train, render_kwargs_test: for `render`, without near and far.
      start: number of steps done.
      grad_vars: parameters to optimise.
      optimizer: Adam.
    Raises:
      UserError: an unknown encoding or device, or a checkpoint that is damaged or does not fit the networks.
    """
    device = pick_device(args.device)
    network_fn = create_network(args, args.netdepth, args.netwidth).to(device)
    network_fn.appearance = ColorCorrection().to(device) if args.appearance else None
    network_fn.poses = PoseOffsets().to(device) if args.refine_poses else None
    network_fine = None
    if args.N_importance > 0:
        network_fine = create_network(args, args.netdepth_fine, args.netwidth_fine).to(device)
    renderer = GridRenderer(seed=args.seed).to(device) if args.occupancy_grid else EXACT
    if args.sampler == 'proposal':
        renderer = ProposalRenderer(args.lambda_distortion, args.contract).to(device)

    ndc = uses_ndc(args)
    render_kwargs_train = {
        'network_fn': network_fn, 'network_fine': network_fine, 'renderer': renderer,
        'N_samples': args.N_samples, 'N_importance': args.N_importance, 'perturb': args.perturb,
        'raw_noise_std': args.raw_noise_std, 'white_bkgd': args.white_bkgd, 'use_viewdirs': args.use_viewdirs,
        'ndc': ndc, 'lindisp': args.lindisp and not ndc, 'pixel_centers': args.pixel_centers,
    }
    networks = [network for network in (network_fn, network_fine) if network is not None]
    grad_vars = [*nn.ModuleList([*networks, renderer]).parameters()]
    optimizer = adam(grad_vars, args.lrate, network_fn.adam_options, network_fn.poses, args.lrate_poses)

    path, state = load_checkpoint(args) if checkpoint is None else checkpoint
    start = 0 if state is None else load_into(args, path, state, render_kwargs_train, optimizer)
    precision = pick_precision(args.precision, device, max(network.W for network in networks))
    render_kwargs_train['network_query_fn'] = NetworkQuery(args.netchunk, precision, args.backward)
    exact_query = NetworkQuery(args.netchunk, rendering_precision(args.precision))
    render_kwargs_test = {**render_kwargs_train, 'network_query_fn': exact_query, 'perturb': 0.,
                          'raw_noise_std': 0.}
    return render_kwargs_train, render_kwargs_test, start, grad_vars, optimizer


def load_scene(args):
    """Load the scene that the options name. Raises UserError if its files, bounds or views cannot be used."""
    if args.dataset_type not in SCENE_LOADERS:
        raise UserError(f'--dataset_type: found {args.dataset_type!r}, expected {" or ".join(SCENE_LOADERS)}')
    return finish_scene(args, SCENE_LOADERS[args.dataset_type](args))


def prepare(args, processes):
    """Load checkpoint and scene, and build the networks, in each process. Returns the scene, (path, state) of
    the checkpoint or (None, None), and what `create_nerf` returns. Raises UserError for unusable data."""
    path, state = find_checkpoint(args, processes)
    torch.manual_seed(args.seed)
    needs_images = not args.render_only or args.render_test or changed_options(args, state, 'scene')
    if needs_images or not state['camera']:
        scene = processes.run_rank0_first(partial(load_scene, args))  # rank 0 may write downsampled images
    else:
        scene = scene_from_checkpoint(args, state['camera'])  # enough for a camera path

    kwargs_train, kwargs_test, start, grad_vars, optimizer = create_nerf(args, (path, state))
    for render_kwargs in (kwargs_train, kwargs_test):
        render_kwargs.update(near=scene.near, far=scene.far)
    if state is None:
        modules = [part for part in kwargs_train.values() if isinstance(part, nn.Module)]
        fit_bounds(modules, scene, kwargs_train['ndc'], RESOLUTION, args.aabb, args.contract)
    else:
        warn_of_changes(args, scene, path, state)
    return scene, (path, state), kwargs_train, kwargs_test, start, grad_vars, optimizer


def frame_renderer(args, scene, kwargs_train, kwargs_test, processes, stop, say):
    """The `ImageRenderer` of a run. Camera paths and test views are rendered fast unless --exact_render is
    given; TensorBoard's view (`render_view`) with all samples, in the precision of training."""
    renderer = kwargs_test['renderer']
    queries = kwargs_train['network_query_fn'], kwargs_test['network_query_fn']
    view_kwargs = {**kwargs_test, 'network_query_fn': queries[0]}
    if renderer.dense and not args.exact_render:
        aabb = box_of_rays(scene, kwargs_test['ndc'], np.arange(len(scene.poses)))
        renderer = FastRenderer(renderer, queries, aabb, say)
    if not args.exact_render:
        renderer = fused(renderer, bf16=args.precision != 'fp32')
    return ImageRenderer(scene.hwf, scene.K, args.chunk, {**kwargs_test, 'renderer': renderer},
                         args.render_factor if args.render_only else 0, view_kwargs, processes, stop,
                         values_of(args, 'networks', 'scene', 'rendering'))


# --- training -----------------------------------------------------------------------------------------------

def color_errors(rgb, acc, extras, target, bkgd):
    """`color_error` of each network by name; arguments as those of `nerf_losses`."""
    if 'rgb0' not in extras:
        return {'coarse': color_error(rgb, acc, target, bkgd)}
    return {'coarse': color_error(extras['rgb0'], extras['acc0'], target, bkgd),
            'fine': color_error(rgb, acc, target, bkgd)}


def nerf_losses(errors, rgb, acc, extras, target, bkgd):
    """The terms of the loss by name; training minimises their sum (Eq. 6). A new term is a new entry: it is
    added to the total, and logged as `loss/<name>`.

    Args:
      errors: `color_errors` of these rays, with gradient.
      rgb, acc: colours [N, 3] and opacities [N] of the fine network, or of the only one.
      extras: the other results of `render`: rgb0, acc0 of the coarse network; weights, z_vals [N, N_samples]
        and depth_map [N]; with another renderer what its `render_rays` says.
      target: colours [N, 3], or colours on `bkgd` and alpha [N, 4].
      bkgd: grey value of the background, 0 or 1.
    """
    losses = {**errors}
    return losses


def loss_and_gradient(hwf, K, chunk, batch, render_kwargs):
    """Render a `Batch`, `chunk` rays at a time, add the gradient of its loss to the parameters' gradients,
    and return the `Measures`. The other arguments are those of `render`."""
    measures, bkgd = Measures(), float(render_kwargs['white_bkgd'])
    for part, share in batch.split(chunk):
        part = render_kwargs['network_fn'].with_refined_poses(part)
        rgb, _, acc, extras = render(*hwf[:2], K, chunk, part.rays, retsamples=True, **render_kwargs)
        rgb = render_kwargs['network_fn'].as_photographed(rgb, part.view)
        errors = color_errors(rgb, acc, extras, part.target, bkgd)
        losses = nerf_losses(errors, rgb, acc, extras, part.target, bkgd)
        losses.update(render_kwargs.get('renderer', EXACT).losses(extras, part, **render_kwargs))
        render_kwargs['network_query_fn'].backward(losses.values(), share)

        with torch.no_grad():
            opacities = {'coarse': extras['acc0'], 'fine': acc} if 'acc0' in extras else {'coarse': acc}
            measures.add(share, losses, errors, {name: part.mean() for name, part in opacities.items()},
                         color_error(torch.full_like(rgb, bkgd), torch.zeros_like(acc), part.target, bkgd),
                         extras['packed'].mean_samples if 'packed' in extras else None)
    return measures


def train(args, console):
    """Train and write outputs, or only render, as the options say; returns the exit code."""
    with StopRequest(console.say) as stop, Processes() as processes:
        # load the scene, build the networks and what renders and evaluates them
        with stop.interruptible():
            scene, loaded, kwargs_train, kwargs_test, start, grad_vars, optimizer = prepare(args, processes)
            frames = frame_renderer(args, scene, kwargs_train, kwargs_test, processes, stop, console.say)
            evaluator = Evaluator(args, scene, frames, processes, console.say)
        if args.render_only:
            evaluator.render_only(start)
            return 0

        # plan, log, rays, safeguards and checkpoints of the run
        plan, logger, rays, safeguards, checkpoints = start_run(
            args, scene, loaded, kwargs_train, optimizer, start, frames, console, processes)
        viewer = LiveViewer(args, scene, frames, processes, stop, console.say)
        max_rays = kwargs_train['renderer'].max_rays(frames.device, **kwargs_train)
        memory = MemoryLimit(args.chunk, 'training', optimizer.zero_grad)
        rank_share = rays.N_rand / args.N_rand  # of the rays of a step
        with suppress(ProcessLost):
            evaluator.run_missing(start, logger)
            for step in logger.steps():
                batch = rays.sample(step)

                # render and backpropagate, in parts that fit in memory
                optimizer.zero_grad()
                measures = memory.fit(partial(loss_and_gradient, scene.hwf, scene.K, batch=batch,
                                              render_kwargs=kwargs_train), min(max_rays, len(batch.target)))
                processes.average(grad_vars, measures.tensors, rank_share)

                # update the networks, and what depends on them
                lrate = args.lrate * safeguards.lrate_scale
                lrate = set_learning_rate(optimizer, lrate, args.lrate_decay, step)
                if safeguards.all_finite(measures):
                    optimizer.step()
                safeguards.recover(step, measures, checkpoints, processes)
                kwargs_train['renderer'].update(step, **kwargs_train)  # the occupancy grid
                rays.adapt_to(measures.mean_samples)

                # log, save, evaluate
                plan.after_step(step)
                logger.finish_step(step, len(batch.target) / rank_share, measures, lrate, safeguards)
                checkpoints.save_if_due(step, safeguards.is_healthy)
                evaluator.run_if_due(step, logger)
                viewer.after_step(step, measures)
                if processes.any(stop.requested):
                    break
        saved = checkpoints.finish(logger.steps_done, processes)
        logger.finish(checkpoints.newest, saved, processes)
        return stop.exit_code or int(processes.lost)


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 1 for others, 128 + n for signal n."""
    keep_freed_memory()
    with rank0_console() as console:
        args = config_parser().parse_args(argv)
        try:
            with yield_when_busy():
                return (report_on_scene(args, load_scene(args), console.say) if args.check_data
                        else train(args, console))
        except (UserError, OSError, TrainingFailed, ProcessLost, torch.OutOfMemoryError, Stopped) as error:
            return console.fail(error)


if __name__ == '__main__':
    sys.exit(main())
