"""Which scenes there are, where their archives are, and what a complete scene consists of."""
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from scenes.errors import UserError

NERFBASELINES = 'https://huggingface.co/datasets/nerfbaselines/nerfbaselines-data/resolve/main/'
NERFMIRROR = 'https://github.com/yxlao/nerfmirror/releases/download/20220618/'
NERF_AUTHORS = 'https://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/'
MIPNERF360_AUTHORS = 'https://storage.googleapis.com/gresearch/refraw360/'
YOULIXIYA = 'https://huggingface.co/datasets/YouLiXiya/nerf/resolve/'

# The SHA-256 of the known versions of an archive. Archives that are not listed are checked by their size and
# by the checksums inside them.
SHA256 = {
    'nerf_synthetic.zip': ('f01fd1b4ab045b0d453917346f26f898657bb5bec4834b95fdad1f361826e45e',
                           '5e36e96ba8e3564835e9313a47f088aa26eeb88093dcccc695bdb1adec398efd'),
    'nerf_llff_data.zip': ('5794b432feaf4f25bcd603addc6ad0270cec588fed6a364b7952001f07466635',
                           'b8be42c77ce345e647812cb69d1f92d2a85159f2464847e99458e53d13cb1d96'),
}


class Archive(NamedTuple):
    """A zip file with scenes."""
    base: str            # URL of the source, with a slash at the end
    path: str            # below `base`; {scene} stands for the name of a scene
    scenes: tuple = ()   # what it holds; empty if there is an archive for each scene

    @property
    def url(self):
        return self.base + self.path

    @property
    def name(self):
        return PurePosixPath(self.path).name

    @property
    def host(self):
        return urlsplit(self.base).netloc


class SceneSet(NamedTuple):
    """Scenes in the same layout."""
    folder: str          # below --out
    page: str            # for people
    files: tuple         # a scene that has these is complete
    images: tuple        # folders of images: of each group an archive must hold one
    scenes: tuple
    archives: tuple      # in the order in which they are tried


class Scene(NamedTuple):
    """A scene to download."""
    name: str
    folder: Path
    page: str
    files: tuple
    images: tuple
    archives: tuple


BLENDER = ('chair', 'drums', 'ficus', 'hotdog', 'lego', 'materials', 'mic', 'ship')
LLFF = ('fern', 'flower', 'fortress', 'horns', 'leaves', 'orchids', 'room', 'trex')
MIPNERF360 = ('bicycle', 'bonsai', 'counter', 'garden', 'kitchen', 'room', 'stump')
MIPNERF360_EXTRA = ('flowers', 'treehill')
NERF_PAGE, MIPNERF360_PAGE = 'https://www.matthewtancik.com/nerf', 'https://jonbarron.info/mipnerf360'

SETS = {
    'blender': SceneSet(
        'nerf_synthetic', NERF_PAGE, ('transforms_train.json', 'transforms_val.json', 'transforms_test.json'),
        (('train/',), ('val/',), ('test/',)), BLENDER, (
            Archive(NERFBASELINES, 'blender/{scene}.zip'),
            Archive(NERF_AUTHORS, 'nerf_example_data.zip', ('lego', 'fern')),
            Archive(NERFMIRROR, 'nerf_synthetic.zip', BLENDER),
            Archive(YOULIXIYA + '3d80caf405540d16337de4fe3219bb69be7cbaa4/', 'nerf_synthetic.zip', BLENDER))),
    'llff': SceneSet(
        'nerf_llff_data', NERF_PAGE, ('poses_bounds.npy',),
        (('images/', 'images_8/'),), LLFF, (
            Archive(NERFBASELINES, 'llff/{scene}.zip'),
            Archive(NERF_AUTHORS, 'nerf_example_data.zip', ('lego', 'fern')),
            Archive(NERFMIRROR, 'nerf_llff_data.zip', LLFF),
            Archive(YOULIXIYA + '8bb2c1f48e1ee51a94bce0c1634dd04795f92faa/', 'nerf_llff_data.zip', LLFF))),
    'mipnerf360': SceneSet(
        'mipnerf360', MIPNERF360_PAGE, ('sparse/0/cameras.bin', 'sparse/0/images.bin'),
        (('images/',),), MIPNERF360 + MIPNERF360_EXTRA, (
            Archive(MIPNERF360_AUTHORS, '360_v2.zip', MIPNERF360),
            Archive(MIPNERF360_AUTHORS, '360_extra_scenes.zip', MIPNERF360_EXTRA),
            Archive(YOULIXIYA + 'c9b5a8bd455757aeac0f3f5bc51d1f957721d070/', '360_v2.zip', MIPNERF360))),
}


def find_scenes(names, out, mirrors):
    """The scenes with these names, each once.

    Args:
      names: scenes, sets, or set/scene for a name that two sets have.
      out: folder of all data.
      mirrors: base URLs to use in place of the built-in sources.
    Raises:
      UserError: there is no such scene or set.
    """
    scenes = {}
    for name in names:
        set_name, _, wanted = name.partition('/')
        if set_name not in SETS:
            wanted, set_name = name, next((key for key in SETS if name in SETS[key].scenes), None)
        found = [scene for scene in SETS[set_name].scenes if wanted in ('', scene)] if set_name else []
        if not found:
            raise UserError(f'{name}: no such scene or set; expected a scene or set of\n{list_of_scenes()}')
        scenes |= {(set_name, scene): make_scene(SETS[set_name], scene, out, mirrors) for scene in found}
    return list(scenes.values())


def make_scene(scene_set, name, out, mirrors):
    archives = [archive._replace(path=archive.path.format(scene=name)) for archive in scene_set.archives
                if name in archive.scenes or not archive.scenes]
    if mirrors:
        by_path = {archive.path: archive for archive in archives}
        archives = [archive._replace(base=base) for base in mirrors for archive in by_path.values()]
    return Scene(name, out / scene_set.folder / name, scene_set.page, scene_set.files, scene_set.images,
                 tuple(archives))


def list_of_scenes():
    return '\n'.join(f'  {name}: {" ".join(scene_set.scenes)}' for name, scene_set in SETS.items())


def is_complete(scene):
    """Whether a scene is in its folder.

    Raises:
      UserError: something else is there.
    """
    missing = [name for name in scene.files if not (scene.folder / name).is_file()]
    occupied = scene.folder.exists() and not (scene.folder.is_dir() and not any(scene.folder.iterdir()))
    if missing and occupied:
        raise UserError(f'{scene.folder}: found a folder without {missing[0]}, expected a complete scene or '
                        'none; move it away')
    return not missing
