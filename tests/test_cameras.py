"""Cameras of any kind: lens distortion, several cameras and sizes in one scene, masks, COLMAP models."""
import json
import struct
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_loaders import load_blender, load_llff, options
from tiny_runs import ROOT, run
from tiny_scenes import blender_scene, edit_json, llff_scene, noise

from run_nerf_helpers import get_rays
from scenes.bounds import Lens
from scenes.cameras import Camera, camera_table, cameras_from_table, sizes_of
from scenes.colmap import load_colmap_scene
from scenes.errors import UserError
from scenes.images import ImageSet, image_sizes, read_image, resize_area
from scenes.points import read_ply
from scenes.rays import RaySampler, camera_rays
from scenes.scene import finish_scene, scene_from_checkpoint
from training.metrics import psnr, ssim

K = np.array([[80.0, 0, 47], [0, 78, 31], [0, 0, 1]])
OPENCV = (0.06, -0.08, 0.01, 0.0, -0.001, 0.0005)
FISHEYE = (0.1, -0.02, 0.003, -0.0005, 0.0, 0.0)


def grid_of(camera):
    """x and y of the pixels' centres of a camera, [H * W] each."""
    y, x = np.divmod(np.arange(camera.H * camera.W), camera.W)
    return x + 0.5, y + 0.5


def distorted(camera, directions):
    """Image coordinates of directions [N, 3], straight from the formulas of the models; [N] each."""
    k1, k2, k3, k4, p1, p2 = camera.distortion
    x, y = directions[:, 0] / -directions[:, 2], directions[:, 1] / directions[:, 2]
    r = np.hypot(x, y)
    if camera.fisheye:
        angle = np.arctan(r)
        scale = angle * (1 + k1 * angle**2 + k2 * angle**4 + k3 * angle**6 + k4 * angle**8) / r
        x, y = x * scale, y * scale
    else:
        radial = 1 + k1 * r**2 + k2 * r**4 + k3 * r**6 + k4 * r**8
        x, y = (x * radial + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
                y * radial + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y)
    return camera.K[0, 0] * x + camera.K[0, 2], camera.K[1, 1] * y + camera.K[1, 2]


# --- lens distortion ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('distortion, fisheye', [(OPENCV, False), (FISHEYE, True)])
def test_directions_invert_the_distortion(distortion, fisheye):
    camera = Camera(60, 90, K, distortion, fisheye)
    x, y = grid_of(camera)
    directions = camera.directions(x, y)
    np.testing.assert_allclose(distorted(camera, directions), [x, y], atol=1e-8)
    if fisheye:
        np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1)
    else:
        assert (directions[:, 2] == -1).all()
    np.testing.assert_allclose(camera.pixels(3 * directions), [x, y], atol=1e-8)


def test_pixels_of_a_pinhole_camera_invert_its_directions():
    camera = Camera(60, 90, K)
    np.testing.assert_allclose(camera.pixels(camera.directions(*grid_of(camera))), grid_of(camera))
    fisheye = Camera(60, 90, K, None, True)
    np.testing.assert_allclose(fisheye.pixels(np.array([0, 0, -2.0])), K[:2, 2])


def test_directions_agree_with_opencv():
    cv2 = pytest.importorskip('cv2')
    camera = Camera(60, 90, K, OPENCV)
    x, y = grid_of(camera)
    k1, k2, k3, _, p1, p2 = OPENCV
    criteria = cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 100, 1e-14
    expected = cv2.undistortPoints(np.stack([x, y], -1)[:, None], K, np.array([k1, k2, p1, p2, k3]),
                                   criteria=criteria)[:, 0]
    np.testing.assert_allclose(camera.pixel_directions(True)[:, :2] * [1, -1], expected, atol=1e-6)
    fisheye = Camera(60, 90, K, FISHEYE, True)
    expected = cv2.fisheye.undistortPoints(np.stack([x, y], -1)[:, None], K, np.array(FISHEYE[:4]))[:, 0]
    directions = fisheye.directions(x, y)
    np.testing.assert_allclose(directions[:, :2] / -directions[:, 2:] * [1, -1], expected, atol=1e-6)


@given(st.tuples(*[st.floats(-0.02, 0.02)] * 6))
@settings(max_examples=30, deadline=None)
def test_small_distortions_are_inverted(distortion):
    camera = Camera(60, 90, K, distortion)
    x, y = grid_of(camera)
    np.testing.assert_allclose(distorted(camera, camera.directions(x, y)), [x, y], atol=1e-7)


