"""Pictures for a viewer: a small one at once, then the full one, tile by tile."""
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from run_nerf_helpers import positions_from_ndc
from scenes.cameras import focus_point
from scenes.rays import camera_rays
from training.outputs import color_map, disparity_range, normalize_disparity

# What a picture can show.
KINDS = ('colour', 'disparity', 'opacity', 'normals', 'samples per ray')
# The small picture has at least this many rows.
MIN_ROWS = 16
# Before anything is measured, this many rays are assumed to take a second.
FIRST_RATE = 3000.0
# A new measurement of the rate counts this much.
RATE_MOMENTUM = 0.5
# A tile has at least this many rays: fewer cost as much.
MIN_TILE = 256
# Near is not brought closer to the camera than to this share of what it is for the photos.
MIN_NEAR = 0.05
# The density of what is cropped, before its ReLU.
TRANSPARENT = -1.0
# Opacities below this count as empty.
EMPTY = 0.5


class Look(NamedTuple):
    """What a picture shows."""
    kind: str = 'colour'                  # one of KINDS
    background: tuple = (1.0, 1.0, 1.0)   # colour behind the scene
    crop: tuple | None = None             # the box that is shown: lowest and highest corner; None for all


class Maps(NamedTuple):
    """What rays have seen, NumPy arrays."""
    rgb: np.ndarray      # colour times opacity [H, W, 3]
    acc: np.ndarray      # opacity [H, W]
    depth: np.ndarray    # in units of rays_d [H, W]; infinity where there is nothing
    samples: np.ndarray  # number of samples of a ray [H, W]


class CroppedQuery:
    """A network query to which everything outside a box is empty.

    Args:
      query: the `NetworkQuery`.
      crop: the box, (lowest corner, highest corner).
    """

    def __init__(self, query, crop):
        self.query, self.crop = query, crop

    def _cut(self, raw, pts):
        low, high = (torch.tensor(corner, dtype=pts.dtype, device=pts.device) for corner in self.crop)
        inside = ((pts >= low) & (pts <= high)).all(-1)
        density = torch.where(inside, raw[..., 3], torch.full_like(raw[..., 3], TRANSPARENT))
        return torch.cat([raw[..., :3], density[..., None]], -1)

    def __call__(self, pts, viewdirs, network):
        return self._cut(self.query(pts, viewdirs, network), pts)

    def at_points(self, pts, viewdirs, network, rays=None):
        return self._cut(self.query.at_points(pts, viewdirs, network), pts)


