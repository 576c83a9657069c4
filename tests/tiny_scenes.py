"""Tiny scenes on disk, for tests of loaders and of bad input."""
import json

import imageio.v3 as iio
import numpy as np

# Frames in each split of the Blender scene, and photos in the LLFF scene.
FRAMES = 3


def noise(*shape, seed):
    """Random uint8 values of the given shape."""
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def blender_scene(folder):
    """Write a scene in the Blender layout, with RGBA images of 8 × 10 pixels; returns its folder."""
    for split in ('train', 'val', 'test'):
        (folder / split).mkdir(parents=True)
        frames = []
        for index in range(FRAMES):
            iio.imwrite(folder / split / f'r_{index}.png', noise(8, 10, 4, seed=index))
            pose = np.eye(4)
            pose[2, 3] = 4 + 0.1 * index
            frames.append({'file_path': f'./{split}/r_{index}', 'transform_matrix': pose.tolist()})
        content = {'camera_angle_x': 0.7, 'frames': frames}
        (folder / f'transforms_{split}.json').write_text(json.dumps(content))
    return folder


def llff_scene(folder):
    """Write a scene in the LLFF layout, with photos of 16 × 24 pixels in full size only; returns its
    folder."""
    (folder / 'images').mkdir(parents=True)
    rows = []
    for index in range(FRAMES):
        iio.imwrite(folder / f'images/{index}.png', noise(16, 24, 3, seed=index))
        pose = np.array([[0, 1, 0, 0.1 * index, 16], [-1, 0, 0, 0.05, 24], [0, 0, 1, 0, 20.0]])
        rows.append([*pose.reshape(-1), 1.0, 9.0])
    np.save(folder / 'poses_bounds.npy', np.array(rows))
    return folder


def edit_json(path, change):
    """Apply `change` to the content of a JSON file, in place."""
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
