"""Evaluates networks at many points: in chunks, in the chosen precision, with a choice of backward passes."""
import torch

from accel.sparse_backward import SparseBackward, evaluate_in_chunks, evaluate_with_activations


class NetworkQuery:
    """What `render_rays` calls to evaluate a network: `network_query_fn(pts, viewdirs, network) -> raw`.

    Args:
      netchunk: the most points to compute at once.
      precision: 'bf16' for bfloat16 products in the hidden layers. 'fp32' and 'tf32' are the same here: TF32
        is a global setting of torch (`pick_precision`).
      backward: 'sparse' keeps no activations and backpropagates only through samples that have a gradient,
        see `accel/sparse_backward.py`; 'plain' is ordinary backpropagation; 'auto' is sparse, and networks
        with `keep_activations` store activations, for steps in which most samples have a gradient.
    """

    def __init__(self, netchunk=1024 * 64, precision='fp32', backward='auto'):
        self.netchunk, self.precision, self.backward = netchunk, precision, backward

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
        if viewdirs is not None:
            viewdirs = viewdirs[:, None].expand(pts.shape).reshape(-1, 3)
        raw = self.at_points(pts.reshape(-1, 3), viewdirs, network)
        return raw.reshape(*pts.shape[:-1], raw.shape[-1])

    def at_points(self, points, viewdirs, network):
        """Raw outputs [M, 4 or more] at `points` [M, 3] with unit directions `viewdirs` [M, 3] or None."""
        inputs = points if viewdirs is None else torch.cat([points, viewdirs], -1)      # [M, 3 or 6]

        def evaluate(inputs):
            with self.autocast(inputs.device):
                return network(inputs[:, :3], inputs[:, 3:] if inputs.shape[-1] > 3 else None).float()

        chunk = self.chunk(network, inputs.device)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (parameters or inputs.requires_grad):
            if self.backward == 'plain':
                return evaluate_with_activations(evaluate, inputs, chunk)
            keep_activations = self.backward == 'auto' and network.keep_activations
            return SparseBackward.apply(evaluate, chunk, keep_activations, inputs, *parameters)
        # Autocast forgets the weights that it has cast when its outermost context ends. This one, which does
        # nothing else, makes them last for all chunks.
        with torch.autocast(inputs.device.type, enabled=False):
            return evaluate_in_chunks(evaluate, inputs, chunk)

    @torch.no_grad()
    def density(self, points, network):
        """The density before its ReLU [M] at `points` [M, 3], without gradients."""
        def evaluate(points):
            with self.autocast(points.device):
                return network.density(points).float()
        with torch.autocast(points.device.type, enabled=False):
            return evaluate_in_chunks(evaluate, points, self.chunk(network, points.device))

    def chunk(self, network, device):
        """How many points to compute at once."""
        return min(self.netchunk, network.preferred_chunk(device) or self.netchunk)

    def autocast(self, device):
        """A context in which products of the hidden layers are bfloat16, with --precision bf16."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == 'bf16')
