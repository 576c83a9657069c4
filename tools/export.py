"""Export a trained scene to other programs: a mesh, a point cloud, depth maps, or a page for a browser.

    python tools/export.py logs/lego_fast --mesh lego.glb --points lego.ply
    python tools/export.py logs/lego_fast --mesh lego.obj --faces 50000 --texture 2048
    python tools/export.py logs/lego_fast --depth lego_depth --html lego.html

Meshes, points and depths are in the coordinates and the scale of the input. Other options are those of
run_nerf.py, such as --datadir and --device. docs/export.md describes the files.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line
from scenes.files import make_folder
from tools.exporting.coordinates import Coordinates
from tools.exporting.depth import SUFFIXES, write_depths
from tools.exporting.field import Field
from tools.exporting.files import check_mesh_path, write_mesh, write_points, write_textured_mesh
from tools.exporting.mesh import find_holes, make_surface, require_packages
from tools.exporting.points import collect_points
from tools.exporting.texture import bake_texture, unwrap
from tools.trained import load_trained
from training.options import integer
from training.signals import Stopped, StopRequest

# The kinds of output, each an option of its own.
OUTPUTS = ('mesh', 'points', 'depth', 'html')


def parse_args(argv):
    """The options of this program, and the words that are options of run_nerf.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('run', type=Path, help='folder of a run, or a checkpoint')
    add('--mesh', type=Path, metavar='FILE', help='triangle mesh: .ply, .obj or .glb')
    add('--points', type=Path, metavar='FILE', help='coloured points with normals: .ply')
    add('--depth', type=Path, metavar='FOLDER', help='depth maps of the training views, and their cameras')
    add('--html', type=Path, metavar='FILE', help='a page that shows the scene in any browser')
    add('--resolution', type=integer(8), default=256,
        help='mesh: cells along the longest side (default: 256)')
    add('--faces', type=integer(4), default=300_000, help='mesh: the most triangles (default: 300000)')
    add('--texture', type=integer(16), metavar='SIZE',
        help='mesh: a texture of SIZE × SIZE texels in place of colours of the vertices; .obj or .glb')
    add('--aabb', type=float, nargs=6, metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help='mesh, points: only what is in this box, in the coordinates of training')
    add('--num_points', type=integer(1), default=1_000_000, help='the most points (default: 1000000)')
    add('--depth_format', choices=SUFFIXES, default='png',
        help='png: 16 bits, the scale is in transforms.json; tiff: float32 (default: png)')
    add('--coordinates', choices=('input', 'scene'), default='input',
        help='those of the input, or of training (default: input)')
    add('--html_size', type=integer(1), metavar='MB', default=25,
        help='html: the most megabytes (default: 25)')
    args, options = parser.parse_known_args(argv)
    if not any(vars(args)[name] for name in OUTPUTS):
        parser.error(f'nothing to export, expected one of {", ".join(f"--{name}" for name in OUTPUTS)}')
    return args, options


def check_outputs(args):
    """Raise UserError, before anything is loaded, if an output cannot be written."""
    if args.aabb is not None and not np.less(args.aabb[:3], args.aabb[3:]).all():
        raise UserError(f'--aabb: found {args.aabb}, expected the lowest corner, then the highest')
    if args.mesh:
        check_mesh_path(args.mesh, args.texture)
        require_packages()
    if args.points and args.points.suffix.lower() != '.ply':
        raise UserError(f'--points: found {args.points}, expected a name that ends in .ply')
    for path in (args.mesh, args.points, args.html):
        if path:
            make_folder(path.parent)
            if path.is_dir():
                raise UserError(f'{path}: found a folder, expected the name of a file')
    if args.depth:
        make_folder(args.depth)


def export_mesh(field, coordinates, args):
    """Write the mesh, and say what it is."""
    surface = make_surface(field, args.resolution, args.faces, args.aabb, say)
    points = field.to_scene(surface.vertices)
    vertices, normals = coordinates.points(points), normals_of(points, surface.faces)
    if args.texture:
        origin, faces, uv = unwrap(points, surface.faces, args.texture)

        def color_of(face, barycentric):
            corners = origin[faces[face]]
            at, normal = ((barycentric[..., None] * part[corners]).sum(1)
                          for part in (surface.vertices, normals))
            return field.colors(at, normal / np.linalg.norm(normal, axis=-1, keepdims=True).clip(1e-12))
        write_textured_mesh(args.mesh, vertices[origin], faces, uv,
                            bake_texture(color_of, faces, uv, args.texture))
    else:
        write_mesh(args.mesh, vertices, surface.faces, field.colors(surface.vertices, normals))

    holes = find_holes(surface.faces, vertices)
    coordinates.write(args.mesh, watertight=not holes, holes=[
        {'center': center.tolist(), 'diameter': diameter} for center, diameter in holes])
    say(f'{args.mesh}: {len(surface.faces)} triangles, {describe_holes(holes)}')


def describe_holes(holes):
    """The result of `find_holes` in words."""
    if not holes:
        return 'watertight'
    center, diameter = holes[0]
    return (f'not watertight: it is open where too few training views look; holes: {len(holes)}, the largest '
            f'{diameter:.3g} wide around ({", ".join(f"{x:.3g}" for x in center)})')


def normals_of(vertices, faces):
    """Unit normals [V, 3] of the vertices of a mesh."""
    import trimesh
    return np.array(trimesh.Trimesh(vertices, faces, process=False).vertex_normals)


def export_points(field, coordinates, args):
    """Write the points."""
    points, normals, colors = collect_points(field, args.num_points, args.aabb)
    if not len(points):
        raise UserError(f'{args.run}: found no opaque pixels in the training views' + (
            ' that show anything in the box of --aabb' if args.aabb else ''))
    write_points(args.points, coordinates.points(points), coordinates.directions(normals), colors)
    coordinates.write(args.points)
    say(f'{args.points}: {len(points)} points')


def run(args, options):
    """Load the run and write the outputs. Raises UserError if one of them cannot be made."""
    check_outputs(args)
    trained = load_trained(args.run, options, say=say)
    field, keep = Field(trained), args.coordinates == 'scene'
    if trained.args.dataset_type == 'llff' and trained.scene.applied_transform is None and not keep:
        keep = True
        say('The coordinates of poses_bounds.npy are not known without it; those of the scene are written')
    coordinates = Coordinates(trained.scene, keep)
    if args.mesh:
        export_mesh(field, coordinates, args)
    if args.points:
        export_points(field, coordinates, args)
    if args.depth:
        count = write_depths(field, coordinates, args.depth, args.depth_format)
        say(f'{args.depth}: {count} depth maps and transforms.json')
    if args.html:
        from tools.exporting.page import write_page
        write_page(trained, args.html, args.html_size, say)


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 128 + n for signal n."""
    args, options = parse_args(argv)
    try:
        with StopRequest(say) as stop, stop.interruptible():
            run(args, options)
    except Stopped as stopped:
        return stopped.exit_code
    except (UserError, OSError) as error:
        problem = first_line(error)
        if isinstance(error, OSError) and error.filename:
            problem = f'{error.filename}: {error.strerror or problem}'
        print(f'export.py: error: {problem}', file=sys.stderr)
        return 2
    return 0


def say(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == '__main__':
    sys.exit(main())
