"""Photos that differ in exposure: the change of colour in training, and the protocol for held-out views."""
import json

import numpy as np
import pytest
import torch
from tiny_devices import DEVICE
from tiny_networks import hash_nerf
from tiny_runs import FAST_DEMO, NO_OUTPUTS, assert_killed_and_resumed_is_undisturbed, run

from accel.appearance import ColorCorrection
from accel.network_query import NetworkQuery
from accel.proposals import ProposalRenderer
from run_nerf import loss_and_gradient
from scenes.rays import Batch
from training.metrics import corrected_half

# Photos with one exposure: the scale of each.
GAINS = torch.tensor([0.6, 0.9, 1.2, 1.3])


def test_at_first_colours_stay_as_they_are():
    rgb, view = torch.rand(9, 3), torch.arange(9)
    assert ColorCorrection().to(DEVICE)(rgb, view).equal(rgb)
    assert hash_nerf().as_photographed(rgb, None) is rgb


def test_the_mean_change_of_a_batch_is_none():
    correction = ColorCorrection().to(DEVICE)
    torch.nn.init.normal_(correction.affine)
    grey = torch.full((50, 3), 0.5)
    changed = correction(grey, torch.arange(50))
    assert (changed - grey).abs().max() > 0.05
    torch.testing.assert_close(changed.mean(0), grey[0], rtol=0, atol=1e-6)


def test_exposures_are_found():
    """Colours of one scene under several exposures: the corrections take up the differences."""
    torch.manual_seed(0)
    correction, colors = ColorCorrection().to(DEVICE), torch.rand(64, 3)
    scene = torch.nn.Parameter(torch.full_like(colors, 0.5))
    optimizer = torch.optim.Adam([scene, *correction.parameters()], 1e-2)
    for _ in range(2000):
        view, index = torch.randint(4, (512,)), torch.randint(64, (512,))
        loss = (correction(scene[index], view) - GAINS[view, None] * colors[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4
    torch.testing.assert_close(scene.detach(), GAINS.mean() * colors, rtol=0, atol=0.03)


@pytest.mark.parametrize('masked', [False, True])
def test_held_out_views_are_fitted_on_the_left_and_measured_on_the_right(masked):
    random = np.random.RandomState(0)
    rgb = random.rand(10, 21, 3).astype(np.float32)
    affine = np.array([[0.5, 0.1, 0], [0, 0.6, 0], [0.1, 0, 0.4], [0.05, 0.1, 0.2]])
    exact = 255 * (rgb @ affine[:3] + affine[3])
    target, mask = np.round(exact).astype(np.uint8), None
    target[:, 10:] += 10  # what the right half shows does not count
    if masked:
        mask = random.rand(10, 21) < 0.7
        target[~mask] = 0
    right, right_target, right_mask = corrected_half(rgb, target, mask)
    assert right_target.shape == right.shape == (10, 11, 3)
    np.testing.assert_allclose(255 * right, exact[:, 10:], atol=0.5)
    assert (right_mask is None) == (not masked) and (not masked or right_mask.shape == (10, 11))
    if masked:
        nothing = corrected_half(rgb, target, np.zeros_like(mask))[0]
        np.testing.assert_allclose(nothing, rgb[:, 10:], atol=1e-6)


def test_a_run_is_resumed_exactly(tmp_path):
    assert_killed_and_resumed_is_undisturbed(tmp_path, *FAST_DEMO, '--appearance', '--no-random_bkgd')


def test_a_step_trains_the_corrections():
    network = hash_nerf().to(DEVICE)
    network.appearance = ColorCorrection().to(DEVICE)
    rays = torch.stack([torch.zeros(20, 3) + torch.tensor([0.0, 0, 2]), torch.randn(20, 3)])
    batch = Batch(rays, torch.rand(20, 3), view=torch.arange(20) % 2)
    loss_and_gradient([8, 10], None, 20, batch, {
        'network_fn': network, 'network_query_fn': NetworkQuery(), 'N_samples': 8, 'near': 1.0, 'far': 3.0,
        'ndc': False, 'use_viewdirs': True, 'white_bkgd': False, 'renderer': ProposalRenderer().to(DEVICE)})
    gradient = network.appearance.affine.grad
    assert gradient[:2].abs().sum() > 0 and not gradient[2:].any()


def test_each_view_has_its_own_correction(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('accel.appearance.MAX_VIEWS', 5)
    assert run(*FAST_DEMO, *NO_OUTPUTS, '--no-random_bkgd', '--appearance', '--basedir', tmp_path) == 2
    assert 'views from the first training view to the last, expected at most 5' in capsys.readouterr().err


def test_metrics_name_the_protocol(tmp_path, capsys):
    arguments = [*FAST_DEMO, '--no-random_bkgd', *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 2,
                 '--i_testset', 2]
    assert run(*arguments, '--appearance') == 0
    (path,) = tmp_path.rglob('metrics.json')
    assert json.loads(path.read_text())['measured'] == 'right half, after fitting colours to the left'
    assert '(right half, after fitting colours to the left)' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*arguments, '--appearance', '--no_batching')
    assert 'not available with --N_importance, --no_batching or --random_bkgd' in capsys.readouterr().err
