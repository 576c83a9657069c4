"""Occupancy grid: the compiled march against its reference implementation, that against a loop; updates."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_grids import (  # noqa: F401
    bounded_rays,
    each_implementation,
    each_kernel,
    implementation,
    march,
    occupied_grid,
    rays_around,
)

from accel import occupancy
from accel.grid_renderer import WARMUP_UPDATES
from accel.occupancy import IMPOSSIBLE, MAX_CANDIDATES, OCC_THRE, OccupancyGrid

both_implementations = pytest.mark.usefixtures('each_implementation')


# --- marching -----------------------------------------------------------------------------------------------

def distance_to_cell_border(grid, points):
    """Distance of points from the nearest face of their cell, in cells."""
    place = (points - grid.aabb[0]) / (grid.aabb[1] - grid.aabb[0]) * grid.resolution
    return (place - place.round()).abs().amin(-1)


@each_kernel
@given(share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), resolution=st.sampled_from([5, 16, 20]),
       seed=st.integers(0, 99), max_samples=st.sampled_from([3, MAX_CANDIDATES]), some=st.booleans())
@settings(max_examples=25, deadline=None)
def test_march_equals_the_reference_implementation(kernels, share, resolution, seed, max_samples, some):
    """Of all rays, and of a part of them from where an earlier march has ended."""
    grid = occupied_grid(share, resolution, seed)
    rays_o, rays_d = rays_around(200, seed)
    rays, alive = bounded_rays(rays_o, rays_d), torch.arange(200)
    resume, other_resume = (torch.zeros(200, dtype=torch.long) for _ in range(2))
    with implementation(kernels):
        spacing, num_candidates = grid.candidates(rays, 0.03, torch.full([200], 0.5))
        if some:
            alive = torch.arange(0, 200, 3)
            grid.march(rays, spacing, num_candidates, resume, None, 5)
            other_resume.copy_(resume)
        t, ray_indices, offsets = grid.march(rays, spacing, num_candidates, resume, alive if some else None,
                                             max_samples)
    other_t, _, other_offsets = grid.march_reference(rays, spacing, num_candidates, other_resume, alive,
                                                     max_samples)
    assert ray_indices.equal(alive.repeat_interleave(offsets.diff()))
    for a, n in enumerate(alive.tolist()):
        ours, theirs = t[offsets[a]:offsets[a + 1]], other_t[other_offsets[a]:other_offsets[a + 1]]
        if len(ours) == len(theirs) and torch.allclose(ours, theirs, atol=1e-6):
            assert resume[n] == other_resume[n]
            continue
        # rounding decides to which cell a point on a face belongs; `max_samples` then shifts all points
        # behind it
        odd = [x for x in torch.cat([ours, theirs]) if (ours - x).abs().min().item() > 1e-6 or
               (theirs - x).abs().min().item() > 1e-6] if len(ours) and len(theirs) else [*ours, *theirs]
        points = rays_o[n] + rays_d[n] * torch.stack(odd)[:, None]
        assert distance_to_cell_border(grid, points).min() < 1e-4
        assert max_samples < MAX_CANDIDATES or distance_to_cell_border(grid, points).max() < 1e-4


@each_kernel
def test_candidates_equal_the_reference_implementation(kernels):
    grid, rays, jitter = occupied_grid(0.3), bounded_rays(*rays_around(2000)), torch.rand(2000)
    with implementation(kernels):
        spacing, num_candidates = grid.candidates(rays, 0.03, jitter)
    expected, expected_number = grid.candidates_reference(rays, 0.03, jitter)
    hit = expected_number > 0
    torch.testing.assert_close(spacing[hit], expected[hit], rtol=1e-5, atol=1e-5)
    assert (num_candidates - expected_number).abs().max() <= 1, 'but for rounding'
    assert (num_candidates == expected_number).float().mean() > 0.99 and 0.2 < hit.float().mean() < 0.9


@both_implementations
def test_march_equals_a_loop():
    grid = occupied_grid(0.2, 10)
    rays_o, rays_d = rays_around(60)
    spacing, num_candidates, (t, _, offsets) = march(grid, rays_o, rays_d)
    low, high, G = *grid.aabb.cpu().numpy().astype(np.float64), grid.resolution
    for n in range(60):
        found, o, d = [], *(rays[n].cpu().numpy().astype(np.float64) for rays in (rays_o, rays_d))
        start, dt, jitter = spacing[n].tolist()
        assert math.isclose(dt * np.linalg.norm(d), 0.03, rel_tol=1e-5)
        for k in range(-3, 500):
            t_k = start + (k + jitter) * dt
            place = (o + t_k * d - low) / (high - low) * G
            inside = ((place >= 0) & (place < G)).all() and 0.1 <= t_k < 6
            off_faces = np.abs(place - np.round(place)).min() > 1e-3
            if inside and off_faces:
                assert 0 <= k < num_candidates[n]
                if grid.occupied[tuple(place.astype(int))]:
                    found.append(t_k)
            elif inside:
                found.append(None)  # on a face: either cell is right
        certain = np.array([x for x in found if x is not None])
        ours = t[offsets[n]:offsets[n + 1]].cpu().numpy()
        assert all(np.abs(ours - x).min() < 1e-4 for x in certain)
        assert len(ours) <= len(found)


@both_implementations
def test_marching_in_parts_finds_the_same_samples():
    grid = occupied_grid(0.3)
    rays_o, rays_d = rays_around(100)
    spacing, num_candidates, (t, _, offsets) = march(grid, rays_o, rays_d)
    parts, begin = [[] for _ in range(100)], torch.zeros_like(num_candidates)
    while (begin < num_candidates).any():
        some, _, ends = grid.march(bounded_rays(rays_o, rays_d), spacing, num_candidates, begin,
                                   max_samples=7)
        assert ends.diff().max() <= 7
        for n in range(100):
            parts[n] += some[ends[n]:ends[n + 1]].tolist()
    assert parts == [t[offsets[n]:offsets[n + 1]].tolist() for n in range(100)]


@both_implementations
def test_degenerate_rays_have_no_samples():
    grid = occupied_grid(1.0)
    rays_o = torch.tensor([[9.0, 9, 9], [0, 0, 0.5], [math.nan, 0, 0], [9, 0, 0.5], [0, 0, 0.5]])
    rays_d = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [math.inf, 0, 0]])
    _, num_candidates, (t, ray_indices, offsets) = march(grid, rays_o, rays_d)
    assert not num_candidates.any() and not len(t) and not len(ray_indices) and offsets.tolist() == [0] * 6


@both_implementations
def test_no_rays_have_no_samples():
    rays_o, rays_d = rays_around(0)
    *_, (t, ray_indices, offsets) = march(occupied_grid(0.3), rays_o, rays_d)
    assert not len(t) and not len(ray_indices) and offsets.tolist() == [0]


def test_the_reference_implementation_marches_in_parts(monkeypatch):
    grid, (rays_o, rays_d) = occupied_grid(0.3), rays_around(100)
    spacing, num_candidates, _ = march(grid, rays_o, rays_d)
    arguments = bounded_rays(rays_o, rays_d), spacing, num_candidates, None, None, MAX_CANDIDATES
    whole = grid.march_reference(*arguments)
    monkeypatch.setattr(occupancy, 'MAX_LOOKUPS', 1000)
    assert all(torch.equal(*pair) for pair in zip(whole, grid.march_reference(*arguments)))


@both_implementations
def test_rays_hit_the_grid_where_they_cross_an_occupied_cell():
    """Compared with points in steps of a 100th of a cell; a corner that is cut may be missed."""
    grid, (rays_o, rays_d) = occupied_grid(0.2), rays_around(1000)
    rays_o, rays_d = rays_o.clamp(-0.9, 0.9).abs(), torch.nn.functional.normalize(rays_d, dim=-1)
    near, far = torch.zeros(1000, 1), torch.full([1000, 1], 0.4)
    found = grid.may_hit(torch.cat([rays_o, rays_d, near, far], -1))
    cell = ((grid.aabb[1] - grid.aabb[0]) / grid.resolution).amin()
    points = rays_o[:, None] + torch.arange(0, 0.4, cell / 100)[:, None] * rays_d[:, None]  # [1000, K, 3]
    leaves = ((points < grid.aabb[0]) | (points > grid.aabb[1])).any(-1).any(-1)
    occupied = grid.maybe_occupied(points).sum(-1)
    assert leaves.sum() > 50 and (occupied[~leaves] > 60).sum() > 50 and (occupied[~leaves] == 0).sum() > 50
    assert found[leaves].all(), 'what is outside of the box is not known'
    assert found[~leaves & (occupied > 60)].all() and not found[~leaves & (occupied == 0)].any()


# --- cells --------------------------------------------------------------------------------------------------

def test_points_are_in_their_cells():
    grid, cells = occupied_grid(0.4, resolution=7), torch.arange(7 ** 3)
    for within in (0.5, torch.tensor([0.1, 0.5, 0.9]), 0.01 + 0.98 * torch.rand(7 ** 3, 3)):
        assert grid.maybe_occupied(grid.cell_points(cells, within)).equal(grid.occupied.flatten())
    for cell, corner in ((0, 0), (-1, 1)):
        assert grid.cell_points(cells[cell][None], float(corner)).allclose(grid.aabb[corner])


def test_outside_of_the_box_anything_may_be():
    grid = occupied_grid(0.0)
    points = torch.tensor([[0.0, 0, 0.5], [1.6, 0, 0.5], [0, -2.1, 0.5], [0, 0, 2], [math.nan, 0, 0]])
    assert grid.maybe_occupied(points).tolist() == [False, True, True, True, True]


def test_step_length_divides_the_diagonal_of_the_box():
    grid = OccupancyGrid(4)
    grid.set_aabb([[0.0, 0, 0], [2, 3, 6]])
    assert grid.step_size(14) == pytest.approx(0.5)


# --- updates ------------------------------------------------------------------------------------------------

def blob(points):
    """A smooth density: 40 at the origin, almost none at a distance of 1."""
    return 40 * torch.exp(-(points ** 2).sum(-1) / 0.08)


def update(grid, density, num_updates=WARMUP_UPDATES, step_size=0.02):
    """Update the grid as training does at first."""
    for number in range(num_updates):
        torch.manual_seed(number)
        grid.update(density, step_size, all_cells=True)
    return grid


def test_no_cell_is_skipped_that_holds_anything():
    """Evaluated in 4 points along each side, skipped cells have less than the threshold."""
    grid = OccupancyGrid(32)
    grid.set_aabb([[-1.0, -1, -1], [1, 1, 1]])
    update(grid, blob)
    skipped = (~grid.occupied).flatten().nonzero()[:, 0]
    assert 0.3 < len(skipped) / 32 ** 3 < 0.99
    for i in range(64):
        within = (torch.tensor([i // 16, i // 4 % 4, i % 4]) + 0.5) / 4
        assert (blob(grid.cell_points(skipped, within)) * 0.02).max() <= OCC_THRE


def test_a_grid_follows_a_density_that_moves():
    grid = update(update(OccupancyGrid(16), blob), lambda points: blob(points - 0.5))
    at = (torch.tensor([[0.5, 0.5, 0.5], [-0.3, -0.3, -0.3]]) + 1) * 8
    assert grid.occupied[tuple(at.long().T)].tolist() == [True, False]


def test_an_empty_scene_leaves_the_grid_full():
    grid = update(OccupancyGrid(8), lambda points: torch.zeros(len(points)))
    assert grid.occupied.all()


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_density_that_is_not_finite_does_not_stay(bad):
    """Once the network has recovered, the grid is that of its density."""
    grid = OccupancyGrid(16)
    update(grid, lambda points: torch.full([len(points)], bad), num_updates=1)
    assert torch.isfinite(grid.occs).all()
    grid.reset()
    assert update(grid, blob).occupied.equal(update(OccupancyGrid(16), blob).occupied)


def test_impossible_cells_stay_empty():
    possible = torch.zeros(16, 16, 16, dtype=torch.bool)
    possible[4:9] = True
    grid = OccupancyGrid(16)
    grid.set_aabb([[-1.0, -1, -1], [1, 1, 1]], possible)
    assert grid.occupied.equal(possible)
    update(grid, lambda points: torch.full([len(points)], 9.0))
    assert grid.occupied.equal(possible)
    grid.reset()
    assert grid.occupied.equal(possible)
    grid.set_aabb([[-2.0, -2, -2], [1, 1, 1]])
    assert grid.occupied.all(), 'nothing is known of another box'


def test_reset_forgets_what_was_found():
    grid = OccupancyGrid(16)
    grid.set_aabb([[-1.0, -1, -1], [1, 1, 1]])
    new = {key: value.clone() for key, value in grid.state_dict().items()}
    update(grid, blob)
    assert not grid.occupied.all() and grid.occs.any()
    grid.reset()
    assert all(grid.state_dict()[key].equal(new[key]) for key in new)


def test_later_updates_evaluate_a_bounded_number_of_cells(monkeypatch):
    monkeypatch.setattr(occupancy, 'MAX_UPDATED_CELLS', 512)
    evaluated = []

    def density(points):
        evaluated.append(len(points))
        return blob(points)
    grid = update(OccupancyGrid(16), density)
    assert sum(evaluated) == 16 ** 3 * WARMUP_UPDATES
    evaluated.clear()
    grid.update(density, 0.02, all_cells=False)
    assert sum(evaluated) == 512


# --- state --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('assign', [False, True])
@both_implementations
def test_a_loaded_grid_marches_like_the_saved_one(assign):
    saved, loaded, rays = occupied_grid(0.1), OccupancyGrid(20), rays_around(100)
    assert saved.state_dict().keys() == {'aabb', 'occs', 'occupied'}
    march(loaded, *rays)
    loaded.load_state_dict(saved.state_dict(), assign=assign)
    (t, ray_indices, _), (other_t, other_indices, _) = (march(grid, *rays)[2] for grid in (saved, loaded))
    assert t.equal(other_t) and ray_indices.equal(other_indices) and len(t)


def test_what_a_new_grid_holds():
    grid = OccupancyGrid(5)
    assert grid.occupied.all() and not grid.occs.any() and grid.occupied.shape == (5, 5, 5)
    assert not list(grid.parameters()) and IMPOSSIBLE < 0
    assert all(buffer.device.type == 'meta' for buffer in grid.to('meta').buffers())
