"""Evaluates a network in bfloat16 with all its weights converted at once.

Autocast converts them one by one, with a kernel for each, which takes a GPU as long as the layers that use
them. On a GPU, matrix products are fast if all sizes are multiples of 8, so there encodings are padded with
zeros, and so are the weights that multiply them.
"""
import contextlib
from functools import partial

import torch

from accel.positional import padded_encoding, padded_size
from run_nerf_helpers import EncodedNeRF

# Matrix products of sizes that are multiples of this are fast on a GPU.
GPU_MULTIPLE = 8


class HalfPrecision:
    """`method` of `network` as a function of its inputs, in bfloat16 with a result in float32, for one
    evaluation of many points: the weights of the network's `half_layers` are converted at the first call.
    Gradients flow to the network's own parameters.

    Args:
      method: function of a network and tensors, such as `EncodedNeRF.__call__`.
      network: a `RadianceField`.
      multiple: the sizes of encodings are padded to a multiple of this; by default as the device prefers.
    """

    def __init__(self, method, network, multiple=None):
        self.method, self.network, self.layers = method, network, network.half_layers()
        self.parameters = [part for layer in self.layers for part in (layer.weight, layer.bias)]
        on_gpu = bool(self.layers) and self.parameters[0].is_cuda
        self.multiple = multiple or (GPU_MULTIPLE if on_gpu else 1)
        self.widths = [None] * len(self.parameters)  # of the parts of a weight that are padded one by one
        self.padded = {}                             # attributes of the network during the evaluation
        if isinstance(network, EncodedNeRF) and self.multiple > 1:
            self.widths[::2] = [widths if any(width % self.multiple for width in widths) else None
                                for widths in network.input_widths()]
            self.padded = {'encoding': partial(padded_encoding, network.encoding, self.multiple),
                           'encoding_views': partial(padded_encoding, network.encoding_views, self.multiple),
                           'input_ch': padded_size(network.input_ch, self.multiple),
                           'input_ch_views': padded_size(network.input_ch_views, self.multiple)}
        self.weights, self.differentiable = [], []  # the parameters in bfloat16, without and with gradients

    def __call__(self, *inputs):
        if not self.weights:
            self.weights = self.to_bfloat16()
        if torch.is_grad_enabled() and not self.differentiable:
            self.differentiable = ToBfloat16.apply(self, self.weights, *self.parameters)
        weights = self.differentiable if torch.is_grad_enabled() else self.weights
        attributes = [{'weight': weight, 'bias': bias} for weight, bias in zip(weights[::2], weights[1::2])]
        with (replaced([self.network, *self.layers], [self.padded, *attributes]),
              torch.autocast(inputs[0].device.type, torch.bfloat16)):
            return self.method(self.network, *inputs).float()

    @torch.no_grad()
    def to_bfloat16(self):
        """Copies of the parameters in bfloat16, padded."""
        copies = []
        for parameter, widths in zip(self.parameters, self.widths):
            shape = list(parameter.shape)
            if widths:
                shape[1] = sum(padded_size(width, self.multiple) for width in widths)
            allocate = parameter.new_zeros if widths else parameter.new_empty
            copies.append(allocate(shape, dtype=torch.bfloat16))
        copy_tensors(self.parts(copies, self.multiple), self.parts(self.parameters))
        return copies

    def to_float32(self, grads):
        """The gradients of the copies as gradients of the parameters."""
        copies = [torch.empty_like(parameter) for parameter in self.parameters]
        copy_tensors(self.parts(copies), self.parts(grads, self.multiple))
        return copies

    def parts(self, tensors, multiple=1):
        """The parts that the parameters consist of, without padding. `tensors` are like the parameters, but
        padded to a `multiple`."""
        parts = []
        for tensor, widths in zip(tensors, self.widths):
            if widths is None:
                parts.append(tensor)
            else:
                padded = tensor.split([padded_size(width, multiple) for width in widths], 1)
                parts += [part[:, :width] for part, width in zip(padded, widths)]
        return parts


class ToBfloat16(torch.autograd.Function):
    """`copies` of the parameters of a `HalfPrecision`, through which gradients flow to the parameters.
    Nothing is saved, so that several parts of a batch can be differentiated one after another."""

    @staticmethod
    def forward(ctx, half, copies, *parameters):
        ctx.half = half
        return tuple(part.detach() for part in copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, None, *ctx.half.to_float32(grads)


def copy_tensors(targets, sources):
    """Copy `sources` to `targets`, those of equal strides in one pass."""
    pairs = list(zip(targets, sources))
    together = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
    if together:
        torch._foreach_copy_(*map(list, zip(*together)))
    for target, source in pairs:
        if target.stride() != source.stride():
            target.copy_(source)


@contextlib.contextmanager
def replaced(modules, attributes):
    """Replace attributes of modules for a while, each module's by a dict. Instance attributes take precedence
    over registered parameters and submodules, which stay as they are."""
    saved = [{name: vars(module)[name] for name in names if name in vars(module)}
             for module, names in zip(modules, attributes)]
    try:
        for module, new in zip(modules, attributes):
            vars(module).update(new)
        yield
    finally:
        for module, new, old in zip(modules, attributes, saved):
            for name in new:
                vars(module).pop(name, None)
            vars(module).update(old)
