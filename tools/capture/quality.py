"""How sharp and how well exposed a photo is, and which photos are unusable.

Sharpness is the variance of the Laplacian (Pech-Pacheco et al. 2000) of the grey photo, reduced to
`MEASURED_SIDE` pixels so that it compares between cameras and is close to the size for training.
"""
from dataclasses import dataclass

import numpy as np

from tools.capture.collect import Reason

# Photos are reduced to this length of their longer side before they are measured, in pixels.
MEASURED_SIDE = 800
# The sharpness of a blurred photo is below this fraction of the median of all photos. No photo of fox or fern
# has less than 0.54 of it.
BLURRED_FRACTION = 0.1
# A photo above this sharpness is not blurred in any case.
SHARP_ENOUGH = 6.0
# A photo is too dark if hardly any of its pixels is brighter than this grey.
DARK_GREY = 0.1
# A photo is overexposed if hardly any of its pixels is darker than this grey.
BRIGHT_GREY = 0.95
# Pixels brighter than this grey are white.
WHITE_GREY = 0.94
# A scene has a white background if at least this fraction of its photos' borders is white.
WHITE_BORDER = 0.8
# A photo whose grey has less than this standard deviation shows nothing.
BLANK_DEVIATION = 0.01
# Photos whose mean grey differs by more than this were taken with different exposures.
EXPOSURE_SPREAD = 0.25


@dataclass
class Quality:
    """Measures of a photo; grey values are 0 to 1."""
    sharpness: float    # variance of the Laplacian, in units of 1e-4
    exposure: float     # mean grey
    dark: float         # 1st percentile of grey
    bright: float       # 99th percentile of grey
    deviation: float    # standard deviation of grey
    white_border: float  # fraction of the pixels at the border that are white
    fingerprint: str    # photos with the same pixels have the same


def measure(image):
    """The `Quality` of a Pillow image."""
    import hashlib
    grey = reduced_grey(image)
    fingerprint = hashlib.sha256(grey).hexdigest() + f'{image.width}x{image.height}'
    dark, bright = np.percentile(grey, [1, 99])
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return Quality(sharpness(grey), float(grey.mean()), float(dark), float(bright), float(grey.std()),
                   float((border > WHITE_GREY).mean()), fingerprint)


def reduced_grey(image):
    """The grey values of a Pillow image, float32 [H, W], 0 to 1, reduced to `MEASURED_SIDE`."""
    from PIL import Image
    grey = image.convert('L')
    scale = MEASURED_SIDE / max(grey.size)
    if scale < 1:
        grey = grey.resize([max(1, round(side * scale)) for side in grey.size], Image.Resampling.BOX)
    return np.asarray(grey, np.float32) / 255


def sharpness_of(image):
    """The `sharpness` of a Pillow image."""
    return sharpness(reduced_grey(image))


def sharpness(grey):
    """The variance of the Laplacian of `grey` [H, W], 0 to 1, in units of 1e-4; 0 below 3 × 3 pixels."""
    if min(grey.shape) < 3:
        return 0.0
    laplacian = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1] - 4 * grey[1:-1, 1:-1]
    return float(1e4 * laplacian.var())


def has_white_background(qualities):
    """Whether an object is shown on plain white in photos of these qualities."""
    return bool(np.median([quality.white_border for quality in qualities]) > WHITE_BORDER)


def find_faults(qualities):
    """Why photos cannot be used.

    Args:
      qualities: dict name → `Quality`.
    Returns:
      dict name → `Reason`, for those that cannot be used.
    """
    reasons, first = {}, {}
    for name, quality in qualities.items():
        if quality.bright < DARK_GREY:
            reasons[name] = Reason('dark', f'black or too dark (mean grey {quality.exposure:.2f} of 1)')
        elif quality.dark > BRIGHT_GREY:
            reasons[name] = Reason('bright', f'overexposed (mean grey {quality.exposure:.2f} of 1)')
        elif quality.deviation < BLANK_DEVIATION:
            reasons[name] = Reason('blank', 'blank: it shows only one colour')
        elif first.setdefault(quality.fingerprint, name) != name:
            reasons[name] = Reason('duplicate', f'duplicate of {first[quality.fingerprint]}')
    remaining = {name: quality.sharpness for name, quality in qualities.items() if name not in reasons}
    median = np.median(list(remaining.values())) if remaining else 0.0
    for name, value in remaining.items():
        if value < min(BLURRED_FRACTION * median, SHARP_ENOUGH):
            reasons[name] = Reason('blurred', f'blurred (sharpness {value:.1f}; the median is {median:.1f})')
    return reasons
