"""tools/photos.py: from photos and videos to cameras, configs and reports."""
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import DATA, ROOT, needs_data
from PIL import Image, ImageFilter
from tiny_photos import ORIENTATIONS, exif, in_view, look_at, ring, tangents, texture, write_video
from tiny_runs import finish, run_python, start, wait_for

from load_blender import load_blender_scene
from load_llff import load_llff_data, read_poses_bounds
from scenes.cameras import focus_point
from scenes.errors import UserError
from scenes.files import read_json
from tools.capture.collect import Photo, Reason, find_photos, group_cameras, unique_name
from tools.capture.database import forget_photos
from tools.capture.diagnose import advice_for, explain_unplaced, findings_of
from tools.capture.model import View
from tools.capture.place import (
    ALL_AROUND,
    AROUND,
    FORWARD_FACING,
    UNBOUNDED,
    Placement,
    level,
    place_scene,
    robust_focus,
    view_bounds,
)
from tools.capture.poses import MAX_KEYFRAMES, SEQUENCE_OVERLAP, Poses, plan_matching
from tools.capture.prepare import Prepared
from tools.capture.quality import find_faults, measure
from tools.capture.video import sharpest_frames
from tools.capture.write import (
    experiment_name,
    publish,
    write_config,
    write_ply,
    write_poses_bounds,
    write_transforms,
)
from training.options import config_parser

FERN, FOX = DATA / 'nerf_llff_data/fern/photos', DATA / 'fox/images'


def photos_py(*args):
    return run_python('tools/photos.py', *args)


# --- photos -------------------------------------------------------------------------------------------------

