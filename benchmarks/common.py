"""What the benchmarks share: options, a clock that waits for the GPU, the rate of a matrix product, tables."""
import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from options import config_parser  # noqa: E402
from ranks import Ranks  # noqa: E402
from run_nerf import batchify, prepare, render_rays  # noqa: E402
from training_run import training_batches  # noqa: E402

PRODUCT = 4096  # side of the matrices whose product shows what the machine reaches


def parse(doc, *own):
    """The benchmark's own options, a list of (name, keywords of add_argument), and those of run_nerf.py."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='All other options are those of run_nerf.py.')
    for name, keywords in own:
        parser.add_argument(name, **keywords)
    parser.add_argument('--json', metavar='FILE', help='write the results there too')
    own, rest = parser.parse_known_args()
    own.rest = rest
    return own, config_parser().parse_args(rest)


def built(args):
    """Scene, render_kwargs for training and for rendering, parameters, optimizer; nothing of it is written anywhere."""
    args.basedir = tempfile.mkdtemp()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scene, _, _, kwargs, kwargs_test, start, parameters, optimizer = prepare(args, Ranks(1))
    return scene, kwargs, kwargs_test, start, parameters, optimizer


def batches_of(args, scene, kwargs):
    args.precrop_iters = 0
    return training_batches(args, scene, kwargs, Ranks(1))


def established(kwargs):
    """render_kwargs whose networks are applied as in the established code: all points are encoded, then go through the
    network in chunks of 65,536, and all activations are kept."""
    query = kwargs['network_query_fn'].keywords
    embed_fn, embeddirs_fn = query['embed_fn'], query['embeddirs_fn']

    def network_query_fn(inputs, viewdirs, network_fn):
        encoded = [embed_fn(inputs.reshape(-1, 3))]
        if viewdirs is not None:
            encoded.append(embeddirs_fn(viewdirs[:, None].expand(inputs.shape).reshape(-1, 3)))
        raw = batchify(network_fn, 1024 * 64)(torch.cat(encoded, -1))
        return raw.reshape(*inputs.shape[:-1], raw.shape[-1])
    return {**kwargs, 'network_query_fn': network_query_fn, 'ray_renderer': render_rays}


def clock(device):
    """Seconds, when all work given to `device` is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work, device):
    """How long a call takes."""
    began = clock(device)
    work()
    return clock(device) - began


def product_rate(device, dtype=torch.float32):
    """Operations a second of one large matrix product."""
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
    return 2 * PRODUCT ** 3 / seconds_of(lambda: a @ a, device)


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU'
    return f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def show(rows, title):
    """A table of dicts that have the same keys."""
    texts = [list(rows[0])] + [[f'{value:.4g}' if isinstance(value, float) else str(value) for value in row.values()]
                               for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    print(title)
    for line in texts:
        print('  ' + '  '.join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), flush=True)


def write_json(path, content):
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + '\n')
