"""The rules of docs/architecture.md: which package may import which, how long files and functions may be."""
import ast

import pytest
from tiny_runs import ROOT

LOADERS = {'load_blender', 'load_llff'}
# What a package or file must not import.
FORBIDDEN = {
    'run_nerf_helpers.py': {'run_nerf', 'scenes', 'accel', 'training', *LOADERS},
    'scenes': {'run_nerf', 'accel', 'training', 'viewing', *LOADERS},
    'accel': {'run_nerf', 'scenes', 'training', 'viewing', *LOADERS},
    'training': {'run_nerf', 'accel', 'viewing', *LOADERS},
    'viewing': {'run_nerf', 'accel', 'tools', *LOADERS},
    'load_blender.py': {'run_nerf', 'accel', 'training', 'load_llff'},
    'load_llff.py': {'run_nerf', 'accel', 'training', 'load_blender'},
}
# These files look up attributes by name this many times: of torch, and options.
LOOKUPS = {'training/devices.py': 1, 'training/checkpoints.py': 3, 'tools/make_demo_scene.py': 1}
# The most lines of run_nerf.py.
MAX_LINES = 500
# The most lines of a function without its docstring.
MAX_FUNCTION_LINES = 50


def sources():
    """All Python files of the program, relative to its root."""
    rooms = [path for room in ('scenes', 'training', 'accel', 'viewing', 'tools', 'benchmarks')
             for path in (ROOT / room).rglob('*.py')]
    return [path.relative_to(ROOT) for path in [*ROOT.glob('*.py'), *rooms]]


def tree(path):
    return ast.parse((ROOT / path).read_text(encoding='utf-8'))


def imported(path):
    """The top-level names of all modules that a file imports, in functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name.split('.')[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split('.')[0]


def test_the_root_holds_four_python_files():
    assert {path.name for path in ROOT.glob('*.py')} == {
        'run_nerf.py', 'run_nerf_helpers.py', 'load_blender.py', 'load_llff.py'}


@pytest.mark.parametrize('room', FORBIDDEN)
def test_nothing_imports_upwards(room):
    files = [path for path in sources() if path.parts[0] == room]
    assert files
    for path in files:
        assert not FORBIDDEN[room] & set(imported(path)), path


def test_no_import_cycles():
    modules = {'.'.join(path.with_suffix('').parts): path for path in sources()}
    depends = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom):
                imported = {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
                found |= imported & modules.keys()
        depends[name] = found
    while leaves := {name for name, needs in depends.items() if not needs}:
        depends = {name: needs - leaves for name, needs in depends.items() if name not in leaves}
    assert not depends


def test_the_method_fits_in_one_file():
    assert len((ROOT / 'run_nerf.py').read_text(encoding='utf-8').splitlines()) <= MAX_LINES


def test_functions_are_short():
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f'{path}: {node.name} has {lines} lines'


def test_our_own_objects_are_not_probed_by_name():
    for path in sources():
        calls = [node for node in ast.walk(tree(path))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                 and node.func.id in ('hasattr', 'getattr', 'setattr')]
        assert len(calls) == LOOKUPS.get(path.as_posix(), 0), path
