"""Meshes and points as files: PLY, OBJ and GLB."""
import numpy as np

from scenes.errors import UserError
from scenes.files import atomic_write, write_text
from scenes.images import write_image

# Meshes are written to files with these endings.
MESH_SUFFIXES = ('.ply', '.obj', '.glb')


def check_mesh_path(path, texture):
    """Raise UserError if a mesh, or a mesh with a texture, cannot be written to `path`."""
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise UserError(f'--mesh: found {path}, expected a name that ends in {", ".join(MESH_SUFFIXES)}')
    if texture and path.suffix.lower() == '.ply':
        raise UserError(f'--texture: found {path}, but a PLY file has no texture; expected .obj or .glb')


def write_mesh(path, vertices, faces, colors):
    """Write a mesh with the colours [V, 3] of its vertices, in [0, 1]."""
    import trimesh
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    if path.suffix.lower() == '.glb':
        # in glTF these colours are linear, for which 8 bits are too few
        rgba = np.concatenate([to_linear(colors), np.ones_like(colors[:, :1])], -1)
        mesh.vertex_attributes['_COLOR'] = np.round(65535 * rgba).astype(np.uint16)
        write_glb(path, mesh)
    else:
        mesh.visual.vertex_colors = np.round(255 * colors).astype(np.uint8)
        with atomic_write(path) as partial:
            mesh.export(partial, file_type=path.suffix.lower()[1:])


def write_textured_mesh(path, vertices, faces, uv, texture):
    """Write a mesh with texture coordinates [V, 2] and a texture, uint8 [H, W, 3]. An OBJ file gets
    `<name>.mtl` and `<name>_texture.png` beside it."""
    import trimesh
    from PIL import Image
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(texture))
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    mesh = trimesh.Trimesh(vertices, faces, visual=visual, process=False)
    if path.suffix.lower() == '.glb':
        write_glb(path, mesh)
        return
    image, library = path.with_name(f'{path.stem}_texture.png'), path.with_suffix('.mtl')
    write_image(image, texture)
    write_text(library, f'newmtl surface\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nmap_Kd {image.name}\n')
    lines = [f'mtllib {library.name}', 'usemtl surface']
    lines += [f'v {x:.8g} {y:.8g} {z:.8g}' for x, y, z in vertices]
    lines += [f'vt {u:.8g} {v:.8g}' for u, v in uv]
    lines += [f'f {a}/{a} {b}/{b} {c}/{c}' for a, b, c in faces + 1]
    write_text(path, '\n'.join(lines) + '\n')


def write_glb(path, mesh):
    """Write a mesh as GLB whose colours are shown as they are, because they include the light of the
    scene."""
    from trimesh.exchange.gltf import export_glb

    def finish(tree):
        tree['materials'] = tree.get('materials') or [{}]
        for material in tree['materials']:
            material['doubleSided'] = True
            material['extensions'] = {'KHR_materials_unlit': {}}
            material.setdefault('pbrMetallicRoughness', {})['metallicFactor'] = 0
        tree['extensionsUsed'] = ['KHR_materials_unlit']
        for primitive in tree['meshes'][0]['primitives']:
            primitive['material'] = 0
            attributes = primitive['attributes']
            if '_COLOR' in attributes:
                attributes['COLOR_0'] = attributes.pop('_COLOR')
                tree['accessors'][attributes['COLOR_0']]['normalized'] = True
    with atomic_write(path) as partial:
        partial.write_bytes(export_glb(mesh.scene(), tree_postprocessor=finish))


def to_linear(colors):
    """Colours of sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def write_points(path, points, normals, colors):
    """Write points [N, 3] with unit normals [N, 3] and colours in [0, 1], [N, 3], as a binary PLY file."""
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(points)}',
              *(f'property float {name}' for name in ('x', 'y', 'z', 'nx', 'ny', 'nz')),
              *(f'property uchar {name}' for name in ('red', 'green', 'blue')), 'end_header\n']
    vertices = np.empty(len(points), [('xyz', '<f4', 3), ('normal', '<f4', 3), ('rgb', 'u1', 3)])
    vertices['xyz'], vertices['normal'], vertices['rgb'] = points, normals, np.round(255 * colors)
    with atomic_write(path) as partial:
        partial.write_bytes('\n'.join(header).encode() + vertices.tobytes())
