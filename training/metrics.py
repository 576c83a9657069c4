"""Image metrics as the field reports them: of 8-bit images, averaged over the images.

PSNR; SSIM (Wang et al. 2004) with an 11 × 11 Gaussian window of σ 1.5, averaged over the pixels whose window
lies inside the image; LPIPS with VGG if the optional package `lpips` and its weights are available.
"""
import csv
import importlib.util
import io
import json

import numpy as np
import torch

from scenes.errors import first_line
from scenes.files import write_text

# The window of SSIM is this many pixels wide and high.
SSIM_WINDOW = 11
# The Gaussian weights of the window have this standard deviation, in pixels.
SSIM_SIGMA = 1.5
# This constant stabilises the luminance term of SSIM.
SSIM_K1 = 0.01
# This constant stabilises the contrast term of SSIM.
SSIM_K2 = 0.03


def psnr(image, target, mask=None):
    """Peak signal-to-noise ratio in dB of two uint8 images [H, W, C], over the pixels in `mask` [H, W] if
    given; infinite if they are equal, None if there is no pixel."""
    if mask is not None:
        image, target = image[mask], target[mask]
    if image.size == 0:
        return None
    mse = np.mean((image.astype(np.float64) - target.astype(np.float64)) ** 2) / 255 ** 2
    return float('inf') if mse == 0 else float(-10 * np.log10(mse))


def blur(x):
    """Gaussian mean of each window inside the image: [..., H, W] to [..., H - 10, W - 10]."""
    taps = np.exp(-0.5 * (np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2 / SSIM_SIGMA ** 2)
    taps /= taps.sum()
    for axis in (-2, -1):
        windows = x.unfold(axis, SSIM_WINDOW, 1).unbind(-1)
        x = torch.zeros_like(windows[0])
        for tap, shifted in zip(taps.tolist(), windows, strict=True):
            x.add_(shifted, alpha=tap)
    return x


def similarity(x, y):
    """Structural similarity of two float images [H, W] in [0, 1], of each window [H - 10, W - 10]."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, covariance = mean_xx - mean_x ** 2, mean_yy - mean_y ** 2, mean_xy - mean_x * mean_y
    c1, c2 = SSIM_K1 ** 2, SSIM_K2 ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))


def ssim(image, target, device='cpu', mask=None):
    """Mean structural similarity of two uint8 images [H, W, C], over the windows whose centre is in `mask`
    [H, W] if given, computed on `device`, which needs float64; None if there is no window. Pixels that are
    not in `mask` count as equal."""
    if mask is not None:
        image = np.where(mask[..., None], image, target)
    margin = SSIM_WINDOW // 2
    inner = None if mask is None else torch.from_numpy(mask[margin:-margin, margin:-margin]).to(device)
    if min(image.shape[:2]) < SSIM_WINDOW or (inner is not None and not inner.any()):
        return None
    channels = torch.from_numpy(np.stack([image, target])).to(device).unbind(-1)       # [2, H, W] each
    # one after another: a processor's caches hold the intermediate results of one channel
    maps = (similarity(*pair.double() / 255) for pair in channels)
    return torch.stack([(part if inner is None else part[inner]).mean() for part in maps]).mean().item()


def load_lpips(device):
    """Load LPIPS-VGG.

    Returns:
      distance: a function of two uint8 images [H, W, 3] and a mask [H, W] or None; None if LPIPS is not
        available.
      problem: why it is not available, or None.
    """
    if importlib.util.find_spec('lpips') is None:
        return None, 'LPIPS is not measured: pip install lpips'
    try:
        import lpips
        network = lpips.LPIPS(net='vgg', verbose=False).to(device).eval()
    except Exception as error:  # the weights are downloaded, which can fail in many ways
        return None, f'LPIPS is not measured: its weights are not available ({first_line(error)})'

    @torch.no_grad()
    def distance(image, target, mask=None):
        if mask is not None:  # other pixels do not differ
            image = np.where(mask[..., None], image, target)
        pair = torch.from_numpy(np.stack([image, target])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return float(network(pair[:1], pair[1:]))
    return distance, None


def fit_colors(image, target):
    """The affine change of colour [4, 3] that brings pixels `image` [N, 3] closest to `target` [N, 3]."""
    pixels = np.concatenate([image, np.ones_like(image[:, :1])], -1)
    return np.linalg.lstsq(pixels.astype(np.float64), target.astype(np.float64), rcond=None)[0]


def corrected_half(rgb, target, mask=None):
    """The right half of a rendered image after the affine change of colour that fits its left half: the
    protocol for held-out views whose exposure is not known (Martin-Brualla et al., CVPR 2021).

    Args:
      rgb: the image, [H, W, 3] in [0, 1]; target: the photo, uint8 [H, W, 3].
      mask: which pixels count, bool [H, W]; None for all.
    Returns:
      rgb, target, mask: of the right half; the mask is None if it was.
    """
    half = rgb.shape[1] // 2
    left = (slice(None), slice(half)) if mask is None else mask & (np.arange(rgb.shape[1]) < half)
    pixels = rgb[left].reshape(-1, 3)
    affine = fit_colors(pixels, target[left].reshape(-1, 3) / 255) if len(pixels) else np.eye(4, 3)
    right = rgb[:, half:] @ affine[:3] + affine[3]
    return right.astype(np.float32), target[:, half:], None if mask is None else mask[:, half:]


def write_metrics(folder, rows, about):
    """Write `metrics.json` and `metrics.csv`: the conditions (`about`), the means, and a row for each image.

    Args:
      rows: dicts with the same keys: view, image (file name), psnr, ssim, lpips, seconds; None if not
        measured.
      about: dict of what the numbers depend on: step, resolution, background, …
    Returns:
      dict of the means of all keys but view and image.
    """
    def mean(key):
        values = [row[key] for row in rows if row[key] is not None]
        return float(np.mean(values)) if values else None

    def finite(row):
        """JSON has no infinity."""
        return {key: None if value == float('inf') else value for key, value in row.items()}

    means = {key: mean(key) for key in rows[0] if key not in ('view', 'image')}
    content = {**about, 'mean': finite(means), 'images': [finite(row) for row in rows]}
    write_text(folder / 'metrics.json', json.dumps(content, indent=1) + '\n')
    table = io.StringIO()
    writer = csv.DictWriter(table, [*about, *rows[0]])
    writer.writeheader()
    writer.writerows([{**about, **row} for row in [*rows, {'view': 'mean', **means}]])
    write_text(folder / 'metrics.csv', table.getvalue())
    return means
