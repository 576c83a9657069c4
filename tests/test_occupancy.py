"""Occupancy grid, packed samples, bounds: compiled kernels against plain twins, plain twins against loops."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel import occupancy
from accel.bounds import box_of_rays, find_bounds
from accel.compiled import compiled
from accel.grid_rays import GridBatches, render_rays_in_grid
from accel.occupancy import ALL_CELLS_UNTIL, EVERY, THRESHOLD, OccupancyGrid
from accel.packed import LEAST_TRANSMITTANCE, composite, composite_onto, composite_plain
from run_nerf import raw2outputs
from run_nerf_helpers import pixel_rays

needs_compiler = pytest.mark.skipif(compiled('occupancy') is None, reason='no C compiler')
both = pytest.mark.parametrize('is_plain', [False, True], indirect=True, ids=['compiled', 'plain'])


@pytest.fixture
def is_plain(request, monkeypatch):
    """Whether the plain twins work in place of the kernels."""
    if request.param:
        monkeypatch.setattr('accel.occupancy.compiled', lambda name: None)
        monkeypatch.setattr('accel.packed.compiled', lambda name: None)
    return request.param


def grid_of(share, resolution=20, seed=0):
    """A grid in which `share` of the cells are occupied, in lumps."""
    grid = OccupancyGrid(resolution)
    grid.restrict([[-1.0, -2, 0], [1.5, 1, 1]])
    noise = torch.rand([1, 1] + [resolution] * 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0]
    grid.occupied.copy_(noise < torch.quantile(noise, share) if share < 1 else torch.ones_like(noise))
    return grid


def rays_at(grid, N, seed=0):
    """Rays from around and from within the box, some along an axis, some past it."""
    random = torch.Generator().manual_seed(seed)
    rays_o = 4 * torch.rand(N, 3, generator=random) - 2
    rays_d = torch.rand(N, 3, generator=random) - 0.5 - 0.3 * rays_o
    rays_d[::7, 0] = 0
    rays_d[::11, 1:] = 0
    rays_d[::11, 0] = 1
    return rays_o, rays_d


def marched(grid, rays_o, rays_d, step=0.03, near=0.1, far=6.0, **options):
    N = len(rays_o)
    lattice, count = grid.lattice(rays_o, rays_d, torch.full([N], near), torch.full([N], far), step, torch.full([N], 0.5))
    return lattice, count, grid.march(rays_o, rays_d, lattice, count, **options)


def to_cell_border(grid, points):
    """How far points are from a face of their cell, in cells."""
    place = (points - grid.aabb[0]) / (grid.aabb[1] - grid.aabb[0]) * grid.resolution
    return (place - place.round()).abs().amin(-1)


@needs_compiler
@given(share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), resolution=st.sampled_from([5, 16, 20]), seed=st.integers(0, 99),
       most=st.sampled_from([3, 2 ** 14]))
@settings(max_examples=25, deadline=None)
def test_march_equals_plain_twin(share, resolution, seed, most):
    grid = grid_of(share, resolution, seed)
    rays_o, rays_d = rays_at(grid, 200, seed)
    lattice, count, (t, ray_index, first, resume) = marched(grid, rays_o, rays_d, most=most)
    other_t, _, other_first, other_resume = grid.march_plain(rays_o, rays_d, lattice, count, torch.zeros_like(count), most)
    for n in range(200):
        ours, theirs = t[first[n]:first[n + 1]], other_t[other_first[n]:other_first[n + 1]]
        if len(ours) == len(theirs) and torch.allclose(ours, theirs, atol=1e-6):
            assert resume[n] == other_resume[n]
            continue
        # rounding decides to which cell a point on a face belongs; with `most` what follows is shifted too
        odd = [x for x in torch.cat([ours, theirs]) if (ours - x).abs().min().item() > 1e-6 or
               (theirs - x).abs().min().item() > 1e-6] if len(ours) and len(theirs) else [*ours, *theirs]
        points = rays_o[n] + rays_d[n] * torch.stack(odd)[:, None]
        assert to_cell_border(grid, points).min() < 1e-4
        assert most < 2 ** 14 or to_cell_border(grid, points).max() < 1e-4
    assert ray_index.equal(torch.arange(200).repeat_interleave(first.diff()))


@both
def test_march_equals_a_loop(is_plain):
    grid = grid_of(0.2, 10)
    rays_o, rays_d = rays_at(grid, 60)
    lattice, count, (t, _, first, _) = marched(grid, rays_o, rays_d)
    low, high, G = *grid.aabb.numpy().astype(np.float64), grid.resolution
    for n in range(60):
        found, o, d = [], rays_o[n].numpy().astype(np.float64), rays_d[n].numpy().astype(np.float64)
        start, dt, offset = lattice[n].tolist()
        assert math.isclose(dt * np.linalg.norm(d), 0.03, rel_tol=1e-5)
        for k in range(-3, 500):
            here = start + (k + offset) * dt
            place = (o + here * d - low) / (high - low) * G
            inside = ((place >= 0) & (place < G)).all() and 0.1 <= here < 6
            sure = np.abs(place - np.round(place)).min() > 1e-3
            if inside and sure:
                assert 0 <= k < count[n]
                if grid.occupied[tuple(place.astype(int))]:
                    found.append(here)
            elif inside:
                found.append(None)  # on a face: it may be found or not
        certain = np.array([x for x in found if x is not None])
        ours = t[first[n]:first[n + 1]].numpy()
        assert all(np.abs(ours - x).min() < 1e-4 for x in certain)
        assert len(ours) <= len(found)


@both
def test_marching_in_pieces_finds_the_same(is_plain):
    grid = grid_of(0.3)
    rays_o, rays_d = rays_at(grid, 100)
    lattice, count, (t, _, first, _) = marched(grid, rays_o, rays_d)
    pieces, begin = [[] for _ in range(100)], torch.zeros_like(count)
    while (begin < count).any():
        some, _, of, begin = grid.march(rays_o, rays_d, lattice, count, begin, 7)
        assert of.diff().max() <= 7
        for n in range(100):
            pieces[n] += some[of[n]:of[n + 1]].tolist()
    assert pieces == [t[first[n]:first[n + 1]].tolist() for n in range(100)]


@both
def test_odd_rays_find_nothing(is_plain):
    grid = grid_of(1.0)
    rays_o = torch.tensor([[9.0, 9, 9], [0, 0, 0.5], [math.nan, 0, 0], [9, 0, 0.5], [0, 0, 0.5]])
    rays_d = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [math.inf, 0, 0]])
    _, count, (t, ray_index, first, _) = marched(grid, rays_o, rays_d)
    assert not count.any() and not len(t) and not len(ray_index) and first.tolist() == [0] * 6


# --- compositing ---

def packed(N, seed, density=30.0):
    """Samples of N rays, some of which have none."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 40, (N,), generator=random) * (torch.rand(N, generator=random) > 0.3)
    first = torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])
    M = int(first[-1])
    raw = torch.randn(M, 4, generator=random) * torch.tensor([1, 1, 1, density])
    t = torch.rand(M, generator=random) + torch.arange(M)
    return raw, t, torch.arange(N).repeat_interleave(numbers), 0.01 + 0.02 * torch.rand(N, generator=random), first


