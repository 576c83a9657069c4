"""Camera paths: smooth interpolation, files of several programs, and the frames that they lead to."""

import numpy as np
import pytest

from scenes.paths import interpolate_path
from scenes.quaternions import exp, log, matrices_of, multiply, quaternions_of


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