def test_a_distortion_that_folds_the_image_is_an_error():
    with pytest.raises(UserError, match='cannot be inverted'):
        Camera(60, 90, K, (-5.0, 0, 0, 0, 0, 0)).pixel_directions(False)


@pytest.mark.parametrize('distortion, focal, fisheye', [
    ((-0.4, 0.12, -0.01, 0, 0, 0), 120.0, False), (None, 40.0, True)])
def test_directions_on_the_other_side_are_an_error(distortion, focal, fisheye):
    """Newton's method may find a solution that no light takes, beyond the fold of the image or behind the
    camera."""
    camera = Camera(200, 200, np.array([[focal, 0, 100], [0, focal, 100], [0, 0, 1]]), distortion, fisheye)
    with pytest.raises(UserError, match='cannot be inverted'):
        camera.pixel_directions(True)


@pytest.mark.parametrize('k1', [-0.2, 0.1, 0.5])
def test_projection_with_distortion_for_the_visual_hull(k1):
    """What is in the image is projected exactly; what is outside stays outside."""
    camera = Camera(60, 90, K, (k1, 0, 0, 0, 0.001, 0))
    plane = np.random.RandomState(0).uniform(-3, 3, (2, 5000))
    x, y = Lens(camera, 'cpu').project(torch.from_numpy(plane)).numpy()
    true_x, true_y = distorted(camera, np.stack([plane[0], -plane[1], -np.ones(5000)], -1))
    farthest = np.linalg.norm(camera.directions(*grid_of(camera))[:, :2], axis=-1).max()
    seen = np.linalg.norm(plane, axis=0) < farthest
    inside = seen & (true_x > 0) & (true_x < 90) & (true_y > 0) & (true_y < 60)
    assert inside.sum() > 100
    np.testing.assert_allclose([x[inside], y[inside]], [true_x[inside], true_y[inside]], atol=1e-3)
    assert ((x[~inside] <= 0) | (x[~inside] >= 90) | (y[~inside] <= 0) | (y[~inside] >= 60)).all()


def test_a_fisheye_camera_sees_behind_itself():
    camera = Camera(100, 100, np.array([[20.0, 0, 50], [0, 20, 50], [0, 0, 1]]), None, True)
    directions = camera.directions(np.array([50.0, 90.0]), np.array([50.0, 50.0]))
    np.testing.assert_allclose(directions, [[0, 0, -1], [np.sin(2), 0, -np.cos(2)]], atol=1e-12)


def test_cameras_of_other_sizes_cast_the_same_rays():
    camera = Camera(60, 90, K, OPENCV)
    for other in (camera.resized(30, 45), camera.reduced(2)):
        assert (other.H, other.W) == (30, 45)
        x, y = grid_of(other)
        np.testing.assert_allclose(other.directions(x, y), camera.directions(2 * x, 2 * y))
    assert camera.undistorted().is_pinhole and Camera(60, 90, K).is_pinhole
    pinhole, pose = camera.undistorted(), torch.eye(4, device='cpu')[:3]
    for found, expected in zip(camera_rays(pinhole, pose), get_rays(60, 90, K, pose)):
        assert torch.equal(found, expected)


def test_cameras_as_a_table():
    cameras = [Camera(60, 90, K, OPENCV), Camera(20, 30, K, FISHEYE, True), Camera(20, 30, K)]
    found = cameras_from_table(camera_table([*cameras, cameras[0]]))
    assert found[0] is found[3] and sizes_of(found) == '2 sizes, 30×20 to 90×60'
    for camera, expected in zip(found, cameras):
        assert (camera.H, camera.W, camera.fisheye) == (expected.H, expected.W, expected.fisheye)
        assert camera.distortion == expected.distortion and np.array_equal(camera.K, expected.K)


# --- scenes with several cameras ----------------------------------------------------------------------------

SIZES = [(8, 10), (12, 6), (8, 10), (5, 7)]


def mixed_scene(folder, **shared):
    """A scene of SIZES whose frames have their own intrinsics, and masks if `masks` is true."""
    (folder / 'images').mkdir(parents=True)
    frames = []
    for index, (H, W) in enumerate(SIZES):
        iio.imwrite(folder / f'images/{index}.png', noise(H, W, 3, seed=index))
        pose = np.eye(4)
        pose[:3, 3] = index, 0, 4
        frames.append({'file_path': f'images/{index}.png', 'transform_matrix': pose.tolist(), 'w': W, 'h': H,
                       'fl_x': 10.0 + index % 2, 'cx': W / 2, 'cy': H / 2})
    (folder / 'transforms.json').write_text(json.dumps({'frames': frames, **shared}))
    return folder


