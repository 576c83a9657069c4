"""The report: a page that is complete, self-contained and escaped; coverage; how a browser shows it."""
import json
import re
import shutil
import subprocess
import time
from html import escape
from html.parser import HTMLParser

import imageio.v3 as iio
import numpy as np
import pytest
from test_checks import millimetres, opencv_axes, orbit_scene

from scenes.checks import check_scene
from scenes.report import HEIGHT, WIDTH, Geometry, coverage, nice_number, text_report, write_report

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# Elements without a closing tag.
VOID = 'meta', 'img'


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and whether all elements are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.balanced = [], [], [], True
        self.feed(html)
        self.balanced &= not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def photo(index, **changes):
    """An ordinary photo of a report."""
    return {'name': f'{index:03}.png', 'used': True, 'reason': None, 'sharpness': 100.0 + index,
            'exposure': 0.5, 'features': 5000, 'matches': 900, 'error': 0.5, 'thumbnail': None, **changes}


def capture_report(**scene):
    """A report with all parts."""
    report = check_scene(orbit_scene(**scene), 'orbit')
    report['photos'] = [photo(index) for index in range(24)] + [
        photo(24, used=False, reason='too dark', exposure=0.01, error=None,
              thumbnail='data:image/jpeg;base64,AAAA')]
    report['scene']['aabb'] = [[-1, -1, -1], [1, 1, 1]]
    return report


def write(report, folder):
    """The text of the written page."""
    write_report(report, folder)
    return (folder / 'report.html').read_text(encoding='utf-8')


def test_the_page_is_complete_and_needs_nothing_else(tmp_path):
    report = capture_report()
    html = write(report, tmp_path)
    page = Page(html)
    assert page.balanced and len(page.all('svg')) == 3 and page.all('html') == [{'lang': 'en'}]
    assert json.loads((tmp_path / 'report.json').read_text(encoding='utf-8')) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ['report.html', 'report.json']
    assert not re.search(r'https?:|//|@import|url\(|<script|<link|\bon\w+=', html)
    assert [image['src'] for image in page.all('img')] == ['data:image/jpeg;base64,AAAA']
    for text in (report['title'], *report['summary'], report['findings'][0]['text'], 'Not used: too dark'):
        assert text in ''.join(page.text)


def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;\'"><b onload=x>'
    report = capture_report()
    plain = Page(write(report, tmp_path / 'plain'))
    report['title'], report['summary'] = evil, [evil]
    report['findings'] = [{'level': 'good', 'text': evil, 'advice': evil}]
    report['cameras'][3]['name'] = evil
    report['photos'][-1].update(name=evil, reason=evil, thumbnail='javascript:alert(1)')
    thumbnail = f'data:image/jpeg;base64,{evil}'
    report['photos'].append(photo(25, used=False, reason='blurred', thumbnail=thumbnail))
    page = Page(write(report, tmp_path / 'evil'))
    names = [name for name, _ in page.elements if name != 'img']
    assert names.count('script') == 0 and set(names) <= {name for name, _ in plain.elements} and page.balanced
    assert sum(text.count(evil) for text in page.text) == 9  # title twice, two cameras' titles, and so on
    assert [image['src'] for image in page.all('img')] == [thumbnail]


def test_the_verdict_is_that_of_the_worst_finding(tmp_path):
    for fault, verdict in ((None, 'Ready to train'), (millimetres, 'Can be trained, but look'),
                           (opencv_axes, 'Fix this before training')):
        scene = orbit_scene()
        if fault:
            fault(scene)
        html = write(check_scene(scene, 'orbit'), tmp_path)
        assert verdict in html and ('Where to take' in html) == (fault is not opencv_axes)


def test_a_failed_capture_has_a_page(tmp_path):
    finding = {'level': 'error', 'text': 'No cameras were found.', 'advice': 'Take photos with more overlap.'}
    unknown = dict.fromkeys(('sharpness', 'exposure', 'features', 'matches', 'error'))
    report = {'title': 'mine: 0 of 25 photos', 'summary': [], 'findings': [finding],
              'scene': {'type': None, 'near': None, 'far': None, 'aabb': None, 'up': [0, 0, 1]},
              'cameras': [], 'points': [], 'photos': [photo(0, used=False, reason='few matches', **unknown)]}
    page = Page(write(report, tmp_path))
    assert page.balanced and not page.all('svg') and 'Not used: few matches' in page.text
    assert text_report(report).splitlines() == [
        'mine: 0 of 25 photos', 'error: No cameras were found.', '  -> Take photos with more overlap.',
        'not used: 000.png: few matches']


def test_the_bad_photos_come_first(tmp_path):
    report = capture_report()
    report['photos'][7].update(error=3.0)
    report['photos'][9].update(sharpness=5.0, matches=10)
    html = write(report, tmp_path)
    rows = re.findall(r'<tr><td>(?:<img[^>]*>)?(\d+)\.png</td><td>([^<]*)', html)
    assert [(int(name), remark) for name, remark in rows[:3]] == [
        (24, 'Not used: too dark'), (9, 'blurred, few matches'), (7, 'camera uncertain')]
    assert len(rows) == 25 and {remark for _, remark in rows[3:]} == {''}
    assert html.index('<details>') > html.index('007.png</td>')


