"""Renders the frames of a scene, one after another or by all processes of a run together."""
import warnings

import torch
from tqdm import tqdm

from training.outputs import frames_fingerprint
from training.processes import Processes

# The chunk of rays that is not halved any further when memory runs out.
MIN_CHUNK = 256


class FrameRenderer:
    """Renders frames of one scene; the processes of a run share the work.

    Args:
      render_frame: `render_frame` of run_nerf.py.
      hwf, K, chunk, render_kwargs, render_factor: its arguments. If a GPU runs out of memory, the chunk is halved from
        there on.
      renderer: the `Renderer` for the frames of paths; that of `render_kwargs` if not given.
      processes: the `Processes` that render, each another frame.
      check: called between frames; it may raise to end a path.
      settings: plain values that affect frames, for their fingerprint; those of `render_kwargs` if not given.
    """

    def __init__(self, render_frame, hwf, K, chunk, render_kwargs, render_factor=0, renderer=None, processes=None,
                 check=None, settings=None):
        self.render_frame, self.hwf, self.K, self.chunk = render_frame, hwf, K, chunk
        self.exact_kwargs, self.render_factor = render_kwargs, render_factor
        self.render_kwargs = {**render_kwargs, 'renderer': renderer} if renderer else render_kwargs
        self.processes, self.check = processes or Processes(1), check
        plain = {key: value for key, value in render_kwargs.items() if isinstance(value, (int, float, str))}
        self.settings = {**plain, **(settings or {}), 'render_factor': render_factor}
        self.device = next(render_kwargs['network_fn'].parameters()).device

    def render(self, pose, stride=1, exact=False):
        """The `Frame` of one camera; every `stride`-th pixel of both axes; with `exact` by the renderer of
        `render_kwargs`."""
        render_kwargs = self.exact_kwargs if exact else self.render_kwargs
        while True:
            try:
                return self.render_frame(pose, self.hwf, self.K, self.chunk, render_kwargs, self.render_factor, stride)
            except torch.OutOfMemoryError:
                if self.chunk <= MIN_CHUNK:
                    raise
                self.chunk //= 2
                warnings.warn(f'out of memory in rendering: continuing with --chunk {self.chunk}', stacklevel=2)
                torch.cuda.empty_cache()

    def view(self, pose, stride=1):
        """The `Frame` of one camera with the colours of the coarse network too."""
        return self.render(pose, stride, exact=True)

    def path(self, poses, store=None):
        """Render camera after camera: yields one `Frame` at a time and keeps none.

        Args:
          poses: c2w matrices [N, 3 or 4, 4 or more].
          store: a `FrameFolder`: its frames are not rendered again, and new ones are saved there.
        """
        progress = tqdm(poses, desc='frames', unit='frame', disable=None, leave=False, dynamic_ncols=True)
        rendered = []
        for index, _ in enumerate(progress):
            frame = stored = store.load(index) if store and not rendered else None
            if frame is None:
                rendered = rendered or self.processes.each(self.render, poses[index:index + self.processes.size])
                frame = rendered.pop(0)
            if store and stored is None:
                store.save(index, frame)
            yield frame
            if self.check:
                self.check()

    def forget(self):
        """Drop whatever the renderer computed from the networks, because they have changed."""
        if 'renderer' in self.render_kwargs:
            self.render_kwargs['renderer'].forget()

    def serve(self):
        """Render what rank 0 hands out, on the other ranks, until it is done."""
        self.processes.serve(self.render)

    def fingerprint(self, poses):
        """A string that is equal for equal frames: it depends on cameras, weights, settings and the code."""
        modules = {name: self.render_kwargs.get(name) for name in ('network_fn', 'network_fine', 'renderer')}
        state = {name: module.state_dict() for name, module in modules.items() if module is not None}
        return frames_fingerprint(poses, self.hwf, self.K, state, self.settings)
