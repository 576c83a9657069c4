"""Options: nerf-pytorch's names and defaults, config files, what overrides what, and what each option
affects."""
import re

import pytest
from conftest import ROOT

from training.options import KINDS, config_parser, options_that_affect, plain_options

# Names and defaults of nerf-pytorch.
NERF_PYTORCH = {
    'config': None, 'expname': 'run', 'basedir': './logs/', 'datadir': './data/llff/fern', 'netdepth': 8,
    'netwidth': 256, 'netdepth_fine': 8, 'netwidth_fine': 256, 'N_rand': 4096, 'lrate': 5e-4,
    'lrate_decay': 250, 'chunk': None, 'netchunk': None,  # as suits the device
    'no_batching': False, 'no_reload': False,
    'ft_path': None, 'N_samples': 64, 'N_importance': 0, 'perturb': 1.0, 'use_viewdirs': False,
    'i_embed': 0, 'multires': 10, 'multires_views': 4, 'raw_noise_std': 0.0, 'render_only': False,
    'render_test': False, 'render_factor': 0, 'precrop_iters': 0, 'precrop_frac': 0.5,
    'dataset_type': 'llff', 'testskip': 8, 'white_bkgd': False, 'half_res': False, 'factor': 8,
    'no_ndc': False, 'lindisp': False, 'spherify': False, 'llffhold': 8, 'i_print': 100, 'i_img': 500,
    'i_weights': 10000, 'i_testset': 50000, 'i_video': 50000,
}
OURS = {'N_iters': 200000, 'check_data': False, 'seed': 0, 'device': 'auto', 'near': None, 'far': None,
        'pixel_centers': False, 'render_poses': None, 'no_restart': False, 'save_minutes': 10.0,
        'precision': 'auto', 'backward': 'auto', 'i_embed_views': None, 'n_levels': 16, 'n_features': 2,
        'log2_hashmap_size': 19, 'finest_res': 2048, 'occupancy_grid': False, 'N_rand_samples': 2 ** 18,
        'aabb': None, 'random_bkgd': False, 'exact_render': False, 'overwrite': False,
        'sampler': 'hierarchical', 'contract': False, 'lambda_distortion': 0.0, 'lambda_depth': 0.0,
        'train_views': None, 'minutes': None, 'appearance': False, 'refine_poses': False, 'lrate_poses': 3e-4,
        'viewer': False, 'viewer_port': 8080,
        'dataparser_transforms': None, 'render_size': None, 'fps': None}
BLENDER = ['chair', 'drums', 'ficus', 'hotdog', 'lego', 'materials', 'mic', 'ship']
LLFF = ['fern', 'flower', 'fortress', 'horns', 'leaves', 'orchids', 'room', 'trex']
FAST = ['lego_fast', 'demo_fast', 'fast', 'photos_fast', *(f'{scene}_fast' for scene in LLFF)]
# The factor of each scene.
MIP_NERF_360 = {'bicycle': 4, 'flowers': 4, 'garden': 4, 'stump': 4, 'treehill': 4,
                'room': 2, 'counter': 2, 'kitchen': 2, 'bonsai': 2}


def parse(*args):
    return dict(plain_options(config_parser().parse_args([str(arg) for arg in args])))


def test_names_and_defaults():
    assert parse('--expname', 'run') == {**NERF_PYTORCH, **OURS}


def test_every_option_has_a_group_and_a_help_line():
    for action in config_parser()._actions:
        assert action.help, action.dest
    ungrouped = [action.dest for action in config_parser()._optionals._group_actions]
    assert ungrouped == ['help']


def test_each_option_is_read():
    """Each has a reader in the program, `args.NAME`, beside the parser."""
    paths = [*ROOT.glob('*.py'), *ROOT.glob('scenes/*.py'), *ROOT.glob('training/*.py'),
             *ROOT.glob('viewing/*.py')]
    code = '\n'.join(path.read_text(encoding='utf-8') for path in paths if path.name != 'options.py')
    read = set(re.findall(r'\bargs\.(\w+)', code))
    assert set(parse('--expname', 'run')) - read == set()


# Resuming warns if one of these differs from the checkpoint.
RESUME_WARNED = set(re.findall(r'\w+', """
    N_importance N_rand N_rand_samples N_samples aabb appearance backward contract dataset_type factor far
    finest_res half_res i_embed i_embed_views lambda_depth lambda_distortion lindisp llffhold
    log2_hashmap_size lrate lrate_decay lrate_poses multires multires_views n_features n_levels near
    netdepth netdepth_fine netwidth netwidth_fine no_batching no_ndc occupancy_grid perturb precrop_frac
    precrop_iters random_bkgd raw_noise_std refine_poses sampler seed spherify train_views use_viewdirs
    white_bkgd"""))
# --render_only takes these from the checkpoint.
RENDER_ONLY_ADOPTED = set(re.findall(r'\w+', """
    N_importance N_samples appearance contract dataset_type datadir expname factor far finest_res half_res
    i_embed i_embed_views lindisp llffhold log2_hashmap_size multires multires_views n_features n_levels near
    netdepth netdepth_fine netwidth netwidth_fine no_ndc occupancy_grid pixel_centers refine_poses sampler
    seed spherify testskip use_viewdirs white_bkgd"""))


