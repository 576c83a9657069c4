"""Image metrics, the files they are written to, and the record of a run."""
import csv
import json
import math

import numpy as np
import pytest
from tiny_scenes import noise

from training.metrics import load_lpips, psnr, ssim, write_metrics


def test_psnr_is_its_definition():
    image, target = noise(9, 7, 3, seed=0), noise(9, 7, 3, seed=1)
    mse = np.mean((image / 255.0 - target / 255.0) ** 2)
    assert psnr(image, target) == pytest.approx(10 * math.log10(1 / mse))
    assert psnr(image, image) == float('inf')


@pytest.mark.parametrize('shape', [(11, 11, 3), (40, 31, 3), (64, 64, 3)])
@pytest.mark.parametrize('strength', [5, 60, 255])
def test_ssim_equals_scikit_image(shape, strength):
    metrics = pytest.importorskip('skimage.metrics')
    target = noise(*shape, seed=0) // 2 + np.arange(shape[1], dtype=np.uint8)[:, None]
    error = np.random.RandomState(1).randint(-strength, strength + 1, shape)
    image = np.clip(target + error, 0, 255).astype(np.uint8)
    expected = metrics.structural_similarity(image / 255.0, target / 255.0, channel_axis=-1, data_range=1.0,
                                             sigma=1.5, gaussian_weights=True, use_sample_covariance=False)
    assert ssim(image, target) == pytest.approx(expected, abs=1e-4)
    assert ssim(target, target) == pytest.approx(1)


def test_ssim_of_an_image_smaller_than_its_window():
    assert ssim(noise(8, 20, 3, seed=0), noise(8, 20, 3, seed=1)) is None


def test_lpips_says_what_is_missing():
    distance, problem = load_lpips('cpu')
    assert distance is not None or 'LPIPS is not measured' in problem


def test_metrics_files(tmp_path):
    rows = [{'view': 3, 'image': 'r_3.png', 'psnr': 20.0, 'ssim': 0.5, 'lpips': None, 'seconds': 1.0},
            {'view': 5, 'image': 'r_5.png', 'psnr': 30.0, 'ssim': 0.7, 'lpips': None, 'seconds': None}]
    means = write_metrics(tmp_path, rows, {'step': 7})
    assert means == {'psnr': 25.0, 'ssim': pytest.approx(0.6), 'lpips': None, 'seconds': 1.0}
    content = json.loads((tmp_path / 'metrics.json').read_text(encoding='utf-8'))
    assert content['step'] == 7 and content['mean']['psnr'] == 25 and content['images'] == rows
    table = list(csv.DictReader((tmp_path / 'metrics.csv').open()))
    assert [row['view'] for row in table] == ['3', '5', 'mean'] and table[2]['psnr'] == '25.0'
    assert [row['image'] for row in table] == ['r_3.png', 'r_5.png', '']


def test_an_infinite_psnr_is_null_in_json(tmp_path):
    write_metrics(tmp_path, [{'view': 0, 'image': None, 'psnr': float('inf')}], {'step': 1})
    content = json.loads((tmp_path / 'metrics.json').read_text(encoding='utf-8'), parse_constant=pytest.fail)
    assert content['images'] == [{'view': 0, 'image': None, 'psnr': None}]
    assert content['mean'] == {'psnr': None}


def test_metrics_of_a_run(demo_run):
    content = json.loads((demo_run[0] / 'testset_000250/metrics.json').read_text(encoding='utf-8'))
    about = {key: content[key] for key in ('step', 'width', 'height', 'views', 'background', 'seed')}
    assert about == {'step': 250, 'width': 64, 'height': 64, 'views': 2, 'background': 'white', 'seed': 0}
    assert content['mean']['seconds'] > 0 and 'cpu' in content['device']
    assert [image['image'] for image in content['images']] == ['test/r_0.png', 'test/r_4.png']
    for image in content['images']:
        assert image['psnr'] > 10 and 0 < image['ssim'] < 1


def test_the_record_of_a_run(demo_run):
    folder, out, _ = demo_run
    assert (folder / 'log.txt').read_text(encoding='utf-8') == out
    (record,) = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
    assert record['seed'] == 0 and record['after_step'] == 0 and record['device'] == 'cpu'
    assert record['torch'] and record['python'] and record['numpy'] and '--config' in record['command']
