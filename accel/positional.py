"""Encodings padded with zeros to a size that suits a GPU; positional encodings by a compiled kernel."""
import torch
import torch.nn.functional as F

from accel.kernels.compiled import Kernels
from run_nerf_helpers import Embedder, get_embedder


def padded_size(size, multiple):
    """The smallest multiple of `multiple` that is not less than `size`."""
    return size + -size % multiple


def padded_encoding(encoding, multiple, points):
    """`encoding(points)` of points or directions [N, 3], float32, with zeros behind it up to a multiple of
    `multiple` columns."""
    differentiable = points.requires_grad and torch.is_grad_enabled()
    if has_kernel(encoding) and not differentiable and KERNELS.usable(points.device):
        return encode(encoding, points, padded_size(encoding.out_dim, multiple))
    encoded = encoding(points)
    return F.pad(encoded, (0, -encoded.shape[-1] % multiple))


def has_kernel(encoding):
    """Whether the kernel computes `encoding`."""
    return (type(encoding) is Embedder and encoding.include_input
            and encoding.periodic_fns == (torch.sin, torch.cos))


def encode(embedder, points, columns):
    """`embedder(points)` of points [N, 3], float32, with zeros behind it up to `columns`, [N, columns];
    without gradient."""
    N, bands = len(points), embedder.frequencies(points)
    points = points if points.stride(1) == 1 else points.contiguous()
    encoded = points.new_empty(N, columns)
    KERNELS.call('positional', N * columns, points, points.stride(0), bands, len(bands), encoded, N, columns)
    return encoded


def check_kernels(device):
    """Raise AssertionError if the kernel differs from its reference, `Embedder`, on `device`."""
    generator = torch.Generator('cpu').manual_seed(0)
    points = 20 * torch.rand(257, 6, generator=generator, device='cpu').to(device)[:, 3:] - 10
    for multires in (10, 4):
        embedder, size = get_embedder(multires)
        expected = F.pad(embedder(points), (0, 5))
        torch.testing.assert_close(encode(embedder, points, size + 5), expected, rtol=1e-4, atol=1e-4)


KERNELS = Kernels('positional', check_kernels)
