"""Backpropagation through the samples that have a gradient, and no others.

The gradient of `raw` is exactly zero at samples whose density before its ReLU is not positive, and at samples
hidden behind a surface: in training soon at most of them. So the forward pass stores only its inputs. The
backward pass selects the points where the gradient is not zero, evaluates the network there again, and
differentiates that. The gradient is the same. With F the cost of a forward pass and p the fraction of these
points, a step costs F(1 + 3p) instead of 3F, and activations take the memory of one chunk.

With `keep_activations` the forward pass stores the activations too, and each backward pass takes the cheaper
way: it evaluates the network again if p < 2/3, and otherwise uses them.
"""
import math

import torch

# On a CPU, chunks are padded to one of this many lengths: oneDNN compiles a kernel for each new number of
# rows and keeps hundreds of them, which costs more time and memory than a few superfluous rows.
CHUNK_LENGTHS = 32
# Evaluating the network again is cheaper than using stored activations if fewer points than this fraction
# have a gradient: F(1 + 3p) < 3F.
RECOMPUTE_BELOW = 2 / 3


class SparseBackward(torch.autograd.Function):
    """`fn(inputs)` of `inputs` [M, C], points and directions, computed `chunk` rows at a time. The parameters
    of `fn` are arguments too, so that autograd requests their gradients."""

    @staticmethod
    def forward(ctx, fn, chunk, keep_activations, inputs, *parameters):
        ctx.fn, ctx.chunk, ctx.kept = fn, chunk, None
        ctx.save_for_backward(inputs, *parameters)
        if not keep_activations:
            return evaluate_in_chunks(fn, inputs, chunk)
        leaf = inputs.detach().requires_grad_(ctx.needs_input_grad[3])
        with torch.enable_grad():
            raw = evaluate_with_activations(fn, leaf, chunk)
        ctx.kept = raw, leaf
        return raw.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_raw):
        inputs, *parameters = ctx.saved_tensors
        to_inputs = ctx.needs_input_grad[3]
        grad_inputs = torch.zeros_like(inputs) if to_inputs else None
        sums = [None] * len(parameters)
        for rows, leaf, raw in SparseBackward.differentiable_parts(ctx, inputs, grad_raw):
            wanted = [*parameters, leaf] if to_inputs else parameters
            grads = torch.autograd.grad(raw, wanted, grad_raw[rows], allow_unused=True)
            if to_inputs:
                grads, grad_inputs[rows] = grads[:-1], grads[-1]
            sums = add_gradients(sums, grads)
        sums = [torch.zeros_like(p) if total is None else total for p, total in zip(parameters, sums)]
        return None, None, None, grad_inputs, *sums

    @staticmethod
    def differentiable_parts(ctx, inputs, grad_raw):
        """Yield (rows, leaf, raw): an index of rows, a leaf tensor with these rows of `inputs`, and
        `fn(leaf)` with its graph. Together they cover all rows that have a gradient."""
        with_gradient = (grad_raw != 0).any(-1).nonzero().squeeze(-1)  # NaN != 0, so NaN is passed on
        kept, ctx.kept = ctx.kept, None
        if kept and len(with_gradient) >= RECOMPUTE_BELOW * len(inputs):
            raw, leaf = kept
            yield slice(None), leaf, raw
            return
        del kept  # frees the stored activations
        for rows in with_gradient.split(ctx.chunk) if len(with_gradient) else ():
            leaf = inputs[rows].detach().requires_grad_(ctx.needs_input_grad[3])
            with torch.enable_grad():
                raw = evaluate_padded(ctx.fn, leaf, ctx.chunk)
            yield rows, leaf, raw


def add_gradients(sums, grads):
    """`sums` with `grads` added; None stands for zero in both."""
    both = [(total, grad) for total, grad in zip(sums, grads) if total is not None and grad is not None]
    if both:
        torch._foreach_add_([total for total, _ in both], [grad for _, grad in both])
    return [grad if total is None else total for total, grad in zip(sums, grads)]


def evaluate_in_chunks(fn, inputs, chunk):
    """`fn` on `chunk` rows of `inputs` at a time, into one tensor that is allocated once."""
    first = evaluate_padded(fn, inputs[:chunk], chunk)
    if len(inputs) <= chunk:
        return first
    out = first.new_empty(len(inputs), *first.shape[1:])
    out[:chunk] = first
    for start in range(chunk, len(inputs), chunk):
        out[start:start + chunk] = evaluate_padded(fn, inputs[start:start + chunk], chunk)
    return out


def evaluate_with_activations(fn, inputs, chunk):
    """`fn` on `chunk` rows of `inputs` at a time, for ordinary backpropagation."""
    return torch.cat([evaluate_padded(fn, part, chunk) for part in inputs.split(chunk)])


def evaluate_padded(fn, part, chunk):
    """`fn` on `part` [M, C], M <= chunk; on a CPU with its last row repeated up to one of CHUNK_LENGTHS
    lengths."""
    if part.device.type != 'cpu' or len(part) == 0:
        return fn(part)
    multiple = math.ceil(chunk / CHUNK_LENGTHS)
    padding = min(-len(part) % multiple, chunk - len(part))
    return fn(torch.cat([part, part[-1:].expand(padding, -1)]))[:len(part)] if padding else fn(part)
