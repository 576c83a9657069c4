"""Renders the frames of a scene, one after another or by all processes of a run together."""
import contextlib

import numpy as np
import torch
from tqdm import tqdm

from scenes.cameras import camera_table
from scenes.rays import camera_rays
from training.alignment import find_offset, frozen
from training.devices import MemoryLimit
from training.outputs import code_version, frames_fingerprint
from training.processes import Processes


class FrameRenderer:
    """Renders frames of one scene; the processes of a run share the work. Subclasses define `render_frame`
    and `render_rays`.

    Args:
      hwf: [H, W, focal]; K: intrinsics [3, 3]; both in pixels.
      chunk: most rays to render at once, None for as many as suit the device. If a GPU runs out of memory, it
        is halved from there on.
      render_kwargs: arguments of `render`.
      render_factor: divides image size and intrinsics (0 as 1).
      view_kwargs: arguments of `render` for `render_view`; those of `render_kwargs` if not given.
      processes: the `Processes` that render, each a different frame.
      stop: a `StopRequest`; its signal interrupts rendering with `Stopped`. None if there is none.
      settings: plain values that affect frames, for their fingerprint.
    """

    def __init__(self, hwf, K, chunk, render_kwargs, render_factor=0, view_kwargs=None, processes=None,
                 stop=None, settings=None):
        self.hwf, self.K, self.render_factor = hwf, K, render_factor
        self.memory = MemoryLimit(chunk, 'rendering')
        self.render_kwargs, self.view_kwargs = render_kwargs, view_kwargs or render_kwargs
        self.processes, self.stop, self.settings = processes or Processes(1), stop, settings or {}
        self.device = next(render_kwargs['network_fn'].parameters()).device
        self.code_version = code_version()  # now: the files may be edited while they run

    def render_frame(self, pose, hwf, K, chunk, render_kwargs, render_factor, stride, camera):
        """The `Frame` of a camera at `pose`, c2w; every `stride`-th pixel of both axes. `camera` takes the
        place of hwf and K unless it is None."""
        raise NotImplementedError

    def render_rays(self, H, W, K, **kwargs):
        """`render` of run_nerf.py."""
        raise NotImplementedError

    @torch.no_grad()
    def render(self, pose, stride=1, render_kwargs=None, camera=None):
        """The `Frame` of one pose; every `stride`-th pixel of both axes. `camera` is a `Camera`; that of the
        path if not given."""
        render_kwargs = render_kwargs or self.render_kwargs

        def render(chunk):
            return self.render_frame(pose, self.hwf, self.K, chunk, render_kwargs, self.render_factor, stride,
                                     camera)
        H, W = (camera.H, camera.W) if camera else self.hwf[:2]
        with self.stop.interruptible() if self.stop else contextlib.nullcontext():
            return self.memory.fit(render, self.max_rays(render_kwargs, H * W))

    def max_rays(self, render_kwargs, all_rays):
        """The most rays of a frame of `all_rays` that the renderer takes at once."""
        renderer = render_kwargs.get('renderer')
        return min(all_rays, renderer.max_rays(self.device, **render_kwargs)) if renderer else all_rays

    def render_view(self, pose, stride=1, camera=None):
        """The `Frame` of one pose with the arguments `view_kwargs`."""
        return self.render(pose, stride, self.view_kwargs, camera)

    def align_views(self, scene, views, left_half=False):
        """The poses [N, 3, 4] at which the networks see the photos of the `views` [N] best; with `left_half`
        the left halves of the photos, whose colours are fitted too."""
        poses = scene.poses[views]
        for index, view in enumerate(views):
            camera, mask = scene.cameras[view], None if scene.masks is None else scene.masks[view]
            if left_half:
                whole = np.ones((camera.H, camera.W), bool) if mask is None else mask
                mask = whole & (np.arange(camera.W) < camera.W // 2)
            poses[index] = self.align(poses[index], camera, scene.images[view], mask, left_half)
        return poses

    def align(self, pose, camera, image, mask=None, corrects_colors=False):
        """The pose [3, 4] at which the networks see a photo best, starting from `pose`.

        Args:
          pose: c2w [3, 4]; camera: its `Camera`.
          image: the photo, uint8 [H, W, 3]; mask: which of its pixels count, bool [H, W], None for all.
          corrects_colors: see `find_offset`.
        """
        kwargs, c2w = self.view_kwargs, torch.as_tensor(pose, dtype=torch.float32, device=self.device)
        move = kwargs['network_fn'].poses.move
        rays = torch.stack(camera_rays(camera, c2w, kwargs['pixel_centers'])).flatten(1, 2)  # [2, H * W, 3]
        target = torch.from_numpy(image).to(self.device).view(-1, 3) / 255
        if mask is not None:
            counts = torch.from_numpy(mask).to(self.device).flatten()
            rays, target = rays[:, counts], target[counts]
        if not len(target):
            return pose

        def render(rays):
            return self.render_rays(camera.H, camera.W, camera.K, rays=rays, **kwargs)[0]
        parts = [part for part in kwargs.values() if isinstance(part, torch.nn.Module)]
        with self.stop.interruptible() if self.stop else contextlib.nullcontext(), frozen(parts):
            offset = find_offset(render, move, rays, target, corrects_colors)
        center, axes = move(torch.stack([c2w[:, 3].expand(3, 3), c2w[:, :3].T]), offset)
        return torch.cat([axes.T, center[:1].T], -1).cpu().numpy()

    def render_item(self, item):
        """The `Frame` of a pair of pose and camera."""
        pose, camera = item
        return self.render(pose, camera=camera)

    def render_path(self, poses, store=None, cameras=None):
        """Render pose after pose: yields one `Frame` at a time and keeps none.

        Args:
          poses: c2w matrices [N, 3 or 4, 4 or more].
          store: a `FrameFolder`: its frames are not rendered again, and new ones are saved there.
          cameras: the `Camera` of each pose; that of the path if not given.
        """
        items = list(zip(poses, cameras or [None] * len(poses)))
        progress = tqdm(items, desc='frames', unit='frame', disable=None, leave=False, dynamic_ncols=True)
        rendered = []  # by the processes together, one frame each, and not yielded yet
        for index, _ in enumerate(progress):
            stored = store.load(index) if store and not rendered else None
            if stored is None and not rendered:
                rendered = self.processes.render_all(self.render_item,
                                                     items[index:index + self.processes.size])
            frame = stored or rendered.pop(0)
            if store and stored is None:
                store.save(index, frame)
            yield frame

    def drop_cache(self):
        """Drop whatever the renderer computed from the networks, because they have changed."""
        self.render_kwargs['renderer'].drop_cache()

    def serve(self):
        """Render what rank 0 hands out, on the other ranks, until it is done."""
        self.processes.serve(self.render_item)

    def fingerprint(self, poses, cameras=None):
        """A string that is equal for equal frames: it depends on cameras, weights, settings and code.
        Arguments as those of `render_path`."""
        modules = {name: self.render_kwargs.get(name) for name in ('network_fn', 'network_fine', 'renderer')}
        state = {name: module.state_dict() for name, module in modules.items() if module is not None}
        plain = {key: self.render_kwargs[key] for key in self.render_kwargs
                 if isinstance(self.render_kwargs[key], (int, float, str))}
        settings = {**self.settings, **plain, 'render_factor': self.render_factor, 'device': self.device.type,
                    'code': self.code_version, 'renderer': type(modules['renderer']).__name__,
                    'query': repr(self.render_kwargs['network_query_fn'])}
        if cameras is not None:
            settings['cameras'] = camera_table(cameras).tolist()
        return frames_fingerprint(poses, self.hwf, self.K, state, settings)
