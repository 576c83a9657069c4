"""A headless Chromium with software WebGL, for tests of pages."""
from contextlib import ExitStack, contextmanager

import pytest

from benchmarks.page import FLAGS, chromium_path


@contextmanager
def open_browser(beside=None):
    """A `Browser` of Playwright; skips the test if it or Chromium is not installed.

    Args:
      beside: another one that is open.
    """
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    path = chromium_path()
    if path is None:
        pytest.skip('Chromium is not installed')
    with ExitStack() as stack:
        chromium = (beside.browser_type if beside is not None
                    else stack.enter_context(playwright.sync_playwright()).chromium)
        browser = chromium.launch(executable_path=path, args=FLAGS)
        stack.callback(browser.close)
        yield browser
