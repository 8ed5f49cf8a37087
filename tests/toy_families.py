"""A toy model and a tokenizer of its kind for each family: four layers of 32, dropout 0."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import toy
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lad_dist.core.batch import Batch, Head, unpad
from lad_dist.core.collate import collate, span_starts
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import role_ids
from lad_dist.models import loading
from lad_dist.models.loading import PreTrainedModel

PADDING_FIRST = {**toy.SIZES, "type_vocab_size": 1, "max_position_embeddings": 66}
DISTILBERT = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
MODERNBERT = {name: value for name, value in toy.SIZES.items() if "dropout" not in name}
DEBERTA = {**toy.SIZES, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
# As v3 is: no absolute positions, the content's own maps for the relative ones, their embeddings normalised.
DEBERTA_V3 = {**DEBERTA, "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm"}

SIZES: dict[str, dict[str, Any]] = {
    "bert": toy.SIZES,
    "roberta": PADDING_FIRST,
    "xlm-roberta": PADDING_FIRST,
    "electra": {**toy.SIZES, "embedding_size": 16},
    "albert": {**toy.SIZES, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    "distilbert": {**DISTILBERT, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "mpnet": {**toy.SIZES, "max_position_embeddings": 66},
    "deberta-v2": {**DEBERTA, "conv_kernel_size": 3},
    "deberta-v3": DEBERTA_V3,
    "modernbert": {**MODERNBERT, "local_attention": 8, "classifier_pooling": "mean"},
}
# Of families like another: only that they run as transformers runs them.
LIKE = dict.fromkeys(("camembert", "xlm-roberta-xl", "data2vec-text", "roberta-prelayernorm"), PADDING_FIRST)

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Their sentencepiece models, as the authors laid them out: transformers makes the fast tokenizer of each.
PIECES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": (
        "spiece.model",
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>", "unk_piece": "<unk>"}
        | {"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"]},
    ),
    "xlm-roberta": ("sentencepiece.bpe.model", {}),
    "deberta-v2": (
        "spm.model",
        {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
        | {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
    ),
}
OF_TOKENS = ("mlm", "tagging", "question_answering")  # heads
TEXTS = [toy.sentence(n) for n in range(300)]


def kind(family: str) -> str:
    """The model_type of a name in SIZES."""
    return "deberta-v2" if family == "deberta-v3" else family


def tokenizer(family: str, folder: Path) -> Path:
    """WordPiece for BERT's and MPNet's, byte-level BPE for RoBERTa's and ModernBERT's, sentencepiece for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind(family) in PIECES:
        _sentencepiece(kind(family), folder)
    elif family in ("roberta", "modernbert"):
        _byte_level(ROBERTA if family == "roberta" else ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"), folder)
    elif family == "mpnet":
        _wordpiece(("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), folder)
    else:
        toy.tokenizer(folder)
    return folder


def architecture(family: str, **sizes: Any) -> dict[str, Any]:
    """A student.architecture of the family."""
    return {"model_type": kind(family), **(SIZES | LIKE)[family], **sizes}


def new_model(
    family: str, head: str, tokenizer: PreTrainedTokenizerFast, labels: tuple[str, ...] = (), **sizes: Any
) -> PreTrainedModel:
    """A model in evaluation, its weights far from the tiny ones of a new model."""
    torch.manual_seed(1)
    model = loading.create_model(
        architecture(family, **sizes),
        head,  # type: ignore[arg-type]
        vocab_size=len(tokenizer),
        special_ids=role_ids(tokenizer),
        labels=labels,
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def batch_of_pairs(
    lengths: list[int], head: Head, vocabulary: int, pad_to: int | None = None, pad_token_id: int = 0
) -> Batch:
    """Pairs of random tokens: the second segment begins in the middle. Heads of tokens read two of each sequence."""
    random = np.random.default_rng(3)
    sequences = [random.integers(5, vocabulary, n) for n in lengths]
    segments = [(np.arange(n) >= n // 2).astype(np.uint8) for n in lengths]
    rows = starts = span_starts(sequences, pad_to)[:-1]
    if head in OF_TOKENS:
        rows = np.unique(np.concatenate([starts, starts + np.array(lengths) - 1]))
    return collate(sequences, segments, rows, np.zeros(len(rows), dtype=np.int64), pad_to, pad_token_id)


def real(x: Tensor, batch: Batch) -> Tensor:
    """[N, ...] without the tokens that pad_to added."""
    return x[unpad(batch.is_token, batch)]


def write_sentencepiece(folder: Path, family: str, file: str, texts: list[str], **layout: Any) -> None:
    """A folder with nothing but a sentencepiece model and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    written, options = io.BytesIO(), {"hard_vocab_limit": False, "minloglevel": 2, **layout}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=written, **options)
    (folder / file).write_bytes(written.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": family}))


def _sentencepiece(family: str, folder: Path) -> None:
    file, layout = PIECES[family]
    write_sentencepiece(folder, family, file, TEXTS, vocab_size=120, **layout)
    fast_tokenizer = load_tokenizer(folder)
    (folder / "config.json").unlink()
    fast_tokenizer.save_pretrained(folder)


def _byte_level(special: tuple[str, ...], folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    _save(backend, special, folder)


def _wordpiece(special: tuple[str, ...], folder: Path) -> None:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(special), show_progress=False)
    )
    _save(backend, special, folder)


def _save(backend: Tokenizer, special: tuple[str, ...], folder: Path) -> None:
    roles = {role: next(token for token in special if any(name in token for name in names)) for role, names in ROLES}
    first, last = roles["cls_token"], roles["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (first, last)],
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)


ROLES = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "unk_token": ("[UNK]", "<unk>"),
}.items()
