"""The report of many runs, as text and files."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lad_dist.config.errors import UserError
from lad_dist.report import pareto, plots
from lad_dist.report.comparison import Comparison, compare
from lad_dist.report.csv_table import run_table
from lad_dist.report.markdown import markdown
from lad_dist.report.results import collect
from lad_dist.utils.atomic_io import write_text


def build_report(folders: Sequence[str | Path], baseline: str | None = None, out: str | Path | None = None) -> str:
    """Return the comparison of all complete task runs below the folders, in Markdown.

    Args:
        folders: with runs below them.
        baseline: the label of the method that the others are tested against; default: kd, if there is one.
        out: a folder for report.md, report.csv, report.png and, of runs that `lad-dist latency` measured,
            pareto.png.

    Raises:
        UserError: a folder does not exist, a results.json is damaged, there is no complete run or no such baseline, or
            `out` cannot be written.
    """
    comparison = compare(collect(folders), baseline)
    text = markdown(comparison)
    if out is not None:
        _write(comparison, text, Path(out))
    return text


def _write(comparison: Comparison, text: str, out: Path) -> None:
    figures = {"report.png": plots.figure(comparison), "pareto.png": pareto.figure(comparison)}
    pictures = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "report.md", text)
        write_text(out / "report.csv", run_table(comparison).to_csv(index=False, lineterminator="\n"))
        for name, content in pictures.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give --out another folder") from None


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    return content.getvalue()
