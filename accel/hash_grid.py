"""Multiresolution hash encoding (Müller et al., "Instant Neural Graphics Primitives", SIGGRAPH 2022).

A point is looked up in grids of growing resolution. Their corners hold trained features, which are interpolated between the
eight around the point; grids with more corners than entries share these by a hash. The features of all levels together are
the encoding.
"""
import math

import torch
from torch import nn

from accel.kernels.compiled import call, compiled

# Cells along a side of the first level.
BASE_RESOLUTION = 16
# The factors of the paper's spatial hash (Eq. 4).
PRIMES = (1, 2654435761, 805459861)
# The numbers of features per entry that the compiled kernel supports.
FEATURES = (1, 2, 4, 8)


class HashGrid(nn.Module):
    """Points [..., 3] in the box `aabb` to their encoding [..., n_levels * n_features].

    Args:
      n_levels: number of grids; their resolutions grow geometrically from BASE_RESOLUTION to `finest_res`.
      finest_res: cells along a side of the finest grid.
      log2_hashmap_size: log2 of the most entries of a level.
      n_features: features per entry, one of FEATURES.
    """

    def __init__(self, n_levels=16, finest_res=2048, log2_hashmap_size=19, n_features=2):
        super().__init__()
        growth = (finest_res / BASE_RESOLUTION) ** (1 / max(n_levels - 1, 1))
        resolution = [math.floor(BASE_RESOLUTION * growth ** level + 1e-6) for level in range(n_levels)]
        sizes = [min((r + 1) ** 3, 2 ** log2_hashmap_size) for r in resolution]
        offset = [sum(sizes[:level]) for level in range(n_levels + 1)]
        self.register_buffer('resolution', torch.tensor(resolution), persistent=False)
        self.register_buffer('offset', torch.tensor(offset), persistent=False)
        self.register_buffer('aabb', torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
        self.out_dim = n_levels * n_features
        self.table = nn.Parameter(torch.empty(offset[-1], n_features))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.table, -1e-4, 1e-4)

    def set_box(self, aabb):
        """Use the box `aabb` [2, 3]."""
        self.aabb.copy_(torch.as_tensor(aabb))

    def forward(self, points):
        unit = (points - self.aabb[0]) / (self.aabb[1] - self.aabb[0])
        flat = unit.reshape(-1, 3)
        if flat.device.type == 'cpu' and not flat.requires_grad and compiled('hash_grid') is not None:
            encoded = CompiledEncoding.apply(flat.contiguous(), self.table, self.resolution, self.offset)
        else:
            encoded = encode(flat, self.table, self.resolution, self.offset)
        return encoded.reshape(*points.shape[:-1], self.out_dim)


def encode(unit, table, resolution, offset):
    """The reference implementation, all levels at once.

    Args:
      unit: points [N, 3]; values outside of [0, 1] are clamped, NaN counts as 0.
      table: entries of all levels [E, F].
      resolution: cells along a side of each level [L].
      offset: first entry of each level, and the end [L + 1].
    Returns:
      [N, L * F].
    """
    N, L = len(unit), len(resolution)
    side = resolution[:, None]                                                     # [L, 1]
    scaled = unit.nan_to_num(0).clamp(0, 1)[:, None] * side                                      # [N, L, 3]
    cell = torch.minimum(scaled.floor(), (side - 1).to(scaled.dtype))
    fraction = scaled - cell
    up = torch.stack(torch.meshgrid(*[torch.arange(2, device=unit.device)] * 3, indexing='ij'), -1).reshape(8, 3)
    corner = cell.long()[:, :, None] + up                                          # [N, L, 8, 3]
    weight = torch.where(up == 1, fraction[:, :, None], 1 - fraction[:, :, None]).prod(-1)  # [N, L, 8]

    size = (offset[1:] - offset[:-1])[:, None]                                     # [L, 1]
    x, y, z = corner.unbind(-1)
    dense = (z * (side + 1) + y) * (side + 1) + x
    hashed = (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & (size - 1)          # the lower bits, as in 32-bit arithmetic
    entry = torch.where((side + 1) ** 3 <= size, dense, hashed) + offset[:-1, None]
    return (weight[..., None] * table[entry]).sum(2).reshape(N, L * table.shape[1])


class CompiledEncoding(torch.autograd.Function):
    """`encode` by `hash_grid.c`, without a gradient of the points."""

    @staticmethod
    def forward(ctx, unit, table, resolution, offset):
        assert unit.dtype == table.dtype == torch.float32 and table.shape[1] in FEATURES
        ctx.save_for_backward(unit, resolution, offset)
        ctx.shape = table.shape
        encoded = unit.new_empty(len(unit), len(resolution) * table.shape[1])
        call('hash_grid', 'encode', unit, table, encoded, len(unit), len(resolution), table.shape[1], resolution, offset)
        return encoded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_encoded):
        unit, resolution, offset = ctx.saved_tensors
        grad = grad_encoded.new_empty(ctx.shape)
        call('hash_grid', 'gradient', unit, grad_encoded.contiguous(), grad, len(unit), len(resolution), ctx.shape[1],
             resolution, offset)
        return None, grad, None, None
