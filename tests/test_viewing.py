"""The viewer without a browser: pictures, the ray microscope, live runs."""
import itertools
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import (
    FAST_DEMO,
    NO_OUTPUTS,
    PROPOSAL_DEMO,
    ROOT,
    TINY,
    assert_same_parameters,
    run,
    run_python,
)

from scenes.errors import UserError
from tools.trained import load_trained
from training.processes import Processes
from viewing.live import SHARE, LiveViewer
from viewing.microscope import HEADER, csv, examine, table
from viewing.pictures import KINDS, CroppedQuery, Look, Maps, PictureRenderer, draw, normals

WHITE, BLACK = Look(), Look(background=(0, 0, 0))
RUNS = {'exact': TINY, 'grid': FAST_DEMO, 'proposal': PROPOSAL_DEMO}


@pytest.fixture(scope='module', params=RUNS)
def trained(request, tmp_path_factory):
    """A short run of each renderer."""
    folder = tmp_path_factory.mktemp('logs')
    args = ['--N_iters', 20, '--basedir', folder, '--expname', 'run', '--no_restart']
    assert run(*RUNS[request.param], *NO_OUTPUTS, *args) == 0
    return load_trained(folder / 'run')


def renderer_of(trained, seconds=1e-6):
    return PictureRenderer(trained.frames, trained.render_kwargs, trained.scene.poses, seconds)


def test_a_full_picture_is_what_render_gives(trained):
    pictures, pose, camera = renderer_of(trained), trained.scene.poses[3], trained.scene.cameras[3]
    small = pictures.small(pose, camera, WHITE)
    assert small.acc.shape == (16, 16)
    *_, full = pictures.refine(small, pose, camera, WHITE)
    expected = trained.frames.render_view(pose, camera=camera)
    # near and far follow the distance of the camera from the scene, which moves the samples a little
    assert np.abs(draw(full, None, WHITE) - expected.rgb).mean() < 2e-3
    assert np.abs(full.acc - expected.acc).mean() < 2e-3


def test_every_kind_of_picture(trained):
    pictures, pose, camera = renderer_of(trained), trained.scene.poses[0], trained.scene.cameras[0]
    rays = pictures.rays(pose, camera.resized(20, 30))
    for kind in KINDS:
        picture = draw(pictures.maps(rays, Look(kind)), rays[1].numpy(), Look(kind))
        assert picture.shape == (20, 30, 3)
        assert np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1


def test_tiles_cover_the_picture(trained):
    """Whatever its size; the first one is in the middle."""
    pictures, pose, camera = renderer_of(trained), trained.scene.poses[0], trained.scene.cameras[0]
    empty = Maps(np.full((2, 2, 3), np.nan), *(np.full((2, 2), np.nan) for _ in range(3)))
    parts = [maps.acc.copy() for maps in pictures.refine(empty, pose, camera.resized(37, 41), WHITE)]
    assert np.isfinite(parts[0][18, 20]) and np.isnan(parts[0]).any()
    assert np.isfinite(parts[-1]).all()
    finite = [np.isfinite(part) for part in parts]
    assert all((before <= after).all() for before, after in itertools.pairwise(finite))


def test_a_crop_hides_what_is_outside(trained):
    pictures, pose, camera = renderer_of(trained), trained.scene.poses[0], trained.scene.cameras[0]
    rays = pictures.rays(pose, camera.resized(20, 20))
    for box, empty in ((((-9, -9, -9), (9, 9, 9)), False), (((5, 5, 5), (6, 6, 6)), True)):
        maps = pictures.maps(rays, Look(crop=box))
        assert (maps.acc.max() < 1e-6) == empty
    pts = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 0, -1]])

    def query(pts, viewdirs, network):
        return torch.ones(len(pts), 4)
    raw = CroppedQuery(query, ((-1, -1, -1), (1, 1, 1)))(pts, None, None)
    assert (raw[:, 3] > 0).tolist() == [True, False, True] and (raw[:, :3] == 1).all()


