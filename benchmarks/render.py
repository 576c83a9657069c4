"""Time, peak memory and quality of frames: nerf-pytorch's way and ours, in turns within one run.

    python benchmarks/render.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path 001000.tar

`fast` is what run_nerf.py does by default. It bakes grids in its first frame, whose time is printed and not
counted. --stride and --rows render only a part of each frame; the times are scaled to whole frames.
"""
import itertools
import math
import statistics
import sys
from functools import partial

import torch
from common import as_nerf_pytorch, build, choose_ways, machine, parse, peak_gib, seconds_of, show, write_json

from accel.fast_renderer import TOLERANCE
from accel.network_query import NetworkQuery
from run_nerf import render
from run_nerf_helpers import get_rays
from training.devices import rays_at_once
from training.logger import memory_gib

# Precision of the networks that the device must support, by way.
WAYS = {'nerf-pytorch': 'fp32', 'fp32': 'fp32', 'bf16': 'bf16', 'fast': 'fp32'}


def main():
    own, args = parse(__doc__, ('--frames', {'type': int, 'default': 3, 'help': 'frames of each way and view'}),
                      ('--views', {'type': int, 'nargs': '+', 'default': [0], 'help': 'numbers of test views'}),
                      ('--stride', {'type': int, 'default': 1, 'help': 'render every n-th pixel and row'}),
                      ('--rows', {'type': int, 'default': 0, 'help': 'render n rows in the middle; 0 for all'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'default: all available'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print only the peak memory in GiB'}))
    run = build(args)
    scene, device = run.scene, run.device
    if not all(0 <= view < len(scene.i_test) for view in own.views):
        sys.exit(f'--views: found {own.views}, expected numbers of test views, 0 to {len(scene.i_test) - 1}')
    pixels = rendered_pixels(scene, own.rows, own.stride)
    ways = [own.memory_of] if own.memory_of else choose_ways(own.ways, WAYS, run)
    kwargs = {way: kwargs_of(way, run) for way in ways}

    def frame(view, way):
        return render_pixels(scene, view, pixels, args.chunk, kwargs[way])
    if own.memory_of:
        frame(own.views[0], own.memory_of)
        print(memory_gib(device))
        return

    if 'fast' in ways:
        first = seconds_of(partial(frame, own.views[0], 'fast'), device)
        print(f'the first frame of `fast`, with baking: {first:.1f} s')
    keys = list(itertools.product(own.views, ways))
    seconds, pictures = {key: [] for key in keys}, {}
    for view, _, way in itertools.product(own.views, range(own.frames), ways):
        def work(key=(view, way)):
            pictures[key] = frame(*key)
        seconds[view, way].append(seconds_of(work, device))
    scale = scene.H * scene.W / pictures[keys[0]][..., 0].numel()
    medians = {key: scale * statistics.median(seconds[key]) for key in keys}

    peaks, rows = {way: peak_gib(way) for way in ways}, []
    for views in [[view] for view in own.views] + ([own.views] if len(own.views) > 1 else []):
        means = {way: statistics.mean(medians[view, way] for view in views) for way in ways}
        for way, mean in means.items():
            rows.append({'view': 'all' if len(views) > 1 else views[0], 'way': way, 'seconds': mean,
                         **{f'speed-up over {other}': means[other] / mean for other in ways if other != 'fast'},
                         **quality(scene, pictures, views, way, ways[0], pixels), 'peak GiB': peaks[way]})
    show(rows, f'frames of {scene.W}×{scene.H} of {args.expname} after {run.start} steps, {machine(device)}')
    write_json(own.json, {'config': args.expname, 'machine': machine(device), 'ways': rows})


def rendered_pixels(scene, rows, stride):
    """Index of the pixels to render: every `stride`-th of the `rows` rows (0: all) in the middle of the frame."""
    margin = (scene.H - rows) // 2 if rows else 0
    return slice(margin, scene.H - margin, stride), slice(None, None, stride)


def kwargs_of(way, run):
    """Arguments of `render` for one of WAYS."""
    if way == 'nerf-pytorch':
        return as_nerf_pytorch(run.kwargs_test)
    if way == 'fast':
        return run.frames.render_kwargs
    return {**run.kwargs_test, 'network_query_fn': NetworkQuery(run.args.netchunk, WAYS[way])}


@torch.no_grad()
def render_pixels(scene, view, pixels, chunk, kwargs):
    """The colours [h, w, 3] of the pixels of a test view, on the CPU."""
    device = next(kwargs['network_fn'].parameters()).device
    pose = torch.as_tensor(scene.poses[scene.i_test[view]], device=device)
    rays = [part[pixels] for part in get_rays(scene.H, scene.W, scene.K, pose, kwargs['pixel_centers'])]
    samples = kwargs['renderer'].samples_per_ray(kwargs['N_samples'], kwargs['N_importance'])
    return render(scene.H, scene.W, scene.K, rays_at_once(chunk, samples, device), rays, **kwargs)[0].cpu()


def quality(scene, pictures, views, way, reference, pixels):
    """How much the pixels of all `views` differ from those of the way `reference`, and the mean PSNR."""
    pairs = [(pictures[view, way], pictures[view, reference]) for view in views]
    differences = torch.stack([(picture - other).abs().amax(-1) for picture, other in pairs])
    targets = [torch.as_tensor(scene.images[scene.i_test[view]][pixels] / 255) for view in views]
    errors = [(pictures[view, way] - target).square().mean().item() for view, target in zip(views, targets)]
    return {'largest difference': differences.max().item(),
            f'pixels beyond {TOLERANCE}': int((differences > TOLERANCE).sum()), 'of': differences.numel(),
            'PSNR': f'{statistics.mean(-10 * math.log10(error) for error in errors):.3f}'}


if __name__ == '__main__':
    main()
