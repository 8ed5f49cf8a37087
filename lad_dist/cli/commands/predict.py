"""The command predict."""

from collections.abc import Sequence

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, say
from lad_dist.config.errors import EXIT_DONE
from lad_dist.config.evaluation_schema import PredictConfig
from lad_dist.config.load import apply_overrides, parse_config, parse_override
from lad_dist.utils.text import plain_number


def predict(arguments: Sequence[str]) -> int:
    """Predict the label of each text in a file, with its probability; of other models numbers, tags or answers.

    Files of any size are read and written a chunk at a time. Where the file has labels, the accuracy is printed.

    usage: lad-dist predict MODEL FILE --out FILE [key=value …]

    MODEL                 a run folder, model folder, .onnx file, compact.safetensors, or hub name
    FILE                  .csv, .tsv, .jsonl, .parquet, or .txt with a text a line; for tagging CoNLL or .jsonl, for
                          question answering SQuAD's .json
    --out FILE            .csv or .jsonl, in the order of FILE; it must not exist
    text=COLUMN           the texts (default: text)
    text_pair=COLUMN      the second texts of pairs (default: text_pair, if FILE has it)
    label=COLUMN          the labels to compare with (default: label, if FILE has it)
    'labels=["a", "b"]'   names of the model's outputs, in their order (default: the model's own)
    max_length=N          tokens of the longest text; longer ones are cut (default: 512, or the model's positions)
    batch_size=N          texts of one forward (default: 64)
    temperature=T         calibrates probabilities; lad-dist evaluate CONFIG fit_temperature=true fits it (default: 1)

    For question answering also max_answer_length=N and null_score_diff_threshold=X.

    example: lad-dist predict runs/small texts.csv --out predictions.csv text=utterance
    """
    parser = ArgumentParser("predict")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("changes", metavar="key=value", nargs="*")
    parser.add_argument("--out", metavar="FILE", required=True)
    options = vars(parser.parse_intermixed_args(arguments))
    changes = [parse_override(change, PredictConfig) for change in options.pop("changes")]
    config = parse_config(PredictConfig, apply_overrides(options, changes), "predict")
    with loading_libraries():
        from lad_dist.evaluation.predict_file import predict_file

    score = predict_file(config)
    if score.cut:
        say(f"{score.cut:,} of {score.examples:,} texts were cut; max_length=N reads more of them")
    if score.unknown:
        say(f"{score.unknown:,} labels of the file are none of the model's and do not count; labels= renames outputs")
    metrics = ", ".join(f"{name.replace('_', ' ')} {plain_number(value)}" for name, value in score.metrics.items())
    scored = f"; {metrics} over {score.labelled:,} labels" if metrics else ""
    say(f"{config.out}: {score.examples:,} predictions{scored}")
    return EXIT_DONE
