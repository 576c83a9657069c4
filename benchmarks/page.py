"""How close a page that `tools/export.py --html` wrote comes to the photos, in a headless Chromium, and how
close the network itself comes. Pages have no lens distortion: where photos have, the page is compared with
the network.

    python tools/export.py logs/lego_fast --html lego.html
    python benchmarks/page.py logs/lego_fast lego.html

Needs playwright (requirements-dev.txt) and Chromium, in the PATH or named by $CHROMIUM.
"""
import argparse
import base64
import os
import shutil
import sys
from pathlib import Path

import imageio.v3 as iio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run_nerf_helpers import to8b
from tools.trained import load_trained
from training.metrics import psnr

# Nothing but the page itself goes through the network, and WebGL runs on the CPU.
FLAGS = ['--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--use-gl=angle', '--use-angle=swiftshader',
         '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist']


def chromium_path():
    """The path of Chromium, None if it is not installed."""
    names = (os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome')
    return next(filter(None, map(shutil.which, names)), None)


def picture_of(page):
    """What the canvas of a page shows, uint8 [H, W, 3]."""
    url = page.evaluate("document.getElementById('canvas').toDataURL()")
    return iio.imread(base64.b64decode(url.partition(',')[2]))[..., :3]


def show_view(page, trained, view):
    """The picture of a view of the scene of a `Trained`, without distortion, uint8 [H, W, 3]."""
    camera, shift = trained.scene.cameras[view].undistorted(), 0.0 if trained.args.pixel_centers else 0.5
    fx, fy, cx, cy = camera.K[(0, 1, 0, 1), (0, 1, 2, 2)]
    page.evaluate('([c2w, K, W, H]) => setCamera(c2w, K, W, H)',
                  [trained.scene.poses[view].tolist(), [fx, fy, cx + shift, cy + shift], camera.W, camera.H])
    return picture_of(page)


def main():
    from playwright.sync_api import sync_playwright
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('run', help='folder of the run, or the checkpoint')
    parser.add_argument('page', type=Path, help='the .html file')
    parser.add_argument('--views', type=int, default=5, help='how many test views')
    args, options = parser.parse_known_args()
    trained, scores = load_trained(args.run, options), []
    scene = trained.scene
    if scene.images is None:
        sys.exit(f'{args.run}: the photos of the scene were not found; give --datadir')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        page = browser.new_page()
        page.goto(args.page.resolve().as_uri())
        page.wait_for_selector('body[data-ready=yes]', state='attached', timeout=300_000)
        for view in scene.i_test[:args.views]:
            camera, picture = scene.cameras[view], show_view(page, trained, view)
            rgb = to8b(trained.frames.render(scene.poses[view], camera=camera.undistorted()).rgb)
            target = scene.images[view] if camera.is_pinhole else rgb
            scores.append([psnr(picture, target), psnr(rgb, target)])  # the latter may be infinite
            print(f'view {view}: page {scores[-1][0]:.2f} dB, network {scores[-1][1]:.2f} dB', flush=True)
        browser.close()
    means = [sum(part) / len(scores) for part in zip(*scores)]
    print(f'mean: page {means[0]:.2f} dB, network {means[1]:.2f} dB; {args.page.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
