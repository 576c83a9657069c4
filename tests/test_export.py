"""tools/export.py: meshes, points and depth maps of a scene whose geometry is known, and of real runs."""
import json
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny_exports import CENTER, RADIUS, SIZE, Ball, cameras_around, cameras_at, trained_ball
from tiny_runs import NO_OUTPUTS, ROOT, run, run_python

from accel.grid_renderer import GridRenderer
from accel.occupancy import OccupancyGrid
from load_blender import load_blender_data, read_frames
from scenes.cameras import Camera, homogeneous
from scenes.points import read_ply
from tools import export
from tools.exporting import mesh as meshes
from tools.exporting.coordinates import Coordinates
from tools.exporting.depth import write_depths
from tools.exporting.field import Field
from tools.exporting.files import write_mesh, write_points, write_textured_mesh
from tools.exporting.points import collect_points
from tools.exporting.texture import bake_texture, texels_of, unwrap
from tools.make_demo_scene import hemisphere, march, scene_distance

trimesh = pytest.importorskip('trimesh')
for package in ('skimage', 'fast_simplification', 'xatlas'):
    pytest.importorskip(package)

# A transform from the input to the scene: turned, three times as large, moved.
PLACEMENT = np.array([[0, -3, 0, 1], [3, 0, 0, 2], [0, 0, 3, -1], [0, 0, 0, 1.0]])
BOX = [-1.0, -1, -1, 1, 1, 1]
RESOLUTION = 64
CELL = 2 / RESOLUTION


def silent(message):
    pass


@pytest.fixture(scope='module')
def ball():
    return Field(trained_ball())


@pytest.fixture(scope='module')
def surface(ball):
    """The surface of the ball, not decimated."""
    return meshes.make_surface(ball, RESOLUTION, 10 ** 6, BOX, silent)


def radii(points):
    return np.linalg.norm(points - CENTER, axis=-1)


# --- meshes -------------------------------------------------------------------------------------------------

def test_the_mesh_of_a_ball_is_the_ball(surface):
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1
    assert abs(radii(surface.vertices) - RADIUS).max() < CELL
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * RADIUS ** 3, rel=0.1)  # positive: faces look outwards
    outwards = (surface.vertices - CENTER) / radii(surface.vertices)[:, None]
    assert (export.normals_of(*surface) * outwards).sum(-1).min() > 0.9
    assert meshes.find_holes(surface.faces, surface.vertices) == []


def test_decimation_keeps_the_shape(ball):
    few = meshes.make_surface(ball, RESOLUTION, 1000, BOX, silent)
    assert 500 < len(few.faces) <= 1000
    assert trimesh.Trimesh(*few, process=False).is_watertight
    assert abs(radii(few.vertices) - RADIUS).max() < CELL


def test_blocks_leave_no_seams(ball, monkeypatch):
    box = torch.tensor(BOX).view(2, 3)
    whole = meshes.marching_cubes(ball.density, box, CELL, 20.0)
    monkeypatch.setattr(meshes, 'BLOCK', 13)
    blocks = meshes.marching_cubes(ball.density, box, CELL, 20.0)
    assert len(blocks.vertices) == len(whole.vertices) and len(blocks.faces) == len(whole.faces)
    assert trimesh.Trimesh(*blocks, process=False).is_watertight


def test_a_surface_is_closed_where_the_box_cuts_it(ball):
    box = torch.tensor([-1.0, -1, -1, CENTER[0], 1, 1]).view(2, 3)
    half = meshes.marching_cubes(ball.density, box, CELL, 20.0)
    mesh = trimesh.Trimesh(*half, process=False)
    assert mesh.is_watertight and mesh.vertices[:, 0].max() < CENTER[0] + 2 * CELL
    assert mesh.volume == pytest.approx(2 / 3 * np.pi * RADIUS ** 3, rel=0.2)


def test_what_no_view_sees_is_removed(ball):
    hollow = Field(trained_ball(network=Ball(hollow=0.3)))
    both = meshes.marching_cubes(hollow.density, torch.tensor(BOX).view(2, 3), CELL, 20.0)
    assert radii(both.vertices).min() < 0.35
    outer = meshes.make_surface(hollow, RESOLUTION, 10 ** 6, BOX, silent)
    assert radii(outer.vertices).min() > RADIUS - CELL


