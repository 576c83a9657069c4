"""Random rays for training: `sampler.sample(step)` gives a `Batch` of rays and the colours of their
pixels."""
from typing import NamedTuple

import numpy as np
import torch

from run_nerf_helpers import pixel_rays


class Batch(NamedTuple):
    """Rays of one training step and the colours they should have."""
    rays: torch.Tensor    # origins and directions [2, N_rays, 3]
    target: torch.Tensor  # colours in [0, 1], [N_rays, 3], or with alpha [N_rays, 4]

    def split(self, max_rays):
        """Yield batches of at most `max_rays` rays, each with its share of the rays of this batch."""
        for rays, target in zip(self.rays.split(max_rays, 1), self.target.split(max_rays)):
            yield Batch(rays, target), len(target) / len(self.target)


class RaySampler:
    """Samples random pixels of the training views, with replacement, and computes the rays through them.

    The images stay 8 bit on the device. Random numbers come from torch's global generator of that device.
    With `N_rand_samples` the number of rays is adapted, so that the renderer takes about this many samples
    along them; call `adapt_to` after each step.

    Args:
      scene: a `Scene` with images.
      N_rand: rays in a batch; the most rays with `N_rand_samples`.
      no_batching: take all rays of a batch from one image.
      precrop_iters: before this step only the centre of the images is sampled.
      precrop_frac: fraction of each image side that this centre covers.
      pixel_centers: put rays through pixel centres rather than corners.
      device: where the images are kept and batches are made.
      with_alpha: add the alpha of its pixel to each colour, if the scene has alphas.
      N_rand_samples: samples in a batch, all rays together; None for a fixed number of rays.
      expected_samples: samples per ray expected before the first step; needed with `N_rand_samples`.
    """

    def __init__(self, scene, N_rand, no_batching, precrop_iters, precrop_frac, pixel_centers, device,
                 with_alpha=False, N_rand_samples=None, expected_samples=None):
        first, last = min(scene.i_train), max(scene.i_train)  # a slice shares memory on a CPU
        self.images = torch.from_numpy(scene.images[first:last + 1]).to(device)        # [., H, W, 3] uint8
        self.poses = torch.from_numpy(scene.poses[first:last + 1]).to(device)          # [., 3, 4]
        if with_alpha and scene.alphas is not None:
            alphas = torch.from_numpy(scene.alphas[first:last + 1]).to(device)
            self.images = torch.cat([self.images, alphas[..., None]], -1)              # [., H, W, 4]
        self.views = torch.from_numpy(np.asarray(scene.i_train) - first).to(device)    # [N_views]
        self.K, self.device = scene.K.copy(), device
        self.K[:2, 2] -= 0.5 if pixel_centers else 0.0  # integer pixels then stand for their centres
        self.N_rand, self.no_batching = N_rand, no_batching
        self.precrop_iters, self.precrop_frac = precrop_iters, precrop_frac
        self.N_rand_samples, self.expected_samples = N_rand_samples, expected_samples
        self.mean_samples = None  # samples per ray in the last step

    def sample(self, step):
        """The `Batch` of training step `step` ≥ 1."""
        N_rays = self.num_rays()

        def random(low, high, count=N_rays):
            return torch.randint(low, high, (count,), device=self.device)

        N_views, (H, W) = len(self.views), self.images.shape[1:3]
        view = self.views[random(0, N_views, 1).expand(N_rays) if self.no_batching else random(0, N_views)]
        y, x = random(*self.sampled_range(H, step)), random(*self.sampled_range(W, step))  # [N_rays]
        rays = pixel_rays(x, y, self.K, self.poses[view])
        return Batch(torch.stack(rays), self.images[view, y, x] / 255)

    def sampled_range(self, side, step):
        """The range of pixels along an image side that is sampled at `step`."""
        if step >= self.precrop_iters:
            return 0, side
        half = max(1, int(side // 2 * self.precrop_frac))
        return max(0, side // 2 - half), min(side, side // 2 + half)

    def num_rays(self):
        """Number of rays in the next batch."""
        if self.N_rand_samples is None:
            return self.N_rand
        mean_samples = float(self.mean_samples or 0) or self.expected_samples  # not 0, to divide by
        return max(1, min(self.N_rand, int(self.N_rand_samples / mean_samples)))

    def adapt_to(self, mean_samples):
        """Adapt the number of rays to the mean number of samples per ray in the last step; None if it is not
        known."""
        if mean_samples is not None:
            self.mean_samples = mean_samples

    def reset(self):
        """Forget the number of samples per ray, because the renderer has been reset."""
        self.mean_samples = None

    def state_dict(self):
        return {'mean_samples': None if self.mean_samples is None else float(self.mean_samples)}

    def load_state_dict(self, state):
        self.mean_samples = state['mean_samples']
