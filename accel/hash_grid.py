"""Multiresolution hash encoding (Müller et al., "Instant Neural Graphics Primitives", SIGGRAPH 2022).

A point is looked up in grids of growing resolution. Their corners hold trained features, which are
interpolated between the eight corners around the point; grids with more corners than table entries share
these by a hash. The features of all levels together are the encoding.
"""
import math

import torch
from torch import nn

from accel.kernels.compiled import CpuLibrary, Kernels
from run_nerf_helpers import BoundedModule, SphericalHarmonics, in_float32

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
      contract: cover all space, see `contract`.
    """

    def __init__(self, n_levels=16, finest_res=2048, log2_hashmap_size=19, n_features=2, contract=False):
        super().__init__()
        self.contract = contract
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
        flat = points.reshape(-1, 3)
        arguments = self.aabb, self.contract, self.table, self.resolutions, self.level_offsets
        if flat.dtype == torch.float32 and KERNELS.usable(flat.device):
            encoded = CompiledEncoding.apply(flat, *arguments)
        else:
            encoded = encode(flat, *arguments)
        return encoded.reshape(*points.shape[:-1], self.out_dim)


def contract(points):
    """Points [N, 3] of all space to the cube [-2, 2]³. The cube [-1, 1]³ stays as it is, and infinity is the
    surface (mip-NeRF 360, Eq. 10, with the maximum norm)."""
    norm = points.abs().amax(-1, keepdim=True).clamp(min=1)
    return points * ((2 - 1 / norm) / norm)


def expand(points, farthest):
    """The inverse of `contract`: points [N, 3], and their maximum norms, at least 1, [N, 1]. The norms are
    clamped to `farthest`, because the surface of the cube [-2, 2]³ is infinitely far away."""
    contracted = points.abs().amax(-1, keepdim=True).clamp(min=1)
    norm = 1 / (2 - contracted).clamp(min=1 / farthest)
    return points * (norm / contracted), norm


def encode(points, aabb, contracted, table, resolutions, level_offsets):
    """The reference implementation, all levels at once.

    Args:
      points: [N, 3]; NaN counts as the lowest corner. Points outside are clamped to the box.
      aabb: bounding box [2, 3].
      contracted: cover the contraction of all space, in which the box is [-1, 1]³; nothing is clamped.
      table: entries of all levels [E, F].
      resolutions: cells along a side of each level [L].
      level_offsets: first entry of each level, and the end of the last [L + 1].
    Returns:
      [N, L * F].
    """
    unit = (points - aabb[0]) / (aabb[1] - aabb[0])
    unit = torch.where(unit.isnan(), 0, unit)
    if contracted:
        unit = 0.25 * contract(2 * unit - 1) + 0.5
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
    # the gradient of index_select adds atomically on a GPU, that of table[entry] sorts the entries
    features = table.index_select(0, entry.flatten()).view(N, L, 8, table.shape[1])  # [N, L, 8, F]
    return (weight[..., None] * features).sum(2).reshape(N, L * table.shape[1])


class CompiledEncoding(torch.autograd.Function):
    """`encode` by `encodings.c`; the rows of the points may be apart."""

    @staticmethod
    def forward(ctx, points, aabb, contracted, table, resolutions, level_offsets):
        assert table.shape[1] in SUPPORTED_N_FEATURES
        points = points if points.stride(1) == 1 else points.contiguous()
        ctx.save_for_backward(points, aabb, resolutions, level_offsets,
                              table if ctx.needs_input_grad[0] else None)
        ctx.contracted, ctx.table_shape = int(contracted), table.shape
        N, L, F = len(points), len(resolutions), table.shape[1]
        encoded = points.new_empty(N, L * F)
        KERNELS.call('encode', N * L, points, points.stride(0), aabb, ctx.contracted, table, encoded, N, L, F,
                     resolutions, level_offsets)
        return encoded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_encoded):
        points, aabb, resolutions, level_offsets, table = ctx.saved_tensors
        N, L, F = len(points), len(resolutions), ctx.table_shape[1]
        where, sizes = (points, points.stride(0), aabb, ctx.contracted), (N, L, F, resolutions, level_offsets)
        grad_points, grad_table, grad_encoded = None, None, grad_encoded.contiguous()
        if ctx.needs_input_grad[0]:
            grad_points = torch.empty_like(points, memory_format=torch.contiguous_format)
            KERNELS.call('encode_point_gradient', N, *where, table, grad_encoded, grad_points, *sizes)
        if ctx.needs_input_grad[3]:
            overwrites = isinstance(KERNELS.libraries[points.device], CpuLibrary)
            grad_table = (points.new_empty if overwrites else points.new_zeros)(ctx.table_shape)
            KERNELS.call('encode_gradient', N * L, *where, grad_encoded, grad_table, *sizes)
        return grad_points, None, None, grad_table, None, None


def encode_directions(encoding, directions):
    """Directions [N, 3] to `encoding(directions)` [N, C] in float32, by `encodings.c` for spherical
    harmonics."""
    differentiable = directions.requires_grad and torch.is_grad_enabled()
    has_kernel = isinstance(encoding, SphericalHarmonics) and directions.dtype == torch.float32
    if differentiable or not has_kernel or not KERNELS.usable(directions.device):
        return in_float32(encoding, directions)
    directions = directions if directions.stride(1) == 1 else directions.contiguous()
    encoded = directions.new_empty(len(directions), encoding.out_dim)
    KERNELS.call('spherical_harmonics', len(directions), directions, directions.stride(0),
                 encoded, len(directions))
    return encoded


def check_kernels(device):
    """Raise AssertionError if the kernels differ from their references on `device`."""
    generator = torch.Generator('cpu').manual_seed(0)
    for n_features in SUPPORTED_N_FEATURES:
        grid = HashGrid(4, 100, 12, n_features)
        table, points, weights = (torch.rand(*shape, generator=generator, device='cpu') for shape in
                                  (grid.table.shape, (257, 3), (257, grid.out_dim)))
        table, weights = table.to(device).requires_grad_(), weights.to(device)
        points = (3 * points - 1.5).to(device).requires_grad_()  # some outside
        aabb, *levels = [part.to(device) for part in (grid.aabb, grid.resolutions, grid.level_offsets)]
        for contracted in (False, True):
            results = []
            for function in (CompiledEncoding.apply, encode):
                encoded = function(points, aabb, contracted, table, *levels)
                by_table, by_points = torch.autograd.grad((encoded * weights).sum(), (table, points))
                results.append((encoded, by_table, by_points / grid.resolutions[-1]))
            for found, expected in zip(*results):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    harmonics, points = SphericalHarmonics(), points.detach()
    torch.testing.assert_close(encode_directions(harmonics, points), harmonics(points), rtol=1e-4, atol=1e-4)


KERNELS = Kernels('encodings', check_kernels)
