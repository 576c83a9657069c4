"""benchmarks/table.py: its scenes, which results are reused, what is written, and that it survives kills."""
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
from tiny_runs import FAST_DEMO, NO_OUTPUTS, ROOT, TINY, finish, run, start, wait_for
from tiny_scenes import blender_scene, llff_scene

from scenes.errors import UserError
from scenes.files import is_running
from tools.datasets.sources import SETS

sys.path.append(str(ROOT / 'benchmarks'))
import table
from published import PUBLISHED
from results_page import latex, markdown, page

# Options of runs of two steps.
TWO_STEPS = [*map(str, [*TINY[4:], *NO_OUTPUTS, '--N_iters', 2])]
GOING_ON = SimpleNamespace(requested=False)
BENCH = SimpleNamespace(jobs=1, nproc_per_node=1)


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['table.py', *map(str, words)])
    return table.parse()


@pytest.fixture
def make_task(monkeypatch, few_views, tmp_path):
    """A function of options that returns a scene that trains in a moment, in this process."""
    monkeypatch.setattr(table, 'run', lambda bench, stop, task: None if run(*task.words) == 0 else 'failed')
    own = '--preset', 'demo', '--out', tmp_path, '--scenes', f'mine={few_views}', *TWO_STEPS
    return lambda *words: table.make_tasks(parse(monkeypatch, *own, *words))[0]


def content_of(**scenes):
    """The content of a results.json: scenes with these PSNRs, or None."""
    results = {name: {'problem': f'no folder data/{name}'} if psnr is None else
               {'mean': {'psnr': psnr, 'ssim': 0.95, 'lpips': None}, 'width': 400, 'height': 400, 'views': 25,
                'background': 'white'} for name, psnr in scenes.items()}
    measured = {name: {'training_seconds': 60.0, 'hardware': 'CPU, 2 threads', 'commit': None}
                for name in scenes if scenes[name]}
    return {'result': {'table': 'blender', 'preset': 'lego_fast', 'scenes': results,
                       'mean': table.mean_of_scenes(results)},
            'measured': {'command': ['benchmarks/table.py'], 'scenes': measured}}


# --- published figures and what is written ------------------------------------------------------------------

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_means_are_the_means_of_the_scenes(name):
    for method in PUBLISHED[name]:
        for metric, values in method.metrics.items():
            scenes = {key: value for key, value in values.items() if key != 'mean'}
            assert {*scenes} <= {*SETS[name].scenes}
            if len(scenes) == 8:
                rounding = 0.0051 if metric == 'psnr' else 0.00051
                assert sum(scenes.values()) / 8 == pytest.approx(values['mean'], abs=rounding), method.name


def test_missing_scenes_are_named_and_leave_the_mean_out():
    text = markdown(content_of(lego=30.246, ship=None))
    assert 'Not measured: ship (no folder data/ship).' in text
    assert '| lego_fast (ours) | 30.25 | – | – |' in text and '| NeRF | 32.54 | 28.65 | 31.01 |' in text
    assert '| lego_fast (ours) | 400×400 | 25 | white | CPU, 2 threads |' in text and 'LPIPS' not in text
    assert '| lego_fast (ours) | 30.00 | 20.00 | 25.00 |' in markdown(content_of(lego=30.0, ship=20.0))


def test_latex_has_as_many_cells_as_columns():
    lines = latex(content_of(lego=30.246, ship=None)).splitlines()
    assert r'lego\_fast (ours) & 30.25 & -- & -- \\' in lines
    assert '% Not measured: ship (no folder data/ship).' in lines
    for begin in (line for line in lines if line.startswith(r'\begin')):
        rows = lines[lines.index(begin) + 2:]
        assert rows[0].count('&') == rows[2].count('&') == len(begin.rpartition('{')[2]) - 2


def test_the_page_is_that_of_the_results():
    assert (ROOT / 'docs/results.md').read_text(encoding='utf-8') == page(ROOT / 'benchmarks/results')


# --- the scenes of a table ----------------------------------------------------------------------------------

def test_a_table_has_all_its_scenes_and_their_configs(monkeypatch):
    tasks = table.make_tasks(parse(monkeypatch, '--table', 'llff', '--preset', 'paper', '--N_iters', 7))
    assert [task.name for task in tasks] == [*SETS['llff'].scenes]
    for task in tasks:
        assert task.args.config == str(ROOT / f'configs/paper/{task.name}.txt')
        assert task.args.datadir == f'data/nerf_llff_data/{task.name}' and task.args.N_iters == 7


