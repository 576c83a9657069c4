"""The page: what is baked, what the browser shows of it, that it fetches nothing and keeps to its size."""
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from tiny_browser import open_browser
from tiny_exports import Ball, trained_ball
from tiny_runs import DEMO, NO_OUTPUTS, run

from accel import proposals
from accel.hash_grid import expand
from accel.occupancy import CellGrid
from accel.proposals import FAR, ProposalRenderer
from benchmarks.page import picture_of, show_view
from run_nerf_helpers import BoundedModule
from scenes.errors import UserError
from tools.exporting.baking import Baking, ContractedBaking, occupied_box
from tools.exporting.page import angle_limits, write_page
from tools.exporting.sparse_field import (
    BASE_LOW,
    BASE_RANGE,
    BRICK,
    N_BASIS,
    Lattice,
    bake_field,
    fit_gloss,
    number_bricks,
    occupied_bricks,
    octahedron,
)
from tools.trained import load_trained

# The sphere of `SphereBaking`.
RADIUS, COLOR = 0.5, torch.tensor([0.8, 0.5, 0.2])


class SphereBaking(Baking):
    """Stands for the `Baking` of a scene in which a dense sphere surrounds the origin, and one camera sees
    it from above. Its colour is COLOR."""
    scene = Namespace(i_train=[0])

    def __init__(self):
        self.cells = CellGrid(16)
        self.box, self.device = occupied_box(self.cells), self.cells.aabb.device

    def density(self, points):
        return 200.0 * (points.norm(dim=-1) < RADIUS)

    def colors(self, points, viewdirs):
        return COLOR.expand(*viewdirs.shape[:-1], 3)

    def rays(self, view):
        line = torch.linspace(-0.6, 0.6, 80)
        targets = torch.cartesian_prod(line, line, torch.zeros(1))
        origin = torch.tensor([0.0, 0, 3]).expand(len(targets), 3)
        rays_d = torch.nn.functional.normalize(targets - origin, dim=-1)
        return torch.cat([origin, rays_d, torch.tensor([[1.0, 6.0]]).expand(len(origin), 2)], -1), rays_d


@pytest.fixture(scope='module')
def sphere():
    """The `SparseField` of the sphere, and the positions of its points [N, 3]."""
    baking = SphereBaking()
    field, num_points = bake_field(baking, 64, 10 ** 6, print)
    assert num_points == len(field.base)
    corners = BRICK * (field.bricks >= 0).nonzero()
    local = torch.cartesian_prod(*[torch.arange(BRICK)] * 3)
    return field, (field.low + field.spacing * (corners[:, None] + local))[field.opacity > 0]


def test_only_what_is_seen_is_kept(sphere):
    _, points = sphere
    distance = points.norm(dim=-1)
    assert distance.max() < RADIUS
    # the camera is above: nothing deep inside, nothing of the lower half; two steps of the lattice as margin
    assert distance.min() > RADIUS - 3 / 32 and points[:, 2].min() > -2 / 32
    # but all of the surface that it sees
    above = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    above = RADIUS * above[above[:, 2] > 0.4]
    assert torch.cdist(above, points).amin(1).max() < 2 / 32


def test_a_colour_that_is_the_same_from_everywhere_is_kept_as_it_is(sphere):
    field, _ = sphere
    assert (BASE_LOW + BASE_RANGE / 255 * field.base - COLOR).abs().max() < 0.6 * BASE_RANGE / 255
    assert not field.gloss.any()


def test_gloss_is_found_from_the_directions_that_count():
    torch.manual_seed(0)
    values, gloss, base = torch.rand(50, 16, N_BASIS), torch.rand(50, 3, N_BASIS), torch.rand(50, 3)
    colors, is_set = base[:, None] + values @ gloss.mT, torch.rand(50, 16) < 0.7
    colors[~is_set] = 7
    found, found_base, errors = fit_gloss(100 * values, colors, is_set.float())  # the penalty vanishes
    torch.testing.assert_close(100 * found, gloss, atol=2e-3, rtol=0)
    torch.testing.assert_close(found_base, base, atol=2e-3, rtol=0)
    assert errors.abs().max() < 1e-3


