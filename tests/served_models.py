"""A classifier that has learnt its task, in every form that ships."""

from pathlib import Path

import torch
import toy

from lad_dist.compression import compact
from lad_dist.compression.compressed_module import merge_all
from lad_dist.data.tokenization.loading import load_tokenizer, save_beside_model
from lad_dist.evaluation import onnx_export
from lad_dist.models import loading
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.loading import PreTrainedModel, save_model

FORMS = {"folder": "", "compact": "compact.safetensors", "onnx": "onnx/model.onnx", "int8": "onnx/model.int8.onnx"}
TEXTS = [toy.sentence(n, most=6) for n in range(200)]
GOLDS = [toy.LABELS["ba" in text] for text in TEXTS]  # does the text hold a word of the first syllable?


def served(run: Path, tokenizer: Path) -> Path:
    """Write the export of a run whose student is of low rank, with its ONNX files, and return it."""
    export = run / "export"
    words = load_tokenizer(toy.model(export, tokenizer, "classification", toy.LABELS, num_hidden_layers=2))
    student = loading.load_model(str(export), "classification", require_head=True)
    _learn(student, dict(words(TEXTS, padding=True, return_token_type_ids=True, return_tensors="pt")))
    student = toy.compress(student, "low_rank", keep=0.9, modules="layer")
    packed = compact.pack(student)
    save_model(merge_all(student), export)  # type: ignore[arg-type]
    save_beside_model(words, export, segments=True, positions=64)
    packed.save(export, None, None)
    onnx_export.export(InferenceModel(compact.load_compact(export)), export / FORMS["onnx"])
    onnx_export.quantize(export / FORMS["onnx"], export / FORMS["int8"])
    return export


def _learn(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Fit the model to TEXTS and GOLDS, in transformers' attention."""
    model.set_attn_implementation("sdpa")
    labels = torch.tensor([toy.LABELS.index(gold) for gold in GOLDS])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
