"""Networks on many points: no activations are kept, and backward goes through those points alone that have a gradient.

Where the density before its ReLU is not positive, a sample is transparent, and the gradients of its colour and of its
density are exactly zero. In training that is soon true of most samples. So forward keeps nothing but its inputs. Backward is
handed the gradient of `raw`, takes the points where it is not zero, applies the network to them once more, and goes back
through that. The gradient is the same. With F the cost of forward and p the share of such points, a step costs F(1 + 3p),
where the plain way costs 3F; and its memory depends on the size of a chunk alone.
"""
import math
import weakref
from functools import partial

import torch
from torch import nn

CHEAPER_BELOW = 2 / 3      # share of points with gradient: F(1 + 3p) < 3F
CHUNK_SIZES = 16           # lengths that a chunk may have
DENSITY = 3                # its place in `raw`
FIRST_MARGIN = 0.5         # of the density before its ReLU
SAFETY = 3.0               # the margin is more than so many times any error seen, at first twice that
PLAIN_BYTES = 512 * 2**20  # the plain way may keep activations of this size


class InChunks:
    """What `run_network` takes for `in_chunks`: a function of points, applied chunk by chunk.

    Args:
      backward: 'sparse', as above; 'plain', which keeps all activations; 'auto': sparse, unless so many points had a
        gradient in the step before that the plain way is cheaper, and its activations are small.
      precision: 'bf16' for matrix products of bfloat16 numbers in the hidden layers; 'screened' for those in float32 of all
        points that are not surely transparent, see `Screen`: for rendering, without noise on the density.
      most: the most points in a chunk, a function of the networks' width and the device; None for no limit.
    """

    def __init__(self, backward='auto', precision='fp32', most=None):
        self.backward, self.precision, self.most = backward, precision, most
        self.shares = weakref.WeakKeyDictionary()  # of points that had a gradient, by network
        self.screen = Screen()

    def __call__(self, fn, chunk, modules):
        """`fn` [N, C_in] -> [N, C_out] in chunks of at most `chunk` points; `modules` hold the parameters that it uses, the
        network first."""
        network, parameters = modules[0], trained_parameters(modules)
        device = next(network.parameters()).device
        if self.most is not None:
            chunk = min(chunk, self.most(width(network), device))

        def fn_in_bf16(points):
            with torch.autocast(device.type, torch.bfloat16):
                return fn(points).float()

        def fn_in_chunks(points):
            fn_in_precision = fn_in_bf16 if self.precision == 'bf16' else fn
            if not torch.is_grad_enabled() or not (parameters or points.requires_grad):
                if self.precision == 'screened':
                    fn_in_precision = partial(self.screen, network, fn, fn_in_bf16)
                with torch.autocast(device.type, enabled=False):  # weights are cast once, not for each chunk
                    return in_order(fn_in_precision, points, chunk)
            if self.is_plain(network, len(points)):
                return torch.cat([fn_in_precision(part) for part in points.split(chunk)])
            return SparseBackward.apply(fn_in_precision, chunk, self.shares, network, points, *parameters)
        return fn_in_chunks

    def state_dict(self, networks):
        """What a run that goes on needs to take the same ways: {name: share} of `networks`, a dict by name."""
        return {name: self.shares[network] for name, network in networks.items() if network in self.shares}

    def load_state_dict(self, state, networks):
        self.shares.update({networks[name]: share for name, share in state.items() if name in networks})

    def is_plain(self, network, N):
        """Whether `N` points are to go through `network` the plain way."""
        if self.backward != 'auto':
            return self.backward == 'plain'
        share = self.shares.pop(network, 0.0)  # after a plain step, which does not count, a sparse one counts anew
        return share > CHEAPER_BELOW and 4 * N * activations(network) < PLAIN_BYTES


