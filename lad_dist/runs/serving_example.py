"""Code that serves an ONNX file with onnxruntime and tokenizers alone, for cards and READMEs."""

# What a row of the logits says, by head.
ANSWERS = {
    "classification": 'config["id2label"][str(row.argmax())]',
    "multilabel": """[
        label
        for number, label in config["id2label"].items()
        if 1 / (1 + np.exp(-row[int(number)])) >= config.get("label_thresholds", {}).get(label, 0.5)
    ]""",
    "regression": "row[0]",
}

SERVING_EXAMPLE = """\
import json
from pathlib import Path

import numpy as np
{download}from onnxruntime import InferenceSession
from tokenizers import Tokenizer

folder, texts = Path({folder}), {texts}
config = json.loads((folder / "config.json").read_text())
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding(pad_id=config["pad_token_id"])
session = InferenceSession(folder / "{file}")
rows = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
tokens = tokenizer.encode_batch(texts)
inputs = {{x.name: np.array([getattr(y, rows[x.name]) for y in tokens], np.int64) for x in session.get_inputs()}}
for text, row in zip(texts, session.run(None, inputs)[0]):
    print(text, {answer})
"""


def serving_example(
    folder: str,
    file: str = "model.int8.onnx",
    head: str = "classification",
    *,
    text_pairs: bool = False,
    hub_name: str | None = None,
) -> str:
    """Return Python code that prints what an exported model says of two texts.

    Args:
        folder: The folder of the file, with config.json and tokenizer.json.
        file: The name of the file.
        head: What the model is for, a key of ANSWERS.
        text_pairs: Whether it reads pairs of texts.
        hub_name: The name of a model on the hub that holds the folder; default: the folder is on this machine.
    """
    return SERVING_EXAMPLE.format(
        download="from huggingface_hub import snapshot_download\n" if hub_name else "",
        folder=f'snapshot_download("{hub_name}"), "{folder}"' if hub_name else f'"{folder}"',
        texts='[("One text.", "Another one."), ("A third.", "A longer one.")]'
        if text_pairs
        else '["Some text.", "And a longer one."]',
        file=file,
        answer=ANSWERS[head],
    )