def expected_rays(scene, view):
    """Rays through the pixels' corners of a view [H * W, 6], and the colours there."""
    rays = camera_rays(scene.cameras[view], torch.from_numpy(scene.poses[view]))
    return torch.cat(rays, -1).reshape(-1, 6).numpy(), scene.images[view].reshape(-1, 3) / 255


def assert_same_rows(found, expected):
    """Both have the same rows, in any order and any number of times."""
    distances = torch.cdist(*(torch.from_numpy(rows.astype(np.float64)) for rows in (found, expected)))
    assert distances.amin(0).max() < 1e-3 and distances.amin(1).max() < 1e-3


def sampled(scene, count=4000, **settings):
    torch.manual_seed(0)
    sampler = RaySampler(scene, **{'N_rand': count, 'no_batching': False, 'precrop_iters': 0,
                                   'precrop_frac': 0.5, 'pixel_centers': False, 'device': 'cpu', **settings})
    batch = sampler.sample(1)
    return torch.cat(tuple(batch.rays), -1).numpy(), batch.target.numpy()


@pytest.mark.parametrize('distortion', [
    {}, {'k1': 0.05, 'p1': 0.01}, {'k1': 0.02, 'camera_model': 'OPENCV_FISHEYE'}])
@pytest.mark.parametrize('no_batching', [True, False])
def test_views_of_several_sizes_and_cameras(tmp_path, distortion, no_batching):
    """Each ray of a batch is one of the rays of all pixels, with its colour; all of them are drawn."""
    scene = load_blender(mixed_scene(tmp_path / 'scene', **distortion), '--llffhold', 3)
    assert scene.i_test.tolist() == [0, 3] and isinstance(scene.images, ImageSet)
    assert [(camera.H, camera.W) for camera in scene.cameras] == SIZES
    assert scene.cameras[0] is scene.cameras[2] and scene.cameras[1].K[0, 0] == 11
    found = np.concatenate(sampled(scene, no_batching=no_batching), -1)
    views = scene.i_train if not no_batching else [view for view in scene.i_train if found[0, 0] == view]
    expected = [np.concatenate(expected_rays(scene, view), -1) for view in views]
    assert_same_rows(found, np.concatenate(expected))


