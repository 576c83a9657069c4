"""The report on a scene and its photos: one HTML page, JSON, and a short text for the terminal.

`tools/photos.py` and `scenes.checks.check_scene` make the dict; this file computes what the page shows of it.
"""
import json
from html import escape
from typing import NamedTuple

import numpy as np

from scenes.cameras import focus_point, normalize
from scenes.files import make_folder, write_text

# A part of the circle around the subject without a photo is a gap from this angle on, in degrees.
MIN_GAP = 45
# Cameras within this part of the circle, in degrees, all look at one side of the scene.
FORWARD_FACING_SPAN = 75
# Photos taken within this range of elevations, in degrees, are taken from the same height.
MIN_ELEVATION_RANGE = 20
# Photos taken from above this elevation, in degrees, see the subject from all around.
MAX_LEVEL = 75
# A photo is odd if its sharpness, features or matches are below this fraction of the median.
MIN_FRACTION = 0.3
# A photo is odd if its mean grey is not between these.
MIN_GREY, MAX_GREY = 0.1, 0.9
# A photo is odd if its reprojection error, in pixels, is above this and above twice the median.
MIN_ERROR = 1.5
# Headline of a report whose most serious finding has this level, most serious first.
VERDICTS = {'error': '✕ Fix this before training', 'warning': '! Can be trained, but look at this first',
            'good': '✓ Ready to train'}
LEVELS = list(VERDICTS)
# Columns of the table of photos: key, title, format.
COLUMNS = [('sharpness', 'Sharpness', '{:.3g}'), ('exposure', 'Brightness', '{:.0%}'),
           ('features', 'Features', '{}'), ('matches', 'Matches', '{}'),
           ('error', 'Error (pixels)', '{:.2f}')]
# Size of the top view and the side view, in their own pixels.
WIDTH, HEIGHT = 460, 350
# Radius of the diagram of coverage, in its own pixels.
RADIUS = 165

STYLE = '''
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1e21; --soft: #62676d;
  --line: #dcdcd8; --train: #1f66d1; --test: #d9480f; --point: #8a9097;
  --good: #1a7f4b; --warning: #a86400; --error: #c22f2f }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2025; --ink: #e8e9eb;
  --soft: #a0a6ad; --line: #363b42; --train: #76a9ff; --test: #ff9a57; --point: #737b85;
  --good: #55c78b; --warning: #eeb04a; --error: #ff7b72 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: auto; padding: 24px 16px 64px; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px }
h2 { font-size: 1.15rem; margin: 36px 0 8px }
p { margin: 4px 0 12px }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.good { --color: var(--good) }
.warning { --color: var(--warning) }
.error { --color: var(--error) }
.verdict { display: inline-block; font-weight: 600; color: var(--card); background: var(--color);
  border-radius: 6px; padding: 4px 14px }
figure, .finding { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px; margin: 0 }
.finding { border-left: 5px solid var(--color); margin: 8px 0 }
.finding b { color: var(--color) }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.compass { max-width: 440px }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 50%; margin: 0 6px -1px 0 !important }
.legend span { display: inline-block; margin-right: 14px }
svg { display: block; width: 100%; height: auto; fill: none; stroke-linecap: round; stroke-linejoin: round }
text { fill: var(--soft); font-size: 15px; stroke: var(--card); stroke-width: 4; paint-order: stroke }
.train { stroke: var(--train) }
.val, .test { stroke: var(--test) }
.dot { stroke-width: 9 }
.camera { stroke-width: 1.3 }
.camera:hover { stroke-width: 4 }
.points { stroke: var(--point); stroke-width: 1.6; opacity: .7 }
.rays { stroke: var(--soft) }
.box { stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 6 5 }
.axis { stroke: var(--ink); stroke-width: 1.5 }
.ring { stroke: var(--line); stroke-width: 1.5 }
.gap { fill: var(--warning); opacity: .25 }
.missing { fill: var(--warning); font-weight: 600 }
.scroll { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px 5px 0; text-align: right; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500; white-space: nowrap }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 110px }
th:nth-child(2), td:nth-child(2) { text-align: left; min-width: 150px }
td img { display: block; max-width: 110px; max-height: 110px; border-radius: 4px }
.bad { color: var(--error); font-weight: 600 }
summary { cursor: pointer; margin: 12px 0 }
'''