def test_photos_are_found_in_subfolders_and_junk_is_ignored(tmp_path):
    for name in ('a.jpg', 'b/A.PNG', 'b/c d/a.jpeg', 'out/images/x.jpg', '.hidden/x.jpg', '__MACOSX/x.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        texture(12, 16).save(tmp_path / name)
    for name in ('.DS_Store', 'b/Thumbs.db', 'notes.txt', '._a.jpg'):
        (tmp_path / name).write_bytes(b'\0')
    (tmp_path / 'text.jpg').write_text('not a photo')
    (tmp_path / 'empty.png').write_bytes(b'')
    photos, ignored = find_photos(tmp_path, skip=tmp_path / 'out')
    assert {photo.name: photo.shown for photo in photos if photo.reason is None} == {
        'a.jpg': 'a.jpg', 'b_A.jpg': 'b/A.PNG', 'b_c_d_a.jpg': 'b/c d/a.jpeg'}
    assert {photo.shown for photo in photos if photo.reason} == {'text.jpg', 'empty.png'}
    assert {path.name for path in ignored} == {'.DS_Store', 'Thumbs.db', 'notes.txt', '._a.jpg'}


def test_names_differ_without_extension_and_case():
    taken = set()
    paths = ['x.jpg', 'X.png', 'a/b.jpg', 'a_b.jpg', 'x.y.jpg', os.fsdecode(b'x\xff.jpg')]
    names = [unique_name(Path(path), taken) for path in paths]
    assert len({name.lower() for name in names}) == len(paths)
    assert all(re.fullmatch(r'[\w-]+', name) for name in names)


@pytest.mark.parametrize('extension', ['jpg', 'png', 'tif'])
@pytest.mark.parametrize('orientation', ORIENTATIONS)
def test_photos_are_turned_upright_and_keep_their_focal_length(tmp_path, orientation, extension):
    upright = texture(60, 80).filter(ImageFilter.GaussianBlur(2))
    stored = upright.transpose(ORIENTATIONS[orientation])
    (tmp_path / 'in').mkdir()
    tags = exif(orientation, focal_35mm=26).tobytes()
    stored.save(tmp_path / f'in/a.{extension}', quality=98, exif=tags)
    (photo,), _ = find_photos(tmp_path / 'in')
    assert (photo.width, photo.height) == (80, 60)
    assert photo.focal == pytest.approx(26 / 43.2666 * 100, rel=1e-4)   # 26 mm of a diagonal of 43.27 mm
    prepared = Prepared(tmp_path / 'work', max_size=40)
    prepared.add_photos([photo], 1)
    assert photo.focal == pytest.approx(26 / 43.2666 * 50, rel=1e-4)
    with Image.open(prepared.images / 'a.jpg') as image:
        assert np.abs(np.asarray(image, float) - np.asarray(upright.resize((40, 30)))).mean() < 4
        assert image.getexif().get(0x0112, 1) == 1
        assert extension == 'tif' or image.getexif().get_ifd(0x8769)[0xA405] == 26


@pytest.mark.parametrize('orientation, extension', [(1, 'jpg'), (6, 'jpg'), (6, 'tif')])
def test_the_focal_length_follows_from_the_resolution_of_the_sensor(tmp_path, orientation, extension):
    tags = exif(orientation)
    details = {0x920A: 8.0, 0xA20E: 500.0, 0xA210: 3, 0xA002: 4000}   # 8 mm, 500 pixels a cm, 4000 pixels
    for tag, value in details.items():
        tags.get_ifd(0x8769)[tag] = value
    texture(60, 80).save(tmp_path / f'a.{extension}', exif=tags.tobytes())   # 80 of those pixels
    (photo,), _ = find_photos(tmp_path)
    assert photo.focal == pytest.approx(8 * 50 * 80 / 4000)


def test_large_photos_are_reduced_and_small_ones_are_copied(tmp_path):
    (tmp_path / 'in').mkdir()
    texture(60, 80).save(tmp_path / 'in/a.jpg', exif=exif(focal_35mm=26))
    (photo,), _ = find_photos(tmp_path / 'in')
    focal = photo.focal
    Prepared(tmp_path / 'small', 40).add_photos([photo], 1)
    assert (photo.width, photo.height) == (40, 30) and photo.focal == pytest.approx(focal / 2)
    (photo,), _ = find_photos(tmp_path / 'in')
    Prepared(tmp_path / 'same', 100).add_photos([photo], 1)
    assert (tmp_path / 'same/images/a.jpg').read_bytes() == (tmp_path / 'in/a.jpg').read_bytes()


def test_a_second_run_reads_only_photos_that_changed(tmp_path):
    (tmp_path / 'in').mkdir()
    for name in 'ab':
        texture(60, 80, seed=ord(name)).save(tmp_path / f'in/{name}.jpg', exif=exif(focal_35mm=26))

    def prepare():
        photos, _ = find_photos(tmp_path / 'in')
        prepared = Prepared(tmp_path / 'work', 40)
        prepared.add_photos(photos, 1)
        times = {path.name: path.stat().st_mtime_ns for path in prepared.images.iterdir()}
        known = [(photo.width, photo.height, photo.focal, photo.sharpness) for photo in photos]
        return prepared, known, times
    _, known, times = prepare()
    second, known_again, times_again = prepare()
    assert known == known_again and times == times_again and not second.written
    write_database(tmp_path / 'work/database.db', ['a.jpg', 'b.jpg', 'c.jpg'])
    texture(60, 80, seed=5).save(tmp_path / 'in/a.jpg')
    third, _, times_third = prepare()
    assert third.written == {'a.jpg'} and read_database(third.database)[0] == {'b.jpg', 'c.jpg'}
    assert times_third['a.jpg'] > times['a.jpg'] and times_third['b.jpg'] == times['b.jpg']


def test_what_was_prepared_before_an_interruption_is_used(tmp_path):
    (tmp_path / 'in').mkdir()
    texture(60, 80).save(tmp_path / 'in/a.jpg')
    texture(60, 80).save(tmp_path / 'in/b.jpg')
    photos, _ = find_photos(tmp_path / 'in')
    photos[1].source = tmp_path / 'gone.jpg'
    with pytest.raises(FileNotFoundError):
        Prepared(tmp_path / 'work', 40).add_photos(photos, 1)
    again = Prepared(tmp_path / 'work', 40)
    again.add_photos(photos[:1], 1)
    assert not again.written and photos[0].width == 40


def write_database(path, names):
    """A database of COLMAP with a feature in each photo, and a match of each pair."""
    pycolmap = pytest.importorskip('pycolmap')
    with contextlib.closing(pycolmap.Database.open(path)) as database:
        camera = pycolmap.Camera.create_from_model_name(0, 'SIMPLE_PINHOLE', 30, 40, 30)
        camera_id = database.write_camera(camera)
        ids = [database.write_image(pycolmap.Image(name=name, camera_id=camera_id)) for name in names]
        for key in ids:
            database.write_keypoints(key, np.ones([1, 2], np.float32))
        for a, b in itertools.combinations(ids, 2):
            database.write_matches(a, b, np.zeros([1, 2], np.uint32))


def read_database(path):
    """The photos of a database of COLMAP, and the pairs with a match."""
    pycolmap = pytest.importorskip('pycolmap')
    with contextlib.closing(pycolmap.Database.open(path)) as database:
        names = {image.image_id: image.name for image in database.read_all_images()}
        assert all(database.exists_keypoints(key) for key in names)
        pairs = {frozenset(map(names.get, pycolmap.pair_id_to_image_pair(pair)))
                 for pair, _ in zip(*database.read_all_matches())}
    return set(names.values()), pairs


def test_forgotten_photos_leave_nothing_in_the_database(tmp_path):
    database = tmp_path / 'database.db'
    assert forget_photos(database, lambda _: True) == 0 and not database.exists()
    write_database(database, 'abcd')
    assert forget_photos(database, 'bx'.__contains__) == 1
    assert read_database(database) == (set('acd'), {frozenset('ac'), frozenset('ad'), frozenset('cd')})
    write_database(database, 'b')     # its number is a new one, without the old matches
    assert read_database(database)[1] == {frozenset('ac'), frozenset('ad'), frozenset('cd')}


def test_transparency_and_16_bit_photos_are_kept(tmp_path):
    (tmp_path / 'in').mkdir()
    cutout = texture(20, 30).convert('RGBA')
    cutout.putalpha(77)
    cutout.save(tmp_path / 'in/cutout.webp', lossless=True)
    Image.fromarray(np.full((20, 30), 0x8000, np.uint16)).save(tmp_path / 'in/deep.tif')
    photos, _ = find_photos(tmp_path / 'in')
    prepared = Prepared(tmp_path / 'work', 100)
    prepared.add_photos(photos, 2)
    assert [photo.reason for photo in photos] == [None, None]
    with Image.open(prepared.images / 'cutout.png') as image:
        assert image.getpixel((3, 3))[3] == 77
    with Image.open(prepared.images / 'deep.jpg') as image:
        assert image.getpixel((3, 3)) == (128, 128, 128)


def test_masks_follow_their_photos(tmp_path):
    half = Image.new('L', (80, 60))
    half.paste(255, (0, 0, 40, 60))
    masks = {'in/a.jpg': 'in/masks/a.png', 'in/a.2.jpg': None, 'in/b.jpg': 'masks/b.jpg.png',
             'in/x/c.jpg': None, 'in/y/c.jpg': 'in/masks/y/c.png',
             'in/z/images/d/e.png': 'in/z/masks/d/e.PNG'}
    for photo, mask in masks.items():
        for path in filter(None, (photo, mask)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        texture(60, 80).save(tmp_path / photo)
        if mask:
            half.save(tmp_path / mask)
    photos, _ = find_photos(tmp_path / 'in')
    found = {photo.shown: photo.mask and photo.mask.relative_to(tmp_path).as_posix() for photo in photos}
    assert {f'in/{name}': mask for name, mask in found.items()} == masks
    prepared = Prepared(tmp_path / 'work', 40)
    prepared.add_photos(photos, 1)
    assert all(prepared.mask_path(photo.name).is_file() == (photo.mask is not None) for photo in photos)
    with Image.open(prepared.mask_path('a.jpg')) as mask:
        assert np.array_equal(np.asarray(mask), np.asarray(half)[::2, ::2])


@pytest.mark.parametrize('mask, problem', [
    (None, 'not a readable mask'),
    ((60, 80), 'found a mask of 60×80 pixels, expected one of the shape of a.jpg')])
def test_a_mask_that_does_not_fit_is_named(tmp_path, mask, problem):
    (tmp_path / 'masks').mkdir()
    texture(60, 80).save(tmp_path / 'a.jpg')
    (tmp_path / 'masks/a.png').write_text('no image')
    if mask:
        Image.new('L', mask).save(tmp_path / 'masks/a.png')
    photos, _ = find_photos(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=rf'masks.a\.png: {problem}'):
            Prepared(tmp_path / 'work', 40).add_photos(photos, 1)


def test_cameras_are_grouped_by_make_lens_zoom_and_size(tmp_path):
    kinds = [('A', 26, 80), ('A', 26, 80), ('B', 26, 80), ('A', 52, 80), ('A', 26, 60)]
    for index, (make, focal, width) in enumerate(kinds):
        texture(60, width).save(tmp_path / f'{index}.jpg', exif=exif(make=make, focal_35mm=focal))
    photos, _ = find_photos(tmp_path)
    groups = group_cameras(photos)
    assert sorted(len(group.photos) for group in groups) == [1, 1, 1, 2]
    assert {photo.name for photo in groups[0].photos} == {'0.jpg', '1.jpg'}


# --- quality ------------------------------------------------------------------------------------------------

def test_blur_lowers_sharpness_and_is_found():
    image = texture(300, 400)
    values = [measure(image.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    photos = {f'{seed}': measure(texture(300, 400, seed)) for seed in range(8)}
    photos['blurred'] = measure(image.filter(ImageFilter.GaussianBlur(6)))
    assert set(find_faults(photos)) == {'blurred'}
    plain = [texture(300, 400, seed).filter(ImageFilter.GaussianBlur(6)) for seed in range(8)]
    assert not find_faults({str(index): measure(image) for index, image in enumerate(plain)})


def test_black_white_blank_and_duplicate_photos_are_found():
    photos = {'a': texture(30, 40), 'b': texture(30, 40, 5), 'a again': texture(30, 40),
              'black': Image.new('RGB', (40, 30)), 'white': Image.new('RGB', (40, 30), 'white'),
              'blank': Image.new('RGB', (40, 30), 'gray'),
              'night': Image.fromarray((np.asarray(texture(30, 40)) // 16).astype(np.uint8))}
    reasons = find_faults({name: measure(image) for name, image in photos.items()})
    assert set(reasons) == {'a again', 'black', 'white', 'blank', 'night'}
    for name, word in (('a again', 'duplicate of a'), ('black', 'dark'), ('night', 'dark'),
                       ('white', 'overexposed'), ('blank', 'blank')):
        assert word in reasons[name].text


def test_the_sharpest_frame_of_each_window_is_taken(tmp_path):
    sharp = {2, 7, 11}
    image = texture(64, 96)
    frames = [image if index in sharp else image.filter(ImageFilter.GaussianBlur(2)) for index in range(12)]
    write_video(tmp_path / 'a.mp4', np.stack([np.asarray(frame) for frame in frames]))
    chosen = [photo.name for photo, _ in sharpest_frames(tmp_path / 'a.mp4', 3)]
    assert chosen == [f'frame_{index:06d}.jpg' for index in sorted(sharp)]
    assert len(list(sharpest_frames(tmp_path / 'a.mp4', 100))) == 12
    prepared = Prepared(tmp_path / 'work', 100)
    assert [photo.name for photo in prepared.add_video(tmp_path / 'a.mp4', 3)] == chosen
    again = Prepared(tmp_path / 'work', 100)
    assert [photo.name for photo in again.add_video(tmp_path / 'a.mp4', 3)] == chosen and not again.written
    assert len(again.add_video(tmp_path / 'a.mp4', 6)) == 6 == len(list(again.images.iterdir()))
    (again.images / chosen[0]).unlink()
    assert len(Prepared(tmp_path / 'work', 100).add_video(tmp_path / 'a.mp4', 6)) == 6
    turned = tmp_path / 'turned.mp4'
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), '-loglevel', 'error', '-display_rotation', '90', '-i',
                    tmp_path / 'a.mp4', '-c', 'copy', turned], check=True)
    (photo, upright), *_ = sharpest_frames(turned, 3)
    assert upright.size == (photo.width, photo.height) == (64, 96)
    (_, stored), *_ = sharpest_frames(tmp_path / 'a.mp4', 3)
    assert np.array_equal(upright, stored.transpose(Image.Transpose.ROTATE_90))
    (tmp_path / 'b.mp4').write_text('not a video')
    with pytest.raises(UserError, match=r'b\.mp4: not a readable video'):
        list(sharpest_frames(tmp_path / 'b.mp4', 3))


# --- matching -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('count', [3, 30, 400])
def test_planned_pairs_of_a_video_are_counted(count):
    near = {step for step in range(1, SEQUENCE_OVERLAP + 1)} | {2 ** k for k in range(SEQUENCE_OVERLAP)}
    step = -(-count // MAX_KEYFRAMES)
    pairs = sum(other - index in near or index % step == other % step == 0
                for index in range(count) for other in range(index + 1, count))
    assert plan_matching(count, True) == ('sequential', pairs)


def test_matching_depends_on_the_number_of_photos():
    assert plan_matching(150, False) == ('exhaustive', 150 * 149 // 2)
    assert plan_matching(151, False)[0] == 'vocabulary tree'


# --- placing ------------------------------------------------------------------------------------------------

RANDOM = np.random.RandomState(0)
OBJECT = RANDOM.uniform(-0.4, 0.4, (2000, 3))
ROOM = RANDOM.uniform(-1, 1, (4000, 3))
ROOM[np.arange(4000), RANDOM.randint(0, 3, 4000)] = RANDOM.choice([-1.0, 1.0], 4000)  # the walls of a cube
SIDEWAYS = np.linspace([-0.3, -2, 0], [0.3, -2, 0.2], 15)
SCENES = {
    FORWARD_FACING: (look_at(SIDEWAYS, SIDEWAYS + [0, 1, 0]), OBJECT),
    AROUND: (look_at(ring(30, 2), np.zeros((30, 3))), OBJECT),
    UNBOUNDED: (look_at(ring(30, 2), np.zeros((30, 3))), np.concatenate([OBJECT[:500], 12 * ROOM])),
    ALL_AROUND: (look_at(ring(30, 0.2), ring(30, 1.0)), ROOM),
}


def random_similarity(seed):
    """A rotation, a translation and a scale."""
    random = np.random.RandomState(seed)
    q, r = np.linalg.qr(random.randn(3, 3))
    rotation = q * np.sign(np.diag(r))
    return rotation * np.sign(np.linalg.det(rotation)), 10 * random.randn(3), float(np.exp(random.randn()))


def moved(poses, points, rotation, translation, scale):
    """A scene in other coordinates, as structure from motion gives it."""
    positions = scale * rotation @ poses[:, :, 3:] + translation[:, None]
    return (np.concatenate([rotation @ poses[:, :, :3], positions], -1),
            scale * points @ rotation.T + translation)


@pytest.mark.parametrize('scene_type', SCENES)
def test_scenes_are_placed_the_same_in_whatever_coordinates(scene_type):
    poses, points = SCENES[scene_type]
    seen = in_view(poses, points)
    first = place_scene(poses, points, seen, tangents(poses))
    assert first.scene_type == scene_type
    for seed in range(3):
        placed = place_scene(*moved(poses, points, *random_similarity(seed)), seen, tangents(poses))
        assert placed.scene_type == scene_type
        distances = [np.linalg.norm(scene.poses[:, None, :, 3] - scene.poses[None, :, :, 3], axis=-1)
                     for scene in (first, placed)]
        np.testing.assert_allclose(*distances, atol=1e-6)
        assert (placed.near, placed.far) == pytest.approx((first.near, first.far), rel=1e-5)
        np.testing.assert_allclose(placed.poses[:, 2, 1], first.poses[:, 2, 1], atol=1e-5)   # how level it is


@pytest.mark.parametrize('scene_type', SCENES)
def test_up_is_up_and_the_focus_is_the_origin(scene_type):
    poses, points = SCENES[scene_type]
    seen = in_view(poses, points)
    placed = place_scene(*moved(poses, points, *random_similarity(4)), seen, tangents(poses))
    assert placed.poses[:, 2, 1].min() > 0.9
    assert np.abs(placed.poses[:, 2, 0]).max() < 0.02   # cameras are level
    distance = np.median(np.linalg.norm(placed.poses[:, :, 3], axis=-1))
    if scene_type == ALL_AROUND:
        assert distance < 0.5
    else:
        assert distance == pytest.approx(1)
    if scene_type in (AROUND, UNBOUNDED):
        np.testing.assert_allclose(focus_point(placed.poses), 0, atol=1e-4)


@pytest.mark.parametrize('scene_type', SCENES)
def test_bounds_hold_what_is_seen_but_not_outliers(scene_type):
    poses, points = SCENES[scene_type]
    outliers = np.concatenate([points, 100 * np.random.RandomState(0).randn(2, 3)])
    placed = place_scene(poses, outliers, in_view(poses, outliers), tangents(poses))
    seen = in_view(poses, points)
    clean = place_scene(poses, points, seen, tangents(poses))
    assert 0 < placed.near < placed.far < 1.5 * clean.far
    observed = placed.points[np.concatenate(seen)]
    if scene_type != UNBOUNDED:
        assert ((observed >= placed.aabb[0]) & (observed <= placed.aabb[1])).all(-1).mean() > 0.97
    bounds = view_bounds(placed.poses, placed.points, seen)
    assert (bounds[:, 0] > placed.near).all() and (bounds[:, 1] < placed.far).mean() >= 0.9


@pytest.mark.parametrize('spread', [0, 1e-3, np.pi])
def test_up_is_behind_cameras_that_look_straight_down(spread):
    random = np.random.RandomState(0)
    angle = spread * random.uniform(0, 2, 20) + np.pi * (np.arange(20) % 2)   # to and fro
    right = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
    back = np.broadcast_to([0, 0, 1.0], right.shape)
    positions = random.uniform(-1, 1, (20, 3)) + [0, 0, 5]
    poses = np.stack([right, np.cross(back, right), back, positions], -1)
    for seed in range(4):
        rotation, translation, scale = random_similarity(seed)
        turned, _ = moved(poses, OBJECT, rotation, translation, scale)
        np.testing.assert_allclose(level(turned)[2], rotation[:, 2], atol=1e-6)


def test_a_camera_that_looks_elsewhere_hardly_moves_the_focus():
    poses = SCENES[AROUND][0].copy()
    poses[3] = look_at(ring(1, 2), np.array([[5.0, 9, 4]]))[0]
    assert np.linalg.norm(robust_focus(poses)) < 0.02 < np.linalg.norm(focus_point(poses))


# --- files --------------------------------------------------------------------------------------------------

def tiny_views(count, **changes):
    params = np.array([30.0, 30, 20, 15, 0.1, 0, 0, 0])
    return [View(f'{index}.png', index + 1, 40, 30, params, 0.5) for index in range(count)]


def tiny_scene(folder, scene_type=AROUND):
    poses, points = SCENES[scene_type]
    placement = place_scene(*moved(poses, points, *random_similarity(1)), in_view(poses, points),
                            tangents(poses))
    (folder / 'images').mkdir(parents=True)
    for index in range(len(poses)):
        texture(30, 40, index).save(folder / f'images/{index:02d}.png')
    views = tiny_views(len(poses))
    for index, view in enumerate(views):
        view.name = f'{index:02d}.png'
    return placement, views


@pytest.mark.filterwarnings('ignore:.*lens distortion')
def test_transforms_and_config_load(tmp_path):
    folder = tmp_path / 'mine'
    placement, views = tiny_scene(folder)
    write_transforms(folder / 'transforms.json', views, placement)
    write_config(folder / 'config.txt', folder, 'mine', placement, 1)
    args = config_parser().parse_args(['--config', str(folder / 'config.txt')])
    assert args.expname == 'mine' and args.dataset_type == 'blender' and len(args.aabb) == 6
    assert (args.near, args.far) == pytest.approx((placement.near, placement.far), rel=1e-3)
    scene = load_blender_scene(args)
    np.testing.assert_allclose(scene.poses, placement.poses, atol=1e-6)
    meta = read_json(folder / 'transforms.json')
    assert {'camera_model', 'fl_x', 'fl_y', 'cx', 'cy', 'w', 'h', 'k1', 'k2', 'p1', 'p2', 'near', 'far',
            'aabb', 'applied_transform', 'applied_scale', 'ply_file_path'} <= set(meta)
    assert {'file_path', 'transform_matrix', 'colmap_im_id'} == set(meta['frames'][0])


def test_applied_transform_leads_from_the_input_to_the_scene(tmp_path):
    poses, points = moved(*SCENES[AROUND], *random_similarity(2))
    placement = place_scene(poses, points, in_view(poses, points), tangents(poses))
    write_transforms(tmp_path / 'transforms.json', tiny_views(len(poses)), placement)
    meta = read_json(tmp_path / 'transforms.json')
    transform = np.array(meta['applied_transform'])
    placed = meta['applied_scale'] * (points @ transform[:, :3].T + transform[:, 3])
    write_ply(tmp_path / 'p.ply', placement.points, np.zeros((len(points), 3), np.uint8))
    content = (tmp_path / 'p.ply').read_bytes().split(b'end_header\n', 1)[1]
    vertices = np.frombuffer(content, [('xyz', '<f4', 3), ('rgb', 'u1', 3)])
    np.testing.assert_allclose(vertices['xyz'], placed, atol=1e-5)


def test_several_cameras_have_their_intrinsics_in_their_frames(tmp_path):
    poses, points = SCENES[AROUND]
    views = tiny_views(len(poses))
    views[2].params = views[2].params * 1.5
    placement = place_scene(poses, points, in_view(poses, points), tangents(poses))
    write_transforms(tmp_path / 'transforms.json', views, placement)
    meta = read_json(tmp_path / 'transforms.json')
    assert 'fl_x' not in meta
    assert [frame['fl_x'] for frame in meta['frames'][1:4]] == [30, 45, 30]


def test_poses_bounds_load(tmp_path):
    folder = tmp_path / 'mine'
    placement, views = tiny_scene(folder, FORWARD_FACING)
    bounds = np.array([[0.5, 3.0]] * len(views))
    write_poses_bounds(folder / 'poses_bounds.npy', placement.poses, bounds, views[0])
    write_config(folder / 'config.txt', folder, 'mine', placement, 1, llff_error=0.5)
    args = config_parser().parse_args(['--config', str(folder / 'config.txt')])
    assert args.dataset_type == 'llff' and not args.no_ndc and args.lambda_depth == 0.1
    table, read_bounds = read_poses_bounds(folder / 'poses_bounds.npy')
    np.testing.assert_allclose(table[:, :, :4], placement.poses)
    np.testing.assert_allclose(read_bounds, bounds)
    assert load_llff_data(folder, args.factor)[1].shape == (len(views), 3, 5)


@pytest.mark.parametrize('scene_type', SCENES)
def test_every_preset_is_a_valid_config(tmp_path, scene_type):
    box = np.array([[-1.0] * 3, [1.0] * 3])
    placement = Placement(None, None, 1.0, None, None, scene_type, 0.1, 3.0, box)
    for name in ('my scene', 'garden #2', "it's; [mine]", "it's ; x", '"quoted" ; x'):
        write_config(tmp_path / 'config.txt', tmp_path / name, 'mine', placement, 2)
        args = config_parser().parse_args(['--config', str(tmp_path / 'config.txt')])
        assert args.datadir == str(tmp_path / name)
        assert args.factor == 2 and args.expname == 'mine' and args.contract and args.far == 3
        assert args.lambda_depth == 0
    write_config(tmp_path / 'config.txt', tmp_path, 'mine', placement, 2, white_bkgd=True)
    args = config_parser().parse_args(['--config', str(tmp_path / 'config.txt')])
    assert args.white_bkgd and args.occupancy_grid and not args.random_bkgd and args.aabb[:3] == [-1.0] * 3
    for name in ("'x' #1", '[mine]'):
        write_config(tmp_path / 'config.txt', Path(name), 'mine', placement, 2)
        args = config_parser().parse_args(['--config', str(tmp_path / 'config.txt')])
        assert Path(args.datadir) == Path(name)


def test_other_cameras_do_not_resume_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene, new, frame = tmp_path / 'my scene', tmp_path / 'new.json', {'file_path': 'images/a.jpg'}
    scene.mkdir()
    new.write_text(json.dumps({'frames': [{**frame, 'transform_matrix': np.eye(4).tolist()}]}))
    assert experiment_name(scene, new) == 'my_scene'
    for run in ('my_scene', 'my_scene_2'):
        Path('logs', run).mkdir(parents=True)
    assert experiment_name(scene, new) == 'my_scene'
    Path('logs/my_scene/000100.tar').touch()
    assert experiment_name(scene, new) == 'my_scene_2'
    Path('logs/my_scene_2/000100.tar').touch()
    (scene / 'config.txt').write_text('# a comment\nexpname = my_scene_2\nbasedir = ./logs\n')
    assert experiment_name(scene, new) == 'my_scene_3'
    for shift, name in ((1e-6, 'my_scene_2'), (0.1, 'my_scene_3')):
        moved_pose = (np.eye(4) + shift).tolist()
        (scene / 'transforms.json').write_text(
            json.dumps({'frames': [{**frame, 'transform_matrix': moved_pose}]}))
        assert experiment_name(scene, new) == name


def test_results_replace_those_of_an_earlier_run_and_nothing_else(tmp_path):
    for name in ('images/old.jpg', 'images_2/old.png', 'poses_bounds.npy', 'mine.txt',
                 'colmap/new/images/a.jpg', 'colmap/new/config.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    publish(tmp_path / 'colmap/new', tmp_path)
    assert files_below(tmp_path) == {'images/a.jpg', 'config.txt', 'mine.txt'}


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('moves', range(8))
def test_results_that_cannot_be_moved_leave_the_earlier_ones(tmp_path, monkeypatch, moves):
    names = ('config.txt', 'images/a.jpg', 'transforms.json', 'report.html')
    for name in (*names, *(f'colmap/new/{name}' for name in names)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = files_below(tmp_path)
    rename, sources = os.rename, []

    def failing_rename(source, target):
        if len(sources) == moves:
            monkeypatch.undo()
            raise OSError(28, 'No space left on device')
        sources.append(source)
        rename(source, target)
        assert not (tmp_path / 'config.txt').exists() or len(sources) == 8
    monkeypatch.setattr(os, 'rename', failing_rename)
    with pytest.raises(OSError, match='No space left'):
        publish(tmp_path / 'colmap/new', tmp_path)
    assert files_below(tmp_path) == before
    assert (tmp_path / 'images/a.jpg').read_text() == 'images/a.jpg'


# --- the command --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, expected', [
    (lambda folder: folder / 'missing', 'no such file or folder'),
    (lambda folder: folder, 'found no photo among 0 other files'),
    (lambda folder: shutil.copy(ROOT / 'README.md', folder), 'expected a folder of photos or a video'),
])
def test_bad_input_is_one_line(tmp_path, make, expected):
    done = photos_py(make(tmp_path), '--datadir', tmp_path / 'out')
    assert done.returncode == 2 and expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith('photos.py: error: ')


def test_photos_are_not_overwritten(tmp_path):
    texture(30, 40).save(tmp_path / 'a.jpg')
    done = photos_py(tmp_path, '--datadir', tmp_path)
    assert done.returncode == 2 and 'holds the photos' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['a.jpg']


def test_a_damaged_database_is_named(tmp_path):
    (tmp_path / 'in').mkdir()
    for seed in range(3):
        texture(60, 80, seed).save(tmp_path / f'in/{seed}.jpg')
    (tmp_path / 'out/colmap').mkdir(parents=True)
    (tmp_path / 'out/colmap/database.db').write_text('no database' * 100)
    (tmp_path / 'out/colmap/input.txt').write_text(f'{tmp_path / "in"}\n')
    done = photos_py(tmp_path / 'in', '--datadir', tmp_path / 'out')
    assert done.returncode == 2 and 'database.db: not a usable database' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('blur, advice', [(0, 'More overlap'), (9, 'More texture')])
def test_failure_gives_advice_and_a_report(tmp_path, blur, advice):
    (tmp_path / 'in').mkdir()
    for seed in range(4):
        texture(300, 400, seed).filter(ImageFilter.GaussianBlur(blur)).save(tmp_path / f'in/{seed}.jpg')
    done = photos_py(tmp_path / 'in', '--datadir', tmp_path / 'out')
    assert done.returncode == 2 and advice in done.stderr.splitlines()[-1]
    report = read_json(tmp_path / 'out/report.json')
    assert report['cameras'] == [] and report['findings'][0]['level'] == 'error'
    assert all(photo['reason'] and photo['thumbnail'] for photo in report['photos'])
    assert not (tmp_path / 'out/transforms.json').exists()


def photo_like(index, kind=None, text='', **values):
    """A `Photo` for a report."""
    values = {'sharpness': 50.0, 'exposure': 0.5, **values}
    return Photo(Path(f'{index}.jpg'), f'{index}.jpg', f'{index}.jpg', 40, 30,
                 reason=Reason(kind, text) if kind else None, **values)


@pytest.mark.parametrize('kind, advice', [
    ('heif', 'pip install pillow-heif'), ('dark', 'More light'), ('duplicate', 'each from another place'),
    ('unreadable', 'Replace the files'), ('blurred', 'Less blur'), ('overlap', 'More overlap')])
def test_advice_fits_the_most_frequent_reason(kind, advice):
    photos = [photo_like(index, kind) for index in range(5)] + [photo_like(9, 'texture')]
    assert advice in advice_for(photos)
    assert advice in findings_of(photos, [], 0.0)[0]['advice']


def test_copies_and_damaged_files_do_not_count_as_photos_without_a_camera():
    photos = [photo_like(index) for index in range(20)]
    photos += [photo_like(20 + index, 'duplicate') for index in range(20)]
    found = findings_of(photos, tiny_views(20), 0.5)
    texts = [finding['text'] for finding in found]
    assert '20 of 20 usable photos have a camera.' in texts and '20 of 40 photos cannot be used.' in texts
    assert not any('Only' in text for text in texts)


def test_photos_without_a_camera_get_the_reason_that_holds():
    poses = Poses(best_match={'0.jpg': 3, '1.jpg': 99, '2.jpg': 99, '3.jpg': 99}, separate={'1.jpg': 7},
                  few_points={'2.jpg': 4})
    photos = [photo_like(index, features=900) for index in range(4)] + [photo_like(4, features=20)]
    explain_unplaced(photos, poses, placed=set())
    words = ['few matches (3', 'separate group of 7', 'too few points (4)', 'do not fit', 'few features (20)']
    assert all(word in photo.reason.text for word, photo in zip(words, photos))


MEMORY = '''
import sys
import numpy as np
import torch
from tools.capture.collect import find_photos, group_cameras
from tools.capture.diagnose import make_report
from tools.capture.model import Arrays, View
from tools.capture.place import place_scene
from tools.capture.poses import plan_matching
from scenes.report import write_report
from training.logger import memory_gib
sys.path.insert(0, 'tests')
from tiny_photos import in_view, look_at, ring, tangents
photos, ignored = find_photos(sys.argv[1])
groups = group_cameras(photos)
assert len(photos) == 600 and [len(group.photos) for group in groups] == [600], groups
assert plan_matching(600, False)[0] == 'vocabulary tree'
points = np.random.RandomState(0).uniform(-0.4, 0.4, (2000, 3))
poses = look_at(ring(600, 2), np.zeros((600, 3)))
seen = in_view(poses, points)
params = np.array([3e3, 3e3, 2e3, 1.5e3, 0, 0, 0, 0])
views = [View(photo.name, 0, 4000, 3000, params, 0.5) for photo in photos]
arrays = Arrays(views, poses, points, np.zeros((2000, 3), np.uint8), seen, 0.5)
placement = place_scene(poses, points, seen, tangents(poses))
write_report(make_report('600', photos, ignored, groups, [], None, arrays, placement), sys.argv[2])
print(int(1024 * memory_gib(torch.device('cpu'))))
'''


def test_600_large_photos_are_planned_and_reported_in_little_memory(tmp_path):
    (tmp_path / 'in').mkdir()
    Image.new('RGB', (4000, 3000)).save(tmp_path / 'whole.jpg', exif=exif(make='A', focal_35mm=26))
    header = (tmp_path / 'whole.jpg').read_bytes()[:2000]
    for index in range(600):
        (tmp_path / f'in/{index}.jpg').write_bytes(header)
    (tmp_path / 'memory.py').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' + MEMORY)
    done = run_python(tmp_path / 'memory.py', tmp_path / 'in', tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024
    assert len(read_json(tmp_path / 'report.json')['cameras']) == 600


@pytest.fixture(scope='module')
def few_photos(tmp_path_factory):
    """Six photos of the fern, and what tools/photos.py makes of them at a third of their size."""
    folder = tmp_path_factory.mktemp('few')
    (folder / 'in').mkdir()
    for path in sorted(FERN.iterdir())[:6]:
        shutil.copy(path, folder / 'in')
    args = [folder / 'in', '--datadir', folder / 'out', '--max_size', 336]
    return folder, args, photos_py(*args)


@needs_data
def test_photos_become_a_scene_that_trains(few_photos, tmp_path):
    folder, _, done = few_photos
    assert done.returncode == 0, done.stderr
    out = folder / 'out'
    assert {path.name for path in out.iterdir()} == {
        'images', 'sparse', 'sparse_points.ply', 'transforms.json', 'poses_bounds.npy', 'config.txt',
        'report.json', 'report.html', 'colmap'}
    assert {'cameras.bin', 'images.bin', 'points3D.bin'} <= set(os.listdir(out / 'sparse/0'))
    assert f'python run_nerf.py --config {out / "config.txt"}' in done.stdout
    assert '6 of 6 photos' in done.stdout and FORWARD_FACING in done.stdout
    done = run_python('run_nerf.py', '--config', out / 'config.txt', '--basedir', tmp_path, '--N_iters', 2,
                      '--i_testset', 100, '--i_video', 100, '--i_img', 100, '--N_rand_samples', 2048,
                      '--finest_res', 64, '--device', 'cpu')
    assert done.returncode == 0, done.stderr


@needs_data
def test_a_second_run_continues_from_the_database(few_photos):
    folder, args, first = few_photos
    assert first.returncode == 0, first.stderr
    prepared = folder / 'out/colmap/prepared.json'
    features = features_of(folder / 'out')
    shutil.copy(sorted(FERN.iterdir())[6], folder / 'in')
    before = json.loads(prepared.read_text())
    second = photos_py(*args)
    assert second.returncode == 0 and '7 of 7 photos' in second.stdout, second.stderr
    after = features_of(folder / 'out')
    assert features.items() <= after.items() and len(after) == 7
    assert before['photos'].items() <= json.loads(prepared.read_text())['photos'].items()


@needs_data
def test_a_photo_that_replaces_a_removed_one_has_its_own_features(few_photos):
    folder, args, first = few_photos
    assert first.returncode == 0, first.stderr
    before, changed = features_of(folder / 'out'), sorted((folder / 'in').iterdir())[2]
    changed.unlink()
    assert photos_py(*args).returncode == 0
    assert before.keys() - features_of(folder / 'out').keys() == {changed.name}
    with Image.open(sorted(FERN.iterdir())[9]) as image:
        image.crop((100, 75, 1008, 756)).save(changed)
    done = photos_py(*args)
    assert done.returncode == 0, done.stderr
    after = features_of(folder / 'out')
    assert before.keys() == after.keys() and {name for name in before if before[name] != after[name]} == {
        changed.name}


@needs_data
def test_poses_bounds_is_in_the_frame_of_transforms(few_photos):
    folder, _, done = few_photos
    assert done.returncode == 0, done.stderr
    llff = read_poses_bounds(folder / 'out/poses_bounds.npy')[0]
    frames = read_json(folder / 'out/transforms.json')['frames']
    poses = np.array([frame['transform_matrix'] for frame in frames])[:, :3]
    trace = np.einsum('nij,nij->n', poses[:, :, :3], llff[:, :, :3])
    assert np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))).max() < 1.0
    extent = np.linalg.norm(np.ptp(poses[:, :, 3], axis=0))
    assert np.linalg.norm(poses[:, :, 3] - llff[:, :, 3], axis=-1).max() < 0.05 * extent


def features_of(folder):
    return {photo['name']: photo['features'] for photo in read_json(folder / 'report.json')['photos']}


@needs_data
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_only_what_it_continues_from(tmp_path, number):
    process = start(FERN, '--datadir', tmp_path, '--num_threads', 1, script=ROOT / 'tools/photos.py')
    wait_for(tmp_path / 'colmap/database.db', process)
    time.sleep(0.5)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number, output
    assert {path.name for path in tmp_path.iterdir()} == {'colmap'}
    left = {re.sub(r'-(wal|shm)$', '', path.name) for path in (tmp_path / 'colmap').iterdir()}
    assert left == {'images', 'prepared.json', 'database.db', 'input.txt'}


# --- real captures ------------------------------------------------------------------------------------------

def mixed_folder(folder):
    """20 good photos, one more that EXIF turns, and five files that cannot be used."""
    (folder / 'nested').mkdir(parents=True)
    good = sorted(FOX.glob('*.jpg'))
    for index, path in enumerate(good[:20]):
        shutil.copy(path, folder / 'nested' if index % 2 else folder)
    with Image.open(good[20]) as image:
        image.transpose(ORIENTATIONS[6]).save(folder / 'turned.jpg', quality=95, exif=exif(6))
    Image.new('RGB', (540, 960)).save(folder / 'black.jpg')
    with Image.open(good[5]) as image:
        image.filter(ImageFilter.GaussianBlur(8)).save(folder / 'blurred.jpg')
    shutil.copy(FERN / 'IMG_4030.jpg', folder / 'elsewhere.jpg')
    (folder / 'text.jpg').write_text('not a photo')
    (folder / '.DS_Store').write_bytes(b'\0\0\0\1Bud1')


@pytest.mark.slow
@needs_data
def test_a_mixed_folder_is_sorted_out(tmp_path):
    mixed_folder(tmp_path / 'in')
    done = photos_py(tmp_path / 'in', '--datadir', tmp_path / 'out', '--max_size', 720)
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / 'out/report.json')
    reasons = {photo['name']: photo['reason'] for photo in report['photos'] if not photo['used']}
    assert {name: reason.split()[0] for name, reason in reasons.items()} == {
        'black.jpg': 'black', 'blurred.jpg': 'blurred', 'elsewhere.jpg': 'few', 'text.jpg': 'not'}
    assert sum(photo['used'] for photo in report['photos']) == 21 == len(report['cameras'])
    assert any('.DS_Store' in line for line in report['summary'])
    assert len(os.listdir(tmp_path / 'out/images')) == 21


@pytest.mark.slow
@needs_data
def test_the_cameras_of_fern_agree_with_those_it_ships(tmp_path):
    done = photos_py(FERN, '--datadir', tmp_path, '--max_size', 720)
    assert done.returncode == 0, done.stderr
    assert '20 of 20 photos' in done.stdout
    ours = read_poses_bounds(tmp_path / 'poses_bounds.npy')[0]
    shipped = read_poses_bounds(FERN.parent / 'poses_bounds.npy')[0]
    rotation, position = camera_errors(ours, shipped)
    assert np.median(rotation) < 1.0 and np.median(position) < 0.02


def camera_errors(ours, shipped):
    """Differences of two sets of cameras [N, 3, 4 or more] after the best similarity (Umeyama 1991): rotation
    in degrees, position as a fraction of the extent."""
    a, b = ours[:, :, 3], shipped[:, :, 3]
    u, s, vt = np.linalg.svd((b - b.mean(0)).T @ (a - a.mean(0)) / len(a))
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * sign) @ vt
    scale = (s * sign).sum() / a.var(0).sum()
    position = np.linalg.norm(scale * (a - a.mean(0)) @ rotation.T + b.mean(0) - b, axis=-1)
    trace = np.einsum('nij,nij->n', rotation @ ours[:, :, :3], shipped[:, :, :3])
    angle = np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1)))
    return angle, position / np.linalg.norm(np.ptp(b, axis=0))


