"""A Python that has imported the slow libraries once and runs scripts in forks of itself, which start at once.

A job is a line on standard input, the arguments of `become` in JSON; the answer is a line with its exit code. lad_dist
itself is imported by the forks alone, as each tree has another one.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NoReturn

# Where one is missing, forks take longer.
SLOW = """torch torch.utils.tensorboard transformers.models.bert.modeling_bert transformers.models.auto.modeling_auto
deepspeed deepspeed.runtime.zero.muon.muon_optimizer scipy.stats scipy.optimize sklearn.metrics pandas pyarrow.parquet
matplotlib.figure sentencepiece"""


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print while they are imported
    for module in SLOW.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()  # forks neither look through what was imported nor copy it
    while line := sys.stdin.readline():
        process = os.fork()
        if process == 0:
            become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
    os._exit(0)  # taking all modules apart costs seconds


def become(
    script: str, arguments: list[str], tree: str, folder: str, log: str, bytecode: str, seconds: int
) -> NoReturn:
    """Become `python script arguments…` in the folder, with the tree's lad_dist, ended after so many seconds.

    It prints into the file `log`; bytecode goes into a folder of its own, and nothing into the tree.
    """
    signal.alarm(seconds)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = tree
    sys.argv = [script, *arguments]
    sys.path[:1] = [str(Path(script).parent), tree]
    sys.pycache_prefix, sys.dont_write_bytecode = bytecode, False
    package = importlib.util.find_spec("lad_dist")
    assert package is not None
    assert package.origin is not None
    assert "lad_dist" not in sys.modules
    assert Path(package.origin).is_relative_to(tree), package.origin
    runpy.run_path(script, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve()
