"""Refined camera poses: the moved rays, their gradient, what training finds, and held-out views."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_devices import DEVICE, Random
from tiny_networks import encoded_nerf, hash_nerf
from tiny_runs import (
    FAST_DEMO,
    NO_OUTPUTS,
    PROPOSAL_DEMO,
    assert_killed_and_resumed_is_undisturbed,
    read_state,
    run,
)

from accel.grid_renderer import GridRenderer
from accel.network_query import NetworkQuery
from accel.poses import PoseOffsets, rotate
from accel.proposals import ProposalRenderer
from run_nerf import EXACT, ImageRenderer, loss_and_gradient, render
from run_nerf_helpers import RadianceField, img2mse, mse2psnr
from scenes.cameras import Camera
from scenes.rays import Batch, camera_rays
from training import alignment
from training.optimizer import adam, set_learning_rate

# The photos of the tiny scene are those of this camera.
CAMERA = Camera(24, 32, np.array([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]]))


# --- moving rays --------------------------------------------------------------------------------------------

def cross_matrix(x, y, z):
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)


@pytest.mark.parametrize('angle', [0, 1e-9, 1e-4, 0.999e-3, 1.001e-3, 0.1, 2, 3.1])
def test_rotations_are_matrix_exponentials(angle):
    random = Random(0)
    axis = torch.nn.functional.normalize(random.randn(1, 3).double(), dim=-1)
    vectors, rotation = random.randn(5, 3).double(), (angle * axis).requires_grad_()
    expected = vectors @ torch.linalg.matrix_exp(cross_matrix(*rotation[0].tolist())).T
    torch.testing.assert_close(rotate(vectors, rotation), expected, rtol=1e-12, atol=1e-12)
    if DEVICE.type == 'cpu':
        assert torch.autograd.gradcheck(rotate, (vectors, rotation))


def test_without_offsets_rays_stay_as_they_are():
    batch = Batch(torch.randn(2, 9, 3), torch.rand(9, 3), view=torch.arange(9))
    network = hash_nerf().to(DEVICE)
    assert network.with_refined_poses(batch) is batch
    network.poses = PoseOffsets().to(DEVICE)
    assert network.with_refined_poses(batch).rays.equal(batch.rays)


def test_a_camera_turns_about_its_centre_and_shifts_in_units_of_the_box():
    offsets = PoseOffsets().to(DEVICE)
    offsets.set_aabb([[0.0, 0, 0], [2, 4, 6]])
    with torch.no_grad():
        offsets.offsets[0, 2], offsets.offsets[0, 3] = 0.2, 0.1
        offsets.offsets[1] = 1e-20  # a second view, so that the mean is half of that
    rays = torch.tensor([[[0.0, 0, 5]], [[1, 0, 0]]])
    found = offsets(rays, torch.tensor([0]))
    angle = torch.tensor(0.1)
    torch.testing.assert_close(found[0], torch.tensor([[0.1, 0, 5]]), rtol=0, atol=1e-6)
    turned = torch.stack([angle.cos(), angle.sin(), 0 * angle])
    torch.testing.assert_close(found[1, 0], turned, rtol=0, atol=1e-6)


def test_a_motion_of_all_cameras_has_no_effect():
    offsets, rays = PoseOffsets().to(DEVICE), torch.randn(2, 50, 3)
    with torch.no_grad():
        offsets.offsets[:7] = torch.randn(6)
    torch.testing.assert_close(offsets(rays, torch.arange(50) % 7), rays)


# --- training -----------------------------------------------------------------------------------------------

class Ball(RadianceField):
    """A coloured ball of radius 0.7 around the origin, which is not trained."""

    def forward(self, points, viewdirs=None):
        inside = 0.7 - points.norm(dim=-1, keepdim=True)
        return torch.cat([3 * torch.sin(5 * points), 30 * torch.sigmoid(20 * inside)], -1)

    def density(self, points):
        return self(points)[:, 3]


def with_poses(network):
    network.poses = PoseOffsets()
    return network.to(DEVICE)


def arguments(network, renderer=None):
    """Of `render`, for the tiny scene."""
    return {'network_fn': network, 'network_fine': None, 'network_query_fn': NetworkQuery(), 'N_samples': 32,
            'near': 2.0, 'far': 4.0, 'ndc': False, 'use_viewdirs': True, 'white_bkgd': False,
            'pixel_centers': True, 'renderer': renderer or EXACT}


def cameras(count):
    """Poses [count, 3, 4] on an arc, looking at the origin from a distance of 3."""
    angle = torch.linspace(-0.6, 0.6, count)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [[angle.cos(), zero, angle.sin(), 3 * angle.sin()], [zero, one, zero, zero],
            [-angle.sin(), zero, angle.cos(), 3 * angle.cos()]]
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def moved(pose, offset):
    """The pose of a camera whose rays are moved by `offset` [6]."""
    offsets, axes = PoseOffsets().to(DEVICE), torch.stack([pose[:, 3].expand(3, 3), pose[:, :3].T])
    center, axes = offsets.move(axes, offset)
    return torch.cat([axes.T, center[:1].T], -1)


def rays_of(pose):
    return torch.stack(camera_rays(CAMERA, pose, True)).flatten(1, 2)


def view_of(network, rays):
    with torch.no_grad():
        return render(24, 32, CAMERA.K, rays=rays, **arguments(network))[0]


def psnr(rgb, target):
    return float(mse2psnr(img2mse(rgb, target)))


def assert_a_step_moves_the_cameras_of_its_rays(network, **changes):
    rays = rays_of(cameras(1)[0])[:, ::37]
    batch = Batch(rays, torch.rand(rays.shape[1:]), view=torch.arange(rays.shape[1]) % 2)
    loss_and_gradient([24, 32], CAMERA.K, 2 ** 16, batch, {**arguments(network), **changes})
    gradient = network.poses.offsets.grad
    assert gradient[:2].any(-1).all() and not gradient[2:].any() and torch.isfinite(gradient).all()


@pytest.mark.parametrize('renderer', [EXACT, ProposalRenderer(), GridRenderer()])
@pytest.mark.parametrize('backward', ['auto', 'sparse', 'plain'])
@pytest.mark.parametrize('ndc', [False, True])
def test_a_step_moves_the_cameras_of_its_rays(renderer, backward, ndc):
    bounds = {'near': 0.0, 'far': 1.0} if ndc else {}
    assert_a_step_moves_the_cameras_of_its_rays(
        with_poses(hash_nerf()), renderer=renderer.to(DEVICE), ndc=ndc,
        network_query_fn=NetworkQuery(backward=backward), **bounds)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_default_method_moves_cameras_too(precision):
    assert_a_step_moves_the_cameras_of_its_rays(
        with_poses(encoded_nerf()), network_fine=encoded_nerf().to(DEVICE), N_importance=8,
        network_query_fn=NetworkQuery(precision=precision))


# An error of about a degree and 2 % of the half box, and two pixels.
ERROR = torch.tensor([0.01, -0.015, 0.01, 0.02, -0.01, 0.015])


def test_training_finds_the_cameras():
    """Two of five cameras are disturbed, and come back. The scene is fixed, so the mean error must be 0."""
    network, true = with_poses(Ball()), cameras(5)
    photos = torch.stack([view_of(network, rays_of(pose)) for pose in true])
    errors = torch.tensor([0, 1, 0, -1, 0])[:, None] * ERROR
    given = torch.stack([moved(pose, error) for pose, error in zip(true, errors)])
    rays = torch.stack([rays_of(pose) for pose in given])                              # [5, 2, H * W, 3]
    optimizer, random = adam([*network.parameters()], 1.0, {}, network.poses, 3e-3), Random(0)

    def quality():
        view = torch.full([rays.shape[2]], 1, device=DEVICE)
        return psnr(view_of(network, network.poses(rays[1], view)), photos[1])
    before = quality()
    for step in range(1, 81):
        view, pixel = random.randint(0, 5, (256,)), random.randint(0, rays.shape[2], (256,))
        batch = Batch(rays[view, :, pixel].transpose(0, 1), photos[view, pixel], view=view)
        optimizer.zero_grad()
        loss_and_gradient([24, 32], CAMERA.K, 256, batch, arguments(network))
        set_learning_rate(optimizer, 1.0, 1, step)
        optimizer.step()
    assert quality() > before + 10


@pytest.mark.parametrize('masked', [False, True])
def test_a_held_out_view_is_aligned(masked):
    network, (true, *_) = with_poses(Ball()), cameras(3)
    photo = view_of(network, rays_of(true))
    image = (255 * photo.cpu().numpy()).round().astype(np.uint8).reshape(24, 32, 3)
    mask = None
    if masked:  # and what it leaves out is wrong
        mask = np.arange(32)[None] + np.zeros([24, 1]) < 20
        image[~mask] = 0
    given = moved(true, ERROR)
    network.requires_grad_(True)
    frames = ImageRenderer([24, 32, 40.0], CAMERA.K, None, arguments(network))
    state = torch.get_rng_state()
    found = frames.align(given.cpu().numpy(), CAMERA, image, mask)
    assert torch.get_rng_state().equal(state)
    assert frames.align(given.cpu().numpy(), CAMERA, image, mask).tobytes() == found.tobytes()
    assert network.poses.offsets.requires_grad and network.poses.offsets.grad is None
    before, after = (psnr(view_of(network, rays_of(pose)), photo)
                     for pose in (given, torch.from_numpy(found).to(DEVICE)))
    assert after > before + 10


@pytest.mark.parametrize('left_half, masked', [(False, False), (True, False), (True, True)])
def test_only_pixels_that_are_not_measured_align_a_view(left_half, masked, monkeypatch, recwarn):
    network, poses = with_poses(Ball()), np.stack([pose.cpu().numpy() for pose in cameras(3)])
    masks = np.ones([3, 24, 32], bool)
    masks[:, :12] = False
    scene = SimpleNamespace(poses=poses.copy(), cameras=[CAMERA] * 3, masks=masks if masked else None,
                            images=np.zeros([3, 24, 32, 3], np.uint8))
    frames, drawn = ImageRenderer([24, 32, 40.0], CAMERA.K, None, arguments(network)), []

    def find_offset(render, move, rays, target, corrects_colors):
        drawn.append((rays.shape[1], corrects_colors))
        return torch.tensor([[0, 0, 0, 1.0, 0, 0]])
    monkeypatch.setattr('training.frames.find_offset', find_offset)
    found = frames.align_views(scene, np.array([0, 2]), left_half)
    assert drawn == [(24 * 32 // (2 if left_half else 1) // (2 if masked else 1), left_half)] * 2
    np.testing.assert_allclose(found[:, :, 3] - poses[[0, 2]][:, :, 3], [[1, 0, 0]] * 2, atol=1e-6)
    assert np.array_equal(scene.poses, poses) and not recwarn.list


def test_each_view_has_its_own_offset(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('accel.poses.MAX_VIEWS', 5)
    assert run(*FAST_DEMO, *NO_OUTPUTS, '--refine_poses', '--basedir', tmp_path) == 2
    assert '--refine_poses: found 80 views from the first' in capsys.readouterr().err


def test_a_view_without_pixels_stays_where_it_is():
    frames = ImageRenderer([24, 32, 40.0], CAMERA.K, None, arguments(with_poses(Ball())))
    pose, nothing = cameras(1)[0].cpu().numpy(), np.zeros([24, 32], bool)
    assert frames.align(pose, CAMERA, np.zeros([24, 32, 3], np.uint8), nothing) is pose


def test_alignment_corrects_colors():
    """The photo is darker than the scene: its pose is found all the same."""
    network, (true, *_) = with_poses(Ball()), cameras(3)
    photo = view_of(network, rays_of(true)).view(24, 32, 3).cpu().numpy()
    image = (255 * (0.6 * photo + 0.1)).round().astype(np.uint8)
    frames = ImageRenderer([24, 32, 40.0], CAMERA.K, None, arguments(network))
    rgb, dark = (view_of(network, rays_of(torch.from_numpy(
        frames.align(moved(true, ERROR).cpu().numpy(), CAMERA, image, None, corrects)).to(DEVICE)))
        for corrects in (True, False))
    target = torch.from_numpy(photo).to(DEVICE).view(-1, 3)
    assert psnr(rgb, target) > psnr(dark, target) + 3


# --- runs ---------------------------------------------------------------------------------------------------

def test_poses_have_a_rate_of_their_own():
    network = with_poses(hash_nerf())
    optimizer = adam([*network.parameters()], 0.02, network.adam_options, network.poses, 1e-3)
    networks, offsets = optimizer.param_groups
    assert offsets['params'][0] is network.poses.offsets
    assert len(networks['params']) + len(offsets['params']) == len([*network.parameters()])
    assert (networks['eps'], offsets['eps']) == (1e-15, 1e-8)
    assert set_learning_rate(optimizer, 0.01, 1, 1) == networks['lr'] == 0.01
    assert offsets['lr'] == pytest.approx(5e-4)
    other = adam([*network.parameters()], 0.02, network.adam_options, network.poses, 2e-3)
    other.load_state_dict(optimizer.state_dict())  # of a run with another rate
    set_learning_rate(other, 0.02, 1, 1)
    assert other.param_groups[1]['lr'] == pytest.approx(2e-3)


def test_without_the_option_there_is_one_group():
    network = hash_nerf().to(DEVICE)
    (group,) = adam([*network.parameters()], 0.02, network.adam_options).param_groups
    assert 'lrate_scale' not in group and len(group['params']) == len([*network.parameters()])
    assert not any('poses' in key for key in network.state_dict())


def test_a_network_that_starts_again_drops_its_poses():
    network = with_poses(hash_nerf())
    torch.nn.init.normal_(network.poses.offsets)
    network.reset_parameters()
    assert not network.poses.offsets.any()


def test_a_run_is_resumed_exactly(tmp_path):
    assert_killed_and_resumed_is_undisturbed(tmp_path, *PROPOSAL_DEMO, '--contract', '--refine_poses')
    (path,) = tmp_path.rglob('whole/*/000060.tar')
    assert read_state(path)['network_fn_state_dict']['poses.offsets'].any()


@pytest.mark.parametrize('appearance', [False, True])
def test_metrics_name_the_protocol(tmp_path, capsys, monkeypatch, appearance):
    monkeypatch.setattr(alignment, 'ALIGNMENT_STEPS', 2)
    protocol = ('right half, after fitting pose and colours to the left' if appearance
                else 'whole views, after fitting their poses to them')
    arguments = [*FAST_DEMO, '--no-random_bkgd', *NO_OUTPUTS, '--testskip', 100, '--basedir', tmp_path,
                 '--refine_poses', *(['--appearance'] if appearance else [])]
    assert run(*arguments, '--N_iters', 2, '--i_testset', 2) == 0
    (path,) = tmp_path.rglob('metrics.json')
    assert json.loads(path.read_text())['measured'] == protocol
    assert f'({protocol})' in capsys.readouterr().out
    assert run(*arguments, '--render_only', '--render_test') == 0
    (again,) = tmp_path.rglob('renderonly_test_000002/metrics.json')
    assert json.loads(again.read_text())['mean']['psnr'] == json.loads(path.read_text())['mean']['psnr']
