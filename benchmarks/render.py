"""Time, peak memory and quality of frames: nerf-pytorch's implementation and ours, in turns within one run.

    python benchmarks/render.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path FILE

`fast` is what run_nerf.py does by default. It bakes grids in its first frame, whose time is printed and not
counted. --stride and --rows render only a part of each frame; the times are scaled to whole frames.
"""
import itertools
import math
import statistics
import sys
from functools import partial

import torch
from common import (
    as_nerf_pytorch,
    build,
    choose_variants,
    machine,
    parse,
    peak_gib,
    seconds_of,
    show,
    write_json,
)

from accel.fast_renderer import TOLERANCE
from accel.network_query import NetworkQuery
from run_nerf import render
from run_nerf_helpers import get_rays
from training.logger import memory_gib

# Each variant needs a precision that the device must support.
VARIANTS = {'nerf-pytorch': 'fp32', 'fp32': 'fp32', 'bf16': 'bf16', 'fast': 'fp32'}


def main():
    bench, args = parse(
        __doc__, ('--frames', {'type': int, 'default': 3, 'help': 'frames of each variant and view'}),
        ('--views', {'type': int, 'nargs': '+', 'default': [0], 'help': 'numbers of test views'}),
        ('--stride', {'type': int, 'default': 1, 'help': 'render every n-th pixel and row'}),
        ('--rows', {'type': int, 'default': 0, 'help': 'render n rows in the middle; 0 for all'}),
        ('--variants', {'nargs': '+', 'choices': VARIANTS, 'help': 'default: all available'}),
        ('--memory_of', {'choices': VARIANTS, 'help': 'print only the peak memory in GiB'}))
    run = build(args)
    scene, device = run.scene, run.device
    if not all(0 <= view < len(scene.i_test) for view in bench.views):
        sys.exit(f'--views: found {bench.views}, expected numbers from 0 to {len(scene.i_test) - 1}')
    pixels = rendered_pixels(scene, bench.rows, bench.stride)
    requested = [bench.memory_of] if bench.memory_of else bench.variants
    variants = choose_variants(requested, VARIANTS, run)
    kwargs = {variant: kwargs_of(variant, run) for variant in variants}

    def frame(view, variant):
        return render_pixels(scene, view, pixels, args.chunk or sys.maxsize, kwargs[variant])
    if bench.memory_of:
        frame(bench.views[0], bench.memory_of)
        print(memory_gib(device))
        return

    if 'fast' in variants:
        first = seconds_of(partial(frame, bench.views[0], 'fast'), device)
        print(f'the first frame of `fast`, with baking: {first:.1f} s')
    keys = list(itertools.product(bench.views, variants))
    seconds, images = {key: [] for key in keys}, {}
    for view, _, variant in itertools.product(bench.views, range(bench.frames), variants):
        def work(key=(view, variant)):
            images[key] = frame(*key)
        seconds[view, variant].append(seconds_of(work, device))
    scale = scene.H * scene.W / images[keys[0]][..., 0].numel()
    medians = {key: scale * statistics.median(seconds[key]) for key in keys}

    peaks, rows = {variant: peak_gib(variant) for variant in variants}, []
    for views in [[view] for view in bench.views] + ([bench.views] if len(bench.views) > 1 else []):
        means = {variant: statistics.mean(medians[view, variant] for view in views)
                 for variant in variants}
        for variant, mean in means.items():
            speed_ups = {f'speed-up over {other}': means[other] / mean
                         for other in variants if other != 'fast'}
            rows.append({'view': 'all' if len(views) > 1 else views[0], 'variant': variant, 'seconds': mean,
                         **speed_ups, **quality(scene, images, views, variant, variants[0], pixels),
                         'peak GiB': peaks[variant]})
    show(rows, f'frames of {scene.W}×{scene.H} of {args.expname} after {run.start} steps, {machine(device)}')
    write_json(bench.json, {'config': args.expname, 'machine': machine(device), 'variants': rows})


def rendered_pixels(scene, rows, stride):
    """Index of the pixels to render: every `stride`-th of `rows` rows in the middle of the frame (0: all)."""
    rows = min(rows or scene.H, scene.H)
    first = (scene.H - rows) // 2
    return slice(first, first + rows, stride), slice(None, None, stride)


def kwargs_of(variant, run):
    """Arguments of `render` for one of VARIANTS."""
    if variant == 'nerf-pytorch':
        return as_nerf_pytorch(run.kwargs_test)
    if variant == 'fast':
        return run.frames.render_kwargs
    return {**run.kwargs_test, 'network_query_fn': NetworkQuery(run.args.netchunk, VARIANTS[variant])}


@torch.no_grad()
def render_pixels(scene, view, pixels, chunk, kwargs):
    """The colours [h, w, 3] of the pixels of a test view, on the CPU."""
    device = next(kwargs['network_fn'].parameters()).device
    pose = torch.as_tensor(scene.poses[scene.i_test[view]], device=device)
    rays = [part[pixels] for part in get_rays(scene.H, scene.W, scene.K, pose, kwargs['pixel_centers'])]
    chunk = min(chunk, kwargs['renderer'].max_rays(device, **kwargs))
    return render(scene.H, scene.W, scene.K, chunk, rays, **kwargs)[0].cpu()


def quality(scene, images, views, variant, reference, pixels):
    """How much the pixels of all `views` differ from those of the variant `reference`, and the mean PSNR."""
    pairs = [(images[view, variant], images[view, reference]) for view in views]
    differences = torch.stack([(image - other).abs().amax(-1) for image, other in pairs])
    targets = [torch.as_tensor(scene.images[scene.i_test[view]][pixels] / 255) for view in views]
    errors = [(images[view, variant] - target).square().mean().item() for view, target in zip(views, targets)]
    return {'largest difference': differences.max().item(),
            f'pixels beyond {TOLERANCE}': int((differences > TOLERANCE).sum()), 'of': differences.numel(),
            'PSNR': f'{statistics.mean(-10 * math.log10(error) for error in errors):.3f}'}


if __name__ == '__main__':
    main()
