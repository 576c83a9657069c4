"""Bad input: one line that names the problem, exit code 2, and no files left behind."""
import pathlib
import pickle
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny_runs import ROOT, run_script
from tiny_scenes import blender_scene, edit_json, llff_scene, noise

from run_nerf import main


def run(capsys, *args):
    """Run `main`; returns the exit code and what it wrote to stderr."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as error:  # raised by argparse
        code = error.code
    return code, capsys.readouterr().err


def assert_refused(capsys, args, *words):
    """Check that `main` fails with one line on stderr that contains all `words`."""
    code, err = run(capsys, *args)
    assert code == 2
    assert err.count('\n') == 1 and err.startswith('run_nerf.py: error: '), err
    for word in words:
        assert str(word) in err, f'{word!r} not in {err!r}'


@pytest.fixture
def options(tmp_path):
    """A function that writes a tiny scene and returns the options of a one-step run on it."""
    def build(kind, scene=None):
        scene = scene or {'blender': blender_scene, 'llff': llff_scene}[kind](tmp_path / 'scene')
        return ['--dataset_type', kind, '--datadir', scene, '--expname', 'run',
                '--basedir', tmp_path / 'logs', '--N_iters', 1, '--N_rand', 4, '--N_samples', 4,
                '--netdepth', 1, '--netwidth', 4, '--factor', 0, '--device', 'cpu', '--testskip', 1]
    return build


@pytest.mark.parametrize('kind', ['blender', 'llff'])
def test_the_undamaged_scene_trains(capsys, options, tmp_path, kind):
    code, err = run(capsys, *options(kind))
    assert code == 0, err
    assert (tmp_path / 'logs/run/000001.tar').is_file()


def test_no_such_config(capsys):
    assert_refused(capsys, ['--config', 'nowhere.txt'], 'nowhere.txt')


def test_neither_config_nor_expname(capsys):
    assert_refused(capsys, [], '--config', '--expname')


def test_unknown_option(capsys, options):
    assert_refused(capsys, [*options('blender'), '--N_sample', 8], '--N_sample')


def test_unknown_config_key(capsys, tmp_path):
    (tmp_path / 'typo.txt').write_text('expname = run\nN_importanze = 64\n')
    assert_refused(capsys, ['--config', tmp_path / 'typo.txt'], 'typo.txt', 'N_importanze')


def test_unknown_dataset_type(capsys):
    args = ['--expname', 'run', '--dataset_type', 'video']
    assert_refused(capsys, args, 'video', 'blender', 'llff', 'colmap')


@pytest.mark.parametrize('kind', ['blender', 'llff'])
def test_missing_folder(capsys, options, tmp_path, kind):
    assert_refused(capsys, options(kind, tmp_path / 'nowhere'), tmp_path / 'nowhere', 'expected')


@pytest.mark.parametrize('kind', ['blender', 'llff'])
def test_empty_folder(capsys, options, tmp_path, kind):
    (tmp_path / 'scene').mkdir()
    assert_refused(capsys, options(kind, tmp_path / 'scene'), tmp_path / 'scene', 'expected')


def test_missing_split(capsys, options, tmp_path):
    args = options('blender')
    (tmp_path / 'scene/transforms_val.json').unlink()
    assert_refused(capsys, args, 'transforms_val.json')


def test_missing_image(capsys, options, tmp_path):
    args = options('blender')
    (tmp_path / 'scene/train/r_1.png').unlink()
    assert_refused(capsys, args, 'r_1.png')


@pytest.mark.parametrize('kind, image', [('blender', 'train/r_1.png'), ('llff', 'images/1.png')])
@pytest.mark.parametrize('kept', [0, 0.1, 0.5])
def test_truncated_image(capsys, options, tmp_path, kind, image, kept):
    args = options(kind)
    path = tmp_path / 'scene' / image
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content))])
    assert_refused(capsys, args, image)


def test_image_of_different_size(capsys, options, tmp_path):
    args = options('llff')
    iio.imwrite(tmp_path / 'scene/images/1.png', np.zeros((9, 11, 3), np.uint8))
    assert_refused(capsys, args, 'images/1.png', '11×9', 'expected')


def test_image_of_16_bits(capsys, options, tmp_path):
    args = options('blender')
    iio.imwrite(tmp_path / 'scene/train/r_1.png', np.zeros((8, 10), np.uint16))
    assert_refused(capsys, args, 'r_1.png', '8-bit')


def test_malformed_json(capsys, options, tmp_path):
    args = options('blender')
    (tmp_path / 'scene/transforms_train.json').write_text('{"frames": [')
    assert_refused(capsys, args, 'transforms_train.json', 'JSON')


@pytest.mark.parametrize('content', ['[]', '{}', '{"frames": []}', '{"frames": 3}', '{"frames": [3]}'])
def test_json_without_frames(capsys, options, tmp_path, content):
    args = options('blender')
    (tmp_path / 'scene/transforms_train.json').write_text(content)
    assert_refused(capsys, args, 'transforms_train.json')


@pytest.mark.parametrize('key', ['transform_matrix', 'file_path'])
def test_frame_without_key(capsys, options, tmp_path, key):
    args = options('blender')
    edit_json(tmp_path / 'scene/transforms_train.json', lambda meta: meta['frames'][1].pop(key))
    assert_refused(capsys, args, 'transforms_train.json', 'frame 1', key)


@pytest.mark.parametrize('matrix', [[[1, 0], [0, 1]], 'not a matrix', [[1, 2, 3, 4]] * 3 + [[1, 2, 3]], None])
def test_pose_of_wrong_shape(capsys, options, tmp_path, matrix):
    args = options('blender')
    edit_json(tmp_path / 'scene/transforms_train.json',
              lambda meta: meta['frames'][1].update(transform_matrix=matrix))
    assert_refused(capsys, args, 'transforms_train.json', 'frame 1')


def test_nan_pose(capsys, options, tmp_path):
    args = options('blender')

    def damage(meta):
        meta['frames'][2]['transform_matrix'][0][3] = float('nan')
    edit_json(tmp_path / 'scene/transforms_train.json', damage)
    assert_refused(capsys, args, 'transforms_train.json', 'frame 2', 'NaN')


def test_no_intrinsics(capsys, options, tmp_path):
    args = options('blender')
    for split in ('train', 'val', 'test'):
        edit_json(tmp_path / f'scene/transforms_{split}.json', lambda meta: meta.pop('camera_angle_x'))
    assert_refused(capsys, args, 'camera_angle_x', 'fl_x')


def test_intrinsics_for_images_of_different_size(capsys, options, tmp_path):
    args = options('blender')
    for split in ('train', 'val', 'test'):
        edit_json(tmp_path / f'scene/transforms_{split}.json',
                  lambda meta: meta.update(w=20, h=16, fl_x=12.0))
    assert_refused(capsys, args, '20', '10×8')


def test_pose_and_image_counts_differ(capsys, options, tmp_path):
    args = options('llff')
    (tmp_path / 'scene/images/1.png').unlink()
    assert_refused(capsys, args, '2 images', '3 poses')


@pytest.mark.parametrize('table', [
    np.zeros((3, 16)), np.zeros(17), np.zeros((0, 17)), np.full((3, 17), np.nan), np.array(['a'])])
def test_bad_poses_bounds(capsys, options, tmp_path, table):
    args = options('llff')
    np.save(tmp_path / 'scene/poses_bounds.npy', table)
    assert_refused(capsys, args, 'poses_bounds.npy')


def test_poses_bounds_that_is_not_an_array(capsys, options, tmp_path):
    args = options('llff')
    (tmp_path / 'scene/poses_bounds.npy').write_text('not an array')
    assert_refused(capsys, args, 'poses_bounds.npy')


def test_near_and_far_swapped_in_poses_bounds(capsys, options, tmp_path):
    args = options('llff')
    table = np.load(tmp_path / 'scene/poses_bounds.npy')
    table[1, 15:] = 9.0, 1.0
    np.save(tmp_path / 'scene/poses_bounds.npy', table)
    assert_refused(capsys, args, 'row 1', 'near < far')


def test_reduction_without_photos(capsys, options, tmp_path):
    args = options('llff')
    shutil.rmtree(tmp_path / 'scene/images')
    assert_refused(capsys, [*args, '--factor', 4], 'images_4')


@pytest.mark.parametrize('bounds', [['--near', 3, '--far', 3], ['--near', 7], ['--far', 1]])
def test_near_not_below_far(capsys, options, bounds):
    assert_refused(capsys, [*options('blender'), *bounds], 'near', 'far')


@pytest.mark.parametrize('option, value', [
    ('--N_samples', 0), ('--N_rand', -1), ('--N_iters', 'many'), ('--lrate', 'nan'), ('--precrop_frac', 1.5),
    ('--near', -1), ('--chunk', 0), ('--i_embed', 7), ('--i_embed', 2)])
def test_values_out_of_range(capsys, options, option, value):
    assert_refused(capsys, [*options('blender'), option, value], option, value)


def test_too_few_coarse_samples_for_importance_sampling(capsys, options):
    args = [*options('blender'), '--N_samples', 2, '--N_importance', 8]
    assert_refused(capsys, args, '--N_samples', 'at least 3')


def test_lindisp_with_near_zero(capsys, options):
    assert_refused(capsys, [*options('blender'), '--lindisp', '--near', 0], '--lindisp')


def test_render_only_without_checkpoint(capsys, options, tmp_path):
    assert_refused(capsys, [*options('blender'), '--render_only'], 'checkpoint', tmp_path / 'logs/run')
    assert not (tmp_path / 'logs').exists()


def test_unwritable_basedir(capsys, options, tmp_path):
    (tmp_path / 'file').write_text('')
    assert_refused(capsys, [*options('blender'), '--basedir', tmp_path / 'file'], tmp_path / 'file')


def test_no_such_device(capsys, options):
    assert_refused(capsys, [*options('blender'), '--device', 'warp:9'], 'warp:9')


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 half a zip'])
def test_damaged_checkpoint(capsys, options, tmp_path, content):
    """It is an error for --ft_path; in the experiment's folder it is renamed and training starts anew."""
    args, path = options('blender'), tmp_path / 'logs/run/000005.tar'
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert_refused(capsys, [*args, '--ft_path', path], '000005.tar')
    code, err = run(capsys, *args)
    assert code == 0 and '000005.tar.damaged' in err
    assert not path.exists() and path.with_name('000005.tar.damaged').read_bytes() == content


