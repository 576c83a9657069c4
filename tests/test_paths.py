"""Camera paths: smooth interpolation, files of several programs, and the frames that they lead to."""

import json
import shutil
from itertools import pairwise

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny_networks import encoded_nerf
from tiny_runs import NO_OUTPUTS, TINY, run, run_python

from accel.network_query import NetworkQuery
from run_nerf import ImageRenderer
from scenes.cameras import Camera, camera_of_fov, homogeneous
from scenes.errors import UserError
from scenes.paths import interpolate_path, read_camera_path, write_camera_path
from scenes.quaternions import exp, log, matrices_of, multiply, quaternions_of
from tools.path import main, shape_path
from tools.trained import load_trained


def rotation(vector):
    """The matrix of a rotation vector, by Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = np.divide(vector, angle) if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def random_poses(count, seed=0, turn=2.0):
    """Keyframes [count, 3, 4] with random positions, and rotations of up to `turn` radians between them."""
    random = np.random.RandomState(seed)
    poses, R = [], np.eye(3)
    for _ in range(count):
        axis = random.randn(3)
        R = R @ rotation(turn * random.rand() * axis / np.linalg.norm(axis))
        poses.append(np.column_stack([R, random.randn(3)]))
    return np.stack(poses)


# --- quaternions --------------------------------------------------------------------------------------------

def test_quaternions_are_the_rotations_of_rodrigues():
    vectors = np.random.RandomState(0).randn(50, 3) * np.linspace(0, 1.8, 50)[:, None]
    expected = np.stack([rotation(vector) for vector in vectors])
    np.testing.assert_allclose(matrices_of(exp(vectors)), expected, atol=1e-12)
    np.testing.assert_allclose(matrices_of(quaternions_of(3 * expected)), expected, atol=1e-12)
    short = vectors[np.linalg.norm(vectors, axis=-1) < np.pi]
    np.testing.assert_allclose(log(-exp(short)), short, atol=1e-12)
    product = matrices_of(multiply(exp(vectors), exp(vectors[::-1]), exp(vectors)))
    np.testing.assert_allclose(product, expected @ expected[::-1] @ expected, atol=1e-12)


# --- interpolation ------------------------------------------------------------------------------------------

KEYFRAMES = {'random': random_poses(6),
             'half turns': np.stack([np.column_stack([rotation([0, angle, 0]), [angle, 0, 0]])
                                     for angle in np.pi * np.arange(5)]),
             'large turns': random_poses(6, seed=1, turn=3.1),
             'two': random_poses(2), 'one': random_poses(1)}


@pytest.mark.parametrize('name', KEYFRAMES)
@pytest.mark.parametrize('loop', [False, True])
def test_the_path_passes_through_its_keyframes(name, loop):
    keys = KEYFRAMES[name]
    K, between = len(keys), 7
    fovs = np.linspace(20, 90, K)
    poses, found = interpolate_path(keys, fovs, None, between * K if loop else between * (K - 1) + 1, loop)
    assert poses.dtype == np.float32 and poses.shape == (len(found), 3, 4)
    np.testing.assert_allclose(poses[::between], keys, atol=1e-6)
    np.testing.assert_allclose(found[::between], fovs)


@pytest.mark.parametrize('name', KEYFRAMES)
@pytest.mark.parametrize('loop', [False, True])
def test_every_frame_has_a_rotation(name, loop):
    axes = interpolate_path(KEYFRAMES[name], None, None, 101, loop)[0][:, :, :3].astype(np.float64)
    np.testing.assert_allclose(axes @ axes.transpose(0, 2, 1), np.broadcast_to(np.eye(3), axes.shape),
                               atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(axes), 1, atol=1e-6)


@pytest.mark.parametrize('name', ['random', 'half turns', 'large turns', 'two'])
@pytest.mark.parametrize('loop', [False, True])
def test_velocities_are_continuous(name, loop):
    """Between neighbouring frames the velocity changes by little, the less the closer they are."""
    keys = KEYFRAMES[name]
    times = np.cumsum(np.random.RandomState(2).uniform(0.5, 2, len(keys)))

    def largest_change(count):
        poses, fovs = interpolate_path(keys, np.linspace(30, 60, len(keys)), times, count, loop)
        values = np.column_stack([poses.reshape(count, 12), fovs]).astype(np.float64)
        if loop:
            values = np.concatenate([values, values[:2]])  # over the seam too
        return np.abs(np.diff(values, 2, axis=0) * count).max()
    assert largest_change(2000) < 0.25 * largest_change(250) + 0.01


def test_uneven_times_are_kept():
    keys, times = random_poses(4), np.array([1.0, 1.5, 3.0, 7.0])
    poses, _ = interpolate_path(keys, None, times, 13)  # every half second
    np.testing.assert_allclose(poses[[0, 1, 4, 12]], keys, atol=1e-6)
    around, _ = interpolate_path(keys, None, times, 16, loop=True)  # 6 s, and 2 s back
    np.testing.assert_allclose(around[[0, 1, 4, 12]], keys, atol=1e-6)


def test_evenly_spaced_keyframes_on_a_line_give_even_steps():
    keys = np.stack([np.column_stack([rotation([0, 0.3 * k, 0]), [k, 2 * k, 0]]) for k in range(5)])
    poses, _ = interpolate_path(keys, None, None, 41)
    np.testing.assert_allclose(poses[:, 0, 3], np.linspace(0, 4, 41), atol=1e-6)
    expected = np.stack([rotation([0, angle, 0]) for angle in np.linspace(0, 1.2, 41)])
    np.testing.assert_allclose(poses[:, :, :3], expected, atol=1e-6)


def test_fields_of_view_stay_possible():
    _, fovs = interpolate_path(random_poses(4), [5, 5, 170, 1], None, 200)
    assert (fovs > 0).all() and (fovs < 180).all()


@pytest.mark.parametrize('poses, times', [(np.zeros((0, 3, 4)), None), (random_poses(2), [1, 1])])
def test_keyframes_that_are_no_path(poses, times):
    with pytest.raises(ValueError, match='ascending times'):
        interpolate_path(poses, None, times, 5)


# --- files --------------------------------------------------------------------------------------------------

# nerfstudio's transform of a scene into its normalised coordinates, and the transform that a transforms file
# may already have applied to its input: each a rotation, a translation and a scale.
DATAPARSER = {'transform': np.column_stack([rotation([0.4, -1.1, 0.7]), [0.3, -2.0, 0.5]]), 'scale': 0.31}
APPLIED = homogeneous(2.5 * np.column_stack([rotation([1.2, 0.1, -0.3]), [1.0, 2.0, -1.0]]))


def in_input(poses):
    """Poses [N, 3, 4] of the scene in the coordinates from which APPLIED leads there, [N, 4, 4]."""
    moved = np.linalg.inv(APPLIED) @ homogeneous(np.asarray(poses, np.float64))
    moved[:, :3, :3] *= 2.5
    return moved


def write_nerfstudio_path(folder, poses, fov, size, **changes):
    """Write what nerfstudio would for poses [N, 3, 4] in the coordinates of its input: the path, and
    `dataparser_transforms.json` in the same folder; returns the path's file."""
    folder.mkdir(exist_ok=True)
    moved = homogeneous(DATAPARSER['transform']) @ homogeneous(np.asarray(poses, np.float64))
    moved[:, :3, 3] *= DATAPARSER['scale']
    cameras = [{'camera_to_world': pose.flatten().tolist(), 'fov': fov, 'aspect': size[0] / size[1]}
               for pose in moved]
    content = {'camera_path': cameras, 'render_width': size[0], 'render_height': size[1], 'fps': 24,
               'seconds': 2.0, 'is_cycle': True, 'camera_type': 'perspective', 'keyframes': [], **changes}
    (folder / 'path.json').write_text(json.dumps(content))
    about = {'transform': DATAPARSER['transform'].tolist(), 'scale': DATAPARSER['scale']}
    (folder / 'dataparser_transforms.json').write_text(json.dumps(about))
    return folder / 'path.json'


