"""A `HashNeRF` and its gradient on a CPU: compiled kernels take each tile of points through the whole
network, so that nothing but its inputs and outputs goes through memory."""
import torch
import torch.nn.functional as F

from accel.hash_grid import HashGrid
from accel.hash_nerf import DENSITY_OUTPUTS, HIDDEN_WIDTH, INITIAL_LOG_DENSITY, MAX_LOG_DENSITY, HashNeRF
from accel.kernels.compiled import Kernels
from accel.packed import MAX_OPTICAL_DEPTH
from run_nerf_helpers import SphericalHarmonics, get_embedder

# The kernels take encodings of at most so many channels, a multiple of MULTIPLE.
MAX_CHANNELS, MULTIPLE = 64, 8
# They sum the gradient of this many points at once.
BLOCK = 512
# Samples are hidden behind this optical depth: a little more than where `composite` ends, which may round
# its sums in another way.
HIDDEN_OPTICAL_DEPTH = 1.01 * MAX_OPTICAL_DEPTH
# They expect this many rows in the last layer.
RGB_ROWS = 8


def can_fuse(network, inputs):
    """Whether the kernels can evaluate a network at `inputs` [M, 3 or 6], points and directions, and
    differentiate it by its parameters."""
    return (type(network) is HashNeRF and inputs.device.type == 'cpu'
            and inputs.dtype == network.encoding.table.dtype == torch.float32
            and not (inputs.requires_grad and torch.is_grad_enabled())
            and network.encoding.out_dim <= MAX_CHANNELS and network.encoding.out_dim % MULTIPLE == 0
            and (network.encoding_views is None or isinstance(network.encoding_views, SphericalHarmonics))
            and KERNELS.usable(inputs.device))


def evaluate(network, inputs, bf16=False, rays=None):
    """raw [M, 4] of a network that `can_fuse` at `inputs` [M, 3 or 6].

    Args:
      bf16: use bfloat16 products in the hidden layers, if the processor has them.
      rays: step_sizes and offsets, see `accel/packed.py`, if these are samples along rays: those that are
        hidden behind others may be left out, and are 0.
    """
    return FusedNetwork.apply(network, bf16, rays, inputs, network.encoding.table, *layers_of(network))


def density(network, points, bf16=False):
    """The density [M] of a network that `can_fuse` at `points` [M, 3], without gradient; `bf16` as for
    `evaluate`."""
    found, layers = points.new_empty(len(points)), padded(layers_of(network))
    KERNELS.call('evaluate', len(points), *rows_of(points), *arguments_of(network, layers, bf16), len(points),
                 0, found)
    return found


