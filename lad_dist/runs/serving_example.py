"""Code that serves an ONNX file with onnxruntime and tokenizers alone, for cards and READMEs."""

# What a row of the logits says, by kind of task.
ANSWERS = {"classification": 'config["id2label"][str(row.argmax())]', "regression": "row[0]"}

SERVING_EXAMPLE = """\
import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

folder, texts = Path("{folder}"), ["Some text.", "And a longer one."]
config = json.loads((folder / "config.json").read_text())
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding(pad_id=config["pad_token_id"])
session = InferenceSession(folder / "{file}")
rows = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
tokens = tokenizer.encode_batch(texts)  # a pair of texts is a tuple
inputs = {{x.name: np.array([getattr(y, rows[x.name]) for y in tokens], np.int64) for x in session.get_inputs()}}
for text, row in zip(texts, session.run(None, inputs)[0]):
    print(text, {answer})
"""


def serving_example(folder: str, file: str = "model.int8.onnx", kind: str = "classification") -> str:
    """Return Python code that prints what an exported classifier, or regression, says of two texts.

    Args:
        folder: The folder of the file, with config.json and tokenizer.json.
        file: The name of the file.
        kind: A key of ANSWERS.
    """
    return SERVING_EXAMPLE.format(folder=folder, file=file, answer=ANSWERS[kind])