def test_shards_share_the_scenes(monkeypatch, tmp_path, few_views):
    ran, names = [], ['a', 'b', 'c', 'd', 'e']
    monkeypatch.setattr(table, 'run', lambda bench, stop, task: ran.append(task.name) or 'failed')
    for shard in ('3/3', '1/3', '2/3'):
        parse(monkeypatch, '--preset', 'demo', '--out', tmp_path, '--shard', shard,
              '--scenes', *(f'{name}={few_views}' for name in names))
        table.main()
    content = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))
    assert sorted(ran) == names and [*content['result']['scenes'].values()] == 5 * [{'problem': 'failed'}]


@pytest.mark.parametrize('words, message', [
    ('--table blender --preset none', '--preset: found none, expected one of none, '),
    ('--table blender --preset lego --scenes fern', '--scenes: found fern, expected some of chair'),
    ('--preset lego', '--scenes: found none, expected some of NAME=FOLDER'),
    ('--table blender --preset lego --expname mine', '--expname: not available here'),
    ('--table blender --preset lego --minutes 3', '--minutes: not available here'),
    ('--table blender --preset lego --scenes lego', 'lego: no folder nowhere/nerf_synthetic/lego'),
    ('--table blender --preset lego --shard 3/2', 'argument --shard: found 3/2, expected K/N')])
def test_errors_are_one_line(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['table.py', '--data', 'nowhere', *words.split()])
    try:
        code = table.main()
    except SystemExit as ended:
        code = ended.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith('table.py: error: ') and message in last


def test_a_scene_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, few_views, capsys):
    monkeypatch.setattr(table, 'run', lambda bench, stop, task: f'{task.name} killed')
    parse(monkeypatch, '--preset', 'demo', '--out', tmp_path / 'out', '--jobs', 2, *TWO_STEPS,
          '--scenes', f'a={few_views}', 'gone=nowhere', f'b={few_views}')
    assert table.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == 'table.py: error: a: a killed; b: b killed'
    text = (tmp_path / 'out/results.md').read_text(encoding='utf-8')
    assert 'Not measured: a (a killed), gone (no folder nowhere), b (b killed).' in text


# --- which results are reused -------------------------------------------------------------------------------

def test_a_result_is_kept_while_options_and_checkpoint_are_its_own(make_task, monkeypatch):
    task = make_task()
    table.measure(BENCH, GOING_ON, task)
    record = table.read_record(task)
    assert record['result']['step'] == 2 and record['result']['mean']['psnr'] > 0
    assert 0 < record['measured']['training_seconds'] < 100

    monkeypatch.setattr(table, 'run', lambda *_: pytest.fail('measured again'))
    table.measure(BENCH, GOING_ON, task)
    assert table.read_record(make_task('--N_iters', 3)) == {'problem': 'measured with other options'}
    with pytest.raises(UserError, match=r'found a run with other options, lrate 0\.5 '):
        table.measure(BENCH, GOING_ON, make_task('--lrate', 0.5))
    with pytest.raises(UserError, match=r'N_iters 1 \(was 2\)'):
        table.measure(BENCH, GOING_ON, make_task('--N_iters', 1))
    assert table.read_record(task) == record


def test_a_result_of_another_checkpoint_or_other_views_is_measured_again(make_task):
    task = make_task()
    table.measure(BENCH, GOING_ON, task)
    path = task.folder / 'result.json'
    record = json.loads(path.read_text(encoding='utf-8'))
    other = {**record['result'], 'checkpoint': 'other', 'mean': None}
    path.write_text(json.dumps({**record, 'result': other}))
    table.measure(BENCH, GOING_ON, task)
    assert table.read_record(task)['result'] == record['result'] and record['result']['views'] == 1
    table.measure(BENCH, GOING_ON, make_task('--testskip', 4))
    found = json.loads(path.read_text(encoding='utf-8'))['result']
    assert found['views'] == 2 and found['checkpoint'] == record['result']['checkpoint']


@pytest.mark.parametrize('layout, write, image', [('blender', blender_scene, 'test/r_0.png'),
                                                  ('llff', llff_scene, 'images/0.png')])
