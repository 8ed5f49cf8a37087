"""Objectives of the user: `objective.name = "module:Class"` takes a class from outside the package."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World

from lad_dist.config.errors import UserError
from lad_dist.config.load import find_class, read_toml
from lad_dist.objectives.base import Objective
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.training.train import train

OWN = """
from lad_dist.core.outputs import OutputSpec
from lad_dist.objectives.base import Objective

CONSTANT = 1


class Halves(Objective):
    def __init__(self, student, teacher, *, weight=1.0, layer: int = 1):
        super().__init__()
        self.weight, self.layer = weight, layer
        self.student_spec = self.teacher_spec = OutputSpec(hidden=(layer,))

    def on_step_start(self, state):
        self.share = 1 - state.step / state.steps

    def forward(self, student, teacher, batch):
        error = (student.hidden[self.layer] - teacher.hidden[self.layer]).float().square().mean()
        return {"halves": self.weight * self.share * error}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with modules of the user."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "losses.py").write_text(OWN)
    (tmp_path / "incomplete.py").write_text("import nowhere.at_all\n")
    (tmp_path / "misspelt.py").write_text("class Loss(:\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("own_package", "incomplete", "misspelt"):
            del sys.modules[name]


def test_a_class_of_the_working_directory_trains(folder: Path, world: World) -> None:
    """As any objective: arguments are checked, and the stored config has all of them."""
    tables = toy.task_config(folder, world.files, world.teacher, world.pretrained, deepspeed={})
    tables["run"]["steps"] = 4
    objective = {"name": "own_package.losses:Halves", "weight": 2.0}
    rows: list[dict[str, Any]] = []
    result = train(toy.parsed(tables, {"objective": objective}), rows.append)
    errors = [row["halves"] / (1 - (row["step"] - 1) / 4) for row in rows if "loss" in row]
    assert len(errors) == 4
    assert errors[-1] < errors[0]
    assert read_toml(result.folder / "config.toml")["objective"] == {**objective, "layer": 1}
    with pytest.raises(UserError, match='objective: wieght: no such key; did you mean "weight"'):
        train(toy.parsed(tables, {"objective": {"name": objective["name"], "wieght": 2.0}}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_package.losses.Halves", r'unknown: choose from .* \(a class of your own: "my_package\.module:Class"\)$'),
        ("own_package.losses:", 'write a class of your own as "my_package.module:Class"'),
        (":Halves", 'write a class of your own as "my_package.module:Class"'),
        ("own_package/losses.py:Halves", 'write a class of your own as "my_package.module:Class"'),
        ("own_pakage.losses:Halves", "no module own_pakage, neither installed nor in {folder}"),
        ("own_package.lossess:Halves", "no module own_package.lossess, neither installed nor in {folder}"),
        ("incomplete:Loss", r"import of incomplete fails \(ModuleNotFoundError: No module named 'nowhere'\); python"),
        ("misspelt:Loss", r"import of misspelt fails \(SyntaxError: .* \(misspelt\.py, line 1\)\)"),
        ("own_package.losses:Halfs", 'own_package/losses.py has no Halfs; did you mean "Halves"'),
        ("own_package.losses:CONSTANT", r"CONSTANT is no subclass of lad_dist\.objectives\.base\.Objective"),
        ("own_package.losses:OutputSpec", r"OutputSpec is no subclass of lad_dist\.objectives\.base\.Objective"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{folder}", str(folder))) as caught:
        find_class("objective.name", name, OBJECTIVES, Objective)
    assert str(caught.value).startswith(f'objective.name "{name}"')
    assert "\n" not in str(caught.value)


def test_a_file_of_the_working_directory_hides_no_installed_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tomli_w.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "tomli_w")
    with pytest.raises(UserError, match="has no Halves"):
        find_class("objective.name", "tomli_w:Halves", OBJECTIVES, Objective)
