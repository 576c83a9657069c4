"""Bounds of a scene: the box around what cameras see, and the visual hull of silhouettes."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_devices import DEVICE, Random

from run_nerf_helpers import pixel_rays
from scenes.bounds import box_of_rays, find_bounds, num_true, summed_area_table
from scenes.cameras import Camera

# Centre of the ball in the test scene.
BALL = torch.tensor([0.2, 0, 0])


def ball_scene(radius=0.5, views=20, size=64, alpha=True):
    """A ball at (0.2, 0, 0), seen by cameras on a sphere of radius 4 around the origin; only what bounds
    need."""
    random = np.random.RandomState(0)
    back = random.randn(views, 3)
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    right = np.cross([0.0, 0, 1], back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    poses = np.stack([right, np.cross(back, right), back, 4 * back], -1).astype(np.float32)
    K = np.array([[size * 1.2, 0, size / 2], [0, size * 1.2, size / 2], [0, 0, 1]])
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing='ij')
    alphas = []
    for pose in torch.from_numpy(poses).to(DEVICE):
        rays_o, rays_d = pixel_rays(x, y, K, pose)
        viewdirs = torch.nn.functional.normalize(rays_d, dim=-1)
        to_ball = BALL - rays_o
        to_ray = to_ball - (to_ball * viewdirs).sum(-1, keepdim=True) * viewdirs
        in_front = torch.linalg.vector_norm(to_ray, dim=-1) < radius
        alphas.append(in_front.cpu().numpy().astype(np.uint8) * 255)
    return SimpleNamespace(poses=poses, near=2.0, far=6.0, i_train=np.arange(views),
                           cameras=[Camera(size, size, K)] * views,
                           alphas=np.stack(alphas) if alpha else None)


def is_possible(points, aabb, possible):
    """Whether points [N, 3] lie in the box and in a possible cell of it, [N]."""
    inside = ((points > aabb[0]) & (points < aabb[1])).all(-1)
    cells = ((points - aabb[0]) / (aabb[1] - aabb[0]) * len(possible)).long().clamp(0, len(possible) - 1)
    return inside & possible[cells.unbind(-1)]


def test_silhouettes_bound_the_scene():
    aabb, possible = find_bounds(ball_scene(), False, 32, device=DEVICE)
    assert (aabb[0] <= torch.tensor([-0.3, -0.5, -0.5])).all()
    assert (aabb[1] >= torch.tensor([0.7, 0.5, 0.5])).all()
    assert ((aabb[1] - aabb[0]) < 1.8).all()
    centers = torch.stack(torch.meshgrid(*[torch.arange(32) + 0.5] * 3, indexing='ij'), -1).reshape(-1, 3)
    points = aabb[0] + centers / 32 * (aabb[1] - aabb[0])
    in_ball = torch.linalg.vector_norm(points - BALL, dim=-1) < 0.5
    assert possible.flatten()[in_ball].all() and possible.float().mean() < 0.7


def test_rectangles_are_counted():
    mask = Random(0).rand(7, 9) > 0.5
    rectangles = [(0, 0, 9, 7), (2, 3, 5, 4), (8, 6, 9, 7), (4, 4, 4, 4), (9, 7, 9, 7)]
    first, last = torch.tensor(rectangles, dtype=torch.int32).T.view(2, 2, -1)
    expected = [mask[y0:y1, x0:x1].sum().item() for x0, y0, x1, y1 in rectangles]
    assert num_true(summed_area_table(mask), first, last).tolist() == expected


def test_cells_in_parts_are_cells_at_once(monkeypatch):
    aabb, possible = find_bounds(ball_scene(), False, 16)
    monkeypatch.setattr('scenes.bounds.CELLS_AT_ONCE', 1000)
    aabb_in_parts, possible_in_parts = find_bounds(ball_scene(), False, 16)
    assert aabb.equal(aabb_in_parts) and possible.equal(possible_in_parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_finds_the_same_bounds():
    aabb, possible = find_bounds(ball_scene(), False, 32)
    found_aabb, found = find_bounds(ball_scene(), False, 32, device='cuda')
    assert found_aabb.is_cuda and found.is_cuda
    torch.testing.assert_close(found_aabb.cpu(), aabb)
    assert (found.cpu() != possible).float().mean() < 0.001  # a GPU rounds differently


def test_without_alpha_the_box_holds_everything_in_view():
    scene = ball_scene(alpha=False)
    aabb, possible = find_bounds(scene, False, 16, device=DEVICE)
    assert possible is None and aabb.equal(box_of_rays(scene, False, scene.i_train).to(DEVICE))
    x, y = torch.rand(2, 20) * 64
    for t in (2.0, 6.0):
        for pose in torch.from_numpy(scene.poses).to(DEVICE):
            rays_o, rays_d = pixel_rays(x, y, scene.cameras[0].K, pose)
            assert ((rays_o + t * rays_d > aabb[0]) & (rays_o + t * rays_d < aabb[1])).all()


def test_a_given_box_is_used():
    aabb, possible = find_bounds(ball_scene(), False, 16, [-1, -2, -3, 1, 2, 3])
    assert aabb.tolist() == [[-1, -2, -3], [1, 2, 3]] and possible.any() and not possible.all()


def test_a_given_box_keeps_cells_that_few_views_see():
    """An object in the corner of one image, where no other camera looks."""
    scene = ball_scene()
    scene.alphas[0][:6, :6] = 255
    rays_o, rays_d = pixel_rays(torch.tensor(2.5), torch.tensor(2.5), scene.cameras[0].K,
                                torch.from_numpy(scene.poses[0]).to(DEVICE))
    points = rays_o + torch.linspace(2.5, 5.5, 50)[:, None] * rays_d
    assert is_possible(points, *find_bounds(scene, False, 32, [-4, -4, -4, 4, 4, 4], DEVICE)).any()
    assert not is_possible(points, *find_bounds(scene, False, 32, device=DEVICE)).any()


def test_fully_transparent_images_leave_the_box_of_the_cameras():
    scene = ball_scene(radius=0.0)
    aabb, possible = find_bounds(scene, False, 16)
    assert possible is None and aabb.equal(box_of_rays(scene, False, scene.i_train))
