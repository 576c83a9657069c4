"""Aligns the pose of a held-out view to networks whose training poses were refined. It is not refined with
them, and may have an error of its own. This is the protocol of NeRF-- (Wang et al., 2021) and BARF (Lin et
al., ICCV 2021)."""
import contextlib

import torch

from run_nerf_helpers import img2mse
from training.metrics import fit_colors

# The offset of a view is found in this many steps of Adam.
ALIGNMENT_STEPS = 100
# Each of them renders this many random pixels.
ALIGNMENT_RAYS = 1024
# The first step has this learning rate; it falls linearly to 0.
ALIGNMENT_LRATE = 2e-3


@contextlib.contextmanager
def frozen(modules):
    """Keep the parameters of modules from requiring a gradient."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def find_offset(render, move, rays, target, corrects_colors=False):
    """The offset [1, 6] of a camera at which the rendered colours are closest to the photo's. Pixels are
    drawn from a generator of their own, so that the random state of the run stays as it is.

    Args:
      render: function of rays [2, N, 3] that returns their colours [N, 3], with gradient.
      move: function of rays [2, N, 3] and an offset [1, 6] that returns the moved rays.
      rays, target: of the pixels that count, [2, M, 3], and their colours in [0, 1], [M, 3].
      corrects_colors: in each step, first fit an affine change of colour, because the exposure is not known.
    """
    generator = torch.Generator().manual_seed(0)
    offset = torch.zeros(1, 6, device=rays.device, requires_grad=True)
    optimizer = torch.optim.Adam([offset], ALIGNMENT_LRATE)
    for step in range(ALIGNMENT_STEPS):
        drawn = torch.randint(len(target), (ALIGNMENT_RAYS,), generator=generator, device='cpu')
        drawn = drawn.to(rays.device)
        with torch.enable_grad():
            rgb, wanted = render(move(rays[:, drawn], offset)), target[drawn]
            if corrects_colors:
                affine = fit_colors(*(part.detach().cpu().numpy() for part in (rgb, wanted)))
                affine = torch.from_numpy(affine).to(rgb)
                rgb = rgb @ affine[:3] + affine[3]
            (offset.grad,) = torch.autograd.grad(img2mse(rgb, wanted), [offset])
        optimizer.param_groups[0]['lr'] = ALIGNMENT_LRATE * (1 - step / ALIGNMENT_STEPS)
        optimizer.step()
    return offset.detach()
