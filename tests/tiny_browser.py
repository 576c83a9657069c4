"""A headless Chromium with software WebGL, for tests of pages."""
import os
import shutil
from contextlib import contextmanager

import pytest

# Options of Chromium: nothing but the page itself goes through the network, and WebGL runs on the CPU.
FLAGS = ['--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--use-gl=angle', '--use-angle=swiftshader',
         '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist']


@contextmanager
def open_browser():
    """A `Browser` of Playwright; skips the test if it or Chromium is not installed."""
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    names = (os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome')
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip('Chromium is not installed')
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
