"""The panel of one browser."""
from viewing.path_tab import PathTab
from viewing.photo_tab import PhotoTab
from viewing.ray_tab import RayTab
from viewing.view_tab import ViewTab


class Panel:
    """Builds the panel of one browser, and looks through the camera of a photo that was kept out of training,
    if there is one.

    Args:
      viewer: the `Viewer`.
      session: the `Session` of the browser.
    Attributes:
      status: the line of `Viewer.show_status`.
    """

    def __init__(self, viewer, session):
        gui, scene = session.client.gui, viewer.scene
        first = [*scene.i_test, *scene.i_val, *scene.i_train][0]
        viewer.go_to(session, scene.poses[first], scene.cameras[first])
        if viewer.controls is not None:
            viewer.controls(gui)
        self.status, tabs = gui.add_markdown(viewer.status), gui.add_tab_group()
        self.view, self.photos, self.ray, self.path = (
            tab(viewer, session, tabs.add_tab(title))
            for title, tab in (('View', ViewTab), ('Photos', PhotoTab), ('Ray', RayTab), ('Path', PathTab)))