@needs_compiler
@given(N=st.integers(0, 50), seed=st.integers(0, 999), density=st.sampled_from([1.0, 30.0, 1000.0]))
@settings(max_examples=40, deadline=None)
def test_composite_equals_plain_twin(N, seed, density):
    raw, t, ray_index, length, first = packed(N, seed, density)
    results = []
    for function in (composite, composite_plain):
        leaf = raw.clone().requires_grad_()
        out = function(leaf, t, ray_index, length, first)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        results.append((out.detach(), torch.autograd.grad((out * weight).sum(), leaf)[0]))
    (out, grad), (out_plain, grad_plain) = results
    torch.testing.assert_close(out, out_plain, rtol=1e-5, atol=1e-5)
    scale = grad_plain.abs().amax().item() if len(raw) else 1.0
    torch.testing.assert_close(grad, grad_plain, rtol=1e-5, atol=1e-5 * scale)


@both
def test_composite_equals_raw2outputs(is_plain):
    """With one step length for all, and a transparent sample at the end, whose interval is endless there."""
    raw = torch.randn(20, 16, 4)
    raw[:, -1, 3] = -1
    z_vals = (0.1 * torch.arange(16.0)).expand(20, 16)
    rays_d = torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)
    rgb, _, acc, _, depth = raw2outputs(raw, z_vals, rays_d)
    out = composite(raw.reshape(-1, 4), z_vals.reshape(-1).contiguous(), torch.arange(20).repeat_interleave(16),
                    torch.full([20], 0.1), torch.arange(0, 321, 16))
    torch.testing.assert_close(out, torch.cat([rgb, acc[:, None], depth[:, None]], -1), rtol=1e-5, atol=1e-5)