def test_it_is_open_where_no_view_looks():
    field = Field(trained_ball(cameras_at(np.array([[0.5, 0, 2.5], [-0.5, 0.1, 2.5], [0, 0.5, 2.5]]))))
    surface = meshes.make_surface(field, RESOLUTION, 10 ** 6, BOX, silent)
    (center, diameter), *others = meshes.find_holes(surface.faces, surface.vertices)
    assert not others
    height = surface.vertices[:, 2] - CENTER[2]
    assert height.min() > -0.2 and height.max() > RADIUS
    assert center[:2] == pytest.approx(CENTER[:2], abs=0.1) and diameter > 1.5 * RADIUS
    assert 'not watertight' in export.describe_holes([(center, diameter)])


def test_slanted_surfaces_are_seen(ball, surface):
    """Not only where a vertex is in front of the nearest rendered pixel."""
    view = ball.view(4)
    towards = view.c2w[:, 3] - surface.vertices
    outwards = surface.vertices - CENTER
    cosine = (towards * outwards).sum(-1) / np.linalg.norm(towards, axis=-1) / radii(surface.vertices)
    seen = meshes.sees(view, surface.vertices, ball.pixel_centers)
    assert seen[cosine > 0.5].mean() > 0.95 and not seen[cosine < -0.5].any()


def test_interpolation_is_exact_for_planes():
    image = np.add.outer(3.0 * np.arange(5), 2.0 * np.arange(4))
    at = np.array([[0, 4, 1.25, 3.5], [0, 3, 2.5, 0.75]])
    assert meshes.interpolate(image, at) == pytest.approx(3 * at[0] + 2 * at[1])
    image[2, 2] = np.inf
    assert np.isinf(meshes.interpolate(image, at)).tolist() == [False, False, True, False]


def test_small_components_are_removed():
    parts = [trimesh.creation.icosphere(5), trimesh.creation.icosphere(1, 0.1).apply_translation([3, 0, 0]),
             trimesh.creation.icosphere(0, 0.1).apply_translation([0, 3, 0])]  # 20480, 80 and 20 triangles
    joined = trimesh.util.concatenate(parts)
    kept = meshes.largest_components(meshes.Surface(joined.vertices, joined.faces))
    assert len(kept.faces) == 20480 + 80 and kept.vertices[:, 1].max() < 2


def test_a_soft_scene_has_a_surface():
    network = Ball()
    with torch.no_grad():
        network.scale.fill_(0.05)  # 20 at most, of which a cell is far from half opaque
    surface = meshes.make_surface(Field(trained_ball(network=network)), 128, 10 ** 6, BOX, silent)
    assert np.log(2) / (2 / 128) > 20
    assert abs(radii(surface.vertices) - RADIUS).mean() < 0.02


def test_the_occupancy_grid_bounds_the_density():
    grid = OccupancyGrid(8)
    grid.set_aabb([[-1.0, -1, -1], [1, 1, 1]])
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[:, :, 4:] = True  # z > 0
    grid.set_occupied(occupied)
    field = Field(trained_ball(renderer=GridRenderer(grid)))
    points = torch.from_numpy(CENTER + np.array([[0, 0, 0], [0, 0, -0.3], [0, 0, 3]])).float()
    assert (field.density(points) > 0).tolist() == [True, False, False]
    surface = meshes.make_surface(field, RESOLUTION, 10 ** 6, None, silent)  # which finds the box
    assert surface.vertices[:, 2].min() > -CELL
    assert surface.vertices.max(0) == pytest.approx(CENTER + RADIUS, abs=CELL)


