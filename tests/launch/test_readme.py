"""The README is true: keys, files, scripts."""

import re

import pytest
from config_schemas import SCHEMAS
from launching import ROOT

from lad_dist.config.describe import describe_keys
from lad_dist.config.schema import ConfigTable

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_stands_in_the_table_as_it_is(schema: type[ConfigTable]) -> None:
    for key, kind, default, text in describe_keys(schema):
        assert f"| `{key}` | {kind}, {default} | {text} |" in README.replace("\\|", "|"), key


NAMED = set(re.findall(r"\b(?:launch|configs|slurm|tests)/[\w/]+\.(?:py|toml|sh|sbatch)", README)) - {"launch/NAME.py"}


@pytest.mark.parametrize("path", sorted(NAMED))
def test_every_file_named_exists(path: str) -> None:
    assert (ROOT / path).exists()
