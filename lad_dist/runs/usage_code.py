"""The Python code on a model card: how to load a student and to call it, with transformers and with onnxruntime."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lad_dist.runs.card_header import head_of
from lad_dist.runs.serving_example import ANSWERS, serving_example

TEXT_CLASSIFICATION = """\
from transformers import pipeline

classify = pipeline("text-classification", model="{place}", truncation=True)
print(classify([{text}])[0]["{output}"])
"""
CODE = {  # by head
    "none": """\
from transformers import pipeline

encode = pipeline("feature-extraction", model="{place}", truncation=True)
print(encode("Some text.", return_tensors=True).shape)
""",
    "mlm": """\
from transformers import pipeline

fill = pipeline("fill-mask", model="{place}")
print(fill(f"Some {{fill.tokenizer.mask_token}}.")[0]["token_str"])
""",
    "classification": TEXT_CLASSIFICATION,
    "multilabel": """\
from transformers import pipeline

classify = pipeline("text-classification", model="{place}", truncation=True, top_k=None)
print([(each["label"], each["score"]) for each in classify([{text}])[0]])
""",
    "regression": TEXT_CLASSIFICATION,
    "tagging": """\
from transformers import pipeline

tag = pipeline("token-classification", model="{place}", ignore_labels=[])
print([(token["word"], token["entity"]) for token in tag("Some text.")])
""",
    "question_answering": """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
inputs = tokenizer("Who is asked?", "One is asked.", truncation="only_second", return_tensors="pt")
outputs = model(**inputs)
begin, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, begin : end + 1]))
""",
}
ONNX_FILES = {"bytes/onnx int8": "model.int8.onnx", "bytes/onnx": "model.onnx"}  # the fastest first


def usage_code(results: Mapping[str, Any]) -> list[str]:
    """Return the code for transformers and, where the student was exported to ONNX, that for onnxruntime."""
    head, hub_name = head_of(results), results.get("export", {}).get("hub_name")
    has_pairs = results.get("export", {}).get("text_pairs", False)
    place = hub_name or _folder(results["config"]["run"])
    text = '{"text": "One text.", "text_pair": "Another one."}' if has_pairs else '"Some text."'
    output = "score" if head == "regression" else "label"
    code = [CODE.get(head, CODE["none"]).format(place=place, text=text, output=output)]
    file = next((file for form, file in ONNX_FILES.items() if form in results["student"]), None)
    if file is not None and head in ANSWERS:
        folder = "onnx" if hub_name else f"{place}/onnx"
        code.append(serving_example(folder, file, head, text_pairs=has_pairs, hub_name=hub_name))
    return code


def _folder(run: Mapping[str, Any]) -> str:
    """Return the folder of a run's export, from the working directory of its command; never one of this machine."""
    parts = (run["name"], "export") if PurePath(run["dir"]).is_absolute() else (run["dir"], run["name"], "export")
    return str(PurePath(*parts))