def test_what_is_written_is_read(tmp_path):
    keys, times, fovs = random_poses(3), np.array([0, 1.5, 2]), np.array([40.0, 50, 60])
    poses, all_fovs = interpolate_path(keys, fovs, times, 12, loop=True)
    write_camera_path(tmp_path / 'path.json', poses, all_fovs, 12, (48, 27), (keys, fovs, times), loop=True)
    found = read_camera_path(tmp_path / 'path.json', APPLIED)  # the file is in the coordinates of the scene
    np.testing.assert_array_equal(found.poses, poses)
    np.testing.assert_array_equal(found.fovs, all_fovs)
    assert (found.size, found.fps, found.loop) == ((48, 27), 12, True)
    np.testing.assert_array_equal(found.keyframes[0], keys.astype(np.float32))
    np.testing.assert_array_equal(found.keyframes[1:], [fovs, times])
    write_camera_path(tmp_path / 'path.json', poses, None, 12, (48, 27))
    found = read_camera_path(tmp_path / 'path.json')
    assert found.fovs is None and found.keyframes is None and found.loop is False
    assert [path.name for path in tmp_path.iterdir()] == ['path.json']


def test_a_path_in_the_coordinates_of_the_input(tmp_path):
    poses, keys = random_poses(4), random_poses(2, seed=3)
    frames, keyframes = ([{'transform_matrix': pose.tolist()} for pose in in_input(part)]
                         for part in (poses, keys))
    content = {'coordinates': 'input', 'frames': frames, 'keyframes': keyframes}
    (tmp_path / 'path.json').write_text(json.dumps(content))
    found = read_camera_path(tmp_path / 'path.json', APPLIED)
    np.testing.assert_allclose(found.poses, poses, atol=1e-6)
    np.testing.assert_allclose(found.keyframes[0], keys, atol=1e-6)


