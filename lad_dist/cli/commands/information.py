"""Commands that say what is here: configs and env."""

import shutil
import textwrap
from collections.abc import Sequence

from lad_dist.cli.command import MAX_WIDTH, ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.errors import EXIT_DONE
from lad_dist.config.shipped import config_file, shipped_configs


def configs(arguments: Sequence[str]) -> int:
    """List the configs that come with lad_dist, or print one.

    A command takes such a name in place of a file: `lad-dist distill configs:task/lad.toml`.

    usage: lad-dist configs [NAME]

    example: lad-dist configs configs:task/lad.toml > my.toml
    """
    parser = ArgumentParser("configs")
    parser.add_argument("name", metavar="NAME", nargs="?")
    name = parser.parse_args(arguments).name
    if name is not None:
        say(config_file(name).read_text(encoding="utf-8").rstrip("\n"))
        return EXIT_DONE
    descriptions = shipped_configs()
    width = max(map(len, descriptions))
    columns = shutil.get_terminal_size((MAX_WIDTH, 0)).columns
    for name, text in descriptions.items():
        say(f"{name:{width}}  {textwrap.shorten(text, max(20, columns - width - 2), placeholder='…')}")
    return EXIT_DONE


def env(arguments: Sequence[str]) -> int:
    """Print versions, devices, kernels, backend and Ray: what a bug report has to say.

    usage: lad-dist env
    """
    ArgumentParser("env").parse_args(arguments)
    with loading_libraries():
        from lad_dist.cli.environment_report import environment_rows

        rows = environment_rows()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:{width}}  {value}")
    return EXIT_DONE
