"""Seconds and peak memory of a frame: the established way and ours, taking turns in one run.

    python benchmarks/render.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path 001000.tar --frames 3

`fast` is what is on by default; it bakes its grids in a first frame, whose time is printed and not counted.
The established way sends --chunk rays and 65,536 points at once through the networks, and encodes all points before. With
--stride the frame is of every n-th pixel, with --rows only so many of its pixels high; times are scaled to the whole frame.
"""
import json
import statistics
import subprocess
import sys
from functools import partial

import torch
from common import built, established, machine, parse, seconds_of, show, write_json

from accel.sparse_backward import InChunks
from devices import has_fast_bf16, network_chunk, rays_at_once
from run_log import memory_gib
from run_nerf import render, render_rays
from run_nerf_helpers import get_rays

WAYS = {'established': None, 'fp32': 'fp32', 'screened': 'screened', 'bf16': 'bf16', 'fast': None}


def main():
    own, args = parse(__doc__, ('--frames', {'type': int, 'default': 3, 'help': 'of each way'}),
                      ('--stride', {'type': int, 'default': 1, 'help': 'of the pixels, both ways'}),
                      ('--rows', {'type': int, 'default': 0, 'help': 'height of the frame, 0 for all of it'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'by default all that this device has'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print the peak memory of a frame in GiB, and no more'}))
    scene, _, kwargs, start, parameters, _ = built(args)
    device = parameters[0].device
    above = (scene.H - own.rows) // 2 if own.rows else 0  # what is left is the middle of the frame
    pixels = slice(above, scene.H - above, own.stride), slice(None, None, own.stride)
    target = torch.as_tensor(scene.images[scene.i_test[0]][pixels] / 255)
    rest = scene.H * scene.W / target[..., 0].numel()
    pose = torch.as_tensor(scene.poses[scene.i_test[0]], device=device)
    rays = [part[pixels] for part in get_rays(scene.H, scene.W, scene.K, pose, kwargs['pixel_centers'])]
    samples = args.N_samples + args.N_importance
    ways = own.ways or [way for way in WAYS if way not in ('screened', 'bf16') or has_fast_bf16(device)]

    @torch.no_grad()
    def frame(way):
        if way == 'established':
            ours, chunk = established(kwargs), args.chunk
        else:
            ours, chunk = dict(kwargs), rays_at_once(args.chunk, samples, device)
        if WAYS[way]:
            query = partial(kwargs['network_query_fn'], in_chunks=InChunks('auto', WAYS[way], network_chunk))
            ours.update(network_query_fn=query, ray_renderer=render_rays)
        return render(scene.H, scene.W, scene.K, chunk, rays, **ours)[0].cpu()

    if own.memory_of:
        frame(own.memory_of)
        print(json.dumps(memory_gib(device)))
        return
    seconds, pictures = {way: [] for way in ways}, {}
    if 'fast' in ways:
        print(f'the first frame of `fast`, with baking: {seconds_of(lambda: frame("fast"), device):.1f} s')
    for _ in range(own.frames):
        for way in ways:
            seconds[way].append(seconds_of(lambda way=way: pictures.update({way: frame(way)}), device))
    table = []
    for way in ways:
        median = statistics.median(seconds[way]) * rest
        peak = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--memory_of', way], capture_output=True, text=True,
                              check=True).stdout.splitlines()[-1]
        table.append({'way': way, 'seconds': median,
                      f'against {ways[0]}': statistics.median(seconds[ways[0]]) * rest / median,
                      'largest difference': (pictures[way] - pictures[ways[0]]).abs().max().item(),
                      'PSNR': -10 * torch.log10((pictures[way] - target).square().mean()).item(),
                      'peak GiB': float(peak)})
    show(table, f'a frame of {scene.W}×{scene.H} of {args.expname} after {start} steps, {machine(device)}')
    write_json(own.json, {'config': args.expname, 'machine': machine(device), 'ways': table})


if __name__ == '__main__':
    main()