def test_the_octahedron_covers_the_sphere_evenly():
    directions = octahedron(64).view(-1, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(64 * 64))
    everywhere = torch.nn.functional.normalize(torch.randn(500, 3), dim=-1)
    assert torch.cdist(everywhere, directions).amin(1).max() < 0.06


def test_too_many_points_are_counted_and_not_baked():
    field, num_points = bake_field(SphereBaking(), 64, 100, print)
    assert field is None and num_points > 100


def test_an_empty_scene_is_refused():
    baking = SphereBaking()
    baking.density, baking.path = lambda points: points[:, 0] * 0, 'run/000100.tar'
    with pytest.raises(UserError, match='found nothing that the training views see'):
        bake_field(baking, 64, 10 ** 6, print)


def test_points_are_numbered_in_bricks_that_touch_occupied_cells():
    cells = CellGrid(10)
    cells.set_occupied(torch.rand(10, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.02)
    lattice = Lattice(cells, cells.aabb, 90)
    numbers = torch.arange(len(lattice.corners) * BRICK ** 3)
    index = lattice.index(numbers)
    assert lattice.number(index).equal(numbers) and len(index.unique(dim=0)) == len(index)
    assert (index >= 0).all() and (index < index.new_tensor(lattice.shape)).all()
    # all points in occupied cells have a number
    everywhere = torch.cartesian_prod(*[torch.arange(91)] * 3)
    points = lattice.low + lattice.spacing * everywhere
    occupied = cells.occupied[cells.cell_indices(points)]
    assert (lattice.number(everywhere[occupied]) >= 0).all()
    assert lattice.nearest(points[occupied]).equal(lattice.number(everywhere[occupied]))
    # every second point along each axis
    numbers = numbers[:len(numbers) // 8]
    assert lattice.number(lattice.index(numbers, 2), 2).equal(numbers)
    assert lattice.number(lattice.index(numbers, 2)).ge(0).all()
    outside = torch.tensor([[-1, 0, 0], [0, 0, lattice.shape[2]]])
    assert lattice.number(outside).tolist() == [-1, -1]


def test_bricks_border_on_the_next_ones():
    lattice = Lattice(CellGrid(2), CellGrid(2).aabb, 16)
    filled = torch.zeros(len(lattice.corners) * BRICK ** 3, dtype=torch.bool)
    filled[lattice.number(torch.tensor([[8, 3, 8]]))] = True  # the first of its brick in x and z
    assert occupied_bricks(lattice, filled).nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_empty_bricks_know_how_far_the_next_one_is():
    occupied = torch.rand(9, 7, 8, generator=torch.Generator().manual_seed(0)) < 0.02
    numbers = number_bricks(occupied)
    assert numbers[occupied].tolist() == list(range(occupied.sum()))
    empty = (~occupied).nonzero()
    nearest = (empty[:, None] - occupied.nonzero()).abs().amax(-1).amin(-1)
    assert nearest.equal(-numbers[~occupied])


# --- pages in a browser -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def fast_demo_page(fast_demo_run):
    """A run, loaded, and its page."""
    trained = load_trained(fast_demo_run, say=print)
    path = fast_demo_run.parent / 'page.html'
    write_page(trained, path, 2, print)
    return trained, path


@pytest.fixture(scope='module')
def browser():
    with open_browser() as browser:
        yield browser


def open_page(browser, path):
    """A page in the browser, ready, and the list of addresses that it requests."""
    page, requests = browser.new_page(viewport={'width': 160, 'height': 120}), []
    page.on('request', lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector('body[data-ready]', state='attached')
    assert page.evaluate('document.body.dataset.ready') == 'yes', page.inner_text('body')
    return page, requests


@pytest.fixture(scope='module')
def shown(fast_demo_page, browser):
    """That page in a browser, and the addresses that it has requested."""
    return open_page(browser, fast_demo_page[1])


def psnr_of_views(page, trained, views):
    """How close the page comes to `render`, over all `views` together."""
    errors = []
    for view in views:
        expected = trained.frames.render(trained.scene.poses[view], camera=trained.scene.cameras[view]).rgb
        errors.append(((show_view(page, trained, view) / 255 - expected) ** 2).mean())
    return -10 * np.log10(np.mean(errors))


def test_the_page_shows_what_is_rendered(fast_demo_page, shown):
    assert psnr_of_views(shown[0], fast_demo_page[0], fast_demo_page[0].scene.i_test[:4]) > 33


def test_nothing_is_requested_but_the_page(fast_demo_page, shown):
    assert shown[1] == [fast_demo_page[1].as_uri()]
    text = fast_demo_page[1].read_text(encoding='utf-8')
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and 'http' not in text


def test_the_page_keeps_to_its_size(fast_demo_page, tmp_path):
    trained, path = fast_demo_page
    full = path.stat().st_size
    assert full <= 2e6
    write_page(trained, tmp_path / 'small.html', full / 2e6, print)
    assert 0.2 * full < (tmp_path / 'small.html').stat().st_size <= full / 2
    with pytest.raises(UserError, match=r'does not fit in 0\.05 MB'):
        write_page(trained, tmp_path / 'none.html', 0.05, print)
    assert not (tmp_path / 'none.html').exists()


def test_dragging_and_the_wheel_move_the_camera_and_a_double_click_returns(shown):
    page, _ = shown

    def settled(action):
        action()
        page.evaluate('whenSharp()')
        return picture_of(page).astype(int)

    def drag():
        page.mouse.move(80, 60)
        page.mouse.down()
        page.mouse.move(110, 50, steps=3)
        page.mouse.up()
    start = settled(lambda: page.mouse.dblclick(80, 60))
    dragged = settled(drag)
    nearer = settled(lambda: page.mouse.wheel(0, -300))
    assert np.abs(dragged - start).mean() > 2 and np.abs(nearer - dragged).mean() > 2
    assert (nearer.min(-1) < 250).mean() > 1.2 * (dragged.min(-1) < 250).mean()  # the object is larger
    assert np.array_equal(settled(lambda: page.mouse.dblclick(80, 60)), start)


def test_two_fingers_zoom(shown):
    page, _ = shown
    touch = page.context.new_cdp_session(page)

    def move(kind, distance):
        sides = (-1, 1) if distance else ()
        points = [{'x': 80 + side * distance, 'y': 60, 'id': side + 1} for side in sides]
        touch.send('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})
    page.mouse.dblclick(80, 60)
    page.evaluate('whenSharp()')
    before = picture_of(page)
    for kind, distance in (('touchStart', 20), ('touchMove', 25), ('touchMove', 30), ('touchEnd', 0)):
        move(kind, distance)
    page.evaluate('whenSharp()')
    assert (picture_of(page).min(-1) < 250).mean() > 1.3 * (before.min(-1) < 250).mean()


def test_the_start_is_the_first_pose_of_the_path(fast_demo_page):
    trained, path = fast_demo_page
    scene = json.loads(re.search(r'const SCENE = (\{.*\});', path.read_text(encoding='utf-8'))[1])
    np.testing.assert_allclose(scene['position'], trained.scene.render_poses[0][:, 3], atol=1e-6)
    ahead = np.subtract(scene['center'], scene['position'])
    np.testing.assert_allclose(ahead / np.linalg.norm(ahead), -trained.scene.render_poses[0][:, 2], atol=1e-5)


def test_a_page_without_webgl_2_says_so(fast_demo_page, browser):
    page = browser.new_page()
    page.add_init_script('HTMLCanvasElement.prototype.getContext = () => null')
    page.goto(fast_demo_page[1].as_uri())
    page.wait_for_selector('body[data-ready=failed]', state='attached')
    assert 'needs WebGL 2' in page.inner_text('#message') and page.is_visible('#preview')


@pytest.mark.slow
def test_the_page_of_hierarchical_sampling_shows_what_is_rendered(tmp_path, browser):
    assert run(*DEMO, '--netdepth', 4, '--netwidth', 64, '--basedir', tmp_path, *NO_OUTPUTS,
               '--N_iters', 300) == 0
    trained = load_trained(tmp_path / 'demo', say=print)
    write_page(trained, tmp_path / 'page.html', 2, print)
    page, _ = open_page(browser, tmp_path / 'page.html')
    assert psnr_of_views(page, trained, trained.scene.i_test[:4]) > 29


class Room(Ball):
    """The ball in a room, whose walls are a cube around the origin, and colourful. The box that is not
    contracted holds the ball and nothing else."""

    def __init__(self):
        super().__init__()
        self.encoding = BoundedModule()
        self.encoding.set_aabb([[-1, -1.2, -1], [1.2, 1, 1]])

    def density(self, points):
        beyond = points.abs().amax(-1) - 4
        return super().density(points) + 50 * torch.sigmoid(20 * beyond) * (beyond > -0.5)

    def forward(self, points, viewdirs=None):
        raw = super().forward(points, viewdirs)
        is_ball = points.abs().amax(-1, keepdim=True) < 2
        return torch.cat([torch.where(is_ball, raw[:, :3], points.sin()), raw[:, 3:]], -1)


@pytest.fixture
def room(monkeypatch):
    """That room as a trained scene, whose rays are sampled evenly."""
    monkeypatch.setattr(proposals, 'resample', lambda s_vals, weights, edges: edges)
    renderer = ProposalRenderer(contract=True)
    for grid in renderer.grids:
        grid.encoding.set_aabb([[-1, -1.2, -1], [1.2, 1, 1]])
    trained = trained_ball(network=Room(), renderer=renderer, bounds=(0.5, 9.0))
    trained.args.contract, trained.args.occupancy_grid, trained.args.expname = True, False, 'room'
    trained.args.pixel_centers, trained.render_kwargs['N_samples'] = True, 128
    return trained


def test_a_page_of_contracted_space_shows_what_is_rendered(room, browser, tmp_path):
    write_page(room, tmp_path / 'page.html', 4, print)
    page, _ = open_page(browser, tmp_path / 'page.html')
    assert psnr_of_views(page, room, [0, 5, 10]) > 30


def test_steps_along_curved_rays_add_up_to_their_length(room):
    baking, spacing, farthest = ContractedBaking(room), 0.01, 4.5
    t, _ = baking.intervals[0]
    baking.intervals[0] = t, (t[:, 1:] < farthest)
    points, _, ray_indices, _, lengths = baking.march(0, spacing, torch.Generator().manual_seed(0))
    steps = spacing * lengths * baking.unit * expand(points, FAR)[1][:, 0] ** 2
    found = torch.zeros(len(t)).index_add(0, ray_indices, steps)
    expected = torch.where(t < farthest, t, 0).amax(-1) - room.scene.near
    torch.testing.assert_close(found, expected * baking.rays(0)[0][:, 3:6].norm(dim=-1), rtol=0, atol=0.1)


@pytest.mark.parametrize(('degrees', 'expected'), [
    ((-40, 0, 30), (-40, 30)), ((-170, 120, 60, 0), (0, 190)), ((170, -120, -60, 0), (-190, 0)),
    ((10, 50), (0, 50)), ((0, 90, 180, -90), None)])
def test_the_camera_stays_among_the_views_unless_they_surround_the_scene(degrees, expected):
    azimuth = np.radians(degrees)
    position, center, up = np.array([2.0, 0, 1]), np.array([0, 0, 1.0]), np.array([0, 0, 1.0])
    poses = np.zeros((len(azimuth), 3, 4))
    poses[:, :, 3] = center + np.stack([np.cos(azimuth), np.sin(azimuth), 0.1 + 0 * azimuth], -1)
    limits = angle_limits(poses, position, center, up)
    assert limits['elevation'] == pytest.approx([-0.05, np.arctan(0.1) + 0.05])
    found = np.degrees(limits['azimuth']) + [3, -3] if expected else limits.get('azimuth')
    assert found == pytest.approx(expected, abs=0.2)
