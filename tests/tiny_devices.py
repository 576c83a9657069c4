"""The device of the tests, torch's default one: a CPU, or a stand-in for a GPU; and random numbers there."""
import pytest
import torch

DEVICE = torch.empty(0).device


def on_cpu_only(reason):
    """A mark that skips tests unless DEVICE is a CPU."""
    return pytest.mark.skipif(DEVICE.type != 'cpu', reason=reason)


class Random:
    """Random numbers on DEVICE that depend on nothing but the seed."""

    def __init__(self, seed):
        self.generator = torch.Generator('cpu').manual_seed(seed)

    def rand(self, *shape):
        return torch.rand(*shape, generator=self.generator, device='cpu').to(DEVICE)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, device='cpu').to(DEVICE)

    def randint(self, low, high, shape):
        return torch.randint(low, high, shape, generator=self.generator, device='cpu').to(DEVICE)