@pytest.mark.parametrize('beside', [True, False])
def test_a_path_of_nerfstudio(tmp_path, beside):
    poses, named = random_poses(5), None
    path = write_nerfstudio_path(tmp_path / 'ns', in_input(poses), 35.0, (80, 45))
    if not beside:
        named = shutil.move(tmp_path / 'ns/dataparser_transforms.json', tmp_path / 'elsewhere.json')
    found = read_camera_path(path, APPLIED, named)
    np.testing.assert_allclose(found.poses, poses, atol=1e-6)
    assert found.fovs.tolist() == [35] * 5 and found.keyframes is None
    assert (found.size, found.fps, found.loop) == ((80, 45), 24, True)


def test_a_path_of_nerfstudio_without_its_transform(tmp_path):
    path = write_nerfstudio_path(tmp_path / 'ns', random_poses(2), 35.0, (80, 45))
    (tmp_path / 'ns/dataparser_transforms.json').unlink()
    with pytest.warns(UserWarning, match='no dataparser_transforms.json beside it'):
        found = read_camera_path(path)
    assert np.abs(found.poses - random_poses(2)).max() > 0.1


@pytest.mark.parametrize('content, problem', [
    ({'frames': []}, r'shape \[0\]'),
    ({'frames': 3}, 'no matrices'),
    ('path', 'no matrices'),
    ({'camera_path': [{'fov': 40}]}, 'camera_to_world'),
    ({'camera_path': [{'camera_to_world': [1, 2]}]}, 'expected 16 numbers'),
    ({'camera_path': [], 'camera_type': 'Equirectangular'}, 'camera_type = Equirectangular'),
    ({'coordinates': 'blender', 'frames': []}, 'coordinates = blender'),
    ({'fov': 0}, 'frame 0: found fov = 0'), ({'fov': 'wide'}, 'fov = wide'), ({'fov': True}, 'fov = True'),
    ({'fov': float('nan')}, 'fov = nan'), ({'fov': 10 ** 400}, 'expected a number from 0.1 to 179')])
def test_unusable_files(tmp_path, content, problem):
    if 'fov' in content:
        frame = {'transform_matrix': np.eye(4).tolist()}
        content = {'frames': [{**frame, **content}, {**frame, 'fov': 40}]}
    (tmp_path / 'path.json').write_text(json.dumps(content))
    identity = {'transform': np.eye(4).tolist(), 'scale': 1}
    (tmp_path / 'dataparser_transforms.json').write_text(json.dumps(identity))
    with pytest.raises(UserError, match=problem) as error:
        read_camera_path(tmp_path / 'path.json')
    assert 'path.json' in str(error.value)


