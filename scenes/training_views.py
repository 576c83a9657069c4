"""Random pixels of the training views: their colours, and the rays through them."""
import numpy as np
import torch

from run_nerf_helpers import cast_rays, pinhole_directions
from scenes.errors import UserError
from scenes.images import ImageSet


class TrainingViews:
    """The pixels of the training views on the device. Images stay 8 bit; on a CPU they share memory with the
    scene. Random numbers come from torch's global generator of the device.

    Args:
      scene: a `Scene` with images.
      precrop_frac: fraction of each image side that the centre of an image covers; None if `draw` is never
        called with `centre`.
      pixel_centers: put rays through pixel centres rather than corners.
      device: where everything is kept.
      with_alpha: add the alpha of its pixel to each colour, if the scene has alphas.
    Raises:
      UserError: no pixel is left by the masks.
    """

    def __init__(self, scene, precrop_frac, pixel_centers, device, with_alpha=False):
        first, last = min(scene.i_train), max(scene.i_train)  # a slice shares memory
        cameras, self.precrop_frac, self.device = scene.cameras[first:last + 1], precrop_frac, device
        self.first = first
        self.poses = torch.from_numpy(scene.poses[first:last + 1]).to(device)          # [V, 3, 4]
        sizes = [(camera.H, camera.W) for camera in cameras]
        self.size = sizes[0] if len(set(sizes)) == 1 else None                         # None if they differ
        self.heights, self.widths = torch.tensor(sizes, device=device).unbind(-1)      # [V] each
        self.first_pixels = exclusive_sum(self.heights * self.widths)                  # [V]

        self.images = self.on_device(scene.images, first, last)          # [V, H, W, 3] or [P, 3]
        if with_alpha and scene.alphas is not None:
            alphas = self.on_device(scene.alphas, first, last)
            self.images = torch.cat([self.images, alphas[..., None]], -1)  # [V, H, W, 4] or [P, 4]
        views, self.unmasked = np.asarray(scene.i_train) - first, None
        if scene.masks is not None:
            masks = [scene.masks[view] for view in range(first, last + 1)]
            self.unmasked = {centre: self.list_pixels(masks, centre)
                             for centre in ([False] if precrop_frac is None else [False, True])}
            views = views[[masks[view].any() for view in views]]
            if not len(views):
                raise UserError('found no training view with white pixels in its mask, expected some')
        self.views = torch.from_numpy(views).to(device)                                # [N_views]
        self.prepare_directions(cameras, sorted(views), pixel_centers)

    def on_device(self, images, first, last):
        """Images `first` to `last` of an array or an `ImageSet` as a tensor [V, H, W, …] or [P, …]."""
        if isinstance(images, ImageSet):
            pixels = torch.from_numpy(images.pixels_of(first, last)).to(self.device)
            return pixels.unflatten(0, (-1, *self.size)) if self.size else pixels
        return torch.from_numpy(images[first:last + 1]).to(self.device)

    # --- which pixels ---

    def draw(self, count, centre=False, one_view=False):
        """Draw random pixels. Views are equally likely, whatever their size.

        Args:
          count: number of pixels.
          centre: only from the centres of the images.
          one_view: all from one view.
        Returns:
          view, y, x: [count] each.
        """
        def random(low, high, count=count):
            return torch.randint(low, high, (count,), device=self.device)

        def below(limits):
            return random(0, 2 ** 62) % limits

        N_views = len(self.views)
        view = self.views[random(0, N_views, 1).expand(count) if one_view else random(0, N_views)]
        if self.unmasked is not None:
            pixels, starts, counts = self.unmasked[centre]
            pixel, width = pixels[starts[view] + below(counts[view])].long(), self.widths[view]
            return view, pixel // width, pixel % width
        if self.size is None:
            (top, bottom), (left, right) = (self.limits(sides[view], centre)
                                            for sides in (self.heights, self.widths))
            return view, top + below(bottom - top), left + below(right - left)
        height, width = self.size
        return view, random(*self.limits(height, centre)), random(*self.limits(width, centre))

    def limits(self, side, centre):
        """The first pixel along image sides, and the end, an int each or [...], of the images or their
        centres."""
        if not centre:
            return side * 0, side
        half = side // 2 * self.precrop_frac
        half = half.long().clamp(min=1) if torch.is_tensor(half) else max(1, int(half))
        first, end = side // 2 - half, side // 2 + half
        if torch.is_tensor(side):
            return first.clamp(min=0), end.minimum(side)
        return max(0, first), min(side, end)

    def list_pixels(self, masks, centre):
        """The pixels that are white in `masks` [H, W], of the images or their centres; of the whole image
        where the centre has none. Returns y * W + x of all views [A], where each view's begin [V], and how
        many there are [V]."""
        lists = []
        for mask in masks:
            (top, bottom), (left, right) = (self.limits(side, centre) for side in mask.shape)
            white = np.zeros_like(mask)
            white[top:bottom, left:right] = mask[top:bottom, left:right]
            lists.append(np.flatnonzero(white if white.any() else mask).astype(np.int32))
        counts = torch.tensor([len(pixels) for pixels in lists], device=self.device)
        return torch.from_numpy(np.concatenate(lists)).to(self.device), exclusive_sum(counts), counts

    # --- colours and rays ---

    def colors(self, view, y, x):
        """Colours of pixels [count, 3 or 4], uint8; arguments as returned by `draw`."""
        if self.size is not None:
            return self.images[view, y, x]
        return self.images[self.first_pixels[view] + y * self.widths[view] + x]

    def rays(self, view, y, x):
        """Origins and directions [2, count, 3] of the rays through pixels."""
        return torch.stack(cast_rays(self.directions(view, y, x), self.poses[view]))

    def prepare_directions(self, cameras, views, pixel_centers):
        """Compute what `directions` needs: intrinsics of pinhole cameras, [4] if all views share one,
        otherwise [V, 4]; or the directions of all pixels of each camera of `views`, if there is lens
        distortion."""
        self.table = None
        if all(camera.is_pinhole for camera in cameras):
            shift = 0.5 if pixel_centers else 0.0  # integer pixels then stand for their centres
            intrinsics = [[*camera.K.diagonal()[:2], *(camera.K[:2, 2] - shift)] for camera in cameras]
            shared = all(camera is cameras[0] for camera in cameras)
            self.intrinsics = intrinsics[0] if shared else torch.tensor(
                intrinsics, dtype=torch.float32, device=self.device)
            return
        starts, end = {}, 0
        for camera in dict.fromkeys(cameras[view] for view in views):
            starts[camera], end = end, end + camera.H * camera.W
        self.table = torch.empty(end, 3, device=self.device)                           # [P, 3]
        for camera, start in starts.items():
            directions = torch.from_numpy(camera.pixel_directions(pixel_centers))
            self.table[start:start + len(directions)] = directions.to(self.device)
        first = [starts.get(camera, 0) for camera in cameras]
        self.first_directions = torch.tensor(first, device=self.device)                # [V]

    def directions(self, view, y, x):
        """Directions [count, 3] of the rays through pixels, in their cameras' axes."""
        if self.table is not None:
            return self.table[self.first_directions[view] + y * self.widths[view] + x]
        intrinsics = self.intrinsics
        return pinhole_directions(x, y, *(intrinsics[view].unbind(-1) if torch.is_tensor(intrinsics)
                                          else intrinsics))


def exclusive_sum(counts):
    """The sum of the counts in front of each of `counts` [N]."""
    return counts.cumsum(0) - counts