def write_report(report, folder):
    """Write `report.json`, and `report.html`: one page that needs no other file and no network.

    Args:
      report: a dict as `check_scene` returns it; cameras, points and photos may be empty.
      folder: where the files go; created if missing.
    Raises:
      UserError: the folder cannot be created.
    """
    folder = make_folder(folder)
    write_text(folder / 'report.json', json.dumps(report, indent=1, ensure_ascii=False))
    write_text(folder / 'report.html', page(report))


def text_report(report):
    """The report in a few lines for the terminal."""
    sound = report['cameras'] and worst_level(report) != 'error'
    around = coverage(Geometry(report)) if sound else None
    lines = [report['title'], *(f'  {line}' for line in report['summary'])]
    lines += [f'  {around.text}'] if around else []
    for found in report['findings']:
        lines.append(f'{found["level"]}: {found["text"]}')
        lines += [f'  -> {found["advice"]}'] if found['advice'] else []
    unused = [photo for photo in report['photos'] if not photo['used']]
    lines += [f'not used: {photo["name"]}: {photo["reason"]}' for photo in unused]
    return '\n'.join(lines)


def worst_level(report):
    """The level of the most serious finding."""
    return min((found['level'] for found in report['findings']), key=LEVELS.index, default='good')


class Geometry:
    """The N cameras and the points of a report as arrays, the subject, and how views are turned."""

    def __init__(self, report):
        cameras, self.scene = report['cameras'], report['scene']
        self.position, self.forward, self.up = (np.array([camera[key] for camera in cameras], float)
                                                for key in ('position', 'forward', 'up'))  # [N, 3]
        self.slope = np.tan(np.radians(np.minimum([camera['fov'] for camera in cameras], 90)) / 2)  # [N, 2]
        self.names = [camera['name'] for camera in cameras]
        self.splits = [camera['split'] for camera in cameras]
        self.points = np.array(report['points'], float).reshape(-1, 3)
        self.subject = self.find_subject()
        self.distance = np.linalg.norm(self.position - self.subject, axis=-1, keepdims=True)  # [N, 1]
        self.near, self.far = (0, self.distance) if self.scene.get('ndc') else (
            self.scene['near'], self.scene['far'])
        self.axes = self.find_axes()

    def find_subject(self):
        """Where the axes of the cameras meet, [3], if that is in front of most of them; otherwise the middle
        of the points, or of the cameras."""
        focus = focus_point(np.stack([0 * self.up, 0 * self.up, self.forward, self.position], -1))
        if np.mean(((focus - self.position) * self.forward).sum(-1) > 0) > 0.5:
            return focus
        return np.median(self.points if len(self.points) else self.position, 0)

    def find_axes(self):
        """Directions that point right, away from the viewer and up, [3, 3]. The cameras look away from the
        viewer where they have a common direction."""
        up = normalize(np.array(self.scene['up'], float))
        away = self.forward.mean(0)
        if np.linalg.norm(np.cross(away, up)) < 0.3:
            away = np.array([0, 1.0, 0]) if abs(up[1]) < 0.9 else np.array([0, 0, -1.0])
        right = normalize(np.cross(away, up))
        return np.stack([right, np.cross(up, right), up])


# --- page ---------------------------------------------------------------------------------------------------

class Html(str):
    """Text that is markup already; `tag` escapes all other text."""


def tag(name, *content, **attributes):
    """An element of HTML or SVG. Underscores in names of attributes stand for hyphens; one at the end is
    dropped."""
    pairs = ''.join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                    for key, value in attributes.items())
    inner = ''.join(part if isinstance(part, Html) else escape(str(part)) for part in content)
    return Html(f'<{name}{pairs}>' if name == 'img' else f'<{name}{pairs}>{inner}</{name}>')


def page(report):
    """The whole page as text."""
    found = sorted(report['findings'], key=lambda found: LEVELS.index(found['level']))
    worst = worst_level(report)
    body = [tag('h1', report['title']), tag('p', tag('span', VERDICTS[worst], class_=f'verdict {worst}')),
            *(tag('div', line) for line in report['summary']), *map(finding_card, found)]
    if report['cameras']:
        geometry = Geometry(report)
        body += camera_section(geometry)
        body += coverage_section(geometry) if worst != 'error' else []  # the poses may be wrong
    if report['photos']:
        body += photo_section(report['photos'])
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'{tag("title", report["title"])}<style>{STYLE}</style></head>\n'
            f'{tag("body", tag("main", *body))}</html>\n')


def finding_card(found):
    """A finding with its advice."""
    advice = [tag('div', f'→ {found["advice"]}')] if found['advice'] else []
    return tag('div', tag('b', VERDICTS[found['level']][0]), ' ', found['text'], *advice,
               class_=f'finding {found["level"]}')