class PictureRenderer:
    """Renders pictures from the networks of a `FrameRenderer`, and measures how fast that is.

    Args:
      frames: the `FrameRenderer`.
      render_kwargs: arguments of `render`.
      poses: of the scene's cameras, c2w [N, 3, 4].
      unit_seconds: about how long the small picture, or a tile, may take.
    """

    def __init__(self, frames, render_kwargs, poses, unit_seconds):
        self.frames, self.unit_seconds, self.rates = frames, unit_seconds, {}
        self.render_kwargs = {**render_kwargs, 'white_bkgd': False}  # the viewer has its own background
        self.focus = focus_point(poses)
        self.distance = np.median(np.linalg.norm(poses[:, :, 3] - self.focus, axis=-1))

    def affordable(self, look):
        """About how many rays take `unit_seconds`."""
        return self.unit_seconds * self.rates.get(look.crop is None, FIRST_RATE)

    @torch.no_grad()
    def maps(self, rays, look):
        """The `Maps` of rays [2, H, W, 3]."""
        kwargs, (H, W, _) = dict(self.render_kwargs), self.frames.hwf
        kwargs['near'], kwargs['far'] = self.bounds(rays[0][0, 0])
        renderer = kwargs['renderer']
        if look.crop is not None:
            kwargs.update(network_query_fn=CroppedQuery(kwargs['network_query_fn'], look.crop),
                          renderer=renderer.without_shortcuts())
        chunk = self.frames.max_rays(kwargs, rays[0].shape[:2].numel())
        started = time.perf_counter()
        rgb, disp, acc, _ = self.frames.render_rays(H, W, self.frames.K, chunk=chunk, rays=rays, **kwargs)
        samples = torch.full_like(acc, 0)
        if look.kind == 'samples per ray':
            samples = kwargs['renderer'].count_samples(rays, **kwargs)
        depth = torch.where((acc >= EMPTY) & (disp > 0), 1 / disp, torch.inf)
        if kwargs['ndc']:
            depth = positions_from_ndc(1.0, *rays, depth)
        maps = Maps(*(part.float().cpu().numpy() for part in (rgb, acc, depth, samples)))
        rate = acc.numel() / max(time.perf_counter() - started, 1e-6)
        before = self.rates.get(look.crop is None, rate)
        self.rates[look.crop is None] = before + RATE_MOMENTUM * (rate - before)
        return maps

    def bounds(self, center):
        """Near and far for a camera at `center` [3], which may be farther from the scene than those of the
        photos, or nearer: they have the same distance from each other."""
        near, far = self.render_kwargs['near'], self.render_kwargs['far']
        if self.render_kwargs['ndc'] or self.render_kwargs['renderer'].without_shortcuts().contract:
            return near, far  # the cameras are within the scene
        farther = float(np.linalg.norm(center.cpu().numpy() - self.focus) - self.distance)
        closest = max(MIN_NEAR * near, near + farther)
        return closest, closest + far - near

    def rays(self, c2w, camera):
        """Rays [2, H, W, 3] of a `Camera` at c2w [3, 4]."""
        c2w = torch.as_tensor(c2w, dtype=torch.float32, device=self.frames.device)
        return torch.stack(camera_rays(camera, c2w, self.render_kwargs['pixel_centers']))

    def small(self, c2w, camera, look):
        """The `Maps` of a picture that takes about `unit_seconds`, with the proportions of `camera`."""
        scale = min(1.0, np.sqrt(self.affordable(look) / (camera.W * camera.H)))
        rows = max(min(MIN_ROWS, camera.H), round(scale * camera.H))
        columns = max(1, round(rows * camera.W / camera.H))
        return self.maps(self.rays(c2w, camera.resized(rows, columns)), look)

    def refine(self, maps, c2w, camera, look):
        """Yield the `Maps` of the full picture again and again, each time with one more tile, from the centre
        outwards; at first they are `maps`, enlarged."""
        rays, full = self.rays(c2w, camera), enlarge(maps, camera.W, camera.H)
        side = int(np.sqrt(max(MIN_TILE, self.affordable(look))))
        corners = [(y, x) for y in range(0, camera.H, side) for x in range(0, camera.W, side)]
        corners.sort(key=lambda corner: (corner[0] + (side - camera.H) / 2) ** 2
                     + (corner[1] + (side - camera.W) / 2) ** 2)
        for y, x in corners:
            tile = self.maps(rays[:, y:y + side, x:x + side], look)
            for target, part in zip(full, tile):
                target[y:y + side, x:x + side] = part
            yield full


def enlarge(maps, width, height):
    """`Maps` of another size, a copy; depths and counts are those of the nearest pixel."""
    def resized(part, mode):
        channels = torch.from_numpy(part).view(1, *maps.acc.shape, -1).permute(0, 3, 1, 2)
        channels = F.interpolate(channels, (height, width), mode=mode)
        return channels[0].permute(1, 2, 0).reshape(height, width, *part.shape[2:]).numpy().copy()
    return Maps(resized(maps.rgb, 'bilinear'), resized(maps.acc, 'bilinear'), resized(maps.depth, 'nearest'),
                resized(maps.samples, 'nearest'))


def draw(maps, rays_d, look, scale=None):
    """The picture [H, W, 3] in [0, 1] of `Maps`.

    Args:
      rays_d: the directions of the rays [H, W, 3], for normals.
      scale: lowest and highest disparity; those of the picture if not given.
    """
    acc, disp = maps.acc[..., None], 1 / maps.depth
    if look.kind == 'disparity':
        return color_map(normalize_disparity(disp, *(scale or disparity_range(disp))))
    if look.kind == 'opacity':
        return np.repeat(np.clip(acc, 0, 1), 3, -1)
    if look.kind == 'samples per ray':
        return color_map(maps.samples / max(maps.samples.max(), 1))
    if look.kind == 'normals':
        return np.where(np.isfinite(maps.depth)[..., None], 0.5 + 0.5 * normals(maps.depth, rays_d), 1.0)
    return np.clip(maps.rgb + (1 - acc) * look.background, 0, 1)


def normals(depth, rays_d):
    """Unit normals [H, W, 3] of the surface at `depth` [H, W] along rays_d [H, W, 3] from one point, facing
    it: cross products of the differences between neighbours."""
    points = np.where(np.isfinite(depth), depth, 0)[..., None] * rays_d
    if min(depth.shape) < 2:
        return np.zeros_like(points)
    down, right = np.gradient(points, axis=(0, 1))
    normal = np.cross(down, right)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-20)
