"""Sparse points of a scene from PLY files."""
import re

import numpy as np

from scenes.errors import UserError, first_line

# The types of a PLY file as those of NumPy, without the byte order.
TYPES = {'char': 'i1', 'uchar': 'u1', 'short': 'i2', 'ushort': 'u2', 'int': 'i4', 'uint': 'u4', 'float': 'f4',
         'double': 'f8', 'int8': 'i1', 'uint8': 'u1', 'int16': 'i2', 'uint16': 'u2', 'int32': 'i4',
         'uint32': 'u4', 'float32': 'f4', 'float64': 'f8'}
# The formats of a PLY file, and their byte order.
FORMATS = {'ascii': None, 'binary_little_endian': '<', 'binary_big_endian': '>'}


def read_ply(path):
    """The positions of the vertices of a PLY file, float32 [M, 3], whose first element must be `vertex`.

    Raises:
      UserError: it cannot be read as such.
    """
    try:
        content = path.read_bytes()
        header, _, body = content.partition(b'end_header\n')
        header = header.decode('ascii')
        order = FORMATS[re.search(r'^format (\w+)', header, re.M)[1]]
        elements = re.split(r'^element ', header, flags=re.M)
        name, count = elements[1].split()[:2]
        if not header.startswith('ply') or name != 'vertex':
            raise ValueError('its first element is not vertex')
        properties = re.findall(r'^property (\w+) (\w+)$', elements[1], re.M)
        if order is None:
            rows = np.array([line.split() for line in body.splitlines()[:int(count)]], np.float64)
            columns = [name for _, name in properties]
            points = rows.reshape(int(count), -1)[:, [columns.index(axis) for axis in 'xyz']]
        else:
            dtype = np.dtype([(name, order + TYPES[kind]) for kind, name in properties])
            vertices = np.frombuffer(body, dtype, int(count))
            points = np.stack([vertices[axis] for axis in 'xyz'], -1)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'{path}: not a readable PLY file of points ({first_line(error)})') from None
    return points.astype(np.float32)
