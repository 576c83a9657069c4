"""The code in the walkthroughs of docs/architecture.md runs, and does what the text says."""
import inspect
import re

import numpy as np
import pytest
import torch
from tiny_networks import CAMERA, encoded_nerf
from tiny_runs import NO_OUTPUTS, ROOT, TINY, read_state, run

import run_nerf
import run_nerf_helpers
from accel.network_query import NetworkQuery
from accel.packed import PackedSamples
from accel.renderer import Renderer
from scenes.rays import Batch

TEXT = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def block(part):
    """The block of code that contains `part`."""
    (found,) = [code for code in BLOCKS if part in code]
    return found


def defined_by(code, **names):
    """The names that `code` defines, where `names` are known."""
    exec(compile(code, 'architecture.md', 'exec'), names)
    return names


def kwargs_of(**options):
    """Arguments of `render` with two small networks."""
    torch.manual_seed(0)
    return {'network_fn': encoded_nerf(), 'network_fine': encoded_nerf(), 'network_query_fn': NetworkQuery(),
            'N_samples': 8, 'N_importance': 8, 'perturb': 1.0, 'white_bkgd': False, 'use_viewdirs': True,
            'ndc': False, 'near': 2.0, 'far': 6.0, **options}


def batch_of(N):
    rays = torch.stack([torch.zeros(N, 3) + CAMERA, torch.randn(N, 3) * 0.2 - CAMERA / 4])
    return Batch(rays, torch.rand(N, 3))


def test_blurred_weights_replace_one_call():
    source = inspect.getsource(run_nerf.render_rays)
    (call,) = [line for line in source.splitlines(keepends=True) if 'sample_pdf(' in line]
    names = defined_by(source.replace(call, block('blurred')), **vars(run_nerf))
    rays = torch.cat([*batch_of(20).rays, torch.tensor([[2.0, 6.0]]).expand(20, 2), torch.randn(20, 3)], -1)
    kwargs = {key: value for key, value in kwargs_of(perturb=0.0).items()
              if key in inspect.signature(run_nerf.render_rays).parameters}
    blurred, original = (function(rays, **kwargs)
                         for function in (names['render_rays'], run_nerf.render_rays))
    assert (blurred['rgb0'] == original['rgb0']).all()
    assert not torch.equal(blurred['z_std'], original['z_std'])


def test_a_proposal_network_is_trained_and_saved(tmp_path, monkeypatch):
    names = defined_by(block('class CoarseProposal'), Renderer=Renderer, render_rays=run_nerf.render_rays)
    source = inspect.getsource(run_nerf.create_nerf)
    (line,) = [line for line in source.splitlines(keepends=True) if 'GridRenderer(' in line]
    source = source.replace(line, block('proposal = create_network'))
    names = defined_by(source, **{**vars(run_nerf), **names})
    monkeypatch.setattr(run_nerf, 'create_nerf', names['create_nerf'])
    options = [*TINY, *NO_OUTPUTS, '--N_importance', 0, '--lrate', 1e-3, '--basedir', tmp_path]
    states = []
    for steps in (1, 3):  # the second run resumes
        assert run(*options, '--N_iters', steps) == 0
        states.append(read_state(tmp_path / f'demo/{steps:06d}.tar'))
    for part, layer in (('renderer', 'proposal.alpha_linear.weight'), ('network_fn', 'alpha_linear.weight')):
        first, last = (state[f'{part}_state_dict'][layer] for state in states)
        assert not torch.equal(first, last) and torch.allclose(first, last, atol=0.01)


