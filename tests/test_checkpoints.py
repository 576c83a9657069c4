"""Checkpoints: damaged files, exact round trips, older files, and when one is due."""
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, needs_golden
from tiny_devices import DEVICE

from accel.grid_renderer import GridRenderer
from accel.occupancy import OccupancyGrid
from run_nerf import create_nerf
from run_nerf_helpers import NeRF
from scenes.errors import UserError
from scenes.files import remove_partial_files
from training import checkpoints
from training.checkpoints import (
    Checkpoints,
    adopt_options,
    changed_options,
    checkpoint_parts,
    load_checkpoint,
    load_newest,
    read_checkpoint,
    restore,
    restore_random_state,
    trained_pixel_centers,
    warn_of_changes,
)
from training.options import config_parser
from training.processes import Processes

CAMERA = {'H': 4, 'W': 6, 'near': 2.0, 'far': 6.0, 'K': torch.eye(3, device='cpu'), 'pixel_centers': True}


class Counter:
    """Something with a state."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {'count': self.count}

    def load_state_dict(self, state):
        self.count = state['count']


def small_renderer():
    return GridRenderer(OccupancyGrid(4))


def options(*args):
    return config_parser().parse_args(['--expname', 'run', *map(str, args)])


def make_parts(seed=0, **others):
    """Small networks and an optimizer that has done a step."""
    torch.manual_seed(seed)
    networks = {name: NeRF(D=2, W=8, input_ch=3, input_ch_views=3, output_ch=5, skips=[4], use_viewdirs=True)
                for name in ('network_fn', 'network_fine')}
    optimizer = torch.optim.Adam([p for network in networks.values() for p in network.parameters()])
    sum(network(torch.ones(2, 6)).sum() for network in networks.values()).backward()
    optimizer.step()
    return {**networks, 'optimizer': optimizer, **others}


def keeper(folder, *args, parts=None, said=None, is_main=True, **others):
    say = (lambda line: None) if said is None else said.append
    return Checkpoints(folder, parts or make_parts(**others), options(*args), CAMERA, None, 0, say, is_main)


def equal(one, other):
    """Whether two nested structures hold the same tensors and values."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# --- damaged files ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp('saved')
    for step in (1, 2):
        keeper(folder, seed=step).save(step)
    return folder


def damage(saved, folder, content):
    """Copy the checkpoints of steps 1 and 2, the latter with other content."""
    (folder / '000001.tar').write_bytes((saved / '000001.tar').read_bytes())
    (folder / '000002.tar').write_bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('place', range(20))