def test_a_shared_camera_with_distortion(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    for index in range(4):
        iio.imwrite(folder / f'images/{index}.png', noise(8, 10, 3, seed=index))
    camera = {'w': 10, 'h': 8, 'fl_x': 10.0, 'cx': 5.2, 'cy': 4.1}
    edit_json(folder / 'transforms.json', lambda meta: meta.update(
        k2=0.05, frames=[{**frame, **camera} for frame in meta['frames']]))
    scene = load_blender(folder)
    assert scene.images.shape == (4, 8, 10, 3) and len(set(scene.cameras)) == 1
    expected = [np.concatenate(expected_rays(scene, view), -1) for view in scene.i_train]
    assert_same_rows(np.concatenate(sampled(scene), -1), np.concatenate(expected))
    rays, _ = sampled(scene, pixel_centers=True)
    assert_same_rows(rays[:, 3:], scene.cameras[0].pixel_directions(True))


def test_images_are_drawn_from_without_a_copy(tmp_path):
    scene = load_blender(mixed_scene(tmp_path / 'scene'))
    sampler = RaySampler(scene, 10, False, 0, 0.5, False, 'cpu')
    buffer = scene.images.pixels
    assert np.shares_memory(sampler.views.images.numpy(), buffer) and scene.images[1].base is not None


def test_the_centres_of_views_of_several_sizes(tmp_path):
    scene = load_blender(mixed_scene(tmp_path / 'scene'), '--llffhold', 0)
    rays, _ = sampled(scene, precrop_iters=2)
    for view in scene.i_train:
        own = rays[rays[:, 0] == view, 3:]
        camera = scene.cameras[view]
        x, y = own[:, 0] * camera.K[0, 0] + camera.K[0, 2], camera.K[1, 2] - own[:, 1] * camera.K[1, 1]
        for position, side in ((x, camera.W), (y, camera.H)):
            half = max(1, int(side // 2 * 0.5))
            assert set(np.round(position)) == set(range(side // 2 - half, side // 2 + half))


def test_a_checkpoint_has_the_cameras_of_all_views(tmp_path):
    scene = load_blender(mixed_scene(tmp_path / 'scene', k1=0.1))
    torch.save(scene.checkpoint_fields(), tmp_path / 'scene.tar')
    saved = torch.load(tmp_path / 'scene.tar', weights_only=True)
    restored = scene_from_checkpoint(options(tmp_path, '--dataset_type', 'blender'), saved)
    assert np.array_equal(camera_table(restored.cameras), camera_table(scene.cameras))
    assert scene.has_cameras_of(saved)
    restored.cameras = [camera.undistorted() for camera in restored.cameras]
    assert not restored.has_cameras_of(saved)
    older = {key: value for key, value in saved.items() if key != 'view_cameras'}  # one camera, no distortion
    assert not scene.has_cameras_of(older)
    scene.cameras = [Camera(scene.H, scene.W, scene.K)] * 4
    assert scene.has_cameras_of(older)


def test_a_field_of_view_of_a_frame_replaces_the_focal_length_of_the_file(tmp_path):
    folder = mixed_scene(tmp_path / 'scene', fl_x=50.0, fl_y=60.0)
    edit_json(folder / 'transforms.json', lambda meta: (meta['frames'][1].pop('fl_x'),
                                                        meta['frames'][1].update(camera_angle_x=np.pi / 2)))
    camera = load_blender(folder).cameras[1]
    assert camera.K[0, 0] == camera.K[1, 1] == pytest.approx(3)


@pytest.mark.parametrize('change, problem', [
    ({'k5': 0.1}, 'frame 1: found k5 or k6'),
    ({'is_fisheye': []}, r'found is_fisheye = \[\], expected true or false'),
    ({'camera_model': 'EQUIRECTANGULAR'}, 'frame 1: found camera_model = EQUIRECTANGULAR'),
    ({'k1': 'much'}, 'frame 1: found k1 = much, expected a number'),
    ({'fl_x': -3}, 'frame 1: found fl_x = -3, expected a positive number'),
    ({'w': 9}, r'1\.png: found 6×12 pixels, but w, h = 9, 12'),
    ({'mask_path': 'masks/no.png'}, r'masks/no\.png: no such mask')])
def test_a_frame_with_a_wrong_camera(tmp_path, change, problem):
    folder = mixed_scene(tmp_path / 'scene')
    edit_json(folder / 'transforms.json', lambda meta: meta['frames'][1].update(change))
    with pytest.raises(UserError, match=problem):
        load_blender(folder)


# --- files --------------------------------------------------------------------------------------------------

def test_frames_without_an_image_are_left_out_of_a_single_file(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    (folder / 'images/1.png').unlink()
    with pytest.warns(UserWarning, match=r'1 of 4 images do not exist, such as 1\.png; their frames are'):
        scene = load_blender(folder)
    assert scene.names == ['images/0.png', 'images/2.png', 'images/3.png'] and len(scene.poses) == 3
    for path in (folder / 'images').iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r'none of the 4 images in transforms\.json exists'):
        load_blender(folder)


def test_a_missing_image_of_a_split_is_an_error(tmp_path):
    folder = blender_scene(tmp_path / 'scene')
    (folder / 'train/r_1.png').unlink()
    with pytest.raises(UserError, match=r'r_1\.png: no such image'):
        load_blender(folder)


def test_reduced_images_are_kept_beside_the_images(tmp_path):
    folder = mixed_scene(tmp_path / 'scene', k1=0.03)
    scene, full = load_blender(folder, '--factor', 2), load_blender(folder)
    assert [(camera.H, camera.W) for camera in scene.cameras] == [(4, 5), (6, 3), (4, 5), (2, 4)]
    np.testing.assert_allclose(scene.cameras[0].K[:2], full.cameras[0].K[:2] / 2)
    expected = full.images[1].reshape(6, 2, 3, 2, 3).mean((1, 3))
    np.testing.assert_allclose(scene.images[1], expected, atol=0.5)
    reduced = sorted(path.name for path in (folder / 'images_2').iterdir())
    assert reduced == ['0.png', '1.png', '2.png', '3.png']
    iio.imwrite(folder / 'images_2/1.png', np.full((6, 3, 3), 7, np.uint8))
    again = load_blender(folder, '--factor', 2)
    assert (again.images[1] == 7).all() and np.array_equal(again.images[0], scene.images[0])


def test_reduced_images_of_nested_folders_and_of_the_scene_itself(tmp_path):
    """They are under images_2/, and nothing else is taken for them."""
    folder = mixed_scene(tmp_path / 'scene')
    for name in ('images/a', 'images/a_2'):
        (folder / name).mkdir()
    names = ['images/a/0.png', 'images/a_2/0.png', '0.png', 'images/3.png']
    for index, name in enumerate(names):
        iio.imwrite(folder / name, np.full((*SIZES[index], 3), 10 * index, np.uint8))
    edit_json(folder / 'transforms.json', lambda meta: [frame.update(file_path=name)
                                                        for frame, name in zip(meta['frames'], names)])
    for _ in range(2):
        scene = load_blender(folder, '--factor', 2)
        assert [image[0, 0, 0] for image in scene.images] == [0, 10, 20, 30]
    reduced = sorted(str(path.relative_to(folder)) for path in (folder / 'images_2').rglob('*.png'))
    assert reduced == ['images_2/0.png', 'images_2/3.png', 'images_2/a/0.png', 'images_2/a_2/0.png']
    twin = {'file_path': 'images/0.png', 'w': 10, 'h': 8}
    edit_json(folder / 'transforms.json', lambda meta: meta['frames'][3].update(twin))
    with pytest.raises(UserError, match=r'expected different names: both are .*images_2/0\.png'):
        load_blender(folder, '--factor', 2)


def test_a_reduced_image_of_another_size_is_refused(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    (folder / 'images_2').mkdir()
    iio.imwrite(folder / 'images_2/0.png', noise(4, 9, 3, seed=0))
    with pytest.raises(UserError, match=r'images_2/0\.png: found 9×4 pixels, expected 10×8 / 2'):
        load_blender(folder, '--factor', 2)


def test_transparent_pixels_have_no_colour_in_reduced_images(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    image = np.zeros((8, 10, 4), np.uint8)
    image[:, ::2] = 200, 100, 50, 255  # every second column
    iio.imwrite(folder / 'images/0.png', image)
    scene = load_blender(folder, '--factor', 2, '--white_bkgd')
    assert abs(scene.images[0].astype(int) - [228, 178, 153]).max() <= 1


@pytest.mark.parametrize('name', ['0.webp', '0.tif', '0.tiff', '0.jpg'])
def test_other_formats(tmp_path, name):
    folder = mixed_scene(tmp_path / 'scene')
    image = np.tile(noise(1, 1, 3, seed=3), (8, 10, 1))
    Image.fromarray(image).save(folder / 'images' / name, **({'lossless': True} if 'webp' in name else {}))
    edit_json(folder / 'transforms.json', lambda meta: meta['frames'][0].update(file_path=f'images/{name}'))
    np.testing.assert_allclose(load_blender(folder).images[0].astype(int), image, atol=2)


@pytest.mark.parametrize('ending', ['.png', '.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_photos_are_turned_as_their_exif_says(tmp_path, orientation, ending):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'photo{ending}'
    Image.fromarray(noise(6, 9, 3, seed=1)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path), expected)
    seen, stored = image_sizes(path)
    assert seen == expected.shape[:2] and read_image(path, upright=False).shape[:2] == stored
    assert stored == (6, 9) or ending == '.tif'  # Pillow always turns TIFF


@pytest.mark.parametrize('size, turned', [((10, 8), True), ((8, 10), False)])
def test_photos_stay_as_stored_if_their_cameras_are_of_that_size(tmp_path, size, turned):
    folder, (H, W) = mixed_scene(tmp_path / 'scene'), size
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(8, 10, 3, seed=0)).save(folder / 'images/0.png', exif=exif)
    edit_json(folder / 'transforms.json', lambda meta: meta['frames'][0].update(w=W, h=H))
    scene = load_blender(folder)
    stored = noise(8, 10, 3, seed=0)
    assert np.array_equal(scene.images[0], np.rot90(stored, -1) if turned else stored)


def test_the_applied_transform_and_sparse_points(tmp_path):
    folder = mixed_scene(tmp_path / 'scene', applied_scale=2.0, ply_file_path='points.ply',
                         applied_transform=[[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 3]])
    header = ('ply\nformat {} 1.0\ncomment made by hand\nelement vertex 2\nproperty float x\n'
              'property float y\nproperty double z\nproperty uchar red\nend_header\n')
    for name, body in (('ascii', b'1 2 3 255\n4 5 6 0\n'),
                       ('binary_little_endian', struct.pack('<ffdBffdB', 1, 2, 3, 255, 4, 5, 6, 0)),
                       ('binary_big_endian', struct.pack('>ffdBffdB', 1, 2, 3, 255, 4, 5, 6, 0))):
        (folder / 'points.ply').write_bytes(header.format(name).encode() + body)
        scene = load_blender(folder)
        assert scene.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    moved = scene.applied_transform @ [10, 20, 30, 1]
    assert moved.tolist() == [2 * (10 + 1), 2 * (30 + 2), 2 * (-20 + 3), 1]
    pose = np.eye(4)
    pose[:3, 3] = 10, 20, 30
    path = {'coordinates': 'input', 'frames': [{'transform_matrix': pose.tolist()}]}
    (tmp_path / 'path.json').write_text(json.dumps(path))
    (found,) = load_blender(folder, '--render_poses', tmp_path / 'path.json').render_poses
    np.testing.assert_allclose(found[:, 3], moved[:3])
    np.testing.assert_allclose(found[:, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-6)
    (folder / 'points.ply').write_bytes(b'ply\nformat ascii 1.0\nelement vertex 2\nend_header\n')
    with pytest.raises(UserError, match='not a readable PLY file'):
        read_ply(folder / 'points.ply')


# --- masks --------------------------------------------------------------------------------------------------

def add_masks(folder):
    """Masks for all views but the last one; the second one is black."""
    (folder / 'masks').mkdir()
    for index, (H, W) in enumerate(SIZES[:3]):
        mask = np.zeros((H, W), np.uint8)
        if index != 1:
            mask[H // 2:, :W // 2] = 255
        iio.imwrite(folder / f'masks/{index}.png', mask)


@pytest.mark.filterwarnings('ignore:1 of 4 images have no mask')
def test_masked_pixels_are_not_drawn(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    add_masks(folder)
    scene = load_blender(folder, '--llffhold', 0)  # the first view is the only test view
    rays, _ = sampled(scene, 8000)
    assert set(rays[:, 0]) == {2, 3}
    camera, masked = scene.cameras[2], rays[rays[:, 0] == 2, 3:]
    x, y = masked[:, 0] * camera.K[0, 0] + camera.K[0, 2], camera.K[1, 2] - masked[:, 1] * camera.K[1, 1]
    assert {*map(tuple, np.round(np.stack([x, y], -1)).astype(int))} == {(x, y) for x in range(5)
                                                                        for y in range(4, 8)}
    scene.masks[3][1:] = False  # nothing is left of the centre of this view, so all that is left is drawn
    centre, _ = sampled(scene, 8000, precrop_iters=2)
    assert len(np.unique(centre[centre[:, 0] == 3], axis=0)) == SIZES[3][1]
    assert len(np.unique(centre[centre[:, 0] == 2], axis=0)) == 2 * 2  # of 4 × 4 pixels in the centre
    scene.masks.pixels[:] = False
    with pytest.raises(UserError, match='white pixels in its mask'):
        sampled(scene)


def test_masked_pixels_do_not_count_in_metrics():
    image, target = noise(30, 40, 3, seed=1), noise(30, 40, 3, seed=2)
    mask = np.zeros((30, 40), bool)
    mask[5:25, 5:20] = True
    other = np.where(mask[..., None], image, 0)
    cropped = image[5:25, 5:20], target[5:25, 5:20]
    assert psnr(image, target, mask) == psnr(*cropped) == psnr(other, target, mask)
    assert ssim(image, target, mask=mask) == ssim(other, target, mask=mask)
    assert psnr(image, target, np.zeros_like(mask)) is ssim(image, target, mask=np.zeros_like(mask)) is None
    assert ssim(image, target, mask=np.ones_like(mask)) == pytest.approx(ssim(image, target), abs=1e-12)


@pytest.mark.filterwarnings('ignore:1 of 4 images have no mask')
def test_masks_are_reduced_with_their_images(tmp_path):
    folder = mixed_scene(tmp_path / 'scene')
    add_masks(folder)
    masks = load_blender(folder, '--factor', 2).masks
    assert masks[0].sum() == 2 * 2 and masks[0][2:, :2].all()  # half a pixel does not count
    assert masks[3].all()
    Image.fromarray(np.zeros((9, 20), np.uint8)).save(folder / 'masks/0.png')
    with pytest.raises(UserError, match=r'masks/0\.png: found a mask of 20×9 pixels, expected the shape'):
        load_blender(folder)


def test_a_mask_of_one_bit_and_one_of_an_llff_scene(tmp_path):
    folder = llff_scene(tmp_path / 'scene')
    (folder / 'masks').mkdir()
    white = np.zeros((16, 24), bool)
    white[4:8] = True
    for index in range(3):
        Image.fromarray(white).save(folder / f'masks/{index}.png')
    scene = load_llff(folder, '--factor', 2)
    assert scene.masks.shape == (3, 8, 12)
    assert (scene.masks == resize_area(white[..., None], 8, 12)[..., 0]).all()
    (folder / 'masks/1.png').unlink()
    with pytest.warns(UserWarning, match=r'1 of 3 images have no mask, such as 1\.png'):
        assert load_llff(folder, '--factor', 2).masks[1].all()


# --- COLMAP -------------------------------------------------------------------------------------------------

def colmap_scene(folder, binary):
    """Three photos of 8 × 10 pixels, taken by an OPENCV camera at x = 0, 1, 2 that looks along z, in COLMAP's
    axes, and four points."""
    (folder / 'images').mkdir(parents=True)
    (folder / 'sparse/0').mkdir(parents=True)
    parameters = [10.0, 11, 5, 4, 0.05, -0.01, 0.001, 0.002]
    points = [(0.0, 0, 2), (1, 0, 3), (0, 1, 4), (1, 1, 100)]
    for index in range(3):
        iio.imwrite(folder / f'images/{index}.png', noise(8, 10, 3, seed=index))
    if binary:
        cameras = struct.pack('<QiiQQ8d', 1, 7, 4, 10, 8, *parameters)
        images = struct.pack('<Q', 3)
        for index in (2, 0, 1):
            images += struct.pack('<i7di', index + 1, 1, 0, 0, 0, -index, 0, 0, 7) + b'%d.png\0' % index
            images += struct.pack('<Q', 4)
            images += b''.join(struct.pack('<ddq', 1, 1, seen) for seen in (1, 5, -1, 9))
        sparse = struct.pack('<Q', 4)
        for number, point in zip((9, 1, 5, 3), points):
            sparse += struct.pack('<Q3d3BdQ', number, *point, 1, 2, 3, 0.5, 1) + struct.pack('<ii', 1, 0)
        contents = {'cameras.bin': cameras, 'images.bin': images, 'points3D.bin': sparse}
    else:
        lines = ''.join(f'{index + 1} 1 0 0 0 {-index} 0 0 7 {index}.png\n1 1 1 1 1 5 1 1 -1 1 1 9\n'
                        for index in (2, 0, 1))
        sparse = ''.join(f'{number} {x} {y} {z} 1 2 3 0.5 1 0\n'
                         for number, (x, y, z) in zip((9, 1, 5, 3), points))
        contents = {'cameras.txt': f'# cameras\n7 OPENCV 10 8 {" ".join(map(str, parameters))}\n'.encode(),
                    'images.txt': f'# images\n{lines}'.encode(), 'points3D.txt': sparse.encode()}
    for name, content in contents.items():
        (folder / 'sparse/0' / name).write_bytes(content)
    return folder


def load_colmap(folder, *args):
    args = options(folder, '--dataset_type', 'colmap', *args)
    return finish_scene(args, load_colmap_scene(args))


@pytest.mark.filterwarnings('ignore:the cameras look at')
@pytest.mark.parametrize('binary', [True, False])
def test_a_colmap_model(tmp_path, binary):
    scene = load_colmap(colmap_scene(tmp_path / 'scene', binary), '--llffhold', 2)
    assert scene.names == [f'images/{index}.png' for index in range(3)] and scene.i_test.tolist() == [0, 2]
    expected = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0]])
    np.testing.assert_allclose(scene.poses[0], expected)
    np.testing.assert_allclose(scene.poses[:, :, 3], [[0, 0, 0], [1, 0, 0], [2, 0, 0]])
    (camera,) = set(scene.cameras)
    assert camera.distortion == (0.05, -0.01, 0, 0, 0.001, 0.002) and camera.K[1, 1] == 11
    assert scene.images.shape == (3, 8, 10, 3) and len(scene.points) == 4
    assert 1.5 < scene.near < 2 and 4 < scene.far < 5.1, 'the point at 100 is not seen by a photo'


@pytest.mark.filterwarnings('ignore:the cameras look at')
def test_a_colmap_model_with_smaller_images_and_missing_ones(tmp_path):
    folder = colmap_scene(tmp_path / 'scene', True)
    for index in range(3):
        iio.imwrite(folder / f'images/{index}.png', noise(4, 5, 3, seed=index))
    (folder / 'images/1.png').unlink()
    with pytest.warns(UserWarning, match='1 of 3 images of the model do not exist'):
        scene = load_colmap(folder)
    assert (scene.H, scene.W, scene.K[0, 0]) == (4, 5, 5) and len(scene.poses) == 2
    iio.imwrite(folder / 'images/0.png', noise(4, 9, 3, seed=0))
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r'0\.png: found 9×4 pixels, but 10×8'):
        load_colmap(folder)


@pytest.mark.filterwarnings('ignore:the cameras look at')
def test_colmap_poses_are_of_photos_as_stored(tmp_path):
    folder = colmap_scene(tmp_path / 'scene', True)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(noise(8, 10, 3, seed=5)).save(folder / 'images/1.png', exif=exif)
    assert np.array_equal(load_colmap(folder).images[1], noise(8, 10, 3, seed=5))


@pytest.mark.filterwarnings('ignore:the cameras look at')
def test_odd_lines_of_a_colmap_text_model(tmp_path):
    folder = colmap_scene(tmp_path / 'scene', False)
    path = folder / 'sparse/0/images.txt'
    path.write_text(path.read_text().replace('0.png\n', '0.png \n') + '\n\n')
    assert len(load_colmap(folder).poses) == 3
    path.write_text(path.read_text().replace('1.png', '0.png'))
    with pytest.raises(UserError, match=r'found two images called 0\.png'):
        load_colmap(folder)


@pytest.mark.parametrize('name, content, problem', [
    ('cameras.bin', struct.pack('<QiiQQ8d', 1, 7, 11, 10, 8, *range(8)), 'found camera model 11, expected'),
    ('cameras.bin', struct.pack('<QiiQQ3d', 1, 7, 0, 10, 8, 0, 5, 4), 'expected positive sizes and focal'),
    ('cameras.bin', struct.pack('<QiiQQ12d', 1, 7, 6, 10, 8, *range(12)), 'found camera model FULL_OPENCV'),
    ('cameras.bin', b'\1', r'cameras\.bin: not a readable file of COLMAP'),
    ('images.bin', struct.pack('<Q', 0), 'found no image in the model'),
    ('points3D.bin', None, r'found neither points3D\.bin nor points3D\.txt')])
def test_damaged_colmap_models(tmp_path, name, content, problem):
    folder = colmap_scene(tmp_path / 'scene', True)
    path = folder / 'sparse/0' / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        load_colmap(folder)
    with pytest.raises(UserError, match='found no COLMAP model'):
        load_colmap(tmp_path)


@needs_data
@pytest.mark.filterwarnings('ignore:the cameras look at')
def test_fox():
    """instant-ngp's own scene: 17 of its 67 images do not exist."""
    with pytest.warns(UserWarning, match='17 of 67 images do not exist'):
        scene = load_blender(DATA / 'fox', '--factor', 1)
    assert len(scene.poses) == 50 and len(set(scene.cameras)) == 1
    camera = scene.cameras[0]
    assert (camera.H, camera.W) == (960, 540) and camera.distortion[0] == 0.0578421


# --- training -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_scene_with_distortion_trains_as_well_as_one_without(tmp_path):
    """A scene whose distortion is ignored trains worse. The distortion is stronger than a real lens's, to
    matter in small images after few steps. The images differ, so the two results are only roughly equal."""
    def psnr_of(name, folder):
        args = ['--datadir', folder, '--expname', name, '--basedir', tmp_path, '--device', 'cpu']
        outputs = ['--N_iters', 200, '--i_testset', 200, '--i_video', 1000]
        assert run('--config', ROOT / 'configs/demo_fast.txt', *args, *outputs) == 0
        return json.loads((tmp_path / name / 'testset_000200/metrics.json').read_text())['mean']['psnr']

    made = {'straight': [], 'distorted': ['--distortion', 1.2, -0.4, 0, 0, 0.003, -0.002]}
    for name, distortion in made.items():
        size = ['--size', 64, '--samples', 1, '--train', 30, '--val', 1, '--test', 4]
        subprocess.run([sys.executable, ROOT / 'tools/make_demo_scene.py', '--out', tmp_path / 'data' / name,
                        *map(str, size + distortion)], check=True)
    found = {name: psnr_of(name, tmp_path / 'data' / name) for name in made}
    for path in (tmp_path / 'data/distorted').glob('*.json'):
        edit_json(path, lambda meta: [meta.pop(key) for key in ('k1', 'k2', 'p1', 'p2')])
    unknown = psnr_of('unknown', tmp_path / 'data/distorted')
    assert found['distorted'] > found['straight'] - 1 and found['distorted'] > unknown + 0.7, (found, unknown)
