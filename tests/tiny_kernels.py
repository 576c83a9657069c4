"""Builds compiled kernels for other processors, and broken ones."""
import platform

import pytest
import torch

from accel.kernels import compiled
from accel.kernels.compiled import Kernels

CPU = torch.device('cpu')


def on_older_processors(test):
    """Run a test for each `processor` that has no AVX-512 and no bfloat16."""
    other_family = pytest.mark.skipif(platform.machine() != 'x86_64', reason='no processor of this family')
    return other_family(pytest.mark.parametrize('processor', ['x86-64', 'haswell'])(test))


def usable_on(processor, module, name, monkeypatch):
    """Whether the `Kernels` called `name` in a module pass their check when they are built for a
    processor."""
    flags = ['-march=' + processor if flag == '-march=native' else flag for flag in compiled.FLAGS]
    monkeypatch.setattr(compiled, 'FLAGS', flags)
    return built_anew(module, name, monkeypatch).usable(CPU)


def assert_refused(module, name, right, wrong, monkeypatch):
    """The `Kernels` called `name` in a module are not used if their text says `wrong` instead of `right`."""
    original = compiled.read_source
    assert right in original(getattr(module, name).name)
    monkeypatch.setattr(compiled, 'read_source', lambda name: original(name).replace(right, wrong))
    broken = built_anew(module, name, monkeypatch)
    with pytest.warns(UserWarning, match=f'{broken.name} kernels cannot be used on cpu'):
        assert not broken.usable(CPU)


def built_anew(module, name, monkeypatch):
    kernels = getattr(module, name)
    kernels = Kernels(kernels.name, kernels.check)
    monkeypatch.setattr(module, name, kernels)
    return kernels
