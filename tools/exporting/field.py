"""Density and colour of a trained scene at points, as rendering uses them, and its training views.

  ray space       the coordinates in which rays are rendered: normalised device coordinates (NDC) for
                  forward-facing llff scenes, otherwise those of the scene
  scene           the coordinates of `Scene.poses`
"""
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from accel.fast_renderer import evaluated_networks
from accel.grid_renderer import GridRenderer
from run_nerf_helpers import positions_from_ndc
from scenes.bounds import add_margin, find_bounds
from scenes.cameras import Camera
from scenes.rays import camera_rays

# A pixel of at least this opacity shows a surface; rays of less opacity pass through.
MIN_OPACITY = 0.5
# The near plane of NDC is at this distance, as in `render`.
NDC_NEAR = 1.0
# The z of points in NDC is clamped to this, because 1 is infinity.
MAX_NDC_Z = 1 - 1e-6
# What is farther away than this many times the median depth does not count as part of the scene.
MAX_RELATIVE_DEPTH = 10.0
# A box is found with this many cells along a side, see `find_bounds`.
BOX_RESOLUTION = 128


class View(NamedTuple):
    """What a training view sees, in the coordinates of the scene. Maps have every `stride`-th pixel."""
    index: int            # among the views of the scene
    camera: Camera        # of all pixels
    c2w: np.ndarray       # [3, 4]
    stride: int
    rays_d: np.ndarray    # [h, w, 3]
    t: np.ndarray         # where rays end, in units of rays_d [h, w]; infinity where they pass through
    acc: np.ndarray       # opacities [h, w]
    rgb: np.ndarray       # colours [h, w, 3]

    def points(self):
        """Where the rays end, [h, w, 3]; not finite where they pass through."""
        with np.errstate(invalid='ignore'):
            return self.c2w[:, 3] + self.t[..., None] * self.rays_d


class Field:
    """The density and the colour that a scene is rendered with.

    Args:
      trained: a `Trained`.
    """

    def __init__(self, trained):
        kwargs = trained.render_kwargs
        self.trained, self.scene, self.ndc = trained, trained.scene, kwargs['ndc']
        self.network, self.query = evaluated_networks(**kwargs)[-1], kwargs['network_query_fn']
        self.use_viewdirs, self.pixel_centers = kwargs['use_viewdirs'], kwargs['pixel_centers']
        renderer = kwargs['renderer']
        self.grid = renderer.grid if isinstance(renderer, GridRenderer) else None
        self.device = next(self.network.parameters()).device

    @torch.no_grad()
    def density(self, points):
        """The density [N] at `points` [N, 3] of ray space, a tensor; 0 where an occupancy grid lets no ray
        be sampled."""
        if self.grid is None:
            return torch.relu(self.query.density(points, self.network))
        inside = ((points >= self.grid.aabb[0]) & (points <= self.grid.aabb[1])).all(-1)
        sampled = (self.grid.occupied[self.grid.cell_indices(points)] & inside).nonzero()[:, 0]
        density = torch.zeros_like(points[:, 0])
        if len(sampled):
            density[sampled] = torch.relu(self.query.density(points[sampled], self.network))
        return density

    @torch.no_grad()
    def colors(self, points, normals):
        """The colours in [0, 1], [N, 3], of surface points [N, 3] of ray space with unit normals [N, 3] of
        the scene, seen along the normals: from the training view that is closest to them, because from other
        directions networks have learned nothing."""
        positions, viewdirs = self.to_scene(points), -normals
        best = np.full(len(points), -np.inf)
        for center in self.scene.poses[self.scene.i_train][:, :, 3]:
            towards = positions - center
            towards /= np.linalg.norm(towards, axis=-1, keepdims=True).clip(1e-9)
            cosine = -(towards * normals).sum(-1)
            closer = cosine > best
            best[closer], viewdirs[closer] = cosine[closer], towards[closer]
        points, viewdirs = (torch.as_tensor(part, dtype=torch.float32, device=self.device)
                            for part in (points, viewdirs))
        raw = self.query.at_points(points, viewdirs if self.use_viewdirs else None, self.network)
        return torch.sigmoid(raw[:, :3]).cpu().numpy()

    def to_scene(self, points):
        """Points [..., 3] of ray space to the scene: the inverse of Eq. 25 of NeRF's Appendix C for NDC."""
        if not self.ndc:
            return points
        x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        depth = 2 * NDC_NEAR / (1 - np.minimum(z, MAX_NDC_Z))
        H, W, focal = self.scene.hwf
        return np.stack([x * depth * W / (2 * focal), y * depth * H / (2 * focal), -depth], -1)

    def from_scene(self, points):
        """The inverse of `to_scene`, for points in front of the cameras."""
        if not self.ndc:
            return points
        x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        H, W, focal = self.scene.hwf
        with np.errstate(invalid='ignore'):
            return np.stack([-2 * focal / W * x / z, -2 * focal / H * y / z, 1 + 2 * NDC_NEAR / z], -1)

    def views(self, stride, label):
        """Render the training views, one after another: yields `View`s. `label` is that of the progress
        bar."""
        views = self.scene.i_train
        for index in tqdm(views, desc=label, unit='view', disable=None, leave=False, dynamic_ncols=True):
            yield self.view(index, stride)

    def view(self, index, stride=1):
        """Render one view of the scene, every `stride`-th pixel: its `View`."""
        frames, c2w = self.trained.frames, self.scene.poses[index]
        frame = frames.render(c2w, stride, camera=self.scene.cameras[index])
        camera = self.scene.cameras[index].reduced(max(frames.render_factor, 1))
        rays = camera_rays(camera, torch.from_numpy(c2w), self.pixel_centers)
        rays_o, rays_d = (part[::stride, ::stride].double() for part in rays)
        with np.errstate(divide='ignore'):
            t = np.where(frame.acc >= MIN_OPACITY, 1 / frame.disp.astype(np.float64), np.inf)
        if self.ndc:
            t = positions_from_ndc(NDC_NEAR, rays_o, rays_d, torch.from_numpy(t)).numpy()
        rays_d = rays_d.numpy()
        return View(int(index), camera, c2w.astype(np.float64), stride, rays_d, t, frame.acc, frame.rgb)

    def ends(self, views):
        """Where the rays of `views` end, up to `max_depth`: points of ray space, a tensor [N, 3]."""
        farthest = max_depth(np.concatenate([view.t.ravel() for view in views]))
        points = np.concatenate([view.points()[view.t < farthest] for view in views])
        return torch.from_numpy(self.from_scene(points)).to(self.device, torch.float32)

    def box(self, ends):
        """The box [2, 3] of ray space to export, a tensor: what is not contracted; otherwise the box of the
        scene or grid, as far as it holds anything visible. `ends` are the result of the method."""
        if self.trained.args.contract:
            return self.network.encoding.aabb.clone()
        box = find_bounds(self.scene, self.ndc, BOX_RESOLUTION)[0] if self.grid is None else self.grid.aabb
        box = box.to(self.device)
        if not len(ends):
            return box
        low, high = add_margin(ends.amin(0), ends.amax(0))
        return torch.stack([torch.maximum(box[0], low), torch.minimum(box[1], high)])


def max_depth(t):
    """The t at which the scene ends: MAX_RELATIVE_DEPTH times the median of `t` [N], of which infinity does
    not count."""
    finite = t[np.isfinite(t)]
    return MAX_RELATIVE_DEPTH * np.median(finite) if len(finite) else np.inf
