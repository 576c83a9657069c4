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
from devices import has_fast_bf16, network_chunk
from run_log import memory_gib
from run_nerf import render, render_frame, render_rays

WAYS = {'established': None, 'fp32': 'fp32', 'screened': 'screened', 'bf16': 'bf16', 'fast': None}


def main():
    own, args = parse(__doc__, ('--frames', {'type': int, 'default': 3, 'help': 'of each way'}),
                      ('--stride', {'type': int, 'default': 1, 'help': 'of the pixels, both ways'}),
                      ('--rows', {'type': int, 'default': 0, 'help': 'height of the frame, 0 for all of it'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'by default all that this device has'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print the peak memory of a frame in GiB, and no more'}))
    scene, _, kwargs, start, parameters, _ = built(args)
    device = parameters[0].device
    (H, W, focal), K = scene.every_nth_pixel(own.stride, kwargs['pixel_centers'])
    rows = own.rows or H
    K[1, 2] -= (H - rows) // 2  # the middle of the frame
    rest = scene.H * scene.W / (rows * W)
    ways = own.ways or [way for way in WAYS if way not in ('screened', 'bf16') or has_fast_bf16(device)]

    def frame(way):
        pose = torch.as_tensor(scene.poses[scene.i_test[0]], device=device)
        if way == 'established':
            with torch.no_grad():
                return render(rows, W, K, args.chunk, c2w=pose, **established(kwargs))[0].cpu()
        if way == 'fast':
            return torch.as_tensor(render_frame(pose, [rows, W, focal], K, args.chunk, kwargs).rgb)
        query = partial(kwargs['network_query_fn'], in_chunks=InChunks('auto', WAYS[way], network_chunk))
        ours = {**kwargs, 'network_query_fn': query, 'ray_renderer': render_rays}
        return torch.as_tensor(render_frame(pose, [rows, W, focal], K, args.chunk, ours).rgb)

    if own.memory_of:
        frame(own.memory_of)
        print(json.dumps(memory_gib(device)))
        return
    seconds, pictures = {way: [] for way in ways}, {}
    target = scene.images[scene.i_test[0]][::own.stride, ::own.stride]
    target = torch.as_tensor(target[(H - rows) // 2:(H - rows) // 2 + rows] / 255)
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
