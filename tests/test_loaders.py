"""Loaders, scenes and the ray sampler: every layout on disk, and the scene and rays that it gives."""
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_data
from PIL import Image
from tiny_scenes import blender_scene, edit_json, llff_scene, noise

from load_blender import load_blender_data, load_blender_scene, pose_spherical
from load_llff import load_llff_data, load_llff_scene, read_poses_bounds
from run_nerf_helpers import get_rays
from scenes.cameras import focus_point, orbit_of_cameras, viewmatrix
from scenes.errors import UserError
from scenes.images import area_weights, read_image, resize_area, write_image
from scenes.rays import Batch, RaySampler
from scenes.scene import finish_scene, scene_from_checkpoint
from training.options import config_parser


def options(folder, *args):
    return config_parser().parse_args(['--expname', 'run', '--datadir', str(folder), *map(str, args)])


def load_blender(folder, *args):
    args = options(folder, '--dataset_type', 'blender', '--testskip', 1, *args)
    return finish_scene(args, load_blender_scene(args))


def load_llff(folder, *args):
    args = options(folder, '--dataset_type', 'llff', *args)
    return finish_scene(args, load_llff_scene(args))


# --- images -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_in, n_out', [(8, 4), (9, 4), (10, 10), (7, 1), (100, 33)])
def test_area_weights_are_means_over_equal_intervals(n_in, n_out):
    weights = area_weights(n_in, n_out)
    np.testing.assert_allclose(weights.sum(1), 1)                # each output is a mean
    np.testing.assert_allclose(weights.sum(0), n_out / n_in)     # and each input has the same weight


def test_resize_area_with_even_and_uneven_factors():
    image = noise(12, 18, 3, seed=0)
    even = resize_area(image, 4, 6)
    rows, columns = area_weights(12, 4), area_weights(18, 6)
    np.testing.assert_allclose(even, np.einsum('hi,ijc,wj->hwc', rows, image, columns), rtol=1e-5)
    uneven = resize_area(image, 5, 7)
    assert uneven.shape == (5, 7, 3)
    np.testing.assert_allclose(uneven.mean((0, 1)), image.mean((0, 1)), rtol=1e-5)


def test_reading_grey_and_palette_images(tmp_path):
    grey = noise(6, 5, seed=1)
    write_image(tmp_path / 'grey.png', grey)
    assert np.array_equal(read_image(tmp_path / 'grey.png'), np.repeat(grey[..., None], 3, -1))
    assert [path.name for path in tmp_path.iterdir()] == ['grey.png']
    palette = Image.fromarray(noise(6, 5, 3, seed=1)).convert('P')
    palette.save(tmp_path / 'palette.png')
    assert np.array_equal(read_image(tmp_path / 'palette.png'), np.asarray(palette.convert('RGB')))


def test_one_transparent_colour_becomes_alpha(tmp_path):
    image = Image.fromarray(noise(6, 5, seed=1)).convert('P')
    image.save(tmp_path / 'palette.png', transparency=int(np.asarray(image)[2, 3]))
    assert read_image(tmp_path / 'palette.png')[2, 3, 3] == 0


def test_the_fourth_ink_is_not_alpha(tmp_path):
    Image.fromarray(noise(6, 5, 3, seed=1)).convert('CMYK').save(tmp_path / 'print.jpg')
    assert read_image(tmp_path / 'print.jpg').shape == (6, 5, 3)


# --- blender layout -----------------------------------------------------------------------------------------