def test_counted_samples_are_those_that_are_rendered(trained):
    pictures = renderer_of(trained)
    camera = trained.scene.cameras[0].resized(3, 3)
    rays = pictures.rays(trained.scene.poses[0], camera).flatten(1, 2)[:, None]
    kwargs = trained.render_kwargs
    counts = kwargs['renderer'].count_samples(rays, **kwargs)
    for index in range(rays.shape[2]):
        steps, *_ = examine(trained.frames, kwargs, *rays[:, 0, index])
        rendered = [len(step.samples.t) for step in steps if step.shows == 'network']
        assert int(counts[0, index]) == sum(rendered)


def test_the_microscope_adds_up_to_the_pixel(trained):
    pictures = renderer_of(trained)
    rays = pictures.rays(trained.scene.poses[0], trained.scene.cameras[0].resized(8, 8))
    maps = pictures.maps(rays, BLACK)
    for y, x in ((4, 4), (3, 5), (0, 0)):
        near, far = pictures.bounds(rays[0, 0, 0])
        kwargs = {**pictures.render_kwargs, 'near': near, 'far': far}
        steps, color, acc = examine(trained.frames, kwargs, *rays[:, y, x])
        samples = steps[-1].samples
        np.testing.assert_allclose(samples.color()[0], color, atol=1e-3)
        np.testing.assert_allclose(color, maps.rgb[y, x], atol=5e-3)
        np.testing.assert_allclose(acc, maps.acc[y, x], atol=5e-3)
        on_ray = rays[0, y, x] + torch.from_numpy(samples.t)[:, None] * rays[1, y, x]
        np.testing.assert_allclose(samples.points, on_ray, atol=1e-5)
        lines = csv(samples).splitlines()
        assert lines[0] == HEADER and len(lines) == len(samples.t) + 1
        assert len(table(samples, 5).splitlines()) == 2 + min(5, len(samples.t))


def test_normals_of_a_plane():
    """They face the camera, and are perpendicular to the plane n x = d."""
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, 20), np.linspace(0.5, -0.5, 20))
    rays_d = np.stack([x, y, -np.ones_like(x)], -1)
    normal = np.array([0.3, -0.2, 0.9]) / np.linalg.norm([0.3, -0.2, 0.9])
    depth = -3 / (rays_d @ normal)
    np.testing.assert_allclose(normals(depth, rays_d), np.broadcast_to(normal, rays_d.shape), atol=1e-2)


def test_browsers_that_come_at_the_same_time_take_turns():
    viewer = pytest.importorskip('viewing.viewer')
    served = []

    class Browser(SimpleNamespace):
        view, served_at = None, 0.0

        def advance(self):
            served.append(self.name)
            self.served_at += 1
    sessions = {name: Browser(name=name, due_in=lambda: 0.0, wanted=lambda: 1) for name in 'ab'}
    stub = SimpleNamespace(sessions=sessions, tasks=deque(), wake=threading.Event())
    assert all(viewer.Viewer.work(stub) for _ in range(4))
    assert served == ['a', 'b', 'a', 'b']


# --- live runs ----------------------------------------------------------------------------------------------

class Watched:
    """Stands in for the `Viewer` of a browser that always wants the next picture."""
    sessions = {1: None}  # noqa: RUF012 - read only
    address = 'http://nowhere'

    def __init__(self, label, scene, frames, render_kwargs, **options):
        pictures = PictureRenderer(frames, render_kwargs, scene.poses, options['unit_seconds'])
        self.work = lambda: bool(pictures.small(scene.poses[0], scene.cameras[0], WHITE))

    def networks_changed(self, complete_only):
        assert complete_only

    def close(self):
        pass


def test_a_run_that_is_watched_stays_the_same(tmp_path, monkeypatch):
    viewer = pytest.importorskip('viewing.viewer')
    monkeypatch.setattr(viewer, 'Viewer', Watched)
    for name, options in (('plain', []), ('watched', ['--viewer'])):
        assert run(*TINY, *NO_OUTPUTS, '--N_iters', 20, '--basedir', tmp_path / name, *options) == 0
    (one,), (other,) = ((tmp_path / name).rglob('*.tar') for name in ('plain', 'watched'))
    assert_same_parameters(one, other)


def live_viewer(viewer, said):
    """A `LiveViewer` of a stand-in."""
    live = LiveViewer(SimpleNamespace(viewer=False, N_iters=10), None, None, Processes(1),
                      SimpleNamespace(requested=False), said.append)
    live.viewer, live.started_at = viewer, 0.0
    return live