def test_ndc_is_undone():
    poses = np.tile(np.eye(4, dtype=np.float32)[:3], (4, 1, 1))
    poses[:, :, 3] = [[0, 0, 3], [0.3, 0, 3], [0, 0.3, 3], [-0.3, 0, 3]]
    shifted = Ball()
    field = Field(trained_ball(poses, shifted, ndc=True, bounds=(0.0, 1.0)))
    # normalised device coordinates have their origin at 0, where there must be a camera, not the ball
    to_ball = np.array([0, 0, 3.0])
    shifted.to_scene = lambda points: field.to_scene(points) + to_ball
    field.scene.poses[:, :, 3] -= to_ball.astype(np.float32)
    points = np.random.default_rng(0).uniform([-1, -1, -0.9], [1, 1, 0.9], (100, 3))
    assert field.from_scene(field.to_scene(points)) == pytest.approx(points)

    with torch.no_grad():
        shifted.scale.fill_(3)  # a length of the scene is shorter in NDC
    surface = meshes.make_surface(field, 128, 10 ** 6, None, silent)
    vertices = field.to_scene(surface.vertices) + to_ball
    assert abs(radii(vertices) - RADIUS).mean() < 0.02
    outwards = (vertices - CENTER) / radii(vertices)[:, None]
    assert np.median((export.normals_of(vertices, surface.faces) * outwards).sum(-1)) > 0.9
    assert vertices[:, 2].max() > CENTER[2] + 0.9 * RADIUS  # the front, which the cameras see


def test_colors_are_those_of_the_network(ball, surface):
    colors = ball.colors(surface.vertices, export.normals_of(*surface))
    assert colors == pytest.approx(0.5 + 0.5 * surface.vertices, abs=1e-4)


# --- the frame of the input ---------------------------------------------------------------------------------

def test_the_frame_of_the_input_is_restored():
    scene = trained_ball(applied_transform=PLACEMENT).scene
    coordinates, random = Coordinates(scene), np.random.default_rng(0)
    points = random.normal(size=(5, 3))
    in_scene = points @ PLACEMENT[:3, :3].T + PLACEMENT[:3, 3]
    assert coordinates.points(in_scene) == pytest.approx(points)
    assert coordinates.scale == pytest.approx(1 / 3)
    direction = np.array([[0, 0, 1.0], [1, 0, 0]])
    assert coordinates.directions(direction @ PLACEMENT[:3, :3].T / 3) == pytest.approx(direction)
    poses = scene.poses[:2]
    moved = PLACEMENT @ homogeneous(poses)
    moved[:, :3, :3] /= 3
    assert coordinates.poses(moved[:, :3]) == pytest.approx(homogeneous(poses), abs=1e-6)
    assert Coordinates(scene, keep=True).points(points) == pytest.approx(points)


@pytest.mark.parametrize('suffix, texture', [('.ply', None), ('.obj', None), ('.glb', None), ('.obj', 256),
                                             ('.glb', 256)])
def test_a_file_has_shape_place_and_colours(suffix, texture, tmp_path):
    field = Field(trained_ball(applied_transform=PLACEMENT))
    args, _ = export.parse_args(['run', '--mesh', str(tmp_path / f'ball{suffix}'), '--faces', '2000',
                                 '--resolution', str(RESOLUTION), '--aabb', *map(str, BOX),
                                 *(['--texture', str(texture)] if texture else [])])
    export.export_mesh(field, Coordinates(field.scene), args)
    mesh = trimesh.load(args.mesh, process=False)
    mesh = mesh if isinstance(mesh, trimesh.Trimesh) else next(iter(mesh.geometry.values()))
    about = json.loads((tmp_path / f'ball{suffix}.json').read_text())
    assert about['watertight'] and about['holes'] == [] and about['coordinates'] == 'input'
    vertices = trimesh.transform_points(mesh.vertices, about['to_scene'])
    assert abs(radii(vertices) - RADIUS).max() < CELL
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx(2 * RADIUS / 3, rel=0.05)
    assert abs(colors_of(mesh) - (0.5 + 0.5 * vertices)).max() < (0.05 if texture else 0.01)


def colors_of(mesh):
    """The colours of the vertices of a loaded mesh, in [0, 1]."""
    if mesh.visual.kind != 'texture':
        return mesh.visual.vertex_colors[:, :3] / 255
    if 'color' in mesh.visual.vertex_attributes:  # GLB, linear
        linear = mesh.visual.vertex_attributes['color'][:, :3] / 65535
        return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    material = mesh.visual.material
    texture = np.asarray(material.image if hasattr(material, 'image') else material.baseColorTexture)[..., :3]
    column, row = (mesh.visual.uv * [1, -1] + [0, 1]).T * len(texture)
    column, row = (np.clip(part.astype(int), 0, len(texture) - 1) for part in (column, row))
    return texture[row, column] / 255


