"""NeRF: train a radiance field on the images of a scene, and fly through it.

    python run_nerf.py --config configs/demo.txt                   # train; logs/demo gets checkpoints, views, video
    python run_nerf.py --config configs/demo.txt --render_only     # render the camera path from the newest checkpoint
    tensorboard --logdir logs                                      # watch

Mildenhall et al., "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis", ECCV 2020. From the end of this
file to its start the method stands in the order in which a ray meets it: `train` → `render` → `batchify_rays` →
`render_rays` → `network_query_fn` → `raw2outputs`.
"""
import sys
import time
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from accel.grid_renderer import GridRenderer
from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from accel.network_query import NetworkQuery
from accel.packed import PackedSamples
from accel.renderer import Renderer
from load_blender import load_blender_scene
from load_llff import load_llff_scene
from run_nerf_helpers import (  # noqa: F401 - batchify and run_network are nerf-pytorch's names
    EncodedNeRF,
    batchify,
    disparity,
    get_embedder,
    get_rays,
    img2mse,
    img2mse_any_bkgd,
    ndc_rays,
    run_network,
    sample_pdf,
    stratified_samples,
    uniform_like_numpy,
)
from scenes.errors import UserError, first_line
from scenes.scene import finish_scene, scene_from_checkpoint, uses_ndc
from training import setup
from training.checkpoints import changed_options, load_checkpoint, warn_of_changes
from training.devices import pick_device, pick_precision, rays_at_once, rendering_precision
from training.evaluation import Evaluator
from training.frames import FrameRenderer
from training.logger import forward_warnings, rank0_console
from training.options import config_parser, options_that_affect
from training.outputs import Frame, FrameFolder
from training.processes import Processes, ProcessLost
from training.safeguards import Measures, TrainingFailed
from training.signals import Stopped, StopRequest
from training.threads import yield_when_busy

# The length of the interval behind the last sample of a ray.
FAR_AWAY = 1e10
# Layouts of a scene on disk by --dataset_type: functions of the options that return a `Scene`.
SCENE_LOADERS = {'blender': load_blender_scene, 'llff': load_llff_scene}


# --- volume rendering (Sec. 4) ----------------------------------------------------------------------------------

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
    disp_map = disparity(depth_map, acc_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[..., None])
    return rgb_map, disp_map, acc_map, weights, depth_map


