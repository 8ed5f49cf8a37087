"""The tables of a results page, `configs/results/NAME.md`, from the rows beside it, `NAME.jsonl`.

A line of the rows is a table or a row of one:

    {"table": "methods", "columns": {"student": ["", "{}"], "cola": ["CoLA", "{mean:.1f} ± {sd:.1f}"]}}
    {"table": "methods", "student": "LAD", "cola": {"mean": 26.7, "sd": 1.5}}

A column has a title and a format of its cells, which are values or tables of values; what was not measured is absent.
In the page a table follows its line `<!-- table: NAME -->`. `python -m lad_dist.report.results_page PAGE.md` renews it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lad_dist.utils.text import markdown_table

PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(?:\|.*\n)*")


def tables(rows: Path) -> dict[str, str]:
    """Return the Markdown of each table of a file of rows."""
    columns: dict[str, dict[str, tuple[str, str]]] = {}
    cells: dict[str, list[list[str]]] = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["table"]
        if "columns" in row:
            columns[name], cells[name] = row["columns"], []
        else:
            cells[name].append([_cell(form, row.get(key)) for key, (_, form) in columns[name].items()])
    return {name: markdown_table([title for title, _ in columns[name].values()], cells[name]) for name in columns}


def _cell(form: str, value: Any) -> str:
    if value is None:
        return ""
    return form.format(**value) if isinstance(value, dict) else form.format(value)


def page_with_tables(page: Path) -> str:
    """Return the text of a page with its tables renewed."""
    new = tables(page.with_suffix(".jsonl"))
    return PLACE.sub(lambda place: f"{place[1]}{new[place[2]]}\n", page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        Path(argument).write_text(page_with_tables(Path(argument)), encoding="utf-8")
