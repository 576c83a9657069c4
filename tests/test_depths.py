"""Depth supervision: depths of sparse points in the training views, and the loss."""
import json
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny_devices import DEVICE
from tiny_networks import hash_nerf
from tiny_photos import look_at, ring
from tiny_runs import NO_OUTPUTS, read_state, run
from tiny_scenes import noise

from accel.grid_renderer import GridRenderer
from accel.network_query import NetworkQuery
from accel.proposals import ProposalRenderer, to_disparity
from run_nerf import EXACT, load_scene, render
from run_nerf_helpers import ndc_positions, ndc_rays, positions_from_ndc
from scenes.depths import photos_of_views, sparse_depths
from scenes.errors import UserError
from scenes.rays import DEPTH_EVERY, Batch, RaySampler
from training.options import config_parser

H, W, FOCAL = 24, 32, 30.0
# Photos on a ring around the origin, and points near it.
POSES = look_at(ring(8, 4.0), np.zeros((8, 3)))
POINTS = np.random.RandomState(0).uniform(-1, 1, (40, 3))
ERRORS = np.random.RandomState(1).uniform(0.1, 2, 40)
# A rotation, as a quaternion w, x, y, z; a scale; a shift: from the scene to the model.
OTHER_FRAME = (0.5, 0.5, 0.5, 0.5), 3.0, np.array([1.0, -2, 5])
SAME_FRAME = (1.0, 0, 0, 0), 1.0, np.zeros(3)