def test_a_learned_encoding_is_trained_and_saved(tmp_path, monkeypatch):
    names = defined_by(block('class LearnedFrequencies'), torch=torch, nn=torch.nn)
    source = inspect.getsource(run_nerf_helpers.get_embedder)
    source = source.replace('    else:\n', block('elif i == 3') + '    else:\n')
    names = defined_by(source, **{**vars(run_nerf_helpers), **names})
    monkeypatch.setattr(run_nerf, 'get_embedder', names['get_embedder'])
    options = [*TINY, *NO_OUTPUTS, '--i_embed', 3, '--i_embed_views', 3, '--basedir', tmp_path]
    options.remove('--no_restart')  # which checks that it can be reinitialised
    assert run(*options, '--N_iters', 2) == 0
    frequencies = read_state(tmp_path / 'demo/000002.tar')['network_fn_state_dict']['encoding.frequencies']
    start = names['LearnedFrequencies'](len(frequencies)).frequencies.cpu()
    assert not torch.equal(frequencies, start) and torch.allclose(frequencies, start, rtol=0.1)


def test_a_data_layout_is_registered_in_one_place(tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 2, 3] = np.linspace(3.8, 4.2, 5)
    np.savez(tmp_path / 'tiny_nerf_data.npz', images=rng.rand(5, 12, 10, 3), poses=poses, focal=12.0)
    names = defined_by(block('def load_npz_scene'))
    names = defined_by(block('SCENE_LOADERS ='), **{**vars(run_nerf), **names})
    monkeypatch.setattr(run_nerf, 'SCENE_LOADERS', names['SCENE_LOADERS'])
    options = [*TINY, '--dataset_type', 'npz', '--datadir', tmp_path, '--basedir', tmp_path, '--llffhold', 2]
    assert run(*options, '--N_iters', 2, '--i_testset', 2, '--i_video', 2) == 0
    assert run('--render_only', '--ft_path', tmp_path / 'demo/000002.tar', '--basedir', tmp_path) == 0
    assert len(list(tmp_path.rglob('testset_000002/0*.png'))) == 3


def spread(weights, starts, ends):
    """Eq. 15 of mip-NeRF 360 for one ray, as it is written."""
    mids = (starts + ends) / 2
    pairs = weights[:, None] * weights * (mids[:, None] - mids).abs()
    return pairs.sum() + (weights ** 2 * (ends - starts)).sum() / 3


@pytest.mark.parametrize('packed', [False, True])
def test_the_distortion_loss(packed):
    torch.manual_seed(0)
    loss = defined_by(block('def distortion_loss'), torch=torch)['distortion_loss']
    z_vals, weights = torch.rand(6, 9).sort(-1).values, torch.rand(6, 9, requires_grad=True)
    if packed:
        z_vals = torch.rand(6, 1) * torch.arange(9.0)  # intervals of a ray have the same length
    inner, starts, ends = weights[:, :-1], z_vals[:, :-1], z_vals[:, 1:]
    expected = torch.stack([spread(*ray) for ray in zip(inner, starts, ends)]).mean()
    extras = {'z_vals': z_vals, 'weights': weights}
    if packed:
        ray_indices = torch.arange(6).repeat_interleave(8)
        mids, dt = (starts + ends).flatten() / 2, z_vals[:, 1] - z_vals[:, 0]
        extras = {'packed': PackedSamples(inner.flatten(), mids, dt, ray_indices)}
    torch.testing.assert_close(loss(extras), expected)
    gradients = [torch.autograd.grad(value, weights, retain_graph=True)[0]
                 for value in (loss(extras), expected)]
    torch.testing.assert_close(*gradients)


def test_a_loss_is_one_more_line(monkeypatch):
    names = {**vars(run_nerf), **defined_by(block('def distortion_loss'), torch=torch)}
    source = inspect.getsource(run_nerf.nerf_losses)
    source = source.replace('    return losses\n', block("losses['distortion'] ="))
    monkeypatch.setattr(run_nerf, 'nerf_losses', defined_by(source, **names)['nerf_losses'])
    measures = run_nerf.loss_and_gradient([8, 8, 8.0], None, 100, batch_of(20), kwargs_of())
    assert measures.losses.keys() == {'coarse', 'fine', 'distortion'} and measures.losses['distortion'] > 0
