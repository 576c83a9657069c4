"""Checks of a loaded scene: each fault planted in a good scene is found and only it; real scenes are good."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, ROOT, needs_data
from tiny_scenes import noise

from load_blender import load_blender_scene
from load_llff import load_llff_scene
from scenes.cameras import viewmatrix
from scenes.checks import check_scene
from scenes.images import ImageSet
from scenes.scene import finish_scene
from training.options import config_parser

VIEWS = 24


def orbit_scene(points=True, azimuths=None, outward=False):
    """Cameras 4 units from the origin in two circles, looking at a cloud of points there; every eighth is a
    test view. With `outward` they stand back to back in the middle of the points."""
    azimuths = np.linspace(0, 2 * np.pi, VIEWS + 1)[:-1] if azimuths is None else np.radians(azimuths)
    poses = []
    for index, azimuth in enumerate(azimuths):
        elevation = np.radians((15, 45)[index % 2])
        back = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation),
                         np.sin(elevation)])
        away, distance = (-back, 0.3) if outward else (back, 4)
        poses.append(viewmatrix(away, np.array([0, 0, 1.0]), distance * back))
    views = np.arange(len(poses))
    cloud = np.random.RandomState(0).randn(500, 3).astype(np.float32)
    cloud /= np.linalg.norm(cloud, axis=-1, keepdims=True) * (1 / 4 if outward else 1)
    K = np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])
    return SimpleNamespace(
        images=noise(len(poses), 24, 32, 3, seed=0), alphas=None, H=24, W=32, K=K, near=2.0, far=6.0,
        poses=np.stack(poses).astype(np.float32), names=[f'{index:03}.png' for index in views],
        i_train=views[views % 8 != 0], i_val=views[::8], i_test=views[::8], render_poses=None,
        cameras=[SimpleNamespace(H=24, W=32, K=K.copy(), distortion=None, fisheye=False) for _ in views],
        points=cloud if points else None)


def problems(scene):
    """The texts of findings that are not good."""
    return [found['text'] for found in check_scene(scene, 'scene')['findings'] if found['level'] != 'good']


# --- faults -------------------------------------------------------------------------------------------------

def opencv_axes(scene):
    scene.poses[:, :, 1:3] *= -1


def photos_upside_down(scene):
    scene.poses[:, :, :2] *= -1


def three_upside_down(scene):
    scene.poses[4:7, :, :2] *= -1


def one_mirrored(scene):
    scene.poses[5, :, 0] *= -1


def all_mirrored(scene):
    scene.poses[:, :, 2] *= -1


def scale_in_rotation(scene):
    scene.poses[:, :, :3] *= 1.5


def far_too_small(scene):
    scene.far = 3.5


def near_too_large(scene):
    scene.near = 4.5


def near_beyond_far(scene):
    scene.near, scene.far = 6.0, 2.0


def same_pose_twice(scene):
    scene.poses[7] = scene.poses[6]


def turned_only(scene):
    scene.poses[:, :, 3] = 0.001 * scene.poses[:, :, 3] / 4 + 1


def millimetres(scene):
    scene.poses[:, :, 3] *= 1000
    scene.points = None if scene.points is None else scene.points * 1000


def millimetres_with_bounds(scene):
    millimetres(scene)
    scene.near, scene.far = 2000.0, 6000.0


def focal_in_millimetres(scene):
    scene.cameras[3].K[[0, 1], [0, 1]] = 1.5


def focal_of_full_size(scene):
    for camera in scene.cameras:
        camera.K[[0, 1], [0, 1]] *= 40


def black_image(scene):
    scene.images[2] = 3


def white_images(scene):
    scene.images[2:4] = 252


def transparent_image(scene):
    scene.alphas = np.full(scene.images.shape[:3], 255, np.uint8)
    scene.alphas[3], scene.images[3] = 0, 255


def few_views(scene):
    scene.i_train = scene.i_train[:6]


def no_test_view(scene):
    scene.i_test = scene.i_test[:0]


def ndc_around(scene):
    scene.near, scene.far = 0.0, 1.0


FAULTS = [
    (opencv_axes, 'look away from what they surround'), (photos_upside_down, 'The cameras are upside down'),
    (three_upside_down, '3 of 24 cameras are upside down relative to the others: 004.png, 005.png, 006.png.'),
    (one_mirrored, '1 of 24 cameras have mirrored (left-handed) axes: 005.png.'),
    (all_mirrored, '24 of 24 cameras have mirrored'), (scale_in_rotation, 'not perpendicular unit vectors'),
    (far_too_small, 'far = 3.5|far is 3.5'), (near_too_large, 'near = 4.5|near is 4.5'),
    (near_beyond_far, 'near is 6 and far is 2; near must be less'),
    (same_pose_twice, '1 of 24 cameras repeat the pose of another one, such as 006.png and 007.png'),
    (turned_only, 'All 24 cameras are in one place'), (millimetres, 'millimetres'),
    (millimetres_with_bounds, 'millimetres'), (focal_in_millimetres, 'unlikely field of view'),
    (focal_of_full_size, '24 of 24 cameras have an unlikely field of view'),
    (black_image, '1 of 24 images are nearly all black: 002.png'),
    (white_images, '2 of 24 images are nearly all white: 002.png, 003.png'),
    (transparent_image, '1 of 24 images are nearly all transparent: 003.png'),
    (few_views, 'Only 6 views are for training'), (no_test_view, 'No view is held out'),
    (ndc_around, 'normalised device coordinates cannot represent')]


@pytest.mark.parametrize('points', [True, False], ids=['points', 'no_points'])
@pytest.mark.parametrize('fault, text', FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_found_and_only_it(fault, text, points):
    scene = orbit_scene(points)
    assert problems(scene) == []
    fault(scene)
    found, = problems(scene)
    assert any(part in found for part in text.split('|'))


@pytest.mark.parametrize('points', [True, False])
@pytest.mark.parametrize('fault', [far_too_small, near_too_large])
def test_the_advised_bounds_are_good(fault, points):
    scene = orbit_scene(points)
    fault(scene)
    advice = check_scene(scene, 'scene')['findings'][0]['advice']
    scene.near, scene.far = map(float, re.search(r'--near (\S+) --far ([^ ,]+)', advice).groups())
    assert problems(scene) == []


@pytest.mark.parametrize('points, text', [(True, '100% of the sparse points lie outside the box'),
                                          (False, 'lies outside the box')])
def test_a_box_beside_the_subject_is_found(points, text):
    scene = orbit_scene(points)
    assert len(check_scene(scene, 'scene', aabb=[-1.1] * 3 + [1.1] * 3)['findings']) == 1
    report = check_scene(scene, 'scene', aabb=[1.5] * 3 + [2.5] * 3)
    found, = report['findings']
    assert text in found['text'] and report['scene']['aabb'] == [[1.5] * 3, [2.5] * 3]
    if points:
        box = [float(x) for x in found['advice'].removeprefix('Give --aabb ').split()]
        assert check_scene(scene, 'scene', aabb=box)['findings'][0]['level'] == 'good'


def test_the_fraction_of_cut_points_is_that_of_a_loop_over_points():
    scene = orbit_scene()
    scene.far = 3.9
    visible = farther = 0
    for camera, pose in zip(scene.cameras, scene.poses):
        for point in scene.points:
            x, y, z = pose[:, :3].T @ (point - pose[:, 3])
            u, v = (camera.K @ [x, -y, -z])[:2] / -z
            if z < 0 and 0 < u < camera.W and 0 < v < camera.H:
                visible, farther = visible + 1, farther + (-z > 3.9)
    assert f'cut {farther / visible:.0%} of the sparse points: 0% are nearer' in problems(scene)[0]


@pytest.mark.parametrize('points', [True, False])
def test_cameras_back_to_back_are_good(points):
    """They look away from the point where their axes meet, as in a room."""
    scene = orbit_scene(points, outward=True)
    scene.near = 0.5
    assert problems(scene) == []


def test_two_views_from_one_place_are_good():
    scene = orbit_scene()
    scene.poses[7, :, 3] = scene.poses[6, :, 3]
    assert problems(scene) == []


def test_two_faults_are_both_found():
    scene = orbit_scene()
    black_image(scene)
    far_too_small(scene)
    assert len(problems(scene)) == 2


def test_the_report_is_json_with_the_cameras_of_the_scene():
    scene = orbit_scene()
    report = check_scene(scene, 'orbit')
    assert json.loads(json.dumps(report)) == report
    assert report['scene'] == {'type': None, 'near': 2.0, 'far': 6.0, 'ndc': False, 'aabb': None,
                               'up': [0, 0, 1]}
    assert [camera['split'] for camera in report['cameras']].count('test') == 3
    camera = report['cameras'][5]
    np.testing.assert_allclose(camera['position'], scene.poses[5, :, 3])
    np.testing.assert_allclose(np.cross(camera['forward'], camera['up']), scene.poses[5, :, 0], atol=1e-6)
    np.testing.assert_allclose(np.tan(np.radians(camera['fov']) / 2), [16 / 30, 12 / 30])


def test_a_checkpoint_without_images_and_names_is_checked_too():
    scene = orbit_scene()
    scene.images = scene.names = None
    assert problems(scene) == []


def test_images_of_several_sizes_are_checked():
    scene = orbit_scene()
    sizes = [(24, 32) if index % 2 else (300, 200) for index in range(VIEWS)]
    scene.images, scene.alphas = ImageSet(sizes), ImageSet(sizes, ())
    for index in range(VIEWS):
        scene.images[index][:], scene.alphas[index][:] = noise(*sizes[index], 3, seed=index), 255
    assert problems(scene) == []
    scene.images[4][:], scene.alphas[6][:] = 0, 0
    assert problems(scene) == ['1 of 24 images are nearly all black: 004.png.',
                               '1 of 24 images are nearly all transparent: 006.png.']


def test_a_fisheye_lens_may_see_more_than_half_of_the_world():
    scene = orbit_scene(points=False)
    for camera in scene.cameras:
        camera.fisheye = True
        camera.K[[0, 1], [0, 1]] = 10
    fov = check_scene(scene, 'scene')['cameras'][0]['fov']
    assert fov[0] == pytest.approx(np.degrees(3.2)) and problems(scene) == []


# --- real scenes --------------------------------------------------------------------------------------------

def load(folder, layout, *args):
    """The scene in a folder."""
    args = ['--expname', 'x', '--datadir', str(folder), '--dataset_type', layout, *args]
    args = config_parser().parse_args(args)
    return finish_scene(args, load_blender_scene(args) if layout == 'blender' else load_llff_scene(args))


def test_the_demo_is_good():
    scene = load(ROOT / 'data/demo', 'blender', '--white_bkgd', '--near', '2.6', '--far', '5.4')
    assert problems(scene) == []
    opencv_axes(scene)
    assert len(problems(scene)) == 1


@needs_data
@pytest.mark.parametrize('args', [(), ('--no_ndc',), ('--no_ndc', '--spherify', '--lindisp')])
def test_fern_is_good(args):
    assert problems(load(DATA / 'nerf_llff_data/fern', 'llff', *args)) == []


@needs_data
def test_lego_is_good():
    assert problems(load(DATA / 'nerf_synthetic/lego', 'blender', '--white_bkgd', '--half_res')) == []


@needs_data
@pytest.mark.filterwarnings('ignore')
def test_fox_is_good():
    scene = load(DATA / 'fox', 'blender')
    assert len(scene.poses) == 50 and problems(scene) == []
