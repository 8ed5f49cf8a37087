"""The command push."""

from collections.abc import Sequence
from pathlib import Path

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.errors import EXIT_DONE


def push(arguments: Sequence[str]) -> int:
    """Upload a run's export to the Hugging Face hub: model, tokenizer, model card, and ONNX files where there are any.

    The repository is private unless it exists and is public. `hf auth login`, or HF_TOKEN, says who you are. The code
    on the model card then loads the model by this name.

    usage: lad-dist push FOLDER NAME [--public]

    FOLDER    a complete run: runs/NAME
    NAME      of the repository: USER/MODEL
    --public  makes a new repository that everybody can read

    example: lad-dist push runs/lad-rte my-name/lad-rte
    """
    parser = ArgumentParser("push")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--public", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    with loading_libraries():
        from lad_dist.runs.push import push_export

    say(f"uploaded to {push_export(options.folder, options.name, private=not options.public)}")
    return EXIT_DONE
