"""Evaluates a network in bfloat16 with all its weights converted at once.

Autocast converts them one by one, with a kernel for each, which takes a GPU as long as the layers that use
them.
"""
import copy

import torch


class HalfPrecision:
    """`network` with the weights of its `half_layers` in bfloat16. Gradients flow to the network's own
    parameters.

    Args:
      network: a `RadianceField`.
    """

    def __init__(self, network):
        self.layers = network.half_layers()
        self.twin = twin_of(network, self.layers) if self.layers else network

    def evaluation(self, method):
        """`method` of the network as a function of its inputs, with a result in float32, for one evaluation
        of many points: the weights are converted when it is first called, without and with gradients."""
        weights = [part for layer in self.layers for part in (layer.weight, layer.bias)]
        converted_weights = {}  # by whether they have gradients

        def evaluate(*inputs):
            with_gradients = torch.is_grad_enabled()
            if weights and with_gradients not in converted_weights:
                converted_weights[with_gradients] = ToBfloat16.apply(*weights)
            halves = converted_weights.get(with_gradients, ())
            for layer, weight, bias in zip(self.twin.half_layers(), halves[::2], halves[1::2]):
                layer.__dict__.update(weight=weight, bias=bias)
            with torch.autocast(inputs[0].device.type, torch.bfloat16):
                return method(self.twin, *inputs).float()
        return evaluate


class ToBfloat16(torch.autograd.Function):
    """Parameters to their copies in bfloat16. Nothing is saved, so that several parts of a batch can be
    differentiated one after another."""

    @staticmethod
    def forward(ctx, *parameters):
        return converted(parameters, torch.bfloat16)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return converted(grads, torch.float32)


def converted(tensors, dtype):
    """`tensors` in another dtype, in one pass."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def twin_of(module, layers):
    """A copy of `module` that shares all parameters and buffers, but those of `layers`, which it lacks."""
    twin = copy.copy(module)
    twin._modules = {name: child and twin_of(child, layers) for name, child in module._modules.items()}
    if any(module is layer for layer in layers):
        twin._parameters = {}
    return twin