def rotation_of(quaternion):
    w, x, y, z = quaternion
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def quaternion_of(rotation):
    """By an eigenvector, as in Bar-Itzhack 2000."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    matrix = np.array([[xx - yy - zz, 0, 0, 0], [yx + xy, yy - xx - zz, 0, 0],
                       [zx + xz, zy + yz, zz - xx - yy, 0], [zy - yz, xz - zx, yx - xy, xx + yy + zz]]) / 3
    _, vectors = np.linalg.eigh(matrix)
    return vectors[[3, 0, 1, 2], 3]


def write_scene(folder, frame=SAME_FRAME, names=None):
    """A scene with `transforms.json`, and a COLMAP model of photos of twice the size, in another frame."""
    rotation, scale, shift = rotation_of(frame[0]), *frame[1:]
    for name in ('images', 'sparse/0'):
        (folder / name).mkdir(parents=True)
    frames, lines = [], []
    for index, pose in enumerate(POSES):
        iio.imwrite(folder / f'images/{index}.png', noise(H, W, 3, seed=index))
        frames.append({'file_path': f'images/{index}.png',
                       'transform_matrix': np.vstack([pose, [0, 0, 0, 1]]).tolist()})
        w2c = (rotation @ pose[:, :3] * [1, -1, -1]).T
        numbers = [*quaternion_of(w2c), *(-w2c @ (scale * rotation @ pose[:, 3] + shift))]
        lines.append(f'{index + 1} {" ".join(map(str, numbers))} 1 {names[index] if names else index}.jpg')
        x, y, z = ((POINTS - pose[:, 3]) @ pose[:, :3]).T
        seen = zip(W - 2 * FOCAL * x / z, H + 2 * FOCAL * y / z, range(len(POINTS)))
        lines.append(' '.join(f'{x} {y} {number}' for x, y, number in seen) + ' 1 1 -1')
    (folder / 'transforms.json').write_text(json.dumps(
        {'fl_x': FOCAL, 'fl_y': FOCAL, 'cx': W / 2, 'cy': H / 2, 'w': W, 'h': H, 'frames': frames}))
    points = [f'{number} {" ".join(map(str, scale * rotation @ point + shift))} 1 2 3 {error} 1 0'
              for number, (point, error) in enumerate(zip(POINTS, ERRORS))]
    for name, content in (('cameras', [f'1 PINHOLE {2 * W} {2 * H} {2 * FOCAL} {2 * FOCAL} {W} {H}']),
                          ('images', lines), ('points3D', points)):
        (folder / f'sparse/0/{name}.txt').write_text('\n'.join(content))
    return folder


def options(folder, *args):
    return config_parser().parse_args([str(arg) for arg in (*arguments(folder), *args)])


def arguments(folder):
    return ['--expname', 'run', '--dataset_type', 'blender', '--datadir', folder, '--near', 1, '--far', 8]


@pytest.mark.parametrize('frame', [SAME_FRAME, OTHER_FRAME])
@pytest.mark.parametrize('names', [None, 'abcdefgh'])
def test_depths_lead_to_the_points(tmp_path, frame, names):
    """From the camera along the ray through its pixel, up to half a pixel; whatever the model's frame, and if
    its photos have other names, by their order."""
    folder = write_scene(tmp_path / 'scene', frame, names)
    scene = load_scene(options(folder))
    depths = sparse_depths(folder, scene)
    assert set(depths.view) == set(scene.i_train) and len(depths.view) > 100
    for view, y, x, t, weight in zip(*depths):
        pose = scene.poses[view]
        direction = pose[:, :3] @ [(x + 0.5 - W / 2) / FOCAL, (H / 2 - y - 0.5) / FOCAL, -1]
        distances = np.linalg.norm(pose[:, 3] + t * direction - POINTS, axis=-1)
        assert distances.min() < 0.75 * t / FOCAL
        error = ERRORS[distances.argmin()]
        assert weight == pytest.approx(np.exp(-(error / ERRORS.mean()) ** 2), rel=1e-4)


@pytest.mark.parametrize('photos, names, expected', [
    ('a.jpg b.jpg', 'images_4/b.png images_4/a.png', {0: 1, 1: 0}),
    ('1/a.png 2/a.png', 'images/1/a.png images/2/a.png', {0: 0, 1: 1}),
    ('a.png b.png', 'a.png b.png', {0: 0, 1: 1}),
    ('test/0.png train/0.png train/1.png', 'train/0.png train/1.png test/0.png', {0: 1, 1: 2, 2: 0}),
    ('0.png 1.png 2.png', 'train/0.png train/1.png train/2.png test/0.png', {1: 1, 2: 2}),
    ('a.jpg a.png b.png c.png', 'images/a.jpg images/b.png images/c.png', {1: 2, 2: 3}),
    ('0.png 1.png', 'train/0.png train/1.png test/0.png test/1.png', None)])
def test_photos_of_views(photos, names, expected):
    """By their paths, unless several views or photos share them."""
    photos, names = [SimpleNamespace(name=name) for name in photos.split()], names.split()
    model, scene = SimpleNamespace(photos=photos), SimpleNamespace(names=names, poses=names)
    if expected is None:
        with pytest.raises(UserError, match=r'such as 0\.png, expected the 4 .* such as train/0\.png'):
            photos_of_views('sparse', model, scene)
        return
    found = photos_of_views('sparse', model, scene)
    assert {view: photos.index(photo) for view, photo in found.items()} == expected


@pytest.mark.parametrize('change, problem', [
    (lambda folder: (folder / 'sparse/0/cameras.txt').unlink(), 'found no COLMAP model'),
    (lambda folder: (folder / 'sparse/0/points3D.txt').write_text(''), 'found no points in the training'),
    (lambda folder: drop_and_rename(folder / 'sparse/0/images.txt'), 'expected the 8 of the scene'),
    (lambda folder: edit(folder / 'transforms.json', '4.0', '9.0'), 'are not those of the scene')])
def test_a_model_that_does_not_fit(tmp_path, change, problem):
    folder = write_scene(tmp_path / 'scene')
    change(folder)
    scene = load_scene(options(folder))
    with pytest.raises(UserError, match=problem):
        sparse_depths(folder, scene)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def drop_and_rename(path):
    path.write_text('\n'.join(path.read_text().splitlines()[2:]).replace('.jpg', 'x.jpg'))


def test_batches_with_depths(tmp_path):
    """One in DEPTH_EVERY rays has a depth, those of the others have no weight."""
    folder = write_scene(tmp_path / 'scene')
    scene = load_scene(options(folder, '--train_views', 3))
    assert len(scene.i_train) == 3
    depths = sparse_depths(folder, scene)
    sampler = RaySampler(scene, 160, False, 0, 0.5, True, DEVICE, depths=depths)
    batch = sampler.sample(1)
    weighted = batch.depth[:, 1] > 0
    assert batch.rays.shape == (2, 160, 3) and weighted.sum() == 160 // DEPTH_EVERY
    ends = batch.rays[0] + batch.depth[:, :1] * batch.rays[1]
    distances = torch.cdist(ends[weighted], torch.tensor(POINTS, dtype=torch.float32)).amin(-1)
    assert distances.max() < 0.75 * 6 / FOCAL
    parts = list(batch.split(50))
    assert torch.cat([part.depth for part, _ in parts]).equal(batch.depth) and len(parts) == 4


@pytest.mark.parametrize('renderer', [EXACT, GridRenderer(), ProposalRenderer(),
                                      ProposalRenderer(contract=True)])
def test_the_loss_is_the_mean_distance_from_the_depth(renderer):
    """By loops over the samples of each ray."""
    contract = isinstance(renderer, ProposalRenderer) and renderer.contract
    torch.manual_seed(0)
    renderer, network = renderer.to(DEVICE), hash_nerf().to(DEVICE)
    rays = torch.stack([torch.tensor([0.0, 0, 2]) + 0.1 * torch.rand(6, 3),
                        torch.tensor([0.0, 0, -1]) + 0.3 * torch.rand(6, 3)])
    kwargs = {'near': 0.5, 'far': 4.0, 'ndc': False, 'N_samples': 16, 'network_fn': network,
              'network_query_fn': NetworkQuery(), 'renderer': renderer, 'use_viewdirs': True}
    *_, extras = render(8, 10, None, rays=rays, retsamples=True, **kwargs)
    depth = torch.stack([torch.linspace(1, 3, 6), torch.linspace(0, 1, 6)], -1)
    loss = renderer.losses(extras, Batch(rays, None, depth), **kwargs)['depth']
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())

    if isinstance(renderer, GridRenderer):
        samples = list(zip(*(part.tolist() for part in (
            extras['packed'].ray_indices, extras['packed'].t, extras['packed'].weights))))
    else:
        samples = [(ray, t, weight) for ray in range(6) for t, weight in
                   zip(extras['z_vals'][ray].tolist(), extras['weights'][ray].tolist())]
    total = 0.0
    for ray, (t, weight) in enumerate(depth.tolist()):
        mean, through = 0.0, 1.0
        for other, position, share in samples:
            if other == ray:
                places = torch.tensor([position, t])
                gap = to_disparity(places) if contract else places / 3.5
                mean, through = mean + share * abs(gap.diff().item()), through - share
        total += weight * (mean + through) / 6
    assert loss.item() == pytest.approx(total, rel=1e-3)


def test_positions_in_normalised_device_coordinates():
    rays_o, rays_d = torch.randn(50, 3) * 0.1, torch.tensor([0.0, 0, -1]) + 0.3 * torch.randn(50, 3)
    rays_d[:, 2] = -1 - rays_d[:, 2].abs()
    t = 2 + 5 * torch.rand(50)
    points = rays_o + t[:, None] * rays_d
    # a ray from the point itself starts there after its shift to the plane
    origins, directions = ndc_rays(H, W, FOCAL, 1.0, rays_o, rays_d)
    at = origins + ndc_positions(1.0, rays_o, rays_d, t)[:, None] * directions
    expected = torch.stack([-2 * FOCAL / W * points[:, 0] / points[:, 2],
                            -2 * FOCAL / H * points[:, 1] / points[:, 2], 1 + 2 / points[:, 2]], -1)
    torch.testing.assert_close(at, expected, rtol=1e-4, atol=1e-4)

    back = positions_from_ndc(1.0, rays_o, rays_d, ndc_positions(1.0, rays_o, rays_d, t))
    torch.testing.assert_close(back, t, rtol=1e-4, atol=1e-4)
    assert positions_from_ndc(1.0, rays_o[:2], rays_d[:2], torch.tensor([1.0, torch.inf])).isinf().all()


def test_a_run_with_depths(tmp_path, capsys):
    folder = write_scene(tmp_path / 'scene')
    args = [*arguments(folder), *NO_OUTPUTS, '--i_embed', 1, '--log2_hashmap_size', 10, '--sampler',
            'proposal', '--N_samples', 8, '--N_rand', 64, '--contract', '--lambda_depth', 0.1, '--N_iters', 2]
    assert run(*args, '--basedir', tmp_path / 'logs') == 0
    (path,) = (tmp_path / 'logs').rglob('*.tar')
    box = read_state(path)['network_fn_state_dict']['encoding.aabb']
    positions = torch.tensor(POSES[1:, :, 3], dtype=torch.float32, device='cpu')  # of the training views
    low, high = positions.amin(0), positions.amax(0)
    half = (high - low).amax() / 2
    torch.testing.assert_close(box, torch.stack([(low + high) / 2 - half, (low + high) / 2 + half]))
    (folder / 'sparse/0/cameras.txt').unlink()
    assert run(*args, '--basedir', tmp_path / 'other') == 2
    assert f'--lambda_depth: {folder}: found no COLMAP model' in capsys.readouterr().err
