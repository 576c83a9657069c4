"""Random rays for training: `sampler.sample(step)` gives a `Batch` of rays and the colours of their
pixels. And the rays of all pixels of a camera."""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from run_nerf_helpers import cast_rays, get_rays
from scenes.training_views import TrainingViews

# With sparse depths, one in this many rays goes through a pixel whose depth is known.
DEPTH_EVERY = 8


class Batch(NamedTuple):
    """Rays of one training step and the colours they should have."""
    rays: torch.Tensor    # origins and directions [2, N_rays, 3]
    target: torch.Tensor  # colours in [0, 1], [N_rays, 3], or with alpha [N_rays, 4]
    # the t at which rays should end, and how much it counts, 0 where t is not known, [N_rays, 2]; or None
    depth: torch.Tensor | None = None
    view: torch.Tensor | None = None  # the view of each ray [N_rays], counted from the first training view

    def split(self, max_rays):
        """Yield batches of at most `max_rays` rays, each with its share of the rays of this batch."""
        for start in range(0, len(self.target), max_rays):
            part = slice(start, start + max_rays)
            rest = [None if value is None else value[part] for value in self[1:]]
            yield Batch(self.rays[:, part], *rest), len(rest[0]) / len(self.target)


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
      depths: `SparseDepths`; then at least one ray, and one in DEPTH_EVERY, goes through their pixels.
    """

    def __init__(self, scene, N_rand, no_batching, precrop_iters, precrop_frac, pixel_centers, device,
                 with_alpha=False, N_rand_samples=None, expected_samples=None, depths=None):
        centre = precrop_frac if precrop_iters > 0 else None
        self.views = TrainingViews(scene, centre, pixel_centers, device, with_alpha)
        self.N_rand, self.no_batching = N_rand, no_batching
        self.precrop_iters = precrop_iters
        self.N_rand_samples, self.expected_samples = N_rand_samples, expected_samples
        self.mean_samples = None  # samples per ray in the last step
        self.depths = None
        if depths is not None:
            self.depths = [torch.from_numpy(part).to(device)
                           for part in (depths.view - self.views.first, *depths[1:])]

    def sample(self, step):
        """The `Batch` of training step `step` ≥ 1."""
        count, depth = self.num_rays(), None
        with_depth = 0 if self.depths is None else max(1, count // DEPTH_EVERY)
        pixels = self.views.draw(count - with_depth, step < self.precrop_iters, self.no_batching)
        if self.depths is not None:
            drawn = torch.randint(len(self.depths[0]), (with_depth,), device=pixels[0].device)
            *more, t, weight = (part[drawn] for part in self.depths)
            pixels = [torch.cat(parts) for parts in zip(pixels, more)]
            weight = weight * (count / with_depth)  # the loss is a mean over all rays
            depth = F.pad(torch.stack([t, weight], -1), (0, 0, count - with_depth, 0))
        return Batch(self.views.rays(*pixels), self.views.colors(*pixels) / 255, depth, pixels[0])

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


def camera_rays(camera, c2w, pixel_centers=False):
    """Rays through all pixels of a `Camera`, with its lens distortion: rays_o, rays_d [H, W, 3] on the device
    of `c2w` [3, 4]. Arguments as those of `get_rays`."""
    if camera.is_pinhole:
        return get_rays(camera.H, camera.W, camera.K, c2w, pixel_centers)
    directions = torch.from_numpy(camera.pixel_directions(pixel_centers)).to(c2w)
    return cast_rays(directions.view(camera.H, camera.W, 3), c2w)