def test_glb_is_shown_as_it_is(tmp_path):
    """Viewers add no light, and colours of vertices are linear with 16 bits, as glTF has them."""
    write_mesh(tmp_path / 'a.glb', np.eye(3), np.array([[0, 1, 2]]), np.full((3, 3), 0.5))
    content = (tmp_path / 'a.glb').read_bytes()
    tree = json.loads(content[20:20 + int.from_bytes(content[12:16], 'little')])
    assert 'KHR_materials_unlit' in tree['materials'][0]['extensions'] and tree['extensionsUsed']
    primitive = tree['meshes'][0]['primitives'][0]
    color = tree['accessors'][primitive['attributes']['COLOR_0']]
    assert primitive['material'] == 0 and color['normalized'] and color['componentType'] == 5123
    assert color['max'][0] == pytest.approx(65535 * 0.2140, rel=1e-3)


def test_texels_are_those_whose_centres_are_inside():
    random = np.random.default_rng(0)
    corners = random.uniform(-3, 23, (20, 3, 2))
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(16) + 0.5)
    found = np.zeros((20, 16, 20), bool)
    for face, row, column, weights in texels_of(corners, 16, 20):
        found[face, row, column] = True
        assert (weights[..., None] * corners[face]).sum(1) == pytest.approx(np.stack([column, row], -1) + 0.5)
    for triangle, texels in zip(corners, found):
        sides = [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
                 for a, b in zip(triangle, np.roll(triangle, -1, 0))]
        assert np.array_equal(texels, np.all(np.array(sides) >= 0, 0) | np.all(np.array(sides) <= 0, 0))


def test_a_texture_has_no_gaps_beside_its_charts():
    box = trimesh.creation.box()
    origin, faces, uv = unwrap(box.vertices, box.faces, 64)
    assert np.array_equal(box.vertices[origin][faces], box.vertices[box.faces])
    texture = bake_texture(lambda face, _: np.full((len(face), 3), 1.0), faces, uv, 64)
    column, row = np.clip((uv * [64, -64] + [0, 64]).astype(int), 0, 63).T
    assert (texture[row, column] == 255).all() and (texture == 255).mean() > 0.3


# --- points -------------------------------------------------------------------------------------------------

def test_points_lie_on_the_ball(ball, tmp_path):
    points, normals, colors = collect_points(ball, 2000)
    assert 1000 < len(points) <= 2000
    outwards = (points - CENTER) / radii(points)[:, None]
    assert abs(radii(points) - RADIUS).mean() < 0.02 and abs(radii(points) - RADIUS).max() < 0.08
    assert (normals * outwards).sum(-1).mean() > 0.97
    assert abs(colors - (0.5 + 0.5 * points)).mean() < 0.02
    write_points(tmp_path / 'a.ply', points, normals, colors)
    loaded = trimesh.load(tmp_path / 'a.ply')
    assert loaded.vertices == pytest.approx(points, abs=1e-6)
    assert abs(loaded.colors[:, :3] / 255 - colors).max() < 0.01
    assert read_ply(tmp_path / 'a.ply') == pytest.approx(points, abs=1e-6)
    assert b'property float nx' in (tmp_path / 'a.ply').read_bytes()[:400]


def test_points_are_bounded_by_the_box(ball):
    points, *_ = collect_points(ball, 2000, aabb=[-1, -1, 0, 1, 1, 1])
    assert len(points) and points[:, 2].min() >= 0


# --- depth maps ---------------------------------------------------------------------------------------------

def depth_of_ball(camera, pose):
    """The depth along the optical axis at which the rays of a pinhole camera meet the ball [H, W]; NaN where
    they do not."""
    rays_d = camera.pixel_directions(True).astype(np.float64) @ pose[:3, :3].T
    offset = pose[:3, 3] - CENTER
    a, b, c = (rays_d ** 2).sum(-1), rays_d @ offset, (offset ** 2).sum() - RADIUS ** 2
    with np.errstate(invalid='ignore'):
        return ((-b - np.sqrt(b ** 2 - a * c)) / a).reshape(camera.H, camera.W)