class Screen:
    """Networks in float32 on those points alone that may be opaque.

    Where the density before its ReLU is negative, a sample has exactly no weight, whatever its colour. bfloat16 products,
    which cost a fraction, show where it is negative by more than their error. How large that is, the points near zero show,
    for which both are known: the margin follows it, and where it comes too near, all points are done in float32. So `raw`
    differs from the float32 one at transparent samples only, and what is composited from it does not.
    """

    def __init__(self):
        self.errors = weakref.WeakKeyDictionary()  # the largest seen, by network

    def __call__(self, network, fn, fn_in_bf16, points):
        largest = self.errors.get(network)
        margin = FIRST_MARGIN if largest is None else 2 * SAFETY * largest
        raw = fn_in_bf16(points)
        maybe = (~(raw[:, DENSITY] <= -margin)).nonzero().squeeze(-1)  # NaN too
        if len(maybe) == 0:
            return raw
        exact = fn(points[maybe])
        found, true = raw[maybe, DENSITY], exact[:, DENSITY]
        # the error of large densities is larger, and of no account: it is their sign that counts
        errors = (true - found)[~(found.abs() > FIRST_MARGIN) | (true > 0) & ~(found > 0)]
        error = errors.abs().max().item() if len(errors) else 0.0
        if len(errors) and math.isfinite(error):
            self.errors[network] = max(error, largest or 0.0)
        if not SAFETY * error <= margin:
            return fn(points)
        raw[maybe] = exact
        return raw


def trained_parameters(modules):
    """The parameters of those `modules` that have any, as far as they are trained."""
    return [p for module in modules if isinstance(module, nn.Module) for p in module.parameters() if p.requires_grad]


def width(network):
    """Output channels of the widest layer."""
    return max((layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)), default=1)


def activations(network):
    """How many numbers autograd keeps for a point in `network`: about the inputs and outputs of its layers."""
    return sum(layer.in_features + layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear))


def in_order(fn, points, chunk):
    """`fn` on `chunk` points at a time, into one tensor that is made once."""
    if len(points) <= chunk:
        return fn(points)
    first = fn(points[:chunk])
    out = first.new_empty(len(points), *first.shape[1:])
    out[:chunk] = first
    for start in range(chunk, len(points), chunk):
        out[start:start + chunk] = fn(points[start:start + chunk])
    return out


def padded(part, chunk):
    """Indices of one of few lengths: `part`, then its last one again. oneDNN compiles a kernel for each new number of rows
    and keeps hundreds of them, which costs more time and memory than a few rows too many."""
    step = max(1, chunk // CHUNK_SIZES)
    return torch.cat([part, part[-1:].expand(-len(part) % step)])


def summed(sums, grads):
    """`sums` with `grads` added, where None stands for zero."""
    if sums is None:
        return list(grads)
    both = [(total, grad) for total, grad in zip(sums, grads) if total is not None and grad is not None]
    if both:
        torch._foreach_add_([total for total, _ in both], [grad for _, grad in both])
    return [grad if total is None else total for total, grad in zip(sums, grads)]


class SparseBackward(torch.autograd.Function):
    """`fn` on all points, chunk by chunk; see the head of this file. The parameters are inputs, so that autograd asks for
    their gradients."""

    @staticmethod
    def forward(ctx, fn, chunk, shares, network, points, *parameters):
        ctx.fn, ctx.chunk, ctx.shares, ctx.network = fn, chunk, shares, network
        ctx.save_for_backward(points, *parameters)
        return in_order(fn, points, chunk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_raw):
        points, *parameters = ctx.saved_tensors
        live = (grad_raw != 0).any(-1).nonzero().squeeze(-1)  # NaN is not 0: it goes on
        ctx.shares[ctx.network] = len(live) / max(len(points), 1)
        to_points = ctx.needs_input_grad[4]
        grad_points = torch.zeros_like(points) if to_points else None
        sums = None
        for part in live.split(ctx.chunk) if len(live) else ():
            rows = padded(part, ctx.chunk)
            inputs = points[rows].detach().requires_grad_(to_points)
            with torch.enable_grad():
                raw = ctx.fn(inputs)
            grad = grad_raw[rows]
            grad[len(part):] = 0
            wanted = [*parameters, inputs] if to_points else parameters
            grads = torch.autograd.grad(raw, wanted, grad, allow_unused=True)
            if to_points:
                grads, grad_points[part] = grads[:-1], grads[-1][:len(part)]
            sums = summed(sums, grads)
        return None, None, None, None, grad_points, *(sums or [torch.zeros_like(p) for p in parameters])