@pytest.mark.parametrize('scene', [{}, {'points': False}, {'outward': True}])
def test_all_cameras_lie_within_the_views(tmp_path, scene):
    html = write(capture_report(**scene), tmp_path)
    paths = re.findall(r'<path d="([^"]*)" class="camera', html)
    numbers = np.array([re.findall(r'[\d.-]+', path)[:24] for path in paths], float).reshape(-1, 2)
    assert len(paths) == 2 * 24 and np.ptp(numbers, 0).min() > 50
    assert (numbers > 0).all() and (numbers < [WIDTH, HEIGHT]).all()


@pytest.mark.parametrize('value', [0.0123, 0.2, 0.999, 1, 3, 7, 49.9, 2e5])
def test_nice_numbers(value):
    nice = nice_number(value)
    assert nice <= value < 2.5 * nice and f'{nice:.0e}'[0] in '125'


# --- coverage -----------------------------------------------------------------------------------------------

def covered(azimuths, **scene):
    """Coverage of training views at these azimuths."""
    scene = orbit_scene(azimuths=azimuths, **scene)
    scene.i_train, scene.i_val, scene.i_test = np.arange(len(azimuths)), np.arange(0), np.arange(0)
    return coverage(Geometry(check_scene(scene, 'orbit')))


def test_a_full_circle_has_no_gap():
    around = covered(np.arange(0, 360, 15))
    assert around.gaps == [] and 'no gap is wider than 15°' in around.text
    np.testing.assert_allclose(np.sort(around.elevation), [15] * 12 + [45] * 12, atol=0.1)


@pytest.mark.parametrize('start', [0, 100, 250, 330])
def test_a_gap_is_found_wherever_it_is(start):
    around = covered(start + np.arange(80, 361, 10))
    (first, last), = around.gaps
    assert last - first == pytest.approx(80, abs=0.5)
    # the last view stands where the gap starts, and the first view where it ends, seen from above
    assert (first - around.azimuth[-1]) % 360 == pytest.approx(0, abs=1e-6)
    assert (last - around.azimuth[0]) % 360 == pytest.approx(0, abs=1e-6)
    assert 'Take the next photos between 028.png and 000.png (80°)' in around.text


def test_one_side_and_a_narrow_capture():
    around = covered(np.arange(0, 131, 10))
    assert len(around.gaps) == 1 and 'cover 130° of the circle' in around.text
    assert 'go on from 000.png and from 013.png' in around.text
    around = covered(np.arange(0, 41, 5))
    assert around.gaps == [] and 'from one side, within 40°' in around.text


def test_photos_from_one_height_need_others_from_higher_up():
    scene = orbit_scene()
    scene.poses = scene.poses[::2]
    for key in ('cameras', 'names', 'images'):
        setattr(scene, key, getattr(scene, key)[::2])
    scene.i_train, scene.i_val, scene.i_test = np.arange(12), np.arange(0), np.arange(0)
    assert 'take more from higher up' in coverage(Geometry(check_scene(scene, 'orbit'))).text


def test_cameras_back_to_back_cover_directions():
    assert 'the circle of directions: no gap' in covered(np.arange(0, 360, 15), outward=True).text


def test_two_training_views_have_no_coverage(tmp_path):
    scene = orbit_scene()
    scene.i_train = scene.i_train[:2]
    report = check_scene(scene, 'orbit')
    report['cameras'] = [camera for camera in report['cameras'] if camera['name'] in ('001.png', '002.png')]
    assert coverage(Geometry(report)) is None and len(Page(write(report, tmp_path)).all('svg')) == 2


# --- size and looks -----------------------------------------------------------------------------------------

def test_600_photos_are_written_quickly_in_little_space(tmp_path):
    report = check_scene(orbit_scene(azimuths=np.arange(600) * 0.6), 'orbit')
    report['points'] = np.random.RandomState(0).randn(4000, 3).tolist()
    report['photos'] = [photo(index, name=f'holiday/2026/IMG_{index:06}.jpg') for index in range(600)]
    started = time.perf_counter()
    html = write(report, tmp_path)
    assert time.perf_counter() - started < 5
    assert len(html.encode()) < 2e6 and html.count('<tr><td>') == 600


@pytest.mark.skipif(BROWSER is None, reason='found no Chromium or Chrome')
def test_a_browser_shows_the_page(tmp_path):
    """In light and dark, without scrolling sideways on a phone and on a desk."""
    html = escape(write(capture_report(), tmp_path))
    widths = 400, 1200
    script = 'this.title = contentDocument.documentElement.scrollWidth'
    frames = ''.join(f'<iframe style="border:0" height=1500 width={width} srcdoc="{html}" onload="{script}">'
                     '</iframe>' for width in widths)
    path = tmp_path / 'frames.html'  # a window of the browser cannot be as narrow as a phone
    style = 'margin:0;white-space:nowrap'
    path.write_text(f'<meta charset="utf-8"><body style="{style}">{frames}', encoding='utf-8')

    for scheme, dark in enumerate((True, False)):
        shot = tmp_path / f'{scheme}.png'
        done = subprocess.run([
            BROWSER, '--headless', '--no-sandbox', '--no-first-run', '--disable-gpu', '--hide-scrollbars',
            f'--user-data-dir={tmp_path / "profile"}', '--window-size=1700,1500', '--dump-dom',
            f'--screenshot={shot}', f'--blink-settings=preferredColorScheme={scheme}', path.as_uri()],
            capture_output=True, encoding='utf-8', timeout=120, check=True)
        assert [int(attrs['title']) for attrs in Page(done.stdout).all('iframe')] == list(widths)
        image = iio.imread(shot)[..., :3]
        assert image[2, 2].mean() < 50 if dark else image[2, 2].mean() > 200
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