# --- cameras and points -------------------------------------------------------------------------------------

def camera_section(geometry):
    """Top and side view with their legend."""
    right, away, up = geometry.axes
    scene = geometry.scene
    keys = [('train', 'training view'), ('test', 'test view'), ('point', 'sparse point')]
    legend = [tag('span', tag('span', class_='key', style=f'background: var(--{color})'), text)
              for color, text in keys[:3 if len(geometry.points) else 2]]
    views = [tag('figure', tag('figcaption', title), draw_view(geometry, np.stack(axes), title))
             for title, axes in (('From above', (right, away)), ('From the side', (away, up)))]
    lines = 'where each camera looks.' if scene.get('ndc') else (
        f'where samples are taken, {scene["near"]:.3g} to {scene["far"]:.3g} units from each camera.')
    box = ' Dashed lines: the bounding box.' if scene['aabb'] else ''
    note = f'Thin lines: {lines}{box} Point at a camera to see its name.'
    return [tag('h2', 'Cameras'), tag('p', *legend, class_='legend'), tag('div', *views, class_='grid'),
            tag('p', note, class_='soft')]


def draw_view(geometry, axes, title):
    """SVG of cameras, points and bounds, projected onto two directions [2, 3]."""
    position, forward, scene = geometry.position, geometry.forward, geometry.scene
    low, high = view_extent(geometry, axes)
    scale = min((WIDTH, HEIGHT) / (high - low))  # pixels in a unit
    middle = (low + high) / 2

    def place(at):  # [..., 3] in the world to pixels [..., 2]
        return ((at @ axes.T - middle) * scale * [1, -1] + [WIDTH / 2, HEIGHT / 2]).clip(-9999, 9999)

    points = ''.join('M{:.0f} {:.0f}h0'.format(*at) for at in place(geometry.points))
    rays = np.stack([position + geometry.near * forward, position + geometry.far * forward], 1)
    opacity = min(0.45, max(0.12, 15 / len(rays)))
    parts = [tag('path', d=points, class_='points'),
             tag('path', d=line_path(place(rays)), class_='rays', opacity=f'{opacity:.2f}')]
    if scene['aabb']:
        edges = np.array([(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)])
        parts.append(tag('path', d=line_path(place(box_corners(scene['aabb']))[edges]), class_='box'))
    size = 16 / scale * min(1, (80 / len(position)) ** 0.5)
    parts += [tag('path', tag('title', name), d=path, class_=f'camera {split}') for name, split, path in zip(
        geometry.names, geometry.splits, map(frustum_path, place(frustums(geometry, size))))]

    length = nice_number(WIDTH / 5 / scale)
    for name, axis in zip('xyz', np.eye(3)):
        ends = place(np.stack([0 * axis, axis * length / 2]))
        if np.linalg.norm(ends[1] - ends[0]) > 12:
            parts += [tag('path', d=line_path(ends[None]), class_='axis'),
                      tag('text', name, x=f'{ends[1, 0] + 4:.0f}', y=f'{ends[1, 1] - 3:.0f}')]
    parts += [tag('path', d=f'M14 {HEIGHT - 14}v-6m0 3h{length * scale:.0f}m0 -3v6', class_='axis'),
              tag('text', f'{length:g} unit{"s" * (length != 1)}', x=14, y=HEIGHT - 26)]
    return tag('svg', *parts, viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', aria_label=title)


def view_extent(geometry, axes):
    """Lowest and highest corner [2] of what a view shows: all cameras and what they look at, most points, and
    the bounding box, as far as they are not much farther away."""
    far = np.minimum(geometry.far, 1.4 * geometry.distance)
    shown = np.concatenate([geometry.position, geometry.position + far * geometry.forward,
                            geometry.subject[None]]) @ axes.T
    low, high = shown.min(0), shown.max(0)
    limits = low - (high - low).max(), high + (high - low).max()
    if len(geometry.points):
        most = np.percentile(geometry.points @ axes.T, [4, 96], axis=0).clip(*limits)
        low, high = np.minimum(low, most[0]), np.maximum(high, most[1])
    if geometry.scene['aabb']:
        corners = (box_corners(geometry.scene['aabb']) @ axes.T).clip(*limits)
        low, high = np.minimum(low, corners.min(0)), np.maximum(high, corners.max(0))
    margin = max(0.08 * (high - low).max(), 1e-6)
    return low - margin, high + margin


def box_corners(aabb):
    """The corners of a box [8, 3]; those with an edge between them differ in one bit of their indices."""
    return np.array(np.meshgrid(*np.array(aabb, float).T)).reshape(3, 8).T


def frustums(geometry, size):
    """The pyramids that the cameras see, `size` long: apex and four corners, [N, 5, 3]."""
    across = geometry.slope[:, :1] * np.cross(geometry.forward, geometry.up)
    along = geometry.slope[:, 1:] * geometry.up
    rays = [0 * across, *(geometry.forward + x * across + y * along
                          for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1)))]
    return geometry.position[:, None] + size * np.stack(rays, 1)