def test_each_option_affects_one_kind_of_thing():
    names = [name for kind in KINDS for name in options_that_affect(kind)]
    assert sorted(names) == sorted(parse('--expname', 'run'))
    assert set(options_that_affect('networks', 'scene', 'training')) == RESUME_WARNED | {'no_restart'}
    adopted = set(options_that_affect('networks', 'scene', 'training', 'source'))
    assert adopted - RENDER_ONLY_ADOPTED <= set(options_that_affect('training')) | {'aabb'}
    assert adopted >= RENDER_ONLY_ADOPTED
    assert options_that_affect('scene') == ['dataset_type', 'factor', 'half_res', 'llffhold', 'no_ndc',
                                            'spherify']
    assert options_that_affect('rendering') == ['exact_render', 'precision', 'render_factor',
                                                'render_size']


def test_command_line_overrides_config_switches_included():
    lego = ROOT / 'configs/lego.txt'
    assert parse('--config', lego)['half_res'] is True
    changed = parse('--config', lego, '--no-half_res', '--no-no_batching', '--N_rand', 7)
    assert (changed['half_res'], changed['no_batching'], changed['N_rand']) == (False, False, 7)
    assert parse('--config', lego, '--lindisp')['lindisp'] is True


@pytest.mark.parametrize('text, value', [('half_res = True', True), ('half_res = False', False),
                                         ('half_res', True)])
def test_switches_in_a_config(tmp_path, text, value):
    (tmp_path / 'c.txt').write_text(f'expname = run\n{text}\n')
    assert parse('--config', tmp_path / 'c.txt')['half_res'] is value


def test_no_abbreviations(capsys):
    with pytest.raises(SystemExit):
        parse('--expname', 'run', '--half', '--white_bkgd')
    assert '--half' in capsys.readouterr().err


@pytest.mark.parametrize('scene', BLENDER)
def test_blender_configs(scene):
    found = parse('--config', ROOT / f'configs/{scene}.txt')
    expected = {'no_batching': True, 'use_viewdirs': True, 'white_bkgd': True, 'lrate_decay': 500,
                'N_samples': 64, 'N_importance': 128, 'N_rand': 1024, 'precrop_iters': 500,
                'precrop_frac': 0.5, 'half_res': True, 'dataset_type': 'blender',
                'datadir': f'./data/nerf_synthetic/{scene}'}
    assert {key: found[key] for key in expected} == expected
    paper = parse('--config', ROOT / f'configs/paper/{scene}.txt')
    expected.update(half_res=False, N_rand=4096, N_iters=500000, testskip=1)
    assert {key: paper[key] for key in expected} == expected


@pytest.mark.parametrize('scene', LLFF)
def test_llff_configs(scene):
    found = parse('--config', ROOT / f'configs/{scene}.txt')
    expected = {'factor': 8, 'llffhold': 8, 'N_rand': 1024, 'N_samples': 64, 'N_importance': 64,
                'use_viewdirs': True, 'raw_noise_std': 1.0, 'dataset_type': 'llff',
                'datadir': f'./data/nerf_llff_data/{scene}'}
    assert {key: found[key] for key in expected} == expected
    paper = parse('--config', ROOT / f'configs/paper/{scene}.txt')
    expected.update(factor=4, N_rand=4096, N_importance=128)
    assert {key: paper[key] for key in expected} == expected


@pytest.mark.parametrize('scene', MIP_NERF_360)
def test_configs_of_mip_nerf_360(scene):
    found = parse('--config', ROOT / f'configs/paper/360_{scene}.txt')
    expected = {'factor': MIP_NERF_360[scene], 'llffhold': 8, 'dataset_type': 'colmap', 'contract': True,
                'sampler': 'proposal', 'datadir': f'./data/mipnerf360/{scene}'}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize('name', FAST)
def test_fast_configs(name):
    found = parse('--config', ROOT / f'configs/{name}.txt')
    of_photos = name == 'photos_fast' or name.removesuffix('_fast') in LLFF
    expected = {'i_embed': 1, 'occupancy_grid': not of_photos, 'pixel_centers': True, 'no_batching': False,
                'sampler': 'proposal' if of_photos else 'hierarchical', 'contract': name == 'photos_fast',
                'N_importance': 0, 'random_bkgd': not of_photos}
    assert {key: found[key] for key in expected} == expected


def test_no_two_configs_share_an_experiment():
    names = [parse('--config', path)['expname'] for path in (ROOT / 'configs').rglob('*.txt')]
    assert len(names) == len(set(names)) == 2 * 16 + 1 + len(FAST) + len(MIP_NERF_360)


def test_the_options_page_lists_every_option():
    listed = set(re.findall(r'`--(?:no-)?(\w+)', (ROOT / 'docs/options.md').read_text(encoding='utf-8')))
    assert set(parse('--expname', 'run')) - listed == set()
