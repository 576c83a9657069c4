"""Evaluates networks at many points: in chunks, in the chosen precision, with a choice of backward passes."""
import torch

from accel import fused_network
from accel.half_precision import HalfPrecision
from accel.sparse_backward import (
    SampledGradient,
    SparseBackward,
    backpropagate,
    evaluate_in_chunks,
    evaluate_with_activations,
)


class NetworkQuery:
    """What `render_rays` calls to evaluate a network: `network_query_fn(pts, viewdirs, network) -> raw`.

    Args:
      netchunk: the most points to compute at once; None for as many as a network prefers.
      precision: 'bf16' for bfloat16 products in the hidden layers. 'fp32' and 'tf32' are the same here: TF32
        is a global setting of torch (`pick_precision`).
      backward: 'sparse' keeps no activations and backpropagates only through samples that have a gradient,
        see `accel/sparse_backward.py`; 'plain' is ordinary backpropagation. 'auto' is 'sparse', but 'plain'
        for networks with `plain_on_gpu` on a GPU: waiting for the number of samples would cost more than it
        saves. 'sampled' is 'auto' with `SampledGradient` where it is sparse. Unless it is 'plain', hash
        networks are evaluated on a CPU by `accel/fused_network.py`.
    """

    def __init__(self, netchunk=None, precision='fp32', backward='auto'):
        self.netchunk, self.precision, self.backward_pass = netchunk, precision, backward
        self.deferred = None  # the evaluations of a backward pass in `backward`

    def __repr__(self):
        return f'NetworkQuery({self.precision})'  # what its outputs depend on

    def __call__(self, pts, viewdirs, network):
        """Raw outputs of samples along rays.

        Args:
          pts: points [N_rays, N_samples, 3].
          viewdirs: unit directions [N_rays, 3], or None.
          network: a `RadianceField`.
        Returns:
          raw [N_rays, N_samples, 4 or more].
        """
        inputs = pts if viewdirs is None else torch.cat([pts, viewdirs[:, None].expand(pts.shape)], -1)
        raw = self.evaluate(inputs.flatten(0, 1), network)
        return raw.reshape(*pts.shape[:-1], raw.shape[-1])

    def at_points(self, points, viewdirs, network, rays=None):
        """Raw outputs [M, 4 or more] at `points` [M, 3] with unit directions `viewdirs` [M, 3] or None. Of
        packed samples with `rays`, their step_sizes and offsets (`accel/packed.py`), those that are hidden
        behind others may be 0."""
        return self.evaluate(points if viewdirs is None else torch.cat([points, viewdirs], -1), network, rays)

    def evaluate(self, inputs, network, rays=None):
        """`at_points` of points and directions in one tensor [M, 3 or 6]."""
        if self.backward_pass != 'plain' and fused_network.can_fuse(network, inputs):
            raw = fused_network.evaluate(network, inputs, self.precision == 'bf16', rays)
        else:
            function = self.function(type(network).__call__, network)

            def evaluate(inputs):
                return function(*inputs.split(3, -1))

            chunk = self.chunk(network, inputs.device)
            parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            if not (torch.is_grad_enabled() and (parameters or inputs.requires_grad)):
                return evaluate_in_chunks(evaluate, inputs, chunk)
            if self.backward_pass == 'plain' or (
                    self.backward_pass != 'sparse' and network.plain_on_gpu and inputs.device.type == 'cuda'):
                return evaluate_with_activations(evaluate, inputs, chunk)
            raw = SparseBackward.apply(evaluate, chunk, self, inputs, *parameters)
        return SampledGradient.apply(raw) if self.backward_pass == 'sampled' and raw.requires_grad else raw

    def backward(self, losses, share=1.0):
        """`(share * sum(losses)).backward()` for losses of outputs of this query. The host waits for a GPU
        once, instead of once for each evaluation of a network."""
        self.deferred = []
        try:
            losses = [loss for loss in losses if torch.is_tensor(loss) and loss.requires_grad]
            torch.autograd.backward([loss if share == 1 else share * loss for loss in losses])
            backpropagate(self.deferred)
        finally:
            self.deferred = None

    @torch.no_grad()
    def density(self, points, network):
        """The density before its ReLU [M] at `points` [M, 3], without gradients."""
        if fused_network.can_fuse(network, points):
            return fused_network.density(network, points, self.precision == 'bf16')
        density = self.function(type(network).density, network)
        return evaluate_in_chunks(density, points, self.chunk(network, points.device))

    def chunk(self, network, device):
        """How many points to compute at once."""
        preferred = network.preferred_chunk(device)
        return min(self.netchunk or preferred, preferred)

    def function(self, method, network):
        """`method` of the network as a function of its inputs, for one evaluation of many points. Its result
        is float32; with --precision bf16, products of the hidden layers are bfloat16."""
        if self.precision != 'bf16':
            return lambda *inputs: method(network, *inputs).float()
        return HalfPrecision(method, network)
