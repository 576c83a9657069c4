"""Results of table.py as Markdown and LaTeX, and docs/results.md from those in benchmarks/results/.

    cp logs/table_blender_lego_fast/results.json benchmarks/results/blender_lego_fast.json
    python benchmarks/results_page.py
"""
import json
from pathlib import Path

from published import PUBLISHED

# The repository.
ROOT = Path(__file__).resolve().parent.parent
# Metrics of test views: the title of their table, and the number of decimals.
METRICS = {'psnr': ('PSNR in dB', 2), 'ssim': ('SSIM', 3), 'lpips': ('LPIPS', 3)}
# The top of docs/results.md.
HEAD = '''# Results

The scenes of the NeRF paper, trained and evaluated by `benchmarks/table.py`, beside published figures
([sources](../benchmarks/published.py)). Figures compare only where images, test views and background agree;
the protocols say where they differ. `python benchmarks/results_page.py` writes this page from the files in
[benchmarks/results](../benchmarks/results), which also have the metrics of each view, and the hashes of data
and networks.
'''
# LaTeX writes these characters in other ways.
LATEX = {'&': r'\&', '%': r'\%', '_': r'\_', '#': r'\#', '×': r'$\times$', '–': '--', '…': r'\dots'}


def mean_of_scenes(scenes):
    """The mean of each metric over the scenes; None unless it is measured for all of them."""
    columns = {key: [scene.get('mean', {}).get(key) for scene in scenes.values()] for key in METRICS}
    return {key: None if None in column else sum(column) / len(column) for key, column in columns.items()}


def cell(value, decimals):
    return '–' if value is None else f'{value:.{decimals}f}'


def tables(content):
    """Yield the title and the rows of each table: a table for each metric that was measured, training time,
    and protocols. The first row is the heading.

    Args:
      content: of results.json.
    """
    result, machines = content['result'], content['measured']['scenes']
    scenes, methods, own = result['scenes'], PUBLISHED.get(result['table'], ()), f'{result["preset"]} (ours)'

    def rows_of(values, decimals):
        columns = [*scenes, 'mean']
        return [['', *columns], *([name, *(cell(row.get(column), decimals) for column in columns)]
                                  for name, row in values.items())]

    for key, (title, decimals) in METRICS.items():
        measured = {name: scene['mean'][key] for name, scene in scenes.items() if 'mean' in scene}
        if any(value is not None for value in measured.values()):
            values = {method.name: method.metrics[key] for method in methods if key in method.metrics}
            yield title, rows_of({**values, own: {**measured, 'mean': result['mean'][key]}}, decimals)
    yield 'Training, seconds', rows_of({own: {name: machine['training_seconds']
                                              for name, machine in machines.items()}}, 0)

    def text(values):
        return ', '.join(dict.fromkeys(map(str, values))) or '–'
    done = [scenes[name] for name in machines]
    yield 'Protocols', [
        ['', 'images', 'test views', 'background', 'hardware, training time'],
        *([method.name, *method.protocol] for method in methods),
        [own, text(f'{scene["width"]}×{scene["height"]}' for scene in done),
         text(scene['views'] for scene in done), text(scene['background'] for scene in done),
         text(machine['hardware'] for machine in machines.values())]]


def notes(content):
    """Lines about the commits, and the scenes that were not measured and why; and `note`, which a person may
    have added to the file."""
    commits = dict.fromkeys(str(machine['commit']) for machine in content['measured']['scenes'].values())
    scenes = content['result']['scenes'].items()
    missing = [f'{name} ({scene["problem"]})' for name, scene in scenes if 'problem' in scene]
    return [*([f'Commit: {", ".join(commits)}.'] if commits else []),
            *([f'Not measured: {", ".join(missing)}.'] if missing else []),
            *([content['note']] if 'note' in content else [])]


def markdown(content):
    """The content of results.json as Markdown."""
    parts = [f'## {content["result"]["table"]}, {content["result"]["preset"]}',
             f'`python {" ".join(content["measured"]["command"])}`', *notes(content)]
    for title, (heading, *rows) in tables(content):
        parts += [f'**{title}**', '\n'.join(f'| {" | ".join(row)} |'
                                            for row in [heading, ['---'] * len(heading), *rows])]
    return '\n\n'.join(parts) + '\n'


def latex(content):
    """The content of results.json as LaTeX, for the package booktabs."""
    lines = [f'% {line}' for line in notes(content)]
    for title, rows in tables(content):
        heading, *rows = [' & '.join(''.join(LATEX.get(letter, letter) for letter in text) for text in row)
                          + r' \\' for row in rows]
        columns = 'l' + ('l' if title == 'Protocols' else 'r') * heading.count('&')
        lines += [f'% {title}', rf'\begin{{tabular}}{{{columns}}}', r'\toprule', heading, r'\midrule', *rows,
                  r'\bottomrule', r'\end{tabular}']
    return '\n'.join(lines) + '\n'


def page(folder):
    """The text of docs/results.md, from the JSON files in a folder."""
    return '\n'.join([HEAD, *(markdown(json.loads(path.read_text(encoding='utf-8')))
                              for path in sorted(folder.glob('*.json')))])


if __name__ == '__main__':
    (ROOT / 'docs/results.md').write_text(page(ROOT / 'benchmarks/results'), encoding='utf-8')
