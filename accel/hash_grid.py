"""Multiresolution hash encoding (Müller et al., "Instant Neural Graphics Primitives", SIGGRAPH 2022).

A point is looked up in grids of growing resolution. Their corners hold trained features, which are
interpolated between the eight corners around the point; grids with more corners than table entries share
these by a hash. The features of all levels together are the encoding.
"""
import math

import torch
from torch import nn

from accel.kernels.compiled import call_kernel, load_kernels
from run_nerf_helpers import BoundedModule

# The coarsest grid has this many cells along each side.
BASE_RESOLUTION = 16
# These are the factors of the paper's spatial hash (Eq. 4).
PRIMES = (1, 2654435761, 805459861)
# The compiled kernel supports these numbers of features per entry.
SUPPORTED_N_FEATURES = (1, 2, 4, 8)


class HashGrid(BoundedModule):
    """Points [..., 3] in the bounding box to their encoding [..., n_levels * n_features].

    Args:
      n_levels: number of grids; their resolutions grow geometrically from BASE_RESOLUTION to `finest_res`.
      finest_res: cells along a side of the finest grid.
      log2_hashmap_size: log2 of the most table entries of a level.
      n_features: features per entry, one of SUPPORTED_N_FEATURES.
    """

    def __init__(self, n_levels=16, finest_res=2048, log2_hashmap_size=19, n_features=2):
        super().__init__()
        growth = (finest_res / BASE_RESOLUTION) ** (1 / max(n_levels - 1, 1))
        resolutions = [math.floor(BASE_RESOLUTION * growth ** level + 1e-6) for level in range(n_levels)]
        sizes = [min((resolution + 1) ** 3, 2 ** log2_hashmap_size) for resolution in resolutions]
        level_offsets = [sum(sizes[:level]) for level in range(n_levels + 1)]
        self.register_buffer('resolutions', torch.tensor(resolutions), persistent=False)
        self.register_buffer('level_offsets', torch.tensor(level_offsets), persistent=False)
        self.out_dim = n_levels * n_features
        self.table = nn.Parameter(torch.empty(level_offsets[-1], n_features))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.table, -1e-4, 1e-4)

    def forward(self, points):
        unit = (points - self.aabb[0]) / (self.aabb[1] - self.aabb[0])
        flat = unit.reshape(-1, 3)
        arguments = self.table, self.resolutions, self.level_offsets
        if flat.device.type == 'cpu' and not flat.requires_grad and load_kernels('hash_grid') is not None:
            encoded = CompiledEncoding.apply(flat.contiguous(), *arguments)
        else:
            encoded = encode(flat, *arguments)
        return encoded.reshape(*points.shape[:-1], self.out_dim)


def encode(unit, table, resolutions, level_offsets):
    """The reference implementation, all levels at once.

    Args:
      unit: points [N, 3]; values outside [0, 1] are clamped, NaN counts as 0.
      table: entries of all levels [E, F].
      resolutions: cells along a side of each level [L].
      level_offsets: first entry of each level, and the end of the last [L + 1].
    Returns:
      [N, L * F].
    """
    N, L = len(unit), len(resolutions)
    side = resolutions[:, None]                                                        # [L, 1]
    scaled = unit.nan_to_num(0).clamp(0, 1)[:, None] * side                            # [N, L, 3]
    cell = torch.minimum(scaled.floor(), (side - 1).to(scaled.dtype))
    fraction = scaled - cell
    up = torch.cartesian_prod(*[torch.arange(2, device=unit.device)] * 3)              # [8, 3]
    corner = cell.long()[:, :, None] + up                                              # [N, L, 8, 3]
    weight = torch.where(up == 1, fraction[:, :, None], 1 - fraction[:, :, None]).prod(-1)  # [N, L, 8]

    size = (level_offsets[1:] - level_offsets[:-1])[:, None]                           # [L, 1]
    x, y, z = corner.unbind(-1)
    dense = (z * (side + 1) + y) * (side + 1) + x
    # the lower bits, which are those of 32-bit arithmetic
    hashed = (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & (size - 1)
    entry = torch.where((side + 1) ** 3 <= size, dense, hashed) + level_offsets[:-1, None]
    return (weight[..., None] * table[entry]).sum(2).reshape(N, L * table.shape[1])


class CompiledEncoding(torch.autograd.Function):
    """`encode` by `hash_grid.c`, without a gradient of the points."""

    @staticmethod
    def forward(ctx, unit, table, resolutions, level_offsets):
        assert table.shape[1] in SUPPORTED_N_FEATURES
        ctx.save_for_backward(unit, resolutions, level_offsets)
        ctx.table_shape = table.shape
        N, L, F = len(unit), len(resolutions), table.shape[1]
        encoded = unit.new_empty(N, L * F)
        call_kernel('hash_grid', 'encode', unit, table, encoded, N, L, F, resolutions, level_offsets)
        return encoded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_encoded):
        unit, resolutions, level_offsets = ctx.saved_tensors
        grad, F = grad_encoded.new_empty(ctx.table_shape), ctx.table_shape[1]
        N, L = len(unit), len(resolutions)
        call_kernel('hash_grid', 'gradient', unit, grad_encoded.contiguous(), grad, N, L, F, resolutions,
                    level_offsets)
        return None, grad, None, None
