"""How good a rendering is, measured as the field does: on 8-bit images, one by one, then averaged."""
import numpy as np


def psnr(image, target):
    """Peak signal-to-noise ratio in dB of two uint8 images of one shape; infinite where they are equal."""
    mse = np.mean((image.astype(np.float64) - target.astype(np.float64)) ** 2) / 255 ** 2
    return float('inf') if mse == 0 else float(-10 * np.log10(mse))
