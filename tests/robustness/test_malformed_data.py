"""Malformed labelled data: own files, GLUE's, tagged sentences, questions."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import World
from malformed_inputs import Case, assert_one_line, complaint, jsonl

GOOD = "text,label\nban bart,no\ndel fil,yes\n"
ROWS = [{"text": "ban bart", "label": "no"}, {"text": "del fil", "label": "yes"}]


def parquet(columns: dict[str, Any] | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink)
    return sink.getvalue()


def own(name: str, file: str, content: bytes | str, expected: str, **changes: Any) -> Case:
    """The training file of a task."""
    return Case(name, "distill", expected, {file: content}, {"data.train": "{here}/" + file, **changes})


def regression(name: str, file: str, content: bytes | str, expected: str) -> Case:
    return own(name, file, content, expected, **{"data.kind": "regression", "data.dev": "{here}/" + file})


def tagged(name: str, file: str, content: bytes | str, expected: str) -> Case:
    return own(name, file, content, expected, **{"data.kind": "tagging", "data.dev": "{here}/" + file})


def squad_case(name: str, content: Any, expected: str) -> Case:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    kind = {"data.kind": "question_answering", "data.dev": "{here}/train.json"}
    return own(name, "train.json", text, expected, **kind)


def squad(**changes: Any) -> dict[str, Any]:
    answer = {"text": "bart", "answer_start": 4}
    entry = {"question": "who?", "answers": [answer], **changes}
    return {"data": [{"paragraphs": [{"context": "ban bart del", "qas": [entry]}]}]}


def glue(name: str, content: str, expected: str) -> Case:
    files = {"RTE/train.tsv": content, "RTE/dev.tsv": TSV + "0\ta\tb\tentailment\n"}
    return Case(
        name,
        "finetune",
        expected,
        files,
        {"data.train": None, "data.dev": None, "data.task": "rte", "data.path": "{here}"},
    )


DEEP = "[" * 100_000
NONE = pa.array([], pa.string())
TWO_TEXTS = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "label"])
TWICE = 'two columns are called "text"'
SPLIT = squad(question="\ud800")
DEV = {"data.dev": "{here}/dev.csv"}
TSV = "index\tsentence1\tsentence2\tlabel\n"
CASES = [
    own("csv-empty", "t.csv", "", "t.csv: empty"),
    own("csv-newline", "t.csv", "\n\n", "t.csv: empty"),
    own("csv-header-only", "t.csv", "text,label\n", "t.csv: no rows"),
    own("csv-duplicate-columns", "t.csv", "text,label,label\na,no,yes\n", 't.csv: two columns are called "label"'),
    own("csv-no-label", "t.csv", "text,lable\na,no\n", 'no column "label" among text, lable: did you mean "lable"?'),
    own("csv-nul", "t.csv", GOOD.replace("bart", "ba\0rt"), "t.csv:2: a NUL character"),
    own("csv-utf16", "t.csv", GOOD.encode("utf-16"), "t.csv:1: not UTF-8 (byte 0xff)"),
    own("csv-utf16-without-mark", "t.csv", GOOD.encode("utf-16-le"), "t.csv:1: a NUL character"),
    own("csv-latin1", "t.csv", GOOD.replace("bart", "bärt").encode("latin-1"), "t.csv:2: not UTF-8 (byte 0xe4)"),
    own("csv-binary", "t.csv", bytes(range(256)), "t.csv:1: "),
    own("csv-open-quote", "t.csv", 'text,label\ndel,yes\n"ban,no\n', "t.csv:3: not valid CSV"),
    own("csv-quote-inside", "t.csv", 'text,label\n"ban" bart,no\n', "t.csv:2: not valid CSV"),
    own("csv-short-row", "t.csv", GOOD + "lul\n", "t.csv:4: 1 columns, not 2"),
    own("csv-long-row", "t.csv", GOOD + "lul,no,yes\n", "t.csv:4: 3 columns, not 2"),
    own("csv-semicolons", "t.csv", GOOD.replace(",", ";"), 'no column "text" among text;label'),
    own("csv-old-mac", "t.csv", GOOD.replace("\n", "\r") + "lul\r", "t.csv:4: 1 columns, not 2"),
    own("csv-long-field", "t.csv", f"text,label\n\"{'a' * 200_000},no\n", "t.csv:2: not valid CSV: unexpected end"),
    own("csv-empty-label", "t.csv", GOOD + "lul,\n", "t.csv:4: label '' is neither a word nor a whole number"),
    own("csv-one-class", "t.csv", "text,label\nban,no\ndel,no\n", "t.csv: every label is no; a classification needs"),
    own("csv-three-classes", "t.csv", GOOD + "lul,maybe\n", "the task has 3 labels"),
    own("csv-pairs-in-one", "t.csv", "text,text_pair,label\na,b,no\na,c,yes\n", "dev.jsonl: no column text_pair"),
    own("csv-is-gzip", "t.csv", b"\x1f\x8b\x08\x00" + bytes(20), "t.csv:1: not UTF-8"),
    own("csv-compressed", "t.csv.gz", b"", 't.csv.gz: file type ".gz" is unknown'),
    own("no-ending", "train", GOOD, 'train: file type "" is unknown'),
    own("json", "t.json", "{}", 't.json: file type ".json" is unknown: did you mean ".jsonl"?'),
    Case("csv-folder", "distill", "t.csv: no such file", {"t.csv/a": ""}, {"data.train": "{here}/t.csv"}),
    own("tsv-empty", "t.tsv", "", "t.tsv: empty"),
    own("tsv-header-only", "t.tsv", "text\tlabel\n", "t.tsv: no rows"),
    own("tsv-commas", "t.tsv", GOOD, 'no column "text" among text,label'),
    own("tsv-ragged", "t.tsv", GOOD.replace(",", "\t") + "\nlul\n", "t.tsv:5: 1 columns, not 2"),
    own("tsv-duplicate-columns", "t.tsv", "text\ttext\tlabel\na\tb\tno\n", 't.tsv: two columns are called "text"'),
    own("tsv-utf16", "t.tsv", GOOD.encode("utf-16"), "t.tsv:1: not UTF-8"),
    own("jsonl-empty", "t.jsonl", "", "t.jsonl: empty"),
    own("jsonl-blank", "t.jsonl", "\n \n", "t.jsonl: empty"),
    own("jsonl-cut-off", "t.jsonl", "\n" + jsonl(*ROWS)[:-12], "t.jsonl:3: not valid JSON"),
    own("jsonl-array", "t.jsonl", json.dumps(ROWS), "t.jsonl:1: not a JSON object"),
    own("jsonl-no-label", "t.jsonl", jsonl(*ROWS, {"text": "a"}), "t.jsonl:3: no label"),
    own("jsonl-no-first-label", "t.jsonl", jsonl({"text": "a"}, *ROWS), "t.jsonl:1: no label, which other rows have"),
    own("jsonl-no-first-pair", "t.jsonl", jsonl(ROWS[0], {**ROWS[1], "text_pair": "a"}), "t.jsonl:1: no text_pair"),
    own("jsonl-null-text", "t.jsonl", jsonl(*ROWS, {"text": None, "label": "no"}), "t.jsonl:3: text is None, not a"),
    own("jsonl-number", "t.jsonl", jsonl(*ROWS, {"text": 7, "label": "no"}), "t.jsonl:3: text is 7, not a text"),
    own("jsonl-nested", "t.jsonl", jsonl(*ROWS, {"text": ["a"], "label": "no"}), "t.jsonl:3: text is ['a'], not a"),
    own("jsonl-null-label", "t.jsonl", jsonl(*ROWS, {"text": "a", "label": None}), "t.jsonl:3: label None is neither"),
    own("jsonl-float-label", "t.jsonl", jsonl(*ROWS, {"text": "a", "label": 0.5}), "t.jsonl:3: label 0.5 is neither"),
    own("jsonl-bool-label", "t.jsonl", jsonl(*ROWS, {"text": "a", "label": True}), "t.jsonl:3: label True is neither"),
    own(
        "jsonl-twice", "t.jsonl", '{"text": "a", "label": "no", "label": "b"}\n', 't.jsonl:1: not valid JSON: "label"'
    ),
    own("jsonl-deep", "t.jsonl", DEEP, "t.jsonl:1: not valid JSON"),
    own(
        "jsonl-surrogate", "t.jsonl", '{"text": "\\ud800", "label": "no"}\n', "t.jsonl:1: not valid JSON: half a "
    ),
    own("jsonl-digits", "t.jsonl", f'{{"text": "a", "label": {"7" * 5000}}}\n', "t.jsonl:1: not valid JSON"),
    own("jsonl-utf16", "t.jsonl", jsonl(*ROWS).encode("utf-16"), "t.jsonl:1: not UTF-8"),
    own("parquet-empty", "t.parquet", b"", "t.parquet: cannot be read as Parquet"),
    own("parquet-csv", "t.parquet", GOOD, "t.parquet: cannot be read as Parquet"),
    own(
        "parquet-cut", "t.parquet", parquet({"text": ["a"], "label": ["b"]})[:-20], "t.parquet: cannot be read as Parq"
    ),
    own("parquet-middle", "t.parquet", b"PAR1" + bytes(50) + b"PAR1", "t.parquet: cannot be read as Parquet"),
    own("parquet-no-rows", "t.parquet", parquet({"text": NONE, "label": NONE}), "t.parquet: no rows"),
    own("parquet-no-label", "t.parquet", parquet({"text": ["a"], "labels": ["b"]}), 'no column "label"'),
    own("parquet-null-text", "t.parquet", parquet({"text": ["a", None], "label": ["b", "c"]}), "parquet:2: text is"),
    own("parquet-nested", "t.parquet", parquet({"text": [["a"], ["b"]], "label": ["b", "c"]}), "t.parquet:1: text is"),
    own(
        "parquet-null-label", "t.parquet", parquet({"text": ["a", "b"], "label": [1, None]}), "t.parquet:2: label None"
    ),
    own(
        "parquet-bytes", "t.parquet", parquet({"text": [b"\xff", b"b"], "label": ["b", "c"]}), "t.parquet:1: text is b'"
    ),
    own("parquet-two-columns", "t.parquet", parquet(TWO_TEXTS), TWICE),
    regression("nan", "t.jsonl", '{"text": "a", "label": NaN}\n', "t.jsonl:1: label nan is not a number"),
    regression("infinite", "t.csv", "text,label\na,inf\n", "t.csv:2: label 'inf' is not a number"),
    regression("word", "t.csv", "text,label\na,good\n", "t.csv:2: label 'good' is not a number"),
    regression("underscore", "t.csv", "text,label\na,1_000\n", "t.csv:2: label '1_000' is not a number"),
    regression("bool", "t.jsonl", '{"text": "a", "label": true}\n', "t.jsonl:1: label True is not a number"),
    regression("too-large", "t.csv", "text,label\na,1e300\n", "t.csv:2: label '1e300' is not a number"),
    regression("nan-parquet", "t.parquet", parquet({"text": ["a", "b"], "label": [1.0, None]}), "t.parquet:2: label"),
    tagged("conll-empty", "t.conll", "", "t.conll: no sentences"),
    tagged("conll-blank", "t.conll", "\n-DOCSTART- O\n\n", "t.conll: no sentences"),
    tagged("conll-one-column", "t.conll", "ban\nbart\n", "t.conll:1: one column, not two: a word and a tag"),
    tagged("conll-ragged", "t.conll", "ban X O\nbart O\n", "t.conll:2: 2 columns, not 3"),
    tagged("conll-one-tag", "t.conll", "ban O\nbart O\n", "t.conll: every tag is O; tagging needs at least two"),
    tagged("tsv-no-tag", "t.tsv", "Ada\t\n", "t.tsv:1: "),
    tagged("csv", "t.csv", "ban O\n", 't.csv: file type ".csv" is unknown'),
    tagged("conll-utf16", "t.conll", "ban O\nbart B\n".encode("utf-16"), "t.conll:1: not UTF-8"),
    tagged("conll-nul", "t.conll", "ban O\nba\0rt B\n", "t.conll:2: a NUL character"),
    tagged("tags-missing", "t.jsonl", jsonl({"tokens": ["a"]}), "t.jsonl:1: tags is None, not a list"),
    tagged("tags-fewer", "t.jsonl", jsonl({"tokens": ["a", "b"], "tags": ["O"]}), "t.jsonl:1: 2 tokens and 1 tags"),
    tagged("tags-empty", "t.jsonl", jsonl({"tokens": [], "tags": []}), "t.jsonl:1: 0 tokens and 0 tags"),
    tagged("tags-number", "t.jsonl", jsonl({"tokens": ["a"], "tags": [0.5]}), "t.jsonl:1: label 0.5 is neither"),
    tagged("tokens-text", "t.jsonl", jsonl({"tokens": "a b", "tags": ["O"]}), "t.jsonl:1: tokens is 'a b', not a list"),
    tagged("tags-nested", "t.jsonl", jsonl({"tokens": ["a"], "tags": [["O"]]}), "t.jsonl:1: label ['O'] is neither"),
    tagged("tokens-numbers", "t.jsonl", jsonl({"tokens": [1], "tags": ["O"]}), "t.jsonl:1: tokens are not all texts"),
    squad_case("squad-empty", "", "train.json:1: not valid JSON"),
    squad_case("squad-cut", '{"data": [\n{"paragraphs": ]}', "train.json:2: not valid JSON"),
    squad_case("squad-deep", DEEP, "train.json: not valid JSON"),
    squad_case("squad-list", [], 'train.json: no list "data"'),
    squad_case("squad-no-questions", {"data": []}, "train.json: no questions"),
    squad_case("squad-no-paragraphs", {"data": [{}]}, 'train.json: data[0]: no list "paragraphs"'),
    squad_case("squad-no-context", {"data": [{"paragraphs": [{"qas": []}]}]}, '[0].paragraphs[0]: no text "context"'),
    squad_case("squad-number", squad(question=7), 'paragraphs[0].qas[0]: no text "question"'),
    squad_case("squad-no-answers", squad(answers=None), 'qas[0]: no list "answers"'),
    squad_case("squad-texts", squad(answers=["bart"]), 'qas[0].answers[0]: no text "text"'),
    squad_case("squad-nowhere", squad(answers=[{"text": "bart"}]), "answer_start is None, not a place"),
    squad_case("squad-elsewhere", squad(answers=[{"text": "bart", "answer_start": 5}]), 'the context has "art '),
    squad_case("squad-beyond", squad(answers=[{"text": "bart", "answer_start": 10**9}]), "at answer_start 1000000000"),
    squad_case("squad-negative", squad(answers=[{"text": "bart", "answer_start": -4}]), "answer_start is -4"),
    squad_case("squad-surrogate", SPLIT, "train.json: not valid JSON: half a surrogate"),
    squad_case("squad-utf16", json.dumps(squad()).encode("utf-16"), "train.json: not UTF-8"),
    glue("glue-label", TSV + "0\ta\tb\tentailed\n", 'label "entailed" is unknown: did you mean "entailment"?'),
    glue("glue-header", "0\ta\tb\tentailment\n", 'train.tsv: no column "sentence1"'),
    glue("glue-ragged", TSV + "0\ta\tentailment\n", "train.tsv:2: 3 columns, not 4"),
    glue("glue-empty", "", "train.tsv: empty"),
    Case(
        "glue-no-folder", "finetune", "/nowhere/RTE/train.tsv: no such file",
        changes={"data.train": None, "data.dev": None, "data.task": "rte", "data.path": "/nowhere"},
    ),
    Case("dev-empty", "evaluate", "dev.csv: empty", {"dev.csv": ""}, DEV),
    Case("dev-label", "evaluate", 'dev.csv:2: label "ja" is unknown', {"dev.csv": "text,label\na,ja\n"}, DEV),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.usefixtures("no_weights")
def test_it_ends_in_one_line(case: Case, world: World, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    assert_one_line(complaint(case, tmp_path, world, monkeypatch, capfd), case.expected)
