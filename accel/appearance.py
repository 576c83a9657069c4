"""Photos of one place differ in exposure and white balance: an affine change of colour for each view."""
import torch
from torch import nn

# The table has this many rows, so that a checkpoint fits any scene with at most as many views.
MAX_VIEWS = 4096
# Trained numbers are multiplied by this, so that colours change more slowly than the network.
SCALE = 0.1


class ColorCorrection(nn.Module):
    """Rendered colours to those of the photos, for training. The mean change over the views of a batch is
    zero, so that frames get the colours of the mean photo."""

    def __init__(self):
        super().__init__()
        self.affine = nn.Parameter(torch.zeros(MAX_VIEWS, 3, 4))

    def reset_parameters(self):
        nn.init.zeros_(self.affine)

    def forward(self, rgb, view):
        """Colours [N, 3] of rays of the views [N], each less than MAX_VIEWS, corrected."""
        present = torch.zeros_like(self.affine[:, 0, 0]).index_fill_(0, view, 1.0)
        mean = torch.tensordot(present, self.affine, 1) / present.sum()
        affine = SCALE * (self.affine.index_select(0, view) - mean)
        return rgb + (affine[..., :3] * rgb[:, None]).sum(-1) + affine[..., 3]
