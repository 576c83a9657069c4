"""Scenes in zip files: finding and unpacking them."""
import contextlib
import shutil
import stat
import zipfile
from pathlib import PurePosixPath

from scenes.errors import first_line
from scenes.files import PARTIAL, atomic_folder, make_folder
from tools.datasets.transfer import CHUNK, Damaged, check_space, progress_bar, say, size_text, writing


@contextlib.contextmanager
def reading_zip():
    """What goes wrong in this block is the archive's fault."""
    try:
        yield
    except Exception as error:  # malformed archives raise errors of many types
        raise Damaged(f'not a zip file, or damaged ({first_line(error)})') from None


def scene_members(archive, scene):
    """The files of a scene in a zip file: pairs of `ZipInfo` and the path in the scene's folder.

    The scene is the folder of that name with the files that a scene needs, wherever it is in the archive.

    Raises:
      Damaged: the archive does not hold the scene, or its paths lead out of it.
    """
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if path.is_absolute() or '..' in path.parts or stat.S_ISLNK(info.external_attr >> 16):
            raise Damaged(f'found the unsafe path {info.filename!r} in it')
    names = set(archive.namelist())
    folders = [name.removesuffix(scene.files[0]) for name in names]
    folders = [folder for folder in folders if all(folder + name in names for name in scene.files)
               and (folder == '' or f'/{folder}'.endswith(f'/{scene.name}/'))]
    if not folders:
        raise Damaged(f'found no folder {scene.name}/ with {", ".join(scene.files)} in it')
    folder = min(folders, key=len)
    members = [(info, info.filename.removeprefix(folder)) for info in archive.infolist()
               if info.filename.startswith(folder) and not info.is_dir()]
    for group in scene.images:
        if not any(name.startswith(group) for _, name in members):
            raise Damaged(f'found no images in {folder}{" or ".join(group)}')
    return members


def unpack(path, scene):
    """Unpack a scene from a zip file into its folder, which appears when it is complete.

    Raises:
      Damaged: the archive cannot be read, or does not hold the scene.
      UserError: the disk is full, or cannot be written.
    """
    with reading_zip():
        archive = zipfile.ZipFile(path)
    with archive:
        members = scene_members(archive, scene)
        total = sum(info.file_size for info, _ in members)
        parent = make_folder(scene.folder.parent)
        for leftover in parent.glob(f'.{scene.name}{PARTIAL}*'):  # of a killed process
            shutil.rmtree(leftover)
        check_space(parent, total, f'{scene.name} unpacked')
        with atomic_folder(scene.folder) as partial, progress_bar(f'{scene.name}: unpacking', total) as bar:
            for info, name in members:
                unpack_file(archive, info, partial / name, bar)
    say(f'{scene.folder}: {len(members)} files, {size_text(total)}')


def unpack_file(archive, info, path, bar):
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with reading_zip():
        source = archive.open(info)
    with source, open(path, 'wb') as file:
        while True:
            with reading_zip():
                piece = source.read(CHUNK)
            if not piece:
                break
            with writing(path):
                file.write(piece)
                file.flush()
            bar.update(len(piece))