class FusedNetwork(torch.autograd.Function):
    """`evaluate`; parameters are arguments too, so that autograd requests their gradients. Only the inputs
    are saved: the gradient evaluates the network again, at the points where it is not zero."""

    @staticmethod
    def forward(ctx, network, bf16, rays, inputs, table, *layers):
        ctx.network, ctx.bf16 = network, bf16
        ctx.save_for_backward(inputs, table, *layers)
        raw, arguments = inputs.new_zeros(len(inputs), 4), arguments_of(network, padded(layers), bf16)
        if rays is None:
            KERNELS.call('evaluate', len(inputs), *rows_of(inputs), *arguments, len(inputs), 1, raw)
        else:
            step_sizes, offsets = rays
            KERNELS.call('evaluate_rays', len(step_sizes), *rows_of(inputs), *arguments, len(step_sizes),
                         offsets, step_sizes, HIDDEN_OPTICAL_DEPTH, raw)
        return raw

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_raw):
        inputs, table, *layers = ctx.saved_tensors
        encoding, layers = ctx.network.encoding, padded(layers)
        rows = (grad_raw != 0).any(-1).nonzero()[:, 0]  # NaN != 0, so NaN is passed on
        inputs, grad_raw = inputs.index_select(0, rows), grad_raw.index_select(0, rows)
        sizes = [part.numel() for part in layers]
        grad, partial = inputs.new_empty(sum(sizes)), inputs.new_empty(-(-len(rows) // BLOCK), sum(sizes))
        grad_encoded, grad_table = inputs.new_empty(len(rows), encoding.out_dim), torch.empty_like(table)
        KERNELS.call('evaluate_gradient', len(rows), *rows_of(inputs),
                     *arguments_of(ctx.network, layers, ctx.bf16), len(rows), grad_raw, grad_encoded, partial,
                     grad)
        KERNELS.call('encode_gradient', len(rows), inputs, inputs.stride(0), encoding.aabb,
                     int(encoding.contract), grad_encoded, grad_table, len(rows), len(encoding.resolutions),
                     table.shape[1], encoding.resolutions, encoding.level_offsets)
        grads = [part.view_as(layer) for part, layer in zip(grad.split(sizes), layers)]
        outputs = len(ctx.network.rgb_linears[-1].bias)
        return None, None, None, None, grad_table, *grads[:-2], *(part[:outputs] for part in grads[-2:])


def layers_of(network):
    """Weights and biases of the layers, first to last."""
    return [part for layer in [*network.density_linears, *network.rgb_linears]
            for part in (layer.weight, layer.bias)]


def padded(layers):
    """The parts of the layers with RGB_ROWS rows in the last one."""
    *others, weight, bias = layers
    more = RGB_ROWS - len(bias)
    return [*others, F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more))]


def rows_of(inputs):
    """Rows of numbers, and their distance, as arguments of kernels."""
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    return inputs, inputs.stride(0)


def grid_of(encoding):
    """A `HashGrid` as arguments of kernels."""
    return (encoding.aabb, int(encoding.contract), encoding.table, len(encoding.resolutions),
            encoding.table.shape[1], encoding.resolutions, encoding.level_offsets)


def arguments_of(network, layers, bf16):
    """NETWORK_PARAMETERS of kernels; `layers` are `padded`."""
    return (*grid_of(network.encoding), torch.cat([part.flatten() for part in layers]), HIDDEN_WIDTH,
            DENSITY_OUTPUTS, int(network.encoding_views is not None), INITIAL_LOG_DENSITY, MAX_LOG_DENSITY,
            int(bf16))


def check_kernels(device):
    """Raise AssertionError if the kernels differ from their reference on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for n_features, contract, views in ((4, False, True), (2, True, True), (8, False, False)):
            network = HashNeRF(HashGrid(4, 100, 12, n_features, contract),
                               *get_embedder(4, 2) if views else (None, 0)).to(device)
            torch.nn.init.uniform_(network.encoding.table, -2, 2)
            points, weights = torch.rand(1200, 3, device=device), torch.randn(1200, 4, device=device)
            viewdirs = F.normalize(torch.randn(1200, 3, device=device), dim=-1) if views else None
            weights[::3] = 0
            inputs = points if viewdirs is None else torch.cat([points, viewdirs], -1)
            parameters, results = [network.encoding.table, *layers_of(network)], []
            for raw in (network(points, viewdirs), *(evaluate(network, inputs, bf16) for bf16 in (0, 1))):
                results.append([raw, *torch.autograd.grad((raw * weights).sum(), parameters)])
            offsets = torch.tensor([0, 0, 3, 900, 911, 1200], device=device)
            rays = torch.zeros(len(offsets) - 1, device=device), offsets
            for bf16 in (False, True):
                raw = evaluate(network, inputs, bf16)
                # empty steps hide nothing
                for found, expected in ((density(network, points, bf16), raw[:, 3]),
                                        (evaluate(network, inputs, bf16, rays), raw)):
                    assert (found - expected).norm() <= 0.01 * expected.norm()
            for expected, exact, bf16 in zip(*results):
                assert (exact - expected).norm() <= 1e-4 * expected.norm()
                assert (bf16 - expected).norm() <= 0.15 * expected.norm()  # ReLUs change sides


KERNELS = Kernels('network', check_kernels)
