"""Many run folders as one comparison: methods by tasks, mean ± sd over seeds.

report(folders, baseline, out)   the whole of it: what launch/report.py calls

found        the complete task runs below the folders, and what was left out
variants     which runs are one method, and what it is called
comparison   scores, order and tests of the methods
text         a comparison to read
tables       a comparison as rows, one per run
plot         a comparison as a plot
pareto       quality against what it costs, as a plot
"""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lad_dist.config.errors import UserError
from lad_dist.report import pareto, plots
from lad_dist.report.comparison import Comparison, compare
from lad_dist.report.csv_table import table
from lad_dist.report.markdown import markdown
from lad_dist.report.results import collect
from lad_dist.utils.atomic_io import write_text


def report(folders: Sequence[str | Path], baseline: str | None = None, out: str | Path | None = None) -> str:
    """The comparison of all complete task runs below the folders, in Markdown; with `out` also report.md, report.csv,
    report.png and, of runs that launch/ledger.py measured, pareto.png there. Raises UserError for a folder that is
    none, a damaged results.json, no complete run, a baseline that is not there, or an `out` that cannot be written."""
    comparison = compare(collect(folders), baseline)
    text = markdown(comparison)
    if out is not None:
        _write(comparison, text, Path(out))
    return text


def _write(comparison: Comparison, text: str, out: Path) -> None:
    pictures = {"report.png": plots.figure(comparison), "pareto.png": pareto.figure(comparison)}
    drawn = {name: _png(picture) for name, picture in pictures.items() if picture is not None}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "report.md", text)
        write_text(out / "report.csv", table(comparison).to_csv(index=False, lineterminator="\n"))
        for name, content in drawn.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give --out another folder") from None


def _png(picture: Figure) -> bytes:
    content = io.BytesIO()
    picture.savefig(content, dpi=120)
    return content.getvalue()