def test_truncated(saved, tmp_path, place):
    content = (saved / '000002.tar').read_bytes()
    damage(saved, tmp_path, content[:place * len(content) // 20])
    path, state = load_newest(tmp_path)
    assert path.name == '000001.tar' and state['global_step'] == 1
    assert (tmp_path / '000002.tar.damaged').is_file() and not (tmp_path / '000002.tar').exists()


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('seed', range(20))
def test_flipped_byte(saved, tmp_path, seed):
    """Either it is noticed, or it is in a place that nothing is read from (padding, names in the zip)."""
    content = bytearray((saved / '000002.tar').read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 0x10
    damage(saved, tmp_path, bytes(content))
    path, state = load_newest(tmp_path)
    if path.name == '000002.tar':
        assert equal(state, read_checkpoint(saved / '000002.tar'))
    else:
        assert (tmp_path / '000002.tar.damaged').is_file()


def test_damaged_checkpoints_are_named(saved, tmp_path):
    damage(saved, tmp_path, b'')
    with pytest.warns(UserWarning, match=r'000002\.tar: not a readable .* renamed to 000002\.tar\.damaged'):
        load_newest(tmp_path)
    (tmp_path / '000001.tar').write_bytes(b'PK')
    with pytest.warns(UserWarning) as caught:
        assert load_newest(tmp_path) == (None, None)
    first, last = (str(warning.message) for warning in caught)
    assert '000001.tar.damaged' in first and last == f'{tmp_path}: none of its checkpoints can be read'


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


@pytest.mark.parametrize('content, reason', [
    (Malicious(), 'more than tensors'), ([1, 2], 'no networks'), ({'global_step': 3}, 'no networks'),
    ({'global_step': 'three', 'network_fn_state_dict': {}}, 'no networks')])
def test_files_that_are_not_checkpoints(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    torch.save(content, 'model.tar')
    with pytest.raises(UserError, match=reason):
        read_checkpoint('model.tar')
    with pytest.raises(UserError, match=reason):
        load_checkpoint(options('--ft_path', 'model.tar'))
    assert not Path('executed').exists()


@pytest.mark.parametrize('change, reason', [({'extra': Malicious()}, 'more than tensors'),
                                            ({'format': 3}, 'found format 3, expected at most 2')])
def test_a_checkpoint_that_is_not_damaged_is_left_alone(saved, tmp_path, monkeypatch, change, reason):
    """A run does not start afresh beside a checkpoint that it cannot use."""
    monkeypatch.chdir(tmp_path)
    torch.save({**torch.load(saved / '000002.tar', weights_only=True), **change}, tmp_path / '000002.tar')
    with pytest.raises(UserError, match=reason):
        load_newest(tmp_path)
    assert (tmp_path / '000002.tar').is_file() and not Path('executed').exists()


def test_which_checkpoint_is_loaded(saved, tmp_path):
    folder = ['--basedir', saved.parent, '--expname', saved.name]
    assert load_checkpoint(options(*folder))[0] == saved / '000002.tar'
    assert load_checkpoint(options(*folder, '--no_reload')) == (None, None)
    assert load_checkpoint(options(*folder, '--no_reload', '--render_only'))[0] == saved / '000002.tar'
    assert load_checkpoint(options(*folder, '--ft_path', saved / '000001.tar'))[0] == saved / '000001.tar'
    assert load_checkpoint(options('--basedir', tmp_path)) == (None, None)
    with pytest.raises(UserError, match='--ft_path'):
        load_checkpoint(options('--ft_path', tmp_path / 'missing.tar'))


# --- round trips --------------------------------------------------------------------------------------------

def test_everything_is_restored(tmp_path):
    parts = make_parts(renderer=small_renderer(), ray_sampler=Counter(3), safeguards=None)
    parts['renderer'].grid.occs.fill_(0.25)
    keeper(tmp_path, parts=parts).save(7)
    expected = torch.rand(3)
    path, state = load_newest(tmp_path)
    assert path.name == '000007.tar' and state['steps_done'] == state['global_step'] == 7
    assert 'safeguards_state_dict' not in state and equal(state['camera'], CAMERA)

    restored = make_parts(seed=1, renderer=small_renderer(), ray_sampler=Counter(), safeguards=Counter(5))
    restore(path, state, restored)
    restore_random_state(state, 0, DEVICE)
    for name in ('network_fn', 'network_fine', 'optimizer', 'renderer', 'ray_sampler'):
        assert equal(restored[name].state_dict(), parts[name].state_dict()), name
    assert restored['safeguards'].count == 5
    assert torch.equal(torch.rand(3), expected)
    restore_random_state(state, 1, DEVICE)
    assert not torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('change, match', [
    ({'network_fine': None}, None), ({'optimizer': None}, None),
    ({'renderer': small_renderer()}, 'renderer_state_dict'),
    ({'network_fn': torch.nn.Linear(3, 4)}, 'network_fn_state_dict does not fit')])
def test_parts_that_do_not_fit_are_named(saved, change, match):
    path, state = load_newest(saved)
    state = checkpoints.convert_older(state)  # as of a run without a grid
    if match is None:
        restore(path, state, {**make_parts(), **change})
        return
    with pytest.raises(UserError, match=match):
        restore(path, state, {**make_parts(), **change})
    with pytest.raises(UserError, match='netwidth 8'):
        restore(path, state, {**make_parts(), **change}, ['netwidth 8 (was 4)'])


def test_only_options_of_the_networks_can_make_a_checkpoint_unfit(tmp_path, monkeypatch):
    """Not the learning rate, if the proposal grids of another version were larger."""
    given = ['--ft_path', tmp_path / '000001.tar', '--i_embed', 1, '--log2_hashmap_size', 4, '--sampler',
             'proposal']
    kwargs, *_, optimizer = create_nerf(options(*given), (None, None))
    keeper(tmp_path, *given, parts=checkpoint_parts(kwargs, optimizer)).save(1)
    with pytest.raises(UserError, match=r'does not fit these options \(log2_hashmap_size 5 \(was 4\)\)'):
        create_nerf(options(*given, '--lrate', 1e-3, '--log2_hashmap_size', 5))
    monkeypatch.setattr('accel.proposals.PROPOSALS', ((64, 32), (48, 64)))
    with pytest.raises(UserError, match=r'renderer_state_dict does not fit .* this version .*grids\.'):
        create_nerf(options(*given, '--lrate', 1e-3))


def test_a_missing_network_is_named(tmp_path):
    keeper(tmp_path, parts={**make_parts(), 'network_fine': None}).save(1)
    path, state = load_newest(tmp_path)
    with pytest.raises(UserError, match='found no network_fine_state_dict'):
        restore(path, state, make_parts())


# --- options ------------------------------------------------------------------------------------------------

def scene(same):
    return SimpleNamespace(has_cameras_of=lambda camera: same)


def test_changed_options_are_named(saved):
    path, state = load_newest(saved)
    args = options('--N_rand', 32, '--N_iters', 3, '--datadir', 'elsewhere', '--lrate', 1e-3)
    assert changed_options(args, state) == ['N_rand 32 (was 4096)', 'lrate 0.001 (was 0.0005)']
    assert changed_options(args, state, 'source') == ['datadir elsewhere (was ./data/llff/fern)']
    assert changed_options(args, state, 'scene') == []
    with pytest.warns(UserWarning, match=r'differ .*N_rand 32 .*other cameras') as caught:
        warn_of_changes(args, scene(same=False), path, state)
    assert 'N_iters' not in str(caught[0].message)
    args.render_only = True
    with pytest.warns(UserWarning, match='datadir elsewhere') as caught:
        warn_of_changes(args, scene(same=False), path, state)
    assert 'N_rand' not in str(caught[0].message)
    warn_of_changes(options(), scene(same=True), path, state)  # no warning


def test_rendering_adopts_options_that_are_not_given(tmp_path):
    keeper(tmp_path, '--netwidth', 8, '--N_samples', 5, '--lrate', 1, '--chunk', 7,
           '--precision', 'fp32').save(1)
    state = read_checkpoint(tmp_path / '000001.tar')
    args = options('--render_only', '--N_samples', 64)
    adopt_options(args, state)
    assert (args.netwidth, args.N_samples, args.lrate) == (8, 64, 1)
    assert (args.chunk, args.precision, args.render_only) == (None, 'auto', True)


def test_trained_pixel_centers_are_kept(saved):
    path, state = load_newest(saved)
    with pytest.warns(UserWarning, match='through pixel centres'):
        assert trained_pixel_centers(options(), path, state) is True
    assert trained_pixel_centers(options('--pixel_centers'), path, state) is True
    with pytest.warns(UserWarning, match='through pixel corners'):
        assert trained_pixel_centers(options('--pixel_centers'), path, {**state, 'camera': {}}) is False


# --- older files --------------------------------------------------------------------------------------------

@needs_golden
def test_nerf_pytorch():
    state = read_checkpoint(GOLDEN / 'checkpoint/002000.tar')
    assert state['global_step'] == 1999 and state['steps_done'] == 2000
    assert state['args'] == state['camera'] == state['renderer_state_dict'] == {}
    assert not {'safeguards_state_dict', 'ray_sampler_state_dict'} & state.keys()


@pytest.mark.parametrize('with_grid', [False, True])
def test_format_1(tmp_path, with_grid):
    """The occupancy grid was part of the network, and the safeguards were called health."""
    parts, renderer = make_parts(), small_renderer()
    renderer.grid.occs.fill_(0.5)
    renderer.num_updates.fill_(2)
    network = parts['network_fn'].state_dict()
    if with_grid:
        old_names = {'grid.aabb': 'aabb', 'grid.occs': 'opacity', 'grid.occupied': 'occupied'}
        network.update({f'occupancy.{old_names[key]}': value for key, value in renderer.state_dict().items()
                        if key in old_names})
        network['occupancy.samples_of_a_ray'] = torch.tensor(19.25)
    torch.save({'global_step': 37, 'network_fn_state_dict': network,
                'network_fine_state_dict': parts['network_fine'].state_dict(),
                'optimizer_state_dict': parts['optimizer'].state_dict(), 'with_gradient': {'coarse': 0.5},
                'random_state': {'cpu': torch.get_rng_state(), 'cuda': []}, 'args': {'seed': 0},
                'camera': CAMERA, 'health': {'count': 2} if with_grid else {}, 'format': 1},
               tmp_path / 'old.tar')
    state = read_checkpoint(tmp_path / 'old.tar')
    assert state['steps_done'] == 37 and not {'health', 'with_gradient'} & state.keys()
    assert ('safeguards_state_dict' in state) == with_grid
    restored = make_parts(seed=1, renderer=small_renderer() if with_grid else torch.nn.Module(),
                          safeguards=Counter())
    restore(tmp_path / 'old.tar', state, restored)
    for name in ('network_fn', 'network_fine', 'optimizer'):
        assert equal(restored[name].state_dict(), parts[name].state_dict())
    if with_grid:
        assert equal(restored['renderer'].state_dict(), renderer.state_dict())
        assert restored['safeguards'].count == 2
        assert state['ray_sampler_state_dict'] == {'mean_samples': 19.25}
    else:
        with pytest.raises(UserError, match='renderer_state_dict'):
            restore(tmp_path / 'old.tar', state, {'renderer': small_renderer()})


# --- when one is due ----------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, in seconds."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(checkpoints.time, 'monotonic', lambda: now.seconds)
    return now


def steps_in(folder):
    return sorted(int(path.stem) for path in folder.glob('*.tar'))


def test_saves_are_due_by_step_and_at_the_end(tmp_path, clock):
    kept = keeper(tmp_path, '--i_weights', 3, '--N_iters', 8)
    for step in range(1, 9):
        kept.save_if_due(step)
    assert steps_in(tmp_path) == [3, 6, 8] and kept.saved_step == 8 and kept.newest == kept.path_of(8)
    assert kept.read_newest()[1]['steps_done'] == 8
    assert keeper(tmp_path).read_newest() == (None, None)


def test_of_saves_by_time_the_newest_are_kept(tmp_path, clock):
    kept = keeper(tmp_path, '--i_weights', 4, '--save_minutes', 1)
    for step in range(1, 8):
        clock.seconds += 61
        kept.save_if_due(step)
    assert steps_in(tmp_path) == [4, 6, 7]


def test_an_unhealthy_run_is_saved_only_at_the_end(tmp_path, clock):
    kept = keeper(tmp_path, '--i_weights', 1, '--N_iters', 3)
    for step in range(1, 4):
        kept.save_if_due(step, is_healthy=lambda: False)
    assert steps_in(tmp_path) == [3]


def test_only_the_main_process_saves_unless_told_to(tmp_path, clock):
    kept = keeper(tmp_path, '--i_weights', 1, '--N_iters', 1, is_main=False)
    kept.save_if_due(1)
    assert steps_in(tmp_path) == [] and kept.save(1) == tmp_path / '000001.tar' and steps_in(tmp_path) == [1]


def test_a_failed_save_is_reported_and_retried(tmp_path, clock, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    said = []
    kept = keeper(tmp_path, '--i_weights', 5, '--N_iters', 9, said=said)
    (tmp_path / '.000002.part.tar').write_text('half')
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, 'write', fail)
        assert kept.save(5) is None and kept.newest is None and kept.saved_step == 0
        kept.save_if_due(9)
    failed = 'not written (No space left on device)'
    assert said == [f'{tmp_path}/000005.tar: {failed}; training continues and will retry',
                    f'{tmp_path}/000009.tar: {failed}']
    assert not list(tmp_path.iterdir())
    kept.save_if_due(6)
    assert steps_in(tmp_path) == []
    clock.seconds += checkpoints.SAVE_RETRY_SECONDS + 1
    kept.save_if_due(7)
    kept.save_if_due(8)
    assert steps_in(tmp_path) == [7]


def test_a_checkpoint_of_i_weights_that_is_saved_late_is_kept(tmp_path, clock, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    kept = keeper(tmp_path, '--i_weights', 5, '--N_iters', 99, '--save_minutes', 1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, 'write', fail)
        kept.save_if_due(5)
    for step in (6, 7, 8, 9, 11):
        clock.seconds += 61
        kept.save_if_due(step)
    assert steps_in(tmp_path) == [6, 9, 11]


def test_partial_files_of_running_processes_are_kept(tmp_path):
    with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as process:
        names = [f'.frame.part{pid}.png' for pid in ('', os.getpid(), process.pid)]
        for name in names:
            (tmp_path / name).write_text('half')
        remove_partial_files(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == names[2:]
        process.communicate()
    remove_partial_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_step_is_saved_once(tmp_path):
    kept = keeper(tmp_path)
    assert kept.finish(0, Processes(1)) and steps_in(tmp_path) == [], 'nothing was done'
    assert kept.finish(3, Processes(1)) and kept.finish(3, Processes(1)) and steps_in(tmp_path) == [3]


def test_a_last_step_that_cannot_be_saved(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Checkpoints, 'write', fail)
    assert not keeper(tmp_path).finish(3, Processes(1))


@pytest.mark.parametrize('exists, lost, saves', [
    (False, True, True), (True, True, False), (False, False, False)])
def test_another_rank_saves_a_lost_run(tmp_path, monkeypatch, exists, lost, saves):
    monkeypatch.setattr('training.processes.SAVE_SECONDS', 0.2)
    processes, kept = Processes(1), keeper(tmp_path, is_main=False)
    processes.size, processes.rank, processes.is_main, processes.lost = 2, 1, False, lost
    if exists:
        kept.path_of(3).write_text('saved by rank 0')
    kept.finish(3, processes)
    assert (kept.saved_step == 3) == saves