# --- what is there already ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['images', 'transforms.json', 'poses_bounds.npy', 'colmap/database.db'])
def test_another_scene_is_not_replaced(tmp_path, name):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out' / name).mkdir(parents=True)
    done = photos_py(tmp_path / 'in', '--datadir', tmp_path / 'out')
    assert done.returncode == 2 and 'which holds another scene' in done.stderr
    assert [path.name for path in (tmp_path / 'out').iterdir()] == [name.split('/')[0]]


def test_a_folder_of_other_photos_is_not_replaced(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        texture(60, 80).save(tmp_path / f'{name}/1.jpg')
    (tmp_path / 'empty').mkdir()
    empty, first, again, other = (photos_py(tmp_path / name, '--datadir', tmp_path / 'out')
                                  for name in ('empty', 'a', 'a', 'b'))
    assert 'found no photo' in empty.stderr
    assert 'photos that can be used: found 1' in first.stderr and again.stderr == first.stderr
    assert other.returncode == 2 and f'which was made from {tmp_path / "a"}' in other.stderr


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    folder.mkdir()
    texture(60, 80).save(folder / '1.jpg')
    done = photos_py(folder, '--datadir', tmp_path / 'out')
    assert done.returncode == 2 and 'photos that can be used: found 1' in done.stderr
