"""How good renderings are, measured as the field does: on 8-bit images, one by one, then averaged.

PSNR; SSIM with an 11 × 11 Gaussian window of σ 1.5 over the valid region (Wang et al. 2004, as the NeRF papers report it);
LPIPS with VGG where the optional package `lpips` and its weights are there.
"""
import csv
import importlib.util
import io
import json

import numpy as np
import torch

from errors import first_line
from file_io import write_text

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(image, target):
    """Peak signal-to-noise ratio in dB of two uint8 images of one shape; infinite where they are equal."""
    mse = np.mean((image.astype(np.float64) - target.astype(np.float64)) ** 2) / 255 ** 2
    return float('inf') if mse == 0 else float(-10 * np.log10(mse))


def blur(x):
    """Gaussian means over all whole windows: [..., H, W, C] to [..., H - 10, W - 10, C]."""
    taps = np.exp(-0.5 * (np.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA ** 2)
    taps /= taps.sum()
    for axis in (-3, -2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(tap * x.take(range(k, k + length), axis) for k, tap in enumerate(taps))
    return x


def ssim(image, target):
    """Mean structural similarity of two uint8 images [H, W, C]; None if they are smaller than the window."""
    if min(image.shape[:2]) < WINDOW:
        return None
    x, y = image / 255.0, target / 255.0
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = blur(np.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, covariance = mean_xx - mean_x ** 2, mean_yy - mean_y ** 2, mean_xy - mean_x * mean_y
    c1, c2 = K1 ** 2, K2 ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))
    return float(similarity.mean())


def load_lpips(device):
    """A function (image, target) -> LPIPS-VGG of uint8 images, or None; and why there is none."""
    if importlib.util.find_spec('lpips') is None:
        return None, 'LPIPS is not measured: pip install lpips'
    try:
        import lpips
        network = lpips.LPIPS(net='vgg', verbose=False).to(device).eval()
    except Exception as error:  # the weights come from a hub: any network or file error
        return None, f'LPIPS is not measured: its weights are not to be had ({first_line(error)})'

    @torch.no_grad()
    def distance(image, target):
        pair = [torch.from_numpy(x).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (image, target)]
        return float(network(*pair))
    return distance, None


def write_metrics(folder, rows, about):
    """Write `metrics.json` and `metrics.csv`: what was measured (`about`), the means, and a row for each image.

    Args:
      rows: dicts of one set of keys: view, psnr, ssim, lpips, seconds; None for what was not measured.
      about: dict of what the numbers depend on: step, resolution, background, …
    Returns:
      the means, a dict.
    """
    def mean(key):
        values = [row[key] for row in rows if row[key] is not None]
        return float(np.mean(values)) if values else None

    means = {key: mean(key) for key in rows[0] if key != 'view'}
    finite = [{key: None if value == float('inf') else value for key, value in row.items()} for row in [means, *rows]]
    write_text(folder / 'metrics.json', json.dumps({**about, 'mean': finite[0], 'images': finite[1:]}, indent=1) + '\n')
    table = io.StringIO()
    writer = csv.DictWriter(table, [*about, *rows[0]])
    writer.writeheader()
    writer.writerows([{**about, **row} for row in [*rows, {'view': 'mean', **means}]])
    write_text(folder / 'metrics.csv', table.getvalue())
    return means