@pytest.mark.parametrize('change, problem', [
    ({'fps': 0}, 'fps = 0'), ({'width': 10 ** 6}, 'width'), ({'height': -1}, 'height'),
    ({'keyframes': [1]}, 'no matrices'),
    ({'frames': [{'transform_matrix': np.eye(4).tolist(), **more} for more in ({}, {'fov': 40})]}, 'no fov'),
    ({'keyframes': [{'transform_matrix': np.eye(4).tolist(), 'time': 1}] * 2}, 'does not ascend')])
def test_unusable_numbers(tmp_path, change, problem):
    content = {'frames': [{'transform_matrix': np.eye(4).tolist()}], **change}
    (tmp_path / 'path.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem):
        read_camera_path(tmp_path / 'path.json')


@pytest.mark.parametrize('content', [[1], {}, {'transform': [[1, 2]], 'scale': 1},
                                     {'transform': np.eye(4).tolist(), 'scale': 0},
                                     {'transform': np.eye(4).tolist(), 'scale': None}])
def test_unusable_transforms_of_nerfstudio(tmp_path, content):
    path = write_nerfstudio_path(tmp_path, random_poses(1), 35.0, (80, 45))
    (tmp_path / 'dataparser_transforms.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'dataparser_transforms.json: found no invertible transform'):
        read_camera_path(path)


def test_a_transform_of_nerfstudio_for_another_kind_of_path(tmp_path):
    write_camera_path(tmp_path / 'path.json', random_poses(2), None, 30, (8, 8))
    with pytest.raises(UserError, match='no "camera_path"'):
        read_camera_path(tmp_path / 'path.json', None, tmp_path / 'dataparser_transforms.json')


# --- cameras ------------------------------------------------------------------------------------------------

def test_field_of_view_and_size():
    camera = camera_of_fov(40.0, 60, 80)
    assert camera.fov == pytest.approx(40) and camera.with_size(60, 80) is camera
    wide = camera.with_size(90, 160)
    assert wide.fov == pytest.approx(40)
    np.testing.assert_allclose(wide.K, camera_of_fov(40.0, 90, 160).K)
    off_center = Camera(60, 80, np.array([[50.0, 0, 44], [0, 52, 27], [0, 0, 1]]))
    np.testing.assert_allclose(off_center.with_size(120, 160).K, off_center.resized(120, 160).K)
    np.testing.assert_allclose(off_center.with_size(60, 100).K[:2, 2], [54, 27])


@pytest.mark.parametrize('ndc', [False, True])
def test_a_wider_frame_shows_the_same_in_its_middle(ndc):
    """In normalised device coordinates, too: they are those of the scene, whatever the size of a frame."""
    torch.manual_seed(0)
    H, W, network = 6, 8, encoded_nerf()
    camera = Camera(H, W, np.array([[9.0, 0, 4], [0, 9, 3], [0, 0, 1]]))
    kwargs = {'network_fn': network, 'network_fine': None, 'network_query_fn': NetworkQuery(),
              'N_samples': 16, 'N_importance': 0, 'use_viewdirs': True, 'ndc': ndc, 'near': 0.0, 'far': 1.0}
    frames = ImageRenderer([H, W, 9.0], camera.K, None, kwargs)
    pose = np.eye(4)[:3]
    narrow, wide, double = (frames.render(pose, camera=camera.with_size(*size)).rgb
                            for size in ((H, W), (H, 2 * W), (2 * H, 2 * W)))
    np.testing.assert_allclose(wide[:, W // 2:W // 2 + W], narrow, atol=1e-6)
    np.testing.assert_allclose(double[::2, ::2], narrow, atol=1e-6)


# --- rendering ----------------------------------------------------------------------------------------------

OPTIONS = ['--device', 'cpu']


def test_a_path_of_nerfstudio_renders_the_frames_of_its_poses(two_steps, tmp_path):
    checkpoint = two_steps / '000002.tar'
    scene = load_trained(checkpoint, OPTIONS, photos=False).scene
    views = [20, 60]
    camera = scene.cameras[views[0]]
    path = write_nerfstudio_path(tmp_path, scene.poses[views], camera.fov, (camera.W, camera.H))
    trained = load_trained(checkpoint, [*OPTIONS, '--exact_render', '--render_poses', str(path)],
                           photos=False)
    assert len(trained.scene.render_poses) == 2 and trained.scene.fps == 24
    path_frames = trained.frames.render_path(trained.scene.render_poses, cameras=trained.scene.path_cameras)
    view_frames = trained.frames.render_path(scene.poses[views], cameras=[camera, camera])
    for found, expected in zip(path_frames, view_frames, strict=True):
        assert found.rgb.shape == (64, 64, 3)
        np.testing.assert_allclose(found.rgb, expected.rgb, atol=1e-5)
        np.testing.assert_allclose(found.disp, expected.disp, atol=1e-5)


def test_size_fields_of_view_and_rate_of_a_video(two_steps, tmp_path, capsys):
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 2, 3] = 4

    def render(fov, *options):
        """The size of the frames, those of the video per second, and what was printed."""
        write_camera_path(tmp_path / 'path.json', poses, [fov] * 3, 12, (20, 10))
        assert run('--render_only', '--ft_path', two_steps / '000002.tar', '--basedir', tmp_path / 'out',
                   *OPTIONS, '--render_poses', tmp_path / 'path.json', *options) == 0
        folder = tmp_path / 'out/demo/renderonly_path_000002'
        meta = iio.immeta(folder / 'video.mp4', plugin='FFMPEG')
        return iio.imread(folder / '002.png').shape[:2], meta['fps'], capsys.readouterr().out
    assert render(40)[:2] == ((10, 20), 12)
    assert 'reusing 3 frames' in render(40, '--fps', 25)[2]
    assert 'reusing' not in render(41)[2]
    assert render(41, '--render_size', 32, 18, '--fps', 25)[:2] == ((18, 32), 25)
    assert render(41, '--render_size', 32, 18, '--render_factor', 2)[:2] == ((9, 16), 12)


def test_a_checkpoint_keeps_the_cameras_of_its_path(tmp_path):
    write_camera_path(tmp_path / 'path.json', random_poses(3), [20, 30, 40], 12, (20, 10))
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 1, '--render_poses',
               tmp_path / 'path.json') == 0
    scene = load_trained(tmp_path / 'demo', [*OPTIONS, '--render_size', '40', '20'], photos=False).scene
    assert [round(camera.fov, 6) for camera in scene.path_cameras] == [20, 30, 40]
    assert {(camera.W, camera.H) for camera in scene.path_cameras} == {(40, 20)} and scene.fps == 12
    assert (scene.H, scene.W) == (64, 64)


@pytest.mark.parametrize('options, problem', [
    (['--render_test', '--render_size', 8, 8], 'not available with --render_test'),
    (['--dataparser_transforms', 'file.json'], 'needs --render_poses'),
    (['--render_size', 0, 8], 'from 1 to 16384'), (['--fps', 0], 'at least 1')])
def test_options_that_do_not_fit(capsys, options, problem):
    with pytest.raises(SystemExit):
        run('--expname', 'run', *options)
    assert problem in capsys.readouterr().err


# --- tools/path.py ------------------------------------------------------------------------------------------

def make_path(two_steps, out, *options):
    """The path that the tool writes."""
    assert main([str(out), '--run', str(two_steps), *map(str, options)]) == 0
    return read_camera_path(out)


def test_a_path_through_images(two_steps, tmp_path):
    scene = load_trained(two_steps, OPTIONS, photos=False).scene
    path = make_path(two_steps, tmp_path / 'path.json', '--views', 'r_3.png', 'train/r_5.png', '9',
                     '--seconds', 2, '--fps', 12, '--loop')
    np.testing.assert_allclose(path.poses[::8], scene.poses[[3, 5, 9]], atol=1e-6)
    assert len(path.poses) == 24 and path.loop and path.size == (64, 64)
    np.testing.assert_allclose(path.fovs, scene.pinhole.fov)
    assert path.keyframes[2] == pytest.approx([0, 2 / 3, 4 / 3])

    again = make_path(two_steps, tmp_path / 'again.json', '--keyframes', tmp_path / 'path.json')
    np.testing.assert_allclose(again.poses, path.poses, atol=1e-6)
    slower = make_path(two_steps, tmp_path / 'slower.json', '--keyframes', tmp_path / 'path.json',
                       '--seconds', 4)
    assert len(slower.poses) == 48 and slower.fps == 12
    np.testing.assert_allclose(slower.poses[::2], path.poses, atol=1e-6)


def test_matrices_are_keyframes(two_steps, tmp_path):
    np.save(tmp_path / 'keys.npy', random_poses(3))
    path = make_path(two_steps, tmp_path / 'path.json', '--keyframes', tmp_path / 'keys.npy', '--fps', 10)
    assert len(path.poses) == 80 and path.fovs is None and not path.loop
    np.testing.assert_allclose(path.poses[[0, -1]], random_poses(3)[[0, -1]], atol=1e-6)


@pytest.mark.parametrize('shape', ['orbit', 'spiral', 'figure_eight'])
def test_shapes_around_the_cameras(two_steps, tmp_path, shape):
    path = make_path(two_steps, tmp_path / 'path.json', f'--{shape}', '--seconds', 4)
    assert len(path.poses) == 120 and path.loop
    poses = path.poses.astype(np.float64)
    np.testing.assert_allclose(np.linalg.det(poses[:, :, :3]), 1, atol=1e-5)
    # all look at the origin, as the cameras of the demo do, from above the ground
    distances = np.linalg.norm(poses[:, :, 3], axis=-1, keepdims=True)
    np.testing.assert_allclose(poses[:, :, 2], poses[:, :, 3] / distances, atol=2e-3)
    assert (poses[:, 2, 3] > 0).all() and (np.abs(distances - 4) < 1).all()
    steps = np.linalg.norm(np.diff(poses[[*range(120), 0], :, 3], axis=0), axis=-1)
    assert steps[-1] < 1.5 * steps[:-1].max()  # it closes


@pytest.mark.parametrize('shape', ['spiral', 'figure_eight'])
def test_shapes_among_cameras_that_face_the_same_way(shape):
    random = np.random.RandomState(0)
    cameras = np.tile(np.eye(4)[:3], (20, 1, 1))
    cameras[:, :2, 3] = random.uniform(-0.5, 0.5, (20, 2))
    for camera in cameras:  # towards a point at a distance of 4
        camera[:, :3] = rotation([np.arctan2(camera[1, 3], 4), 0, 0]) @ rotation(
            [0, np.arctan2(camera[0, 3], 4), 0])
    poses = shape_path(shape, cameras, 60)
    inside = np.abs(cameras[:, :, 3]).max(0) + 0.1  # the middle of the cameras is not quite the origin
    assert (np.abs(poses[:, :, 3]) <= inside).all() and (poses[:, 2, 2] > 0.9).all()
    for one, other in pairwise([*poses, poses[0]]):
        assert np.linalg.norm(one[:, 3] - other[:, 3]) < 0.15


def test_parallel_cameras_have_no_spiral():
    cameras = np.tile(np.eye(4)[:3], (4, 1, 1))
    cameras[:, 0, 3] = np.arange(4)
    with pytest.raises(UserError, match='common point'):
        shape_path('spiral', cameras, 10)


@pytest.mark.parametrize('options, problem', [
    (['--views', 'r_3.png', 'gone.png'], '--views: found no image gone.png, expected a name, such as train/'),
    (['--views', '999'], 'found no image 999'),
    (['--keyframes', 'gone.json'], 'gone.json: no such file'),
    (['--run', 'nowhere', '--orbit'], 'nowhere: found nothing')])
def test_what_the_tool_cannot_use(two_steps, tmp_path, capsys, options, problem):
    assert main([str(tmp_path / 'path.json'), '--run', str(two_steps), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith('path.py: error: ') and problem in err and err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(two_steps, tmp_path, capsys):
    assert main([str(tmp_path / 'no/path.json'), '--run', str(two_steps), '--orbit']) == 2
    assert f'path.py: error: {tmp_path}/no/path.json: cannot be written (No such' in capsys.readouterr().err


def test_the_tool_as_a_program(two_steps, tmp_path):
    done = run_python('tools/path.py', 'path.json', '--run', two_steps, '--orbit', cwd=tmp_path)
    assert done.returncode == 0 and '240 frames, 8.0 s' in done.stdout, done.stderr
    assert len(read_camera_path(tmp_path / 'path.json').poses) == 240