def frustum_path(pixels):
    """The path of a pyramid whose apex and corners are at pixels [5, 2]."""
    apex, *corners = ('{:.1f} {:.1f}'.format(*at) for at in pixels)
    return f'M{"L".join(corners)}Z' + ''.join(f'M{apex}L{corner}' for corner in corners)


def line_path(ends):
    """The path of lines between pairs of pixels [N, 2, 2]."""
    return ''.join('M{:.0f} {:.0f}L{:.0f} {:.0f}'.format(*pair) for pair in ends.reshape(-1, 4))


def nice_number(value):
    """The largest of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, … that is not above a value."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(power * digit for digit in (1, 2, 5) if power * digit <= value))


# --- coverage -----------------------------------------------------------------------------------------------

class Coverage(NamedTuple):
    """From where the N training views see the subject. If cameras look away from each other, it is about the
    directions that they look in."""
    azimuth: np.ndarray    # in degrees, counter-clockwise from the right of the view from above, [N]
    elevation: np.ndarray  # in degrees above level, [N]
    gaps: list             # parts of the circle without a photo, (start, end) in degrees, start < end
    text: str              # where the next photos should be taken from


def coverage(geometry):
    """The `Coverage` of the training views, or None if there are fewer than three."""
    train = np.flatnonzero(np.array(geometry.splits) == 'train')
    if len(train) < 3:
        return None
    arms = geometry.position - geometry.subject
    outward = np.mean((arms * geometry.forward).sum(-1) > 0) > 0.5
    right, away, up = geometry.axes @ (geometry.forward if outward else arms)[train].T
    azimuth = np.degrees(np.arctan2(away, right)) % 360
    elevation = np.degrees(np.arctan2(up, np.hypot(right, away)))

    order = np.argsort(azimuth)
    if (elevation < MAX_LEVEL).any():
        order = order[elevation[order] < MAX_LEVEL]
    starts, names = azimuth[order], [geometry.names[index] for index in train[order]]
    widths = np.diff(starts, append=starts[0] + 360)
    wide = [index for index in np.argsort(-widths) if widths[index] >= MIN_GAP]
    gaps = [(starts[index], starts[index] + widths[index]) for index in wide]
    between = [f'between {names[index]} and {names[(index + 1) % len(names)]} ({widths[index]:.0f}°)'
               for index in wide]
    what = 'the circle of directions' if outward else 'the circle around the subject'
    span = 360 - widths.max()
    low, high = elevation.min(), elevation.max()
    if span < FORWARD_FACING_SPAN:
        gaps = []
        text = (f'All photos look at the scene from one side, within {span:.0f}°. Views near them will be '
                'good. For more freedom, step further to the left and right, up and down.')
    elif span < 180:
        text = (f'The photos cover {span:.0f}° of {what}. To show the other side too, go on from '
                f'{names[(wide[0] + 1) % len(names)]} and from {names[wide[0]]}, in steps of 10 to 15°.')
    elif gaps:
        text = f'Take the next photos {"; ".join(between[:4])}: none covers this part of {what}.'
    else:
        text = f'The photos cover {what}: no gap is wider than {widths.max():.0f}°.'
    if span >= FORWARD_FACING_SPAN and high - low < MIN_ELEVATION_RANGE:
        text += (f' All are at about the same height, at {low:.0f} to {high:.0f}° from level: take more from '
                 'higher up.')
    return Coverage(azimuth, elevation, gaps, text)


def coverage_section(geometry):
    """The diagram of azimuth and elevation, and where the next photos should be taken from."""
    around = coverage(geometry)
    if not around:
        return []
    caption = ('Turned like the view from above. Each dot is a training view: in the centre it looks down '
               'from straight above, on the circles it is lower.')
    return [tag('h2', 'Where to take the next photos'), tag('p', around.text),
            tag('figure', draw_compass(around), tag('figcaption', caption), class_='compass')]


def draw_compass(around):
    """SVG of azimuth (angle) and elevation (90° in the centre), with the gaps as sectors."""
    lowest = min(0, around.elevation.min() - 5)

    def place(azimuth, elevation):
        radius = RADIUS * (90 - elevation) / (90 - lowest)
        return radius * np.cos(np.radians(azimuth)), -radius * np.sin(np.radians(azimuth))

    def label(text, azimuth, elevation, **attributes):
        x, y = place(azimuth, elevation)
        return tag('text', text, text_anchor='middle', x=f'{x:.0f}', y=f'{y + 4:.0f}', **attributes)

    sectors, rings, labels, label_azimuth = [], [], [], 30
    for start, end in around.gaps:
        arc = 'L{:.1f} {:.1f}A{} {} 0 {} 0 {:.1f} {:.1f}'.format(
            *place(start, lowest), RADIUS, RADIUS, int(end - start > 180), *place(end, lowest))
        sectors.append(tag('path', d=f'M0 0{arc}Z', class_='gap'))
        middle = (start + end) / 2 % 360
        labels.append(label(f'no photos: {end - start:.0f}°', middle, 0.6 * lowest + 36, class_='missing'))
        label_azimuth = 150 if middle < 90 else label_azimuth  # out of the way of the other label
    for elevation in range(60, int(np.ceil(lowest)) - 1, -30):
        radius = np.hypot(*place(0, elevation))
        text = f'{abs(elevation)}° {"up" if elevation > 0 else "down"}' if elevation else 'level'
        rings += [tag('circle', r=f'{radius:.1f}', class_='ring'), label(text, label_azimuth, elevation)]
    dots = ''.join('M{:.1f} {:.1f}h0'.format(*place(*at)) for at in zip(around.azimuth, around.elevation))
    dots = tag('path', d=dots, class_='train dot')
    return tag('svg', *sectors, *rings, dots, *labels, viewBox='-195 -175 390 350', role='img',
               aria_label='Coverage')


# --- photos -------------------------------------------------------------------------------------------------

def photo_section(photos):
    """A table of the photos: those that are not used first, then those with a remark, then the others."""
    used = [photo for photo in photos if photo['used']]
    typical = {key: np.median([photo[key] for photo in used if photo[key] is not None] or [0])
               for key, *_ in COLUMNS}
    marks = [oddities(photo, typical) for photo in photos]
    order = sorted(range(len(photos)), key=lambda i: (
        photos[i]['used'], -len(marks[i]), -(photos[i]['error'] or 0), photos[i]['name']))
    bad = sum(bool(mark) or not photo['used'] for photo, mark in zip(photos, marks))
    rows = [photo_row(photos[index], marks[index]) for index in order]
    titles = ['Photo', 'Remark', *(title for _, title, _ in COLUMNS)]
    head = tag('tr', *(tag('th', title) for title in titles))
    body = [tag('h2', f'Photos: {len(used)} of {len(photos)} used')]
    if bad:
        body.append(tag('div', tag('table', head, *rows[:bad]), class_='scroll'))
    if rows[bad:]:
        body.append(tag('details', tag('summary', f'{len(rows) - bad} photos without a remark'),
                        tag('div', tag('table', head, *rows[bad:]), class_='scroll')))
    return body


def oddities(photo, typical):
    """What is wrong with a photo, in a word, by column; `typical` has the median of each column."""
    wrong = {}
    for key, word in (('sharpness', 'blurred'), ('features', 'few features'), ('matches', 'few matches')):
        if photo[key] is not None and photo[key] < MIN_FRACTION * typical[key]:
            wrong[key] = word
    if photo['exposure'] is not None and not MIN_GREY <= photo['exposure'] <= MAX_GREY:
        wrong['exposure'] = 'dark' if photo['exposure'] < MIN_GREY else 'bright'
    if photo['error'] is not None and photo['error'] > max(2 * typical['error'], MIN_ERROR):
        wrong['error'] = 'camera uncertain'
    return wrong


def photo_row(photo, wrong):
    """The row of a photo in the table; `wrong` are its `oddities`."""
    shown = str(photo['thumbnail'] or '').startswith('data:image/')
    image = [tag('img', src=photo['thumbnail'], alt='')] if shown else []
    remark = ', '.join(wrong.values()) if photo['used'] else f'Not used: {photo["reason"]}'
    cells = [tag('td', '–' if photo[key] is None else form.format(photo[key]),
                 **{'class': 'bad'} if key in wrong else {}) for key, _, form in COLUMNS]
    return tag('tr', tag('td', *image, photo['name']), tag('td', remark), *cells)
