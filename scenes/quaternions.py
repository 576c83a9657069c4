"""Unit quaternions [..., 4] with components w, x, y, z, in NumPy. q and -q are the same rotation."""
import numpy as np


def quaternions_of(matrices):
    """The rotations closest to matrices [..., 3, 3], which need not be orthonormal, as quaternions."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = np.moveaxis(np.asarray(matrices, np.float64), (-2, -1), (0, 1))
    # q maximises q^T N q, the inner product of its matrix with the given one (Horn 1987)
    N = np.stack([xx + yy + zz, zy - yz, xz - zx, yx - xy,
                  zy - yz, xx - yy - zz, xy + yx, xz + zx,
                  xz - zx, xy + yx, yy - xx - zz, yz + zy,
                  yx - xy, xz + zx, yz + zy, zz - xx - yy], -1)
    return np.linalg.eigh(N.reshape(*N.shape[:-1], 4, 4))[1][..., -1]


def matrices_of(q):
    """The rotation matrices [..., 3, 3] of quaternions."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                     2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                     2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)
    return rows.reshape(*rows.shape[:-1], 3, 3)


def multiply(*factors):
    """The product of quaternions: the last one is the first rotation."""
    product, *others = factors
    for q in others:
        w, v, w_q, v_q = product[..., :1], product[..., 1:], q[..., :1], q[..., 1:]
        product = np.concatenate([w * w_q - (v * v_q).sum(-1, keepdims=True),
                                  w * v_q + w_q * v + np.cross(v, v_q)], -1)
    return product


def inverse(q):
    """The opposite rotations."""
    return q * [1, -1, -1, -1]


def exp(vectors):
    """Quaternions of the rotations around `vectors` [..., 3] by their lengths in radians."""
    half = 0.5 * np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.concatenate([np.cos(half), 0.5 * vectors * np.sinc(half / np.pi)], -1)


def log(q):
    """The inverse of `exp`: vectors [..., 3] of lengths up to pi."""
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    half = np.arctan2(sine, q[..., :1])
    return 2 * q[..., 1:] * np.divide(half, sine, out=np.ones_like(sine), where=sine > 0)