def test_checkpoint_of_different_network(capsys, options):
    args = options('blender')
    assert run(capsys, *args)[0] == 0
    assert_refused(capsys, [*args, '--netwidth', 8, '--N_iters', 2], '000001.tar', 'fit')


def test_missing_ft_path(capsys, options):
    assert_refused(capsys, [*options('blender'), '--ft_path', 'gone.tar'], 'gone.tar')


@pytest.mark.parametrize('name, content', [('path.json', '{"frames": ['), ('path.json', '[[1, 2], [3]]'),
                                           ('path.json', '[[[1, 0], [0, 1]]]'), ('path.npy', 'not an array')])
def test_bad_render_poses(capsys, options, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert_refused(capsys, [*options('blender'), '--render_poses', tmp_path / name], name)


@pytest.mark.parametrize('content', [
    b'\xff\xfe binary \x00', b'[section]\nexpname = run\n', b'config = other.txt\n',
    b'expname = a\nexpname = b\n'])
def test_config_with_unusable_content(capsys, tmp_path, content):
    (tmp_path / 'odd.txt').write_bytes(content)
    assert_refused(capsys, ['--config', tmp_path / 'odd.txt'], 'odd.txt')


@pytest.mark.parametrize('value', [3, None, ['a'], '', '/'])
def test_file_path_that_names_no_image(capsys, options, tmp_path, value):
    args = options('blender')
    edit_json(tmp_path / 'scene/transforms_train.json',
              lambda meta: meta['frames'][1].update(file_path=value))
    assert_refused(capsys, args)


@pytest.mark.parametrize('angle', [40.0, 3.5, -1, 0, 'wide', None, 10 ** 400])
def test_impossible_field_of_view(capsys, options, tmp_path, angle):
    args = options('blender')
    for split in ('train', 'val', 'test'):
        edit_json(tmp_path / f'scene/transforms_{split}.json', lambda meta: meta.update(camera_angle_x=angle))
    assert_refused(capsys, args, 'camera_angle_x', 'expected')


@pytest.mark.parametrize('number', [1e300, 10 ** 400, 0])
def test_matrix_that_is_not_a_pose(capsys, options, tmp_path, number):
    args = options('blender')
    edit_json(tmp_path / 'scene/transforms_train.json',
              lambda meta: meta['frames'][1].update(transform_matrix=[[number] * 4] * 4))
    assert_refused(capsys, args, 'transforms_train.json', 'frame 1')


@pytest.mark.parametrize('columns', [slice(0, 3), slice(14, 15)])
def test_poses_bounds_with_zeros(capsys, options, tmp_path, columns):
    """A rotation whose first column is 0; a focal length of 0."""
    args = options('llff')
    table = np.load(tmp_path / 'scene/poses_bounds.npy')
    table[:, columns] = 0
    table[:, [5, 10][:2 if columns.stop == 3 else 0]] = 0
    np.save(tmp_path / 'scene/poses_bounds.npy', table)
    assert_refused(capsys, args, 'poses_bounds.npy', 'expected')


def test_spherify_with_parallel_cameras(capsys, options):
    assert_refused(capsys, [*options('llff'), '--spherify', '--no_ndc'], 'parallel')


def test_near_and_far_in_scene_units_with_ndc(capsys, options):
    assert_refused(capsys, [*options('llff'), '--near', 2, '--far', 6], '--no_ndc')


def test_two_photos_with_the_same_name(capsys, options, tmp_path):
    args = options('llff')
    iio.imwrite(tmp_path / 'scene/images/0.jpg', noise(16, 24, 3, seed=0))
    assert_refused(capsys, [*args, '--factor', 2], 'found two images called 0')


@pytest.mark.parametrize('key, value', [
    ('global_step', 'many'), ('network_fn_state_dict', [1]), ('optimizer_state_dict', 3), ('args', [1]),
    ('network_fn_state_dict', {})])
def test_checkpoint_with_values_of_wrong_type(capsys, options, tmp_path, key, value):
    args = options('blender')
    assert run(capsys, *args)[0] == 0
    path = tmp_path / 'logs/run/000001.tar'
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    if key == 'args':  # not needed for rendering
        assert run(capsys, *args, '--render_only')[0] == 0
    else:
        assert_refused(capsys, [*args, '--ft_path', path], '000001.tar')


def test_code_in_a_checkpoint_is_not_run(capsys, options, tmp_path):
    (tmp_path / 'logs/run').mkdir(parents=True)
    (tmp_path / 'logs/run/000005.tar').write_bytes(pickle.dumps(Touch(tmp_path / 'touched')))
    args = options('blender')
    assert_refused(capsys, [*args, '--ft_path', tmp_path / 'logs/run/000005.tar'], '000005.tar')
    assert run(capsys, *args)[0] == 0
    assert not (tmp_path / 'touched').exists()


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize('option, value', [('--seed', 2 ** 64), ('--device', 'meta'), ('--expname', '')])
def test_values_that_torch_or_the_file_system_rejects(capsys, options, option, value):
    assert_refused(capsys, [*options('blender'), option, value], option if value else 'expname')


def test_render_factor_larger_than_the_image(capsys, options):
    args = options('blender')
    assert run(capsys, *args)[0] == 0
    assert_refused(capsys, [*args, '--render_only', '--render_factor', 1000], '--render_factor')


def test_bad_input_leaves_an_existing_experiment_unchanged(capsys, options, tmp_path):
    args = options('blender')
    assert run(capsys, *args)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'logs/run').iterdir()}
    assert_refused(capsys, [*args, '--near', 9], 'near')
    assert {path: path.read_bytes() for path in (tmp_path / 'logs/run').iterdir()} == before


def test_the_script_exits_with_2(tmp_path):
    done = run_script('--config', ROOT / 'configs/lego.txt', '--datadir', tmp_path / 'nowhere',
                      '--basedir', tmp_path)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.count('\n') == 1 and 'nowhere' in done.stderr