def test_the_hash_of_data_follows_names_and_contents(tmp_path, layout, write, image):
    folder = write(tmp_path / 'scene')
    args = SimpleNamespace(datadir=folder, dataset_type=layout, factor=1, testskip=1, llffhold=8)
    before = table.hash_of_data(args)
    (folder / 'unrelated.txt').write_text('not read')
    assert table.hash_of_data(args) == before
    (folder / image).write_bytes((folder / image).read_bytes() + b' ')
    changed = table.hash_of_data(args)
    assert changed != before
    args.dataset_type = 'another'  # all files
    assert table.hash_of_data(args) not in (before, changed)


# --- runs and kills -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('script, stopping, problem', [
    ('print("done")', False, None),
    ('print("run_nerf.py: error: no images"); sys.exit(2)', False, 'no images'),
    ('sys.exit(3)', False, 'exit code 3'),
    ('os.kill(os.getpid(), signal.SIGKILL)', False, 'killed by SIGKILL'),
    ('signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); print("ready", flush=True); time.sleep(60)',
     True, 'exit code 4')], ids=['done', 'error', 'code', 'killed', 'stopped'])
def test_why_a_run_ended(monkeypatch, tmp_path, script, stopping, problem):
    monkeypatch.setattr(table, 'ROOT', tmp_path)
    (tmp_path / 'run_nerf.py').write_text(f'import os, signal, sys, time\n{script}\n')

    class Stop:
        @property
        def requested(self):
            return stopping and console.exists() and 'ready' in console.read_text(encoding='utf-8')
    console = tmp_path / 'console.txt'
    assert table.run(BENCH, Stop(), SimpleNamespace(words=[], console=console)) == problem


def children_of(pid):
    """The ids of the processes that the threads of a process started."""
    threads = Path(f'/proc/{pid}/task').glob('*/children')
    return [int(word) for path in threads for word in path.read_text(encoding='utf-8').split()]


def small_demo(folder, stride):
    """Write the demo scene with a few of its views, and every `stride`-th of their pixels."""
    for split, count in (('train', 6), ('val', 1), ('test', 2)):
        meta = json.loads((ROOT / f'data/demo/transforms_{split}.json').read_text(encoding='utf-8'))
        meta['frames'] = meta['frames'][:count]
        (folder / split).mkdir(parents=True)
        (folder / f'transforms_{split}.json').write_text(json.dumps(meta))
        for frame in meta['frames']:
            path = f'{frame["file_path"]}.png'
            iio.imwrite(folder / path, iio.imread(ROOT / 'data/demo' / path)[::stride, ::stride])
    return folder


def kill_all(process):
    """Kill a process and its children, at once."""
    process.send_signal(signal.SIGSTOP)  # so that it does not notice that its children have ended
    for pid in children_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def wait_for_end(pids):
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='finds child processes in /proc')
def test_a_table_that_is_killed_twice_ends_as_an_undisturbed_one(tmp_path):
    scenes = [f'stride{stride}={small_demo(tmp_path / str(stride), stride)}' for stride in (8, 7, 5)]

    def begin(name, jobs=1):
        return start('--preset', 'demo_fast', '--scenes', *scenes, '--out', tmp_path / name, '--jobs', jobs,
                     *FAST_DEMO[5:], '--no-half_res', '--testskip', 1, '--N_iters', 60, '--i_weights', 10,
                     script=ROOT / 'benchmarks/table.py')
    folder = tmp_path / 'parts'
    process = begin('parts')
    wait_for(folder / 'stride8/000010.tar', process)
    kill_all(process)

    process = begin('parts')  # killed alone; what it started ends with it
    wait_for(folder / 'stride7/testset_000060/frames.json', process)
    pids = children_of(process.pid)
    process.kill()
    process.communicate()
    wait_for_end(pids)

    results = []
    for name in ('parts', 'whole'):
        code, output = finish(begin(name, jobs=2))
        assert code == 0, output
        results.append(json.loads((tmp_path / name / 'results.json').read_text(encoding='utf-8')))
    assert results[0]['result'] == results[1]['result'] and results[0]['result']['mean']['psnr'] > 5
    starts = [[scene['starts'] for scene in result['measured']['scenes'].values()] for result in results]
    assert starts[0][0] == 2 and starts[1] == [1, 1, 1]