def render_rays(ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False, perturb=0.,
                N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0., verbose=False, pytest=False,
                retsamples=False):
    """Render rays: coarse samples, then fine ones where the coarse network found weight (Sec. 5.2).

    Args:
      ray_batch: [N_rays, 8 or 11]: rays_o, rays_d, near, far, and viewdirs where they are used.
      network_fn, network_fine: coarse and fine network; the coarse one does both if network_fine is None.
      network_query_fn: (pts, viewdirs, network) -> raw.
      N_samples, N_importance: coarse samples per ray, and fine ones beside them.
      retraw: return the last network's raw output too.
      lindisp, perturb: see `stratified_samples`.
      white_bkgd, raw_noise_std, pytest: see `raw2outputs`.
      verbose: print a line if an output is not finite.
      retsamples: return the samples too, for losses on them.
    Returns:
      dict: rgb_map, disp_map, acc_map; raw if retraw; with N_importance also rgb0, disp0, acc0 of the coarse network
      and z_std [N_rays], the spread of the fine samples; with retsamples weights, z_vals [N_rays, N_samples] and
      depth_map, with N_importance also weights0, z_vals0.
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
    raw, (rgb_map, disp_map, acc_map, weights, depth_map) = query(z_vals, network_fn)
    ret = {}
    if N_importance > 0:
        ret = {'rgb0': rgb_map, 'disp0': disp_map, 'acc0': acc_map}
        if retsamples:
            ret.update(weights0=weights, z_vals0=z_vals)
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        z_samples = sample_pdf(mids, weights[..., 1:-1].detach(), N_importance, det=(perturb == 0.), pytest=pytest)
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
    dense, render_rays = True, staticmethod(render_rays)


EXACT = ExactRenderer()


def batchify_rays(rays_flat, chunk=1024 * 32, renderer=EXACT, **kwargs):
    """`render_rays` of a `Renderer` on `chunk` rays at a time; the results are concatenated."""
    renderer = renderer.for_rays(rays_flat, **kwargs)
    parts = [renderer.render_rays(rays, **kwargs) for rays in rays_flat.split(chunk)]
    return {key: (PackedSamples if key == 'packed' else torch).cat([part[key] for part in parts]) for key in parts[0]}


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
      pixel_centers: rays of a camera go through the centres of the pixels.
      kwargs: for `batchify_rays` and `render_rays`.
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
    results = {key: value.reshape(*shape, *value.shape[1:]) if torch.is_tensor(value) else value
               for key, value in results.items()}
    return [results.pop('rgb_map'), results.pop('disp_map'), results.pop('acc_map'), results]


# --- frames -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def render_frame(pose, hwf, K, chunk, render_kwargs, render_factor=0, stride=1):
    """Render the image of one camera into a `Frame`.

    Args:
      pose: c2w [3 or 4, 4 or more].
      hwf: [H, W, focal]; K: intrinsics [3, 3].
      chunk: rays to render at once.
      render_kwargs: for `render`.
      render_factor: divides image size and intrinsics (0 as 1).
      stride: render every `stride`-th pixel of both axes only.
    """
    H, W, K = int(hwf[0]), int(hwf[1]), np.array(K, np.float64)
    if render_factor > 1:
        H, W, K[:2] = H // render_factor, W // render_factor, K[:2] / render_factor
    device = next(render_kwargs['network_fn'].parameters()).device
    c2w = torch.as_tensor(pose, dtype=torch.float32, device=device)[:3, :4]
    samples = render_kwargs.get('renderer', EXACT).samples_per_ray(render_kwargs['N_samples'], render_kwargs['N_importance'])
    chunk = rays_at_once(chunk, samples, device)
    started = time.perf_counter()
    rays = [part[::stride, ::stride] for part in get_rays(H, W, K, c2w, render_kwargs.get('pixel_centers', False))]
    rgb, disp, acc, extras = render(H, W, K, chunk=chunk, rays=rays, **render_kwargs)
    maps = [None if part is None else part.cpu().numpy() for part in (rgb, disp, acc, extras.get('rgb0'))]
    return Frame(*maps, seconds=time.perf_counter() - started)


def render_path(render_poses, hwf, K, chunk, render_kwargs, gt_imgs=None, savedir=None, render_factor=0):
    """Render a camera path into arrays; for long paths `FrameRenderer.path` needs the memory of one frame only.

    Args:
      gt_imgs: images [N, H, W, 3] in [0, 1] to compare with: prints the PSNR of each frame.
      savedir: folder for `000.png`, `001.png`, …; frames of an interrupted call are reused.
      others: as for `render_frame`.
    Returns:
      rgbs [N, H, W, 3], disps [N, H, W].
    """
    frames, store = FrameRenderer(render_frame, hwf, K, chunk, render_kwargs, render_factor), None
    if savedir is not None:
        store = FrameFolder(savedir, frames.fingerprint(render_poses), render_kwargs.get('far', 1.0))
    rgbs, disps = [], []
    for index, frame in enumerate(frames.path(render_poses, store)):
        rgbs.append(frame.rgb)
        disps.append(frame.disp)
        if gt_imgs is not None and render_factor <= 1:
            error = np.mean((frame.rgb - np.asarray(gt_imgs[index])) ** 2)
            tqdm.write(f'frame {index}: PSNR {-10 * np.log10(error):.2f}')
    return np.stack(rgbs), np.stack(disps)


# --- set-up -----------------------------------------------------------------------------------------------------

def create_network(args, depth, width):
    """A new network with its encodings, a `RadianceField`, as the options describe it: the place to add another one.
    Raises UserError for an unknown encoding."""
    hashed = args.i_embed == 1
    i_views = args.i_embed_views if args.i_embed_views is not None else 2 if hashed else args.i_embed
    try:
        encoding, input_ch = get_embedder(args.multires, -1 if hashed else args.i_embed)
        encoding_views, input_ch_views = get_embedder(args.multires_views, i_views) if args.use_viewdirs else (None, 0)
    except ValueError as error:
        raise UserError(f'--i_embed, --i_embed_views: {error}; --i_embed also 1 (hash grids)') from None
    if hashed:
        grid = HashGrid(args.n_levels, args.finest_res, args.log2_hashmap_size, args.n_features)
        return HashNeRF(grid, encoding_views, input_ch_views)
    return EncodedNeRF(encoding, encoding_views, D=depth, W=width, input_ch=input_ch, input_ch_views=input_ch_views,
                       skips=[4], output_ch=5 if args.N_importance > 0 else 4, use_viewdirs=args.use_viewdirs)


def create_nerf(args, checkpoint=None):
    """Build networks, renderer and optimizer, and load the checkpoint that the options name or the experiment has.

    Args:
      args: the options.
      checkpoint: path and content, if `load_checkpoint(args)` was called before.
    Returns:
      render_kwargs_train, render_kwargs_test: for `render`, without near and far.
      start: number of steps done.
      grad_vars: parameters to optimise.
      optimizer: Adam.
    Raises:
      UserError: a checkpoint that is damaged or fits other networks.
    """
    device = pick_device(args.device)
    network_fn = create_network(args, args.netdepth, args.netwidth).to(device)
    network_fine = None
    if args.N_importance > 0:
        network_fine = create_network(args, args.netdepth_fine, args.netwidth_fine).to(device)
    renderer = GridRenderer(seed=args.seed).to(device) if args.occupancy_grid else EXACT

    ndc = uses_ndc(args)
    render_kwargs_train = {
        'network_fn': network_fn, 'network_fine': network_fine, 'renderer': renderer,
        'N_samples': args.N_samples, 'N_importance': args.N_importance, 'perturb': args.perturb,
        'raw_noise_std': args.raw_noise_std, 'white_bkgd': args.white_bkgd, 'use_viewdirs': args.use_viewdirs,
        'ndc': ndc, 'lindisp': args.lindisp and not ndc, 'pixel_centers': args.pixel_centers,
    }
    modules = [module for module in (network_fn, network_fine, renderer) if module is not None]
    grad_vars = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.Adam(grad_vars, lr=args.lrate, **network_fn.adam_options)

    path, state = load_checkpoint(args) if checkpoint is None else checkpoint
    start = 0 if state is None else setup.load_into(args, path, state, render_kwargs_train, optimizer)
    precision = pick_precision(args.precision, device, max(args.netwidth, args.netwidth_fine))
    render_kwargs_train['network_query_fn'] = NetworkQuery(args.netchunk, precision, args.backward)
    exact_query = NetworkQuery(args.netchunk, rendering_precision(args.precision))
    render_kwargs_test = {**render_kwargs_train, 'network_query_fn': exact_query, 'perturb': 0., 'raw_noise_std': 0.}
    return render_kwargs_train, render_kwargs_test, start, grad_vars, optimizer


def load_scene(args):
    """Load the scene that the options name. Raises UserError for missing or damaged files, impossible bounds, no views."""
    if args.dataset_type not in SCENE_LOADERS:
        raise UserError(f'--dataset_type: found {args.dataset_type!r}, expected {" or ".join(SCENE_LOADERS)}')
    return finish_scene(args, SCENE_LOADERS[args.dataset_type](args))


def prepare(args, processes):
    """Load checkpoint and scene, and build the networks, in each process. Returns the scene, (path, state) of the
    checkpoint or (None, None), and what `create_nerf` returns. Raises UserError for data that cannot be used."""
    path, state = setup.find_checkpoint(args, processes)
    torch.manual_seed(args.seed)
    needs_images = not args.render_only or args.render_test or changed_options(args, state, options_that_affect('scene'))
    if needs_images or not state['camera']:
        scene = processes.run_rank0_first(partial(load_scene, args))  # rank 0 may write reduced images
    else:
        scene = scene_from_checkpoint(args, state['camera'])

    built = create_nerf(args, (path, state))
    for render_kwargs in built[:2]:
        render_kwargs.update(near=scene.near, far=scene.far)
    if state is None:
        setup.fit_to_scene(args, scene, built[0])
    else:
        warn_of_changes(args, scene, path, state)
    return scene, (path, state), *built


def frame_renderer(args, scene, render_kwargs, processes, stop, console):
    """What renders the frames of paths and test sets, fast unless the options ask for exact frames."""
    fast = setup.fast_renderer(args, scene, render_kwargs, console.say)
    return FrameRenderer(render_frame, scene.hwf, scene.K, args.chunk, render_kwargs,
                         args.render_factor if args.render_only else 0, fast, processes, stop.check,
                         setup.frame_settings(args))


# --- training ---------------------------------------------------------------------------------------------------

def color_loss(rgb, acc, target, bkgd):
    """Mean squared error of colours [N, 3] with opacity [N] on `bkgd`; over all backgrounds where `target` has alpha."""
    return img2mse(rgb, target) if target.shape[-1] == 3 else img2mse_any_bkgd(rgb, acc, target, bkgd)


def nerf_losses(rgb, acc, extras, target, bkgd):
    """The terms of the loss by name; training minimises their sum, Eq. 6. A new term is a new entry: it is logged as
    `loss/<name>`.

    Args:
      rgb, acc: colours [N, 3] and opacities [N] of the fine network, or of the only one.
      extras: what else `render` returns: rgb0, acc0 of the coarse network; weights, z_vals [N, N_samples] and depth_map
        [N]; with an occupancy grid depth_map and `packed`, the `PackedSamples`.
      target: colours [N, 3], or colours on `bkgd` and alpha [N, 4].
      bkgd: grey value of the background, 0 or 1.
    """
    losses = {'coarse': color_loss(extras.get('rgb0', rgb), extras.get('acc0', acc), target, bkgd)}
    if 'rgb0' in extras:
        losses['fine'] = color_loss(rgb, acc, target, bkgd)
    return losses


def loss_and_gradient(hwf, K, chunk, batch, render_kwargs):
    """Render a `Batch`, add the gradient of its loss to the parameters' gradients, and return the `Measures`. Large batches
    are split, so that their samples need not be in memory together; other arguments are for `render`."""
    measures, bkgd = Measures(), float(render_kwargs['white_bkgd'])
    samples = render_kwargs.get('renderer', EXACT).samples_per_ray(render_kwargs['N_samples'], render_kwargs['N_importance'])
    max_rays = rays_at_once(len(batch.target), samples, batch.target.device)
    for part, share in batch.split(max_rays):
        rgb, _, acc, extras = render(*hwf[:2], K, chunk, part.rays, retsamples=True, **render_kwargs)
        losses = nerf_losses(rgb, acc, extras, part.target, bkgd)
        (sum(losses.values()) * share).backward()

        opacities = {'coarse': extras['acc0'], 'fine': acc} if 'acc0' in extras else {'coarse': acc}
        empty = torch.full_like(part.target[:, :3], bkgd), torch.zeros_like(part.target[:, 0])
        measures.add(share, losses, {name: acc.mean() for name, acc in opacities.items()},
                     background=color_loss(*empty, part.target, bkgd),
                     num_samples=extras['num_samples'].float().mean() if 'num_samples' in extras else None)
    return measures


def set_learning_rate(optimizer, lrate, lrate_decay, step):
    """Exponential decay to a tenth in each 1000 · lrate_decay steps; returns the rate of step `step`, counted from 0."""
    lrate = lrate * 0.1 ** (step / (1000 * lrate_decay))
    for group in optimizer.param_groups:
        group['lr'] = lrate
    return lrate


def train(args, console):
    """Train and write outputs as the options say, or render only. Returns the exit code.

    Raises:
      UserError: options, data or checkpoint that cannot be used.
      TrainingFailed: losses or gradients stay NaN or infinite.
      Stopped: a signal came before anything was worth saving.
    """
    forward_warnings(console)
    with StopRequest(console.say) as stop, Processes() as processes:
        alone = processes.size == 1  # a collective operation of several processes must not be interrupted

        # load the scene, build the networks
        with stop.interruptible():
            scene, (path, state), kwargs_train, kwargs_test, start, grad_vars, optimizer = prepare(args, processes)
            frames = frame_renderer(args, scene, kwargs_test, processes, stop, console)
            evaluator = Evaluator(args, scene, frames, processes, console.say)
        if args.render_only:
            with stop.interruptible(alone):
                evaluator.render_only(start)
            return 0

        # log, rays, safeguards and checkpoints of the run
        logger, rays, safeguards, checkpoints = setup.start_run(args, scene, path, state, kwargs_train, optimizer, start,
                                                                console, processes)
        share = processes.share(args.N_rand) / args.N_rand
        with suppress(ProcessLost):
            with suppress(Stopped), stop.interruptible(alone):
                evaluator.run_missing(start, logger)
            for step in logger.steps():
                batch = rays.sample(step)

                # render and backpropagate
                optimizer.zero_grad()
                measures = loss_and_gradient(scene.hwf, scene.K, args.chunk, batch, kwargs_train)
                processes.average(grad_vars, measures.tensors(), share)

                # update the networks, and what follows them
                lrate = set_learning_rate(optimizer, args.lrate * safeguards.lrate_scale, args.lrate_decay, step - 1)
                if safeguards.finite(measures):
                    optimizer.step()
                elif safeguards.must_go_back:
                    safeguards.go_back(checkpoints, processes)
                safeguards.restart_collapsed(step, measures)
                kwargs_train['renderer'].update(step, **kwargs_train)  # the occupancy grid
                frames.forget()                                        # what was baked from the networks before
                rays.follow(measures.num_samples)

                # log, save, evaluate
                logger.step(step, len(batch.target) / share, measures, lrate, safeguards)
                checkpoints.save_if_due(step, safeguards.healthy)
                with suppress(Stopped), stop.interruptible(alone):
                    evaluator.run_if_due(step, logger)
                if processes.any(stop.requested):
                    break
        logger.finish(checkpoints, processes)
        return stop.exit_code or int(processes.lost)


def main(argv=None):
    with rank0_console() as console:
        args = config_parser().parse_args(argv)
        try:
            with warnings.catch_warnings(), yield_when_busy():
                return train(args, console)
        except UserError as error:
            problem, code = str(error), 2
        except OSError as error:
            problem, code = f'{error.filename}: {error.strerror}' if error.filename else first_line(error), 2
        except (TrainingFailed, ProcessLost) as error:
            problem, code = str(error), 1
        except torch.OutOfMemoryError:
            problem, code = 'out of memory; lower --netchunk, and --chunk in rendering', 1
        except Stopped as stopped:
            return stopped.args[0]
        console.fail(problem)
        return code


if __name__ == '__main__':
    sys.exit(main())
