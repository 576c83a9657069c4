"""Seconds and peak memory of frames: the established way and ours, taking turns in one run.

    python benchmarks/render.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path 001000.tar --frames 3

`fast` is what is on by default; it bakes its grids in a first frame, whose time is printed and not counted.
The established way sends --chunk rays and 65,536 points at once through the networks, and encodes all points before. With
--stride the frames are of every n-th pixel, with --rows only so many of their pixels high; times are scaled to whole frames.
"""
import itertools
import json
import math
import statistics
import subprocess
import sys
from functools import partial

import torch
from common import built, established, machine, parse, seconds_of, show, write_json

from accel.fast_rays import TOLERANCE
from accel.sparse_backward import InChunks
from devices import has_fast_bf16, network_chunk, rays_at_once
from run_log import memory_gib
from run_nerf import render, render_rays
from run_nerf_helpers import get_rays

WAYS = {'established': None, 'fp32': 'fp32', 'screened': 'screened', 'bf16': 'bf16', 'fast': None}


def main():
    own, args = parse(__doc__, ('--frames', {'type': int, 'default': 3, 'help': 'of each way and view'}),
                      ('--views', {'type': int, 'nargs': '+', 'default': [0], 'help': 'which of the test views'}),
                      ('--stride', {'type': int, 'default': 1, 'help': 'of the pixels, both ways'}),
                      ('--rows', {'type': int, 'default': 0, 'help': 'height of the frames, 0 for all of it'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'by default all that this device has'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print the peak memory of a frame in GiB, and no more'}))
    scene, _, kwargs, start, parameters, _ = built(args)
    device = parameters[0].device
    if not all(0 <= view < len(scene.i_test) for view in own.views):
        sys.exit(f'--views: found {own.views}, expected numbers of test views, 0 to {len(scene.i_test) - 1}')
    pixels = pixels_of(scene, own.rows, own.stride)
    ways = own.ways or [way for way in WAYS if way not in ('screened', 'bf16') or has_fast_bf16(device)]
    if own.memory_of:
        frame(args, scene, kwargs, own.memory_of, own.views[0], pixels)
        print(json.dumps(memory_gib(device)))
        return

    seconds, pictures = {}, {}
    if 'fast' in ways:
        first = seconds_of(lambda: frame(args, scene, kwargs, 'fast', own.views[0], pixels), device)
        print(f'the first frame of `fast`, with baking: {first:.1f} s')
    for view, _, way in itertools.product(own.views, range(own.frames), ways):
        def work(key=(view, way)):
            pictures[key] = frame(args, scene, kwargs, key[1], key[0], pixels)
        seconds.setdefault((view, way), []).append(seconds_of(work, device))

    peaks = {way: peak_of(way) for way in ways}
    table = []
    for views in [[view] for view in own.views] + ([own.views] if len(own.views) > 1 else []):
        took = {way: statistics.mean(statistics.median(seconds[view, way]) for view in views) for way in ways}
        for way in ways:
            table.append({'view': 'all' if len(views) > 1 else views[0], 'way': way,
                          'seconds': took[way] * scene.H * scene.W / pictures[views[0], way][..., 0].numel(),
                          **{f'against {other}': took[other] / took[way] for other in ways if other != 'fast'},
                          **quality(scene, pictures, views, way, ways[0], pixels), 'peak GiB': peaks[way]})
    show(table, f'frames of {scene.W}×{scene.H} of {args.expname} after {start} steps, {machine(device)}')
    write_json(own.json, {'config': args.expname, 'machine': machine(device), 'ways': table})


def pixels_of(scene, rows, stride):
    """The pixels of a frame that are rendered, as an index."""
    above = (scene.H - rows) // 2 if rows else 0  # what is left is the middle of the frame
    return slice(above, scene.H - above, stride), slice(None, None, stride)


@torch.no_grad()
def frame(args, scene, kwargs, way, view, pixels):
    """The picture [h, w, 3] of a test view, on the CPU."""
    device = next(kwargs['network_fn'].parameters()).device
    pose = torch.as_tensor(scene.poses[scene.i_test[view]], device=device)
    rays = [part[pixels] for part in get_rays(scene.H, scene.W, scene.K, pose, kwargs['pixel_centers'])]
    if way == 'established':
        ours, chunk = established(kwargs), args.chunk
    else:
        ours, chunk = dict(kwargs), rays_at_once(args.chunk, args.N_samples + args.N_importance, device)
    if WAYS[way]:
        query = partial(kwargs['network_query_fn'], in_chunks=InChunks('auto', WAYS[way], network_chunk))
        ours.update(network_query_fn=query, ray_renderer=render_rays)
    return render(scene.H, scene.W, scene.K, chunk, rays, **ours)[0].cpu()


def quality(scene, pictures, views, way, first_way, pixels):
    """What a way's pictures are like, the worst of the views for pixels, the mean for PSNR."""
    differences = torch.stack([(pictures[view, way] - pictures[view, first_way]).abs().amax(-1) for view in views])
    targets = [torch.as_tensor(scene.images[scene.i_test[view]][pixels] / 255) for view in views]
    errors = [(pictures[view, way] - target).square().mean().item() for view, target in zip(views, targets)]
    return {'largest difference': differences.max().item(),
            f'pixels beyond {TOLERANCE}': int((differences > TOLERANCE).sum()), 'of': differences.numel(),
            'PSNR': f'{statistics.mean(-10 * math.log10(error) for error in errors):.3f}'}


def peak_of(way):
    """GiB, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--memory_of', way], capture_output=True, text=True,
                          check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == '__main__':
    main()
