"""A headless Chromium with software WebGL, for tests of pages."""
import os
import shutil
from contextlib import ExitStack, contextmanager

import pytest

# Options of Chromium: nothing but the page itself goes through the network, and WebGL runs on the CPU.
FLAGS = ['--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--use-gl=angle', '--use-angle=swiftshader',
         '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist']


@contextmanager
def open_browser(beside=None):
    """A `Browser` of Playwright; skips the test if it or Chromium is not installed.

    Args:
      beside: another one that is open.
    """
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    names = (os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome')
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip('Chromium is not installed')
    with ExitStack() as stack:
        chromium = (beside.browser_type if beside is not None
                    else stack.enter_context(playwright.sync_playwright()).chromium)
        browser = chromium.launch(executable_path=path, args=FLAGS)
        stack.callback(browser.close)
        yield browser