@both
def test_nothing_counts_behind_what_is_opaque(is_plain):
    raw = torch.full([5, 4], 3.0).requires_grad_()
    out = composite(raw, torch.arange(5.0), torch.zeros(5, dtype=torch.long), torch.tensor([2.0]), torch.tensor([0, 5]))
    seen = math.ceil(-math.log(LEAST_TRANSMITTANCE) / 6)
    grad = torch.autograd.grad(out.sum(), raw)[0]
    assert (grad[:seen].abs().sum(-1) > 0).all() and (grad[seen:] == 0).all()


@both
def test_compositing_in_pieces(is_plain):
    raw, t, ray_index, length = torch.randn(8, 4), torch.arange(8.0), torch.zeros(8, dtype=torch.long), torch.tensor([0.3])
    whole = composite(raw, t, ray_index, length, torch.tensor([0, 8]))
    out, passed = torch.zeros(1, 5), torch.zeros(1)
    for k in (0, 3):
        part = slice(k, 3 if k == 0 else 8)
        first = torch.tensor([0, part.stop - k])
        out, passed = composite_onto(raw[part], t[part], ray_index[part], length, first, passed, out)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


# --- the grid and what it looks at ---

def blob(points):
    """A smooth density: no more than a few at the middle, nothing far away."""
    return 40 * torch.exp(-(points ** 2).sum(-1) / 0.08)


def looked(grid, density, steps=ALL_CELLS_UNTIL, step_length=0.02):
    for step in range(0, steps, EVERY):
        grid.look(density, step_length, torch.Generator().manual_seed(step), everywhere=step < ALL_CELLS_UNTIL)
    return grid