@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_depth_maps_are_depths(kind, tmp_path):
    trained = trained_ball(applied_transform=PLACEMENT, names=[f'images/{i}.png' for i in range(12)])
    field, coordinates = Field(trained), Coordinates(trained.scene)
    assert write_depths(field, coordinates, tmp_path / 'depth', kind) == 12
    meta = json.loads((tmp_path / 'depth/transforms.json').read_text())
    frame = meta['frames'][5]
    stored = iio.imread(tmp_path / 'depth' / frame['depth_file_path'])
    assert stored.dtype == {'png': np.uint16, 'tiff': np.float32}[kind]
    depth = stored * meta.get('integer_depth_scale', 1.0)
    expected = depth_of_ball(trained.scene.cameras[5], trained.scene.poses[5]) / 3
    both = (depth > 0) & np.isfinite(expected)
    assert ((depth > 0) == np.isfinite(expected)).mean() > 0.98
    assert abs(depth - expected)[both].mean() < 0.01
    assert np.array(frame['transform_matrix']) == pytest.approx(coordinates.poses(trained.scene.poses)[5])
    assert frame['file_path'].endswith('data/images/5.png')


@pytest.mark.parametrize('distortion, fisheye', [(None, False), ((0.05, 0.01, 0, 0, 0.002, -0.001), False),
                                                 ((0.02, 0.001, 0, 0, 0, 0), True)])
