"""What the tabs of a panel have in common."""

# Cameras are drawn in this size, in units of the viewer, with lines of this width.
FRUSTUM, LINE = 0.1, 0.005


class Tab:
    """A tab of the panel. Its `build` adds the controls, whose callbacks viser calls in threads of its own:
    what evaluates networks goes to `Viewer.call`.

    Args:
      viewer: the `Viewer`.
      session: the `Session` of the browser.
      page: viser's handle of the tab.
    """

    def __init__(self, viewer, session, page):
        self.viewer, self.session, self.page = viewer, session, page
        self.client, self.gui = session.client, session.client.gui
        with page:
            self.build(self.gui)

    def build(self, gui):
        raise NotImplementedError
