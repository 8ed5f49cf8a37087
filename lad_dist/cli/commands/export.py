"""The command export."""

from collections.abc import Sequence
from pathlib import Path

from lad_dist.cli.command import ArgumentParser, add_form_options, requested_forms
from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE


def export(arguments: Sequence[str]) -> int:
    """Export a model to ONNX with its tokenizer beside it: a folder that is served without PyTorch.

    Each file is compared with the model on batches with padding: fp32 to 1e-4, fp16 to 2 % of the largest output.

    usage: lad-dist export MODEL [--onnx] [--fp16] [--int8] [--out DIR]

    MODEL           the folder of a model, as a run's export or its teacher, or a hub name
    --onnx          model.onnx, in fp32; the default, and always written, as the others are made of it
    --fp16          also model.fp16.onnx: half the size, for GPUs; slower than fp32 on CPUs
    --int8          also model.int8.onnx: int8 weights, inputs scaled at run time; a quarter of the size, for CPUs
    --out DIR       default: the folder onnx in MODEL

    What int8 costs in quality, `lad-dist latency` measures on a task.

    example: lad-dist export runs/lad-rte/export --int8
    """
    parser = ArgumentParser("export")
    parser.add_argument("model", metavar="MODEL")
    add_form_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path)
    options = parser.parse_intermixed_args(arguments)
    with loading_libraries():
        from lad_dist.evaluation.onnx_export import export_folder

    files = export_folder(options.model, options.out, requested_forms(options))
    rows = [
        (file.name, f"{file.stat().st_size / 1e6:,.1f}", f"{gap.largest:.1e}", f"{gap.largest_output:.1e}")
        for file, gap in files.items()
    ]
    folder = next(iter(files)).parent
    print_table(str(folder), ("file", "MB", "largest difference of an output", "largest output"), rows)
    say(f"{folder} is all that a server needs: the README of lad_dist/evaluation has 15 lines that serve it.")
    return EXIT_DONE