def test_cameras_of_depth_maps_can_be_loaded(distortion, fisheye, tmp_path):
    K = np.array([[SIZE, 0, 31.0], [0, 60, 33.5], [0, 0, 1]])
    camera = Camera(SIZE, SIZE, K, distortion, fisheye)
    trained = trained_ball(cameras_around()[:2], cameras=[camera] * 2)
    write_depths(Field(trained), Coordinates(trained.scene), tmp_path, 'png')
    meta = json.loads((tmp_path / 'transforms.json').read_text())
    for frame in meta['frames']:
        frame['file_path'] = frame['depth_file_path']  # as if these were the photos
        iio.imwrite(tmp_path / frame['file_path'], np.zeros((SIZE, SIZE, 3), np.uint8))
    (tmp_path / 'transforms.json').write_text(json.dumps(meta))
    frames = read_frames(tmp_path)
    assert frames.poses == pytest.approx(homogeneous(trained.scene.poses), abs=1e-6)
    assert load_blender_data(tmp_path)[3] == [SIZE, SIZE, SIZE]
    keys = frames.cameras[0]
    assert [keys['cx'], keys['cy'], keys['fl_y']] == [31, 33.5, 60]
    assert [keys.get(key, 0) for key in ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')] == list(distortion or [0] * 6)
    assert (keys.get('camera_model') == 'OPENCV_FISHEYE') == fisheye


# --- the program --------------------------------------------------------------------------------------------

def test_a_run_is_exported(fast_demo_run, few_views, tmp_path):
    out = [f'--mesh={tmp_path}/a/demo.glb', f'--points={tmp_path}/demo.ply', f'--depth={tmp_path}/depth',
           '--resolution', 64, '--faces', 20000, '--num_points', 5000]
    done = run_python('tools/export.py', fast_demo_run, *out, '--datadir', few_views)
    assert done.returncode == 0, done.stderr
    mesh = trimesh.load(tmp_path / 'a/demo.glb', force='mesh')
    assert 5000 < len(mesh.faces) <= 20000
    assert np.quantile(mesh.vertices, [0.05, 0.95], axis=0) == pytest.approx(
        np.array([[-1.1, -1.1, -0.6], [1.1, 1.1, 0.8]]), abs=0.3)
    assert len(trimesh.load(tmp_path / 'demo.ply').vertices) > 3000
    assert len(list((tmp_path / 'depth').glob('*.png'))) == 8
    assert 'watertight' in done.stderr and not list(tmp_path.rglob('.*'))


@pytest.mark.slow
def test_the_mesh_of_the_demo_is_accurate(tmp_path):
    """The mean distance to the true surface, and from there as far as cameras see it, is at most 0.5% of the
    extent."""
    from scipy.spatial import cKDTree
    assert run('--config', ROOT / 'configs/demo_fast.txt', '--basedir', tmp_path, *NO_OUTPUTS) == 0
    assert export.main([str(tmp_path / 'demo_fast'), '--mesh', str(tmp_path / 'demo.ply')]) == 0
    mesh, visible = trimesh.load(tmp_path / 'demo.ply'), []
    for c2w in hemisphere(12, 0.71):
        rays = Camera(96, 96, np.array([[133.0, 0, 48], [0, 133, 48], [0, 0, 1]])).pixel_directions(True)
        rays_d = rays @ c2w[:3, :3].T / np.linalg.norm(rays, axis=-1, keepdims=True)
        hit, t = march(np.broadcast_to(c2w[:3, 3], rays_d.shape), rays_d, 2.3, 5.7)
        visible.append((c2w[:3, 3] + t[:, None] * rays_d)[hit])
    visible = np.concatenate(visible)
    extent = np.ptp(visible, axis=0).max()
    samples, _ = trimesh.sample.sample_surface(mesh, 1_000_000, seed=0)
    to_true = abs(scene_distance(samples[::20])).mean() / extent
    to_mesh = cKDTree(samples).query(visible)[0].mean() / extent
    print(f'mesh to true {to_true:.4f}, true to mesh {to_mesh:.4f}')
    assert to_true < 0.005 and to_mesh < 0.005


def test_each_output_can_be_made_alone(fast_demo_run, tmp_path):
    """Points need none of the packages of meshes."""
    code = ('import sys; sys.modules.update(dict.fromkeys(["trimesh", "skimage", "xatlas"])); '
            'from tools.export import main; sys.exit(main(sys.argv[1:]))')
    command = [sys.executable, '-c', code, fast_demo_run, '--num_points', '500']
    done = [subprocess.run([*command, *output], cwd=ROOT, capture_output=True, text=True)
            for output in (('--points', tmp_path / 'a.ply'), ('--mesh', tmp_path / 'a.glb'))]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 2 and 'pip install -r requirements-tools.txt' in done[1].stderr
    assert not (tmp_path / 'a.glb').exists()


@pytest.mark.parametrize('options, expected', [
    (['--mesh', 'a.stl'], 'expected a name that ends in .ply, .obj, .glb'),
    (['--mesh', 'a.ply', '--texture', '64'], 'a PLY file has no texture'),
    (['--points', 'a.obj'], 'expected a name that ends in .ply'),
    (['--mesh', 'folder.glb'], 'found a folder'),
    (['--points', 'file/a.ply'], 'cannot create this folder'),
    (['--mesh', 'a.ply', '--aabb', *'000110'], 'expected the lowest corner, then the highest'),
    (['--mesh', 'a.ply'], 'nowhere: found nothing, expected the folder of a run or a checkpoint')])
def test_bad_input_is_one_line(options, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder.glb').mkdir()
    (tmp_path / 'file').touch()
    before = sorted(tmp_path.rglob('*'))
    assert export.main(['nowhere', *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith('export.py: error: ') and error.count('\n') == 1
    assert sorted(tmp_path.rglob('*')) == before


def test_something_must_be_exported(capsys):
    with pytest.raises(SystemExit) as exit:
        export.main(['run'])
    assert exit.value.code == 2 and 'nothing to export' in capsys.readouterr().err


def test_an_empty_box_is_an_error(fast_demo_run, tmp_path, capsys):
    options = ['--aabb', '50', '50', '50', '51', '51', '51', '--resolution', '8']
    for output in ('--mesh', '--points'):
        assert export.main([str(fast_demo_run), output, str(tmp_path / 'a.ply'), *options]) == 2
        assert '--aabb' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(trimesh.Trimesh, 'export', fail)
    with pytest.raises(OSError, match='No space'):
        write_mesh(tmp_path / 'a.ply', np.eye(3), np.array([[0, 1, 2]]), np.zeros((3, 3)))
    with pytest.raises(OSError, match='No space'):
        monkeypatch.setattr('trimesh.exchange.gltf.export_glb', fail)
        write_textured_mesh(tmp_path / 'a.glb', np.eye(3), np.array([[0, 1, 2]]), np.eye(3)[:, :2],
                            np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())
