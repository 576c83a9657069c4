"""Stand-in: writes report.json and an empty page."""
import json
from pathlib import Path

from scenes.files import write_text


def write_report(report, folder):
    write_text(Path(folder) / 'report.json', json.dumps(report))
    write_text(Path(folder) / 'report.html', '<html></html>')