def test_no_cell_is_skipped_that_holds_anything():
    """Sampled four times as densely as the grid's cells are, each way, those skipped have less than the threshold."""
    grid = OccupancyGrid(32)
    grid.restrict([[-1.0, -1, -1], [1, 1, 1]])
    looked(grid, blob)
    skipped = (~grid.occupied).flatten().nonzero()[:, 0]
    assert 0.3 < len(skipped) / 32 ** 3 < 0.99
    for i in range(64):
        within = (torch.tensor([i // 16, i // 4 % 4, i % 4]) + 0.5) / 4
        assert (blob(grid.points_in(skipped, within)) * 0.02).max() <= THRESHOLD


def test_a_grid_forgets_what_is_gone():
    grid = looked(looked(OccupancyGrid(16), blob), lambda points: blob(points - 0.5))
    at = (torch.tensor([[0.5, 0.5, 0.5], [-0.3, -0.3, -0.3]]) + 1) * 8
    assert grid.occupied[tuple(at.long().T)].tolist() == [True, False]


def test_an_empty_scene_leaves_the_grid_full():
    grid = looked(OccupancyGrid(8), lambda points: torch.zeros(len(points)))
    assert grid.occupied.all()


def test_impossible_cells_stay_empty():
    possible = torch.zeros(16, 16, 16, dtype=torch.bool)
    possible[4:9] = True
    grid = OccupancyGrid(16)
    grid.restrict([[-1.0, -1, -1], [1, 1, 1]], possible)
    assert grid.occupied.equal(possible)
    looked(grid, lambda points: torch.full([len(points)], 9.0))
    assert grid.occupied.equal(possible)
    grid.reset_parameters()
    assert grid.occupied.equal(possible)


def test_looks_after_the_first_are_bounded(monkeypatch):
    monkeypatch.setattr(occupancy, 'MOST_CELLS', 512)
    seen = []

    def density(points):
        seen.append(len(points))
        return blob(points)
    grid = looked(OccupancyGrid(16), density)
    assert sum(seen) == 16 ** 3 * (ALL_CELLS_UNTIL // EVERY)
    seen.clear()
    grid.look(density, 0.02, torch.Generator(), everywhere=False)
    assert sum(seen) == 512


# --- rays ---

class Fog(torch.nn.Module):
    """Raw outputs that are the same everywhere."""

    def __init__(self, density, grid):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.tensor([0.0, 1.0, -1.0, density]))
        self.occupancy = grid


def query(pts, viewdirs, network):
    return network.raw.expand(*pts.shape[:-1], 4)


@both
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_rendering_equals_training_and_the_formula(is_plain, share):
    grid = grid_of(share)
    rays_o, rays_d = rays_at(grid, 300)
    rays = torch.cat([rays_o, rays_d, torch.full([300, 1], 0.1), torch.full([300, 1], 6.0), rays_d], -1)
    fog = Fog(2.0, grid)
    trained = render_rays_in_grid(rays, fog, query, 128, white_bkgd=True)
    trained['rgb_map'].sum().backward()  # also where there is no sample at all
    with torch.no_grad():
        rendered = render_rays_in_grid(rays, fog, query, 128, white_bkgd=True)
    for key, value in rendered.items():
        torch.testing.assert_close(value, trained[key].detach(), rtol=1e-4, atol=1e-5)
    _, _, (_, _, first, _) = marched(grid, rays_o, rays_d, grid.step_length(128))
    acc = 1 - torch.exp(-2.0 * grid.step_length(128) * first.diff())
    torch.testing.assert_close(rendered['acc_map'], acc, rtol=1e-4, atol=LEAST_TRANSMITTANCE)
    colors = torch.sigmoid(torch.tensor([0.0, 1.0, -1.0])) * acc[:, None] + 1 - acc[:, None]
    torch.testing.assert_close(rendered['rgb_map'], colors, rtol=1e-4, atol=LEAST_TRANSMITTANCE)
    assert torch.isfinite(rendered['disp_map']).all() and (rendered['disp_map'][acc == 0] == 0).all()


def test_batches_come_to_the_number_of_samples():
    grid = grid_of(0.3)
    fog = Fog(2.0, grid)
    rays_o, rays_d = rays_at(grid, 20000)

    class Batches:
        N_rand, share = 20000, 1.0

        def draw(self, step):
            return torch.stack([rays_o[:self.N_rand], rays_d[:self.N_rand]]), None
    batches = GridBatches(Batches(), {'network_fn': fog, 'network_query_fn': query, 'N_samples': 128, 'use_viewdirs': False},
                          5000, 0)
    for step in range(1, 5):
        (o, d), _ = batches.draw(step)
        ends = torch.tensor([0.1, 6.0]).expand(len(o), 2)
        render_rays_in_grid(torch.cat([o, d, ends], -1), fog, query, 128, perturb=1.0)
        samples = len(o) * grid.samples_of_a_ray.item()
    assert 0.7 * 5000 < samples < 1.4 * 5000
    grid.samples_of_a_ray.zero_()
    grid.occupied.zero_()
    batches.draw(5)
    assert batches.batches.N_rand <= 20000


# --- bounds ---

def ball_scene(radius=0.5, views=20, size=64, alpha=True):
    """Cameras on a sphere around a ball at (0.2, 0, 0)."""
    random = np.random.RandomState(0)
    back = random.randn(views, 3)
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    right = np.cross([0.0, 0, 1], back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    poses = np.stack([right, np.cross(back, right), back, 4 * back], -1).astype(np.float32)
    K = np.array([[size * 1.2, 0, size / 2], [0, size * 1.2, size / 2], [0, 0, 1]])
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing='ij')
    alphas = []
    for pose in torch.from_numpy(poses):
        rays_o, rays_d = pixel_rays(x, y, K, pose)
        to = torch.tensor([0.2, 0, 0]) - rays_o
        along = torch.nn.functional.normalize(rays_d, dim=-1)
        off = to - (to * along).sum(-1, keepdim=True) * along
        alphas.append((torch.linalg.vector_norm(off, dim=-1) < radius).numpy().astype(np.uint8) * 255)
    return SimpleNamespace(H=size, W=size, K=K, poses=poses, near=2.0, far=6.0, i_train=np.arange(views),
                           alphas=np.stack(alphas) if alpha else None)


def test_silhouettes_bound_the_scene():
    scene = ball_scene()
    aabb, possible = find_bounds(scene, False, 32)
    assert (aabb[0] <= torch.tensor([-0.3, -0.5, -0.5])).all() and (aabb[1] >= torch.tensor([0.7, 0.5, 0.5])).all()
    assert ((aabb[1] - aabb[0]) < 1.8).all()
    grid = OccupancyGrid(32)
    grid.restrict(aabb, possible)
    cells = torch.arange(32 ** 3)
    in_ball = torch.linalg.vector_norm(grid.points_in(cells, torch.full([len(cells), 3], 0.5)) - torch.tensor([0.2, 0, 0]),
                                       dim=-1) < 0.5
    assert possible.flatten()[in_ball].all() and possible.float().mean() < 0.7


def test_without_alpha_the_box_holds_all_that_is_seen():
    scene = ball_scene(alpha=False)
    aabb, possible = find_bounds(scene, False, 16)
    assert possible is None and aabb.equal(box_of_rays(scene, False, scene.poses))
    x, y = torch.rand(2, 20) * 64
    for t in (2.0, 6.0):
        for pose in torch.from_numpy(scene.poses):
            rays_o, rays_d = pixel_rays(x, y, scene.K, pose)
            assert ((rays_o + t * rays_d > aabb[0]) & (rays_o + t * rays_d < aabb[1])).all()


def test_a_box_that_is_given_is_taken():
    aabb, possible = find_bounds(ball_scene(), False, 16, [-1, -2, -3, 1, 2, 3])
    assert aabb.tolist() == [[-1, -2, -3], [1, 2, 3]] and possible.any() and not possible.all()


def test_a_box_of_ones_own_keeps_what_few_views_see():
    """Something in the corner of one image, where no other camera looks."""
    scene = ball_scene()
    scene.alphas[0][:6, :6] = 255
    rays_o, rays_d = pixel_rays(torch.tensor(2.5), torch.tensor(2.5), scene.K, torch.from_numpy(scene.poses[0]))
    points = rays_o + torch.linspace(2.5, 5.5, 50)[:, None] * rays_d

    def kept(aabb):
        grid = OccupancyGrid(32)
        grid.restrict(*find_bounds(scene, False, 32, aabb))
        inside = ((points > grid.aabb[0]) & (points < grid.aabb[1])).all(-1)
        return (grid.holds(points) & inside).sum()
    assert kept([-4, -4, -4, 4, 4, 4]) > 0 == kept(None)


def test_images_of_nothing_leave_the_box_of_the_cameras():
    scene = ball_scene(radius=0.0)
    aabb, possible = find_bounds(scene, False, 16)
    assert possible is None and aabb.equal(box_of_rays(scene, False, scene.poses))