def test_blender_splits_and_testskip(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    for testskip, counts in ((1, [3, 3, 3]), (0, [3, 3, 3]), (2, [3, 2, 2])):
        imgs, poses, render_poses, (H, W, focal), i_split = load_blender_data(folder, testskip=testskip)
        assert [len(part) for part in i_split] == counts and len(imgs) == len(poses) == sum(counts)
        assert imgs.shape[1:] == (8, 10, 4) and render_poses.shape == (40, 4, 4)
        assert focal == pytest.approx(5 / np.tan(0.35)) and (H, W) == (8, 10)


@pytest.mark.parametrize('white_bkgd', [True, False])
def test_alpha_is_composited_on_white_or_black(tmp_path, white_bkgd):
    folder = blender_scene(tmp_path / 'scene')
    scene = load_blender(folder, '--white_bkgd' if white_bkgd else '--no-white_bkgd')
    rgba = iio.imread(folder / 'train/r_1.png') / 255.0
    expected = rgba[..., :3] * rgba[..., 3:] + white_bkgd * (1 - rgba[..., 3:])
    assert scene.images.dtype == np.uint8 and scene.images.shape == (9, 8, 10, 3)
    np.testing.assert_allclose(scene.images[1] / 255, expected, atol=0.5 / 255 + 1e-6)


def test_half_res_of_odd_sizes_keeps_the_field_of_view(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    for path in folder.rglob('*.png'):
        iio.imwrite(path, noise(7, 9, 4, seed=0))
    half = load_blender(folder, '--half_res')
    assert (half.H, half.W) == (3, 4)
    np.testing.assert_allclose(half.K[:2, 2], [2, 1.5])
    assert half.K[0, 0] == pytest.approx(2 / np.tan(0.35))


def test_half_res_halves_images_and_intrinsics(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    full, half = load_blender(folder, '--white_bkgd'), load_blender(folder, '--white_bkgd', '--half_res')
    assert (half.H, half.W) == (4, 5)
    np.testing.assert_allclose(half.K[:2], full.K[:2] / 2)
    full, half = load_blender_data(folder)[0], load_blender_data(folder, half_res=True)[0]
    np.testing.assert_allclose(half[0], full[0].reshape(4, 2, 5, 2, 4).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize('ending, in_file', [('.png', ''), ('.png', '.png'), ('.jpg', ''), ('.jpeg', '.jpeg'),
                                             ('.JPG', '')])
def test_images_with_and_without_ending(tmp_path, ending, in_file):
    folder = blender_scene(tmp_path / 'scene')
    for split in ('train', 'val', 'test'):
        def rename(meta, split=split):
            for frame in meta['frames']:
                old = folder / (frame['file_path'] + '.png')
                rgb = iio.imread(old)[..., :3]
                old.unlink()
                iio.imwrite(old.with_suffix(ending), rgb)
                frame['file_path'] += in_file
        edit_json(folder / f'transforms_{split}.json', rename)
    assert load_blender_data(folder)[0].shape == (9, 8, 10, 3)
    assert load_blender(folder).images.shape == (9, 8, 10, 3)


def test_an_image_without_alpha_among_images_with_alpha_is_opaque(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    iio.imwrite(folder / 'train/r_1.png', noise(8, 10, 3, seed=9))
    assert (load_blender_data(folder)[0][1, ..., 3] == 1).all()


def test_intrinsics_in_pixels(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    intrinsics = {'fl_x': 12.0, 'fl_y': 13.0, 'cx': 4.5, 'cy': 3.0, 'w': 10, 'h': 8}
    for split in ('train', 'val', 'test'):
        edit_json(folder / f'transforms_{split}.json', lambda meta: meta.update(intrinsics))
    np.testing.assert_array_equal(load_blender(folder).K, [[12, 0, 4.5], [0, 13, 3], [0, 0, 1]])
    half = load_blender(folder, '--half_res')
    np.testing.assert_array_equal(half.K, [[6, 0, 2.25], [0, 6.5, 1.5], [0, 0, 1]])


def single_file_scene(folder, count=17):
    """Write a scene with one transforms.json: cameras on a circle of radius 3, at height 1 around (5, 0,
    0)."""
    (folder / 'images').mkdir(parents=True)
    frames = []
    for index in range(count):
        iio.imwrite(folder / f'images/{index:03d}.jpg', noise(8, 10, 3, seed=index))
        pose = pose_spherical(360 * index / count, -np.degrees(np.arctan2(1, 3)), np.sqrt(10))
        pose[0, 3] += 5
        frames.append({'file_path': f'images/{index:03d}.jpg', 'transform_matrix': pose.tolist()})
    meta = {'fl_x': 12.0, 'w': 10, 'h': 8, 'frames': frames}
    (folder / 'transforms.json').write_text(json.dumps(meta))
    return folder


def test_a_single_transforms_file_holds_out_every_8th_frame(tmp_path):
    folder = single_file_scene(tmp_path / 'scene')
    scene = load_blender(folder)
    assert scene.i_test.tolist() == [0, 8, 16] and len(scene.i_train) == 14
    assert not set(scene.i_train) & set(scene.i_test)
    assert load_blender(folder, '--llffhold', 5).i_test.tolist() == [0, 5, 10, 15]


def test_the_path_of_a_captured_scene_circles_what_the_cameras_look_at(tmp_path):
    path = load_blender(single_file_scene(tmp_path / 'scene')).render_poses
    np.testing.assert_allclose(focus_point(path), [5, 0, 0], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(path[:, :, 3] - [5, 0, 0], axis=-1), np.sqrt(10), rtol=1e-4)
    np.testing.assert_allclose(path[:, 2, 3], 1, atol=1e-4)
    assert np.linalg.det(path[:, :, :3]) == pytest.approx(np.ones(40), abs=1e-4)


def test_near_and_far_that_miss_the_scene_give_a_warning(tmp_path):
    folder = single_file_scene(tmp_path / 'scene')
    with pytest.warns(UserWarning, match='--near and --far'):
        load_blender(folder, '--near', 0.1, '--far', 1)


def test_the_demo_scene_is_complete():
    scene = load_blender(ROOT / 'data/demo', '--white_bkgd')
    assert [len(part) for part in (scene.i_train, scene.i_val, scene.i_test)] == [80, 2, 8]
    assert (scene.H, scene.W) == (128, 128) and np.isfinite(scene.poses).all()
    size = sum(path.stat().st_size for path in (ROOT / 'data/demo').rglob('*') if path.is_file())
    assert size <= 2 * 1024 ** 2


# --- llff layout --------------------------------------------------------------------------------------------

def test_a_missing_folder_of_reduced_images_is_created(tmp_path):
    folder = llff_scene(tmp_path / 'scene')
    (folder / 'images/.DS_Store').write_text('')
    (folder / 'images/._0.png').write_text('')
    images, poses, _, _, _ = load_llff_data(folder, factor=2)
    assert images.shape == (3, 8, 12, 3) and poses[0, :, 4].tolist() == [8, 12, 10]
    expected = iio.imread(folder / 'images/1.png').reshape(8, 2, 12, 2, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(images[1], expected, atol=0.5 / 255 + 1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ['images', 'images_2', 'poses_bounds.npy']


def test_a_failed_reduction_leaves_nothing(tmp_path):
    folder = llff_scene(tmp_path / 'scene')
    (folder / 'images/1.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'1\.png'):
        load_llff_data(folder, factor=2)
    assert sorted(path.name for path in folder.iterdir()) == ['images', 'poses_bounds.npy']


def test_the_full_size_folder_is_optional(tmp_path):
    folder = llff_scene(tmp_path / 'scene')
    load_llff_data(folder, factor=4)
    for path in (folder / 'images').iterdir():
        path.unlink()
    (folder / 'images').rmdir()
    assert load_llff_data(folder, factor=4)[0].shape == (3, 4, 6, 3)


@pytest.mark.parametrize('factor', [0, 1, None])
def test_full_size(tmp_path, factor):
    images, poses, _, _, _ = load_llff_data(llff_scene(tmp_path / 'scene'), factor=factor)
    assert images.shape == (3, 16, 24, 3) and poses[0, 2, 4] == 20


def test_parameters_of_the_llff_loader(tmp_path):
    folder = llff_scene(tmp_path / 'scene')
    _, poses, bds, path, _ = load_llff_data(folder, 0, bd_factor=None, recenter=False)
    assert bds.tolist() == [[1, 9]] * 3 and path.shape == (120, 3, 5)
    np.testing.assert_allclose(poses[:, :, 3], [[0, 0.05, 0], [0.1, 0.05, 0], [0.2, 0.05, 0]], atol=1e-6)
    _, poses, bds, path, _ = load_llff_data(folder, 0, bd_factor=0.5, path_zflat=True)
    assert bds.min() == pytest.approx(2) and path.shape == (60, 3, 5)
    np.testing.assert_allclose(poses[:, :, 3].mean(0), 0, atol=1e-6)  # recentred


@needs_data
@pytest.mark.parametrize('flags', [(), ('--no_ndc', '--spherify')])
def test_an_llff_scene_knows_where_it_came_from(flags):
    folder = DATA / 'nerf_llff_data/fern'
    scene, (before, _) = load_llff(folder, *flags), read_poses_bounds(folder / 'poses_bounds.npy')
    transform = scene.applied_transform
    scale = np.cbrt(np.linalg.det(transform[:3, :3]))
    np.testing.assert_allclose(before[:, :, 3] @ transform[:3, :3].T + transform[:3, 3], scene.poses[:, :, 3],
                               atol=1e-4)
    np.testing.assert_allclose(transform[:3, :3] @ before[:, :, :3] / scale, scene.poses[:, :, :3], atol=1e-4)


@needs_data
def test_fern_as_a_scene():
    scene = load_llff(DATA / 'nerf_llff_data/fern')
    assert scene.i_test.tolist() == [0, 8, 16] and len(scene.i_train) == 17
    assert (scene.near, scene.far) == (0, 1) and (scene.H, scene.W) == (378, 504)
    flat = load_llff(DATA / 'nerf_llff_data/fern', '--no_ndc')
    assert flat.near == pytest.approx(1.2, abs=0.01) and flat.far > 5


@needs_data
def test_ndc_with_cameras_all_around_gives_a_warning():
    with pytest.warns(UserWarning, match='--no_ndc'):
        load_llff(DATA / 'nerf_llff_data/fern', '--spherify')


def test_cameras_that_face_different_ways_do_not_fit_ndc(tmp_path):
    scene = load_llff(llff_scene(tmp_path / 'scene'))
    turned = np.eye(3, 4, dtype=np.float32)
    turned[0, 0] = turned[2, 2] = -1
    scene.poses = np.stack([np.eye(3, 4, dtype=np.float32), turned])
    with pytest.warns(UserWarning, match='the cameras surround the scene'):
        finish_scene(options(tmp_path), scene)


@pytest.mark.parametrize('turn', np.linspace(0, 1.5, 7))
def test_four_cameras_surround_a_scene(turn):
    azimuths = turn + np.arange(4) * np.pi / 2
    arms = np.stack([np.cos(azimuths), np.sin(azimuths), np.full(4, 0.3)], -1)
    poses = np.stack([viewmatrix(arm, [0, 0, 1], arm) for arm in arms]).astype(np.float32)
    path = orbit_of_cameras(poses, 12)
    between = np.linalg.norm(path[:, :3, 3] - np.roll(path[:, :3, 3], 1, 0), axis=-1)
    np.testing.assert_allclose(between, 2 * np.sin(np.pi / 12), rtol=1e-4)


@pytest.mark.parametrize('degrees', [[-17, 17], [-29, -28, 28, 29], [5]])
def test_the_path_of_few_cameras_stays_between_them(degrees):
    azimuths = np.radians(degrees)
    arms = np.stack([np.cos(azimuths), np.sin(azimuths), np.zeros(len(degrees))], -1)
    path = orbit_of_cameras(np.stack([viewmatrix(arm, [0, 0, 1], arm) for arm in arms]), 12)
    turned = np.degrees(np.arctan2(path[:, 1, 3], path[:, 0, 3]))
    assert min(degrees) - 0.1 < turned.min() and turned.max() < max(degrees) + 0.1
    np.testing.assert_allclose(path[:, 2, 3], 0, atol=1e-4)


@pytest.mark.parametrize('first, last', [(0, 340), (-100, 100), (80, 170)])
def test_the_path_goes_only_where_cameras_were(first, last):
    """A circle if they surround the scene, otherwise an ellipse among them."""
    random, up = np.random.RandomState(0), [0, 0, 1]
    azimuths = np.radians(np.linspace(first, last, 18))
    elevations = random.uniform(0.1, 0.5, 18)
    arms = 3 * np.stack([np.cos(azimuths) * np.cos(elevations), np.sin(azimuths) * np.cos(elevations),
                         np.sin(elevations)], -1)
    poses = np.stack([viewmatrix(arm, up, np.ones(3) + arm) for arm in arms])
    path = orbit_of_cameras(poses, 24)
    # all directions of the path are near those of cameras, and it uses most of their range
    axes = path[:, :3, 2] @ (arms / 3).T
    assert np.degrees(np.arccos(axes.max(1))).max() < 25
    np.testing.assert_allclose(np.linalg.norm(path[:, :3, 3] - 1, axis=-1), 3, rtol=0.15)
    turned = np.degrees(np.unwrap(np.arctan2(path[:, 1, 3] - 1, path[:, 0, 3] - 1)))
    assert 0.75 * (last - first) < np.ptp(turned) < 1.02 * (last - first)


def test_a_panorama_has_no_orbit(tmp_path):
    """All cameras in one place, looking outwards in the plane."""
    folder = blender_scene(tmp_path / 'scene')
    frames = []
    for index, angle in enumerate(np.arange(3) * 2 * np.pi / 3):
        pose, back = np.eye(4), np.array([np.cos(angle), np.sin(angle), 0])
        pose[:3, :3] = np.stack([np.cross([0, 0, 1], back), [0, 0, 1], back], -1)
        frames.append({'file_path': f'train/r_{index}', 'transform_matrix': pose.tolist()})
    for path in folder.glob('transforms_*.json'):
        path.unlink()
    (folder / 'transforms.json').write_text(json.dumps({'camera_angle_x': 0.7, 'frames': frames}))
    problem = 'found cameras that are all in one place'
    with np.errstate(invalid='ignore'), pytest.raises(UserError, match=problem):
        load_blender_data(folder)


# --- camera paths from files --------------------------------------------------------------------------------

@pytest.mark.parametrize('rows', [3, 4])
def test_render_poses_from_files(tmp_path, rows):
    folder, poses = blender_scene(tmp_path / 'scene'), np.tile(np.eye(4), (5, 1, 1))[:, :rows]
    poses[:, 0, 3] = np.arange(5)
    np.save(tmp_path / 'path.npy', poses)
    (tmp_path / 'path.json').write_text(json.dumps(poses.tolist()))
    frames = [{'transform_matrix': pose.tolist()} for pose in poses]
    (tmp_path / 'frames.json').write_text(json.dumps({'frames': frames}))
    for name in ('path.npy', 'path.json', 'frames.json'):
        scene = load_blender(folder, '--render_poses', tmp_path / name)
        np.testing.assert_array_equal(scene.render_poses, poses[:, :3])


# --- scenes and checkpoints ---------------------------------------------------------------------------------

def test_alphas_are_kept_if_an_image_is_transparent(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    iio.imwrite(folder / 'train/r_1.png', noise(8, 10, 3, seed=9))
    scene = load_blender(folder)
    assert scene.alphas.dtype == np.uint8 and (scene.alphas[1] == 255).all()
    assert np.array_equal(scene.alphas[0], iio.imread(folder / 'train/r_0.png')[..., 3])


def test_opaque_images_have_no_alphas(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    for path in folder.rglob('*.png'):
        iio.imwrite(path, np.dstack([noise(8, 10, 3, seed=0), np.full((8, 10), 255, np.uint8)]))
    with pytest.warns(UserWarning, match='without alpha, so --random_bkgd has no effect'):
        assert load_blender(folder, '--random_bkgd').alphas is None


def test_scenes_name_the_image_of_each_view(tmp_path):
    names = load_blender(blender_scene(tmp_path / 'blender')).names
    assert names == [f'{split}/r_{i}.png' for split in ('train', 'val', 'test') for i in range(3)]
    folder = llff_scene(tmp_path / 'llff')
    for factor, name in ((0, 'images'), (2, 'images_2')):
        assert load_llff(folder, '--factor', factor).names == [f'{name}/{i}.png' for i in range(3)]


def test_a_scene_from_a_checkpoint_has_the_same_cameras(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    scene = load_blender(folder)
    args = options(folder, '--dataset_type', 'blender', '--near', 3)
    restored = scene_from_checkpoint(args, scene.checkpoint_fields())
    assert restored.images is restored.alphas is restored.names is None
    assert (restored.near, restored.far, restored.hwf) == (3, scene.far, scene.hwf)
    assert restored.has_cameras_of(scene.checkpoint_fields()) and restored.has_cameras_of({})
    restored.poses = restored.poses + 0.01
    assert not restored.has_cameras_of(scene.checkpoint_fields())
    assert not load_blender(folder, '--half_res').has_cameras_of(scene.checkpoint_fields())


def test_what_a_scene_stores_in_a_checkpoint_is_plain(tmp_path):
    """Also if its loader has put NumPy's scalars into it: no code may be needed to read the checkpoint."""
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    scene.near, scene.H = np.float32(2.5), np.int64(8)
    torch.save(scene.checkpoint_fields(), tmp_path / 'scene.tar')
    saved = torch.load(tmp_path / 'scene.tar', weights_only=True)
    assert (saved['near'], saved['H']) == (2.5, 8) and type(saved['near']) is float


@pytest.mark.parametrize('args, problem', [
    (['--near', 8], 'found near 8 and far 6, expected near < far'),
    (['--near', 0, '--lindisp'], '--lindisp: found near 0, expected more than 0')])
def test_a_scene_from_a_checkpoint_is_checked_too(tmp_path, args, problem):
    folder = blender_scene(tmp_path / 'scene')
    saved = load_blender(folder).checkpoint_fields()
    with pytest.raises(UserError, match=problem):
        scene_from_checkpoint(options(folder, '--dataset_type', 'blender', *args), saved)


# --- rays ---------------------------------------------------------------------------------------------------

def ray_sampler(scene, **options):
    return RaySampler(scene, **{'N_rand': 500, 'no_batching': False, 'precrop_iters': 0, 'precrop_frac': 0.5,
                                'pixel_centers': False, 'device': 'cpu', **options})


def pixels_of(scene, rays):
    """View and pixel of each ray, found by comparison with all rays of all training views."""
    all_rays = []
    for view in scene.i_train:
        rays_o, rays_d = get_rays(scene.H, scene.W, scene.K, torch.from_numpy(scene.poses[view]))
        all_rays.append(torch.cat([rays_o, rays_d], -1).reshape(-1, 6))
    nearest = torch.cdist(torch.cat([rays[0], rays[1]], -1), torch.cat(all_rays)).argmin(-1)
    return np.unravel_index(nearest.numpy(), (len(scene.i_train), scene.H, scene.W))


@pytest.mark.parametrize('no_batching', [True, False])
def test_a_batch_has_rays_and_their_colours(tmp_path, no_batching):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    torch.manual_seed(0)
    rays, target, *_ = ray_sampler(scene, no_batching=no_batching).sample(1)
    view, y, x = pixels_of(scene, rays)
    assert rays.shape == (2, 500, 3) and target.shape == (500, 3)
    np.testing.assert_allclose(target, scene.images[scene.i_train][view, y, x] / 255, atol=1e-6)
    assert len(set(view)) == (1 if no_batching else 3)
    assert len(set(zip(y, x))) == 80  # 500 samples cover all 8 × 10 pixels


def test_a_batch_has_the_alpha_of_its_pixels(tmp_path):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    rays, target, *_ = ray_sampler(scene, with_alpha=True).sample(1)
    view, y, x = pixels_of(scene, rays)
    np.testing.assert_allclose(target[:, 3], scene.alphas[scene.i_train][view, y, x] / 255, atol=1e-6)
    scene.alphas = None
    assert ray_sampler(scene, with_alpha=True).sample(1).target.shape == (500, 3)


@pytest.mark.parametrize('no_batching', [True, False])
def test_precrop_samples_the_centre_at_first(tmp_path, no_batching):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    sampler = ray_sampler(scene, no_batching=no_batching, precrop_iters=3)
    centre, whole = (range(2, 6), range(3, 7)), (range(8), range(10))
    for step, (rows, columns) in ((1, centre), (2, centre), (3, whole)):
        _, y, x = pixels_of(scene, sampler.sample(step).rays)
        assert set(y) == set(rows) and set(x) == set(columns)


def test_rays_through_pixel_centers(tmp_path):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    directions = []
    for centers in (False, True):
        torch.manual_seed(0)
        directions.append(ray_sampler(scene, pixel_centers=centers).sample(1).rays[1])
    shift = torch.tensor([0.5 / scene.K[0, 0], -0.5 / scene.K[1, 1], 0.0], device='cpu').float()
    torch.testing.assert_close(directions[1] - directions[0], shift.expand(500, 3), atol=1e-5, rtol=0)


def test_a_batch_may_be_larger_than_an_image(tmp_path):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    assert ray_sampler(scene, N_rand=3000, no_batching=True).sample(1).rays.shape == (2, 3000, 3)


def test_split_batches_add_up_to_the_batch():
    batch = Batch(torch.randn(2, 500, 3), torch.rand(500, 4))
    parts, shares = zip(*batch.split(150))
    assert [len(part.target) for part in parts] == [150, 150, 150, 50] and shares == (0.3, 0.3, 0.3, 0.1)
    assert torch.cat([part.rays for part in parts], 1).equal(batch.rays)
    assert torch.cat([part.target for part in parts]).equal(batch.target)


def test_the_number_of_rays_follows_the_samples_per_ray(tmp_path):
    scene = load_blender(blender_scene(tmp_path / 'scene'))
    sampler = ray_sampler(scene, N_rand_samples=1000, expected_samples=8)

    def num_rays():
        return len(sampler.sample(1).target)
    assert num_rays() == 125                     # 1000 samples / 8 per ray
    for samples_per_ray, expected in ((4.0, 250), (2.5, 400), (0.5, 500), (5000.0, 1), (0.0, 125)):
        sampler.adapt_to(torch.tensor(samples_per_ray))
        assert num_rays() == expected            # from 1 to N_rand; without any samples, as at first
    sampler.adapt_to(torch.tensor(4.0))
    sampler.adapt_to(None)
    resumed = ray_sampler(scene, N_rand_samples=1000, expected_samples=8)
    assert resumed.state_dict() == {'mean_samples': None}
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.state_dict() == {'mean_samples': 4.0} and len(resumed.sample(1).target) == 250


def test_the_number_of_rays_is_fixed_without_N_rand_samples(tmp_path):
    sampler = ray_sampler(load_blender(blender_scene(tmp_path / 'scene')))
    sampler.adapt_to(torch.tensor(4.0))
    assert len(sampler.sample(1).target) == 500
