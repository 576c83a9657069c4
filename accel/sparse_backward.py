"""Backpropagation through the samples that have a gradient, and no others.

The gradient of `raw` is exactly zero at samples whose density before its ReLU is not positive, and at samples
hidden behind a surface: in training soon at most of them. So the forward pass stores only its inputs. The
backward pass selects the points where the gradient is not zero, evaluates the network there again, and
differentiates that. The gradient is the same. With F the cost of a forward pass and p the fraction of these
points, a step costs F(1 + 3p) instead of 3F, and activations take the memory of one chunk.

"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# On a CPU, chunks are padded to one of this many lengths: oneDNN compiles a kernel for each new number of
# rows and keeps hundreds of them, which costs more time and memory than a few superfluous rows.
CHUNK_LENGTHS = 32


class Evaluation(NamedTuple):
    """An evaluation of a network that is to be differentiated."""
    fn: Callable              # of inputs [M, C]
    chunk: int                # rows to compute at once
    inputs: torch.Tensor      # [M, C]
    parameters: list          # of `fn`
    grad_raw: torch.Tensor    # gradient of the loss by its outputs

    def differentiable_parts(self, mask, count, to_inputs=False):
        """Yield (rows, leaf, raw): an index of rows, a leaf tensor with these rows of `inputs`, and
        `fn(leaf)` with its graph. Together they cover the rows in `mask` [M], `count` of them."""
        rows = indices_of(mask, count)
        for part in rows.split(self.chunk) if count else ():
            leaf = self.inputs.index_select(0, part).detach().requires_grad_(to_inputs)
            with torch.enable_grad():
                raw = evaluate_padded(self.fn, leaf, self.chunk)
            yield part, leaf, raw

    def backward(self, mask, count):
        """Add the gradient to that of the parameters; `mask` and `count` as in `differentiable_parts`."""
        for rows, _, raw in self.differentiable_parts(mask, count):
            torch.autograd.backward(raw, self.grad_raw[rows], inputs=self.parameters)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class SparseBackward(torch.autograd.Function):
    """`fn(inputs)` of `inputs` [M, C], points and directions, computed `chunk` rows at a time. The parameters
    of `fn` are arguments too, so that autograd requests their gradients. If `query.deferred` is a list, the
    backward pass only adds an `Evaluation` to it, for `backpropagate`."""

    @staticmethod
    def forward(ctx, fn, chunk, query, inputs, *parameters):
        ctx.fn, ctx.chunk, ctx.query = fn, chunk, query
        ctx.save_for_backward(inputs, *parameters)
        return evaluate_in_chunks(fn, inputs, chunk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_raw):
        inputs, *parameters = ctx.saved_tensors
        evaluation = Evaluation(ctx.fn, ctx.chunk, inputs, parameters, grad_raw)
        to_inputs = ctx.needs_input_grad[3]
        if ctx.query.deferred is not None and not to_inputs:
            ctx.query.deferred.append(evaluation)
            return (None,) * (4 + len(parameters))
        (mask, count), = rows_with_gradient([grad_raw])
        grad_inputs = torch.zeros_like(inputs) if to_inputs else None
        sums = [None] * len(parameters)
        for rows, leaf, raw in evaluation.differentiable_parts(mask, count, to_inputs):
            wanted = [*parameters, leaf] if to_inputs else parameters
            grads = torch.autograd.grad(raw, wanted, grad_raw[rows], allow_unused=True)
            if to_inputs:
                grads, grad_inputs[rows] = grads[:-1], grads[-1]
            sums = add_gradients(sums, grads)
        sums = [torch.zeros_like(p) if total is None else total for p, total in zip(parameters, sums)]
        return None, None, None, grad_inputs, *sums


class SampledGradient(torch.autograd.Function):
    """The identity. Rows of its gradient [M, C] that are small are drawn at random: one whose largest number
    is smaller than their mean, of rows that are not 0, is kept with a probability in proportion to it, and
    divided by that. So most rows are 0, and the expected value is the gradient itself."""

    @staticmethod
    def forward(ctx, raw):
        return raw.view_as(raw)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_raw):
        size = grad_raw.abs().amax(-1)
        mean = size.sum() / (size > 0).sum().clamp(min=1)
        probability = (size / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(max=1)
        dropped = torch.rand_like(probability) >= probability  # never if it is NaN, which is passed on
        return (grad_raw / probability[:, None]).masked_fill(dropped[:, None], 0)


def backpropagate(evaluations):
    """Add the gradients of `Evaluation`s to those of their parameters. The host waits for a GPU once for all
    of them, to know in how many rows they have a gradient."""
    if evaluations:
        found = rows_with_gradient([evaluation.grad_raw for evaluation in evaluations])
        while evaluations:  # stored activations are freed one by one
            evaluations.pop(0).backward(*found.pop(0))


def rows_with_gradient(grads):
    """For each of `grads` [M, C], which rows are not zero, [M], and how many."""
    masks = [(grad != 0).any(-1) for grad in grads]  # NaN != 0, so NaN is passed on
    return list(zip(masks, torch.stack([mask.sum() for mask in masks]).tolist()))


def indices_of(mask, count):
    """Where `mask` [M] is true, `count` times."""
    if mask.device.type == 'cpu':
        return mask.nonzero()[:, 0]
    return mask.sort(descending=True, stable=True).indices[:count]  # `nonzero` would wait for the count


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
    parts = [evaluate_padded(fn, part, chunk) for part in inputs.split(chunk)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def evaluate_padded(fn, part, chunk):
    """`fn` on `part` [M, C], M <= chunk; on a CPU with its last row repeated up to one of CHUNK_LENGTHS
    lengths."""
    if part.device.type != 'cpu' or len(part) == 0:
        return fn(part)
    multiple = math.ceil(chunk / CHUNK_LENGTHS)
    padding = min(-len(part) % multiple, chunk - len(part))
    return fn(torch.cat([part, part[-1:].expand(padding, -1)]))[:len(part)] if padding else fn(part)