def test_the_share_of_the_time_is_kept(monkeypatch):
    """Units take 0.03 s, steps 0.1 s of a clock that the test moves."""
    clock = [1000.0]
    monkeypatch.setattr('viewing.live.time', SimpleNamespace(perf_counter=lambda: clock[0]))

    def work():
        clock[0] += 0.03
        return True
    viewer = SimpleNamespace(work=work, sessions={}, networks_changed=lambda complete_only: None)
    live = live_viewer(viewer, [])
    live.left_at = clock[0]
    for step in range(2000):
        clock[0] += 0.1
        live.after_step(step, None)
    share = live.rendered / (clock[0] - 1000)
    assert 0.8 * SHARE < share <= 1.01 * SHARE


def test_a_viewer_that_fails_is_closed_and_the_run_goes_on():
    said, closed = [], []

    def fail():
        raise RuntimeError('out of memory')
    live = live_viewer(SimpleNamespace(work=fail, sessions={}, networks_changed=lambda complete_only: None,
                                       close=lambda: closed.append(True)), said)
    live.credit = 1.0
    live.after_step(1, None)
    live.after_step(2, None)
    assert closed == [True] and said == ['viewer: closed (out of memory); training continues']


# --- what can be loaded -------------------------------------------------------------------------------------

def test_a_run_of_nerf_pytorch(tmp_path):
    """Its checkpoint has no options: config.txt beside it has them."""
    options = {'datadir': ROOT / 'data/demo', 'dataset_type': 'blender', 'half_res': True, 'white_bkgd': True,
               'use_viewdirs': True, 'netdepth': 2, 'netwidth': 16, 'netdepth_fine': 2, 'netwidth_fine': 16,
               'N_samples': 8, 'N_importance': 8, 'N_rand': 64, 'testskip': 8, 'near': 2.6, 'far': 5.4}
    config = tmp_path / 'given.txt'
    config.write_text(''.join(f'{key} = {value}\n' for key, value in options.items()))
    args = ['--config', config, '--expname', 'old', '--basedir', tmp_path, '--N_iters', 2]
    assert run(*args, *NO_OUTPUTS) == 0
    path = tmp_path / 'old/000002.tar'
    state = torch.load(path, weights_only=True)
    kept = ('network_fn_state_dict', 'network_fine_state_dict', 'optimizer_state_dict')
    torch.save({'global_step': 1, **{key: state[key] for key in kept}}, path)
    trained = load_trained(tmp_path / 'old')
    assert trained.step == 2 and trained.args.netwidth == 16 and trained.args.expname == 'old'
    assert trained.frames.render(trained.scene.poses[0], stride=16).rgb.shape == (4, 4, 3)


def test_photos_that_are_not_there(tmp_path):
    said = []
    assert run(*TINY, *NO_OUTPUTS, '--N_iters', 2, '--basedir', tmp_path) == 0
    with pytest.warns(UserWarning, match='datadir'):
        trained = load_trained(tmp_path / 'demo', ['--datadir', str(tmp_path / 'gone')], say=said.append)
    assert trained.scene.images is None and len(trained.scene.poses)
    assert len(said) == 1 and said[0].startswith('The photos are not shown: ') and 'gone' in said[0]


# --- bad input ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, message', [
    (['logs/no_such_run'], 'found nothing, expected the folder of a run or a checkpoint'),
    (['configs'], 'found no checkpoint, expected one such as 001000.tar'),
    (['README.md'], 'README.md: not a readable checkpoint'),
    (['configs', '--no_such_option'], 'unknown option --no_such_option')])
def test_what_cannot_be_viewed(arguments, message):
    result = run_python('tools/view.py', *arguments, cwd=ROOT)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_viser_a_line_says_what_to_install(monkeypatch):
    import builtins
    import sys
    monkeypatch.delitem(sys.modules, 'viewing.viewer', raising=False)
    real = builtins.__import__

    def without_viser(name, *args, **kwargs):
        if name.partition('.')[0] == 'viser':
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without_viser)
    with pytest.raises(UserError, match=r'pip install -r requirements-tools\.txt'):
        import viewing.viewer  # noqa: F401
