"""Changes to COLMAP's database of features and matches that pycolmap does not offer."""
import sqlite3
from contextlib import closing

from scenes.errors import UserError, first_line

# COLMAP numbers a pair of images by this times the smaller number, plus the larger one.
MAX_IMAGES = 2 ** 31 - 1
IN_PAIR = f':id IN (pair_id / {MAX_IMAGES}, pair_id % {MAX_IMAGES})'
# For each table the rows that belong to the image with the number :id.
ROWS_OF_AN_IMAGE = {
    'frames': 'frame_id IN (SELECT frame_id FROM frame_data WHERE data_id = :id)',
    'frame_data': 'data_id = :id', 'pose_priors': 'corr_data_id = :id', 'keypoints': 'image_id = :id',
    'descriptors': 'image_id = :id', 'matches': IN_PAIR, 'two_view_geometries': IN_PAIR,
    'images': 'image_id = :id'}


def forget_photos(database, is_outdated):
    """Delete photos from a database, with their features and matches. Their numbers are not used again.

    Args:
      database: path; the file may be missing.
      is_outdated: function of a photo's name: whether to delete it.
    Returns:
      the number of photos deleted.
    Raises:
      UserError: the file is not a database of COLMAP, or another process is writing to it.
    """
    if not database.is_file():
        return 0
    try:
        with closing(sqlite3.connect(database)) as connection, connection:
            images = connection.execute('SELECT image_id, name FROM images').fetchall()
            outdated = [{'id': key} for key, name in images if is_outdated(name)]
            for table, condition in ROWS_OF_AN_IMAGE.items():
                connection.executemany(f'DELETE FROM {table} WHERE {condition}', outdated)
    except sqlite3.DatabaseError as error:
        advice = 'another run may be using it' if 'locked' in str(error) else 'delete it'
        problem = f'not a usable database of COLMAP ({first_line(error)})'
        raise UserError(f'{database}: {problem}; {advice}') from None
    return len(outdated)
