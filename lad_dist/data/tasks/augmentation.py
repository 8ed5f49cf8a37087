"""More texts like those of a task: a masked language model replaces some words (TinyBERT, Jiao et al., 2020, alg. 1).

They have no labels: a student learns them from the teacher alone, as `data.unlabelled`. So do the authors' students,
but on STS-B, where a text keeps the label of its origin.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lad_dist.config.errors import UserError
from lad_dist.core.collate import collate, span_starts
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import ordinary_ids, rust_backend, special_token_frame, word_starts
from lad_dist.models.dims import check_length
from lad_dist.models.frozen import FrozenModel
from lad_dist.utils import progress
from lad_dist.utils.rng import AUGMENTATION, derive_key, random_uint64

EXAMPLES_AT_ONCE = 32
BATCH_SIZE = 64  # sequences of a forward


class Augmentation(NamedTuple):
    """How texts are augmented."""

    samples: int = 20  # of each example, N_a
    candidates: int = 15  # of each word, K
    probability: float = 0.4  # that a word is replaced, p_t
    seed: int = 0


class Word(NamedTuple):
    """A word of letters, what may stand in the place of it, and where it is."""

    begin: int  # characters of the text
    end: int
    candidates: list[str]


class WordProposer:
    """Proposes other words, with the tokenizer and the weights of a masked language model.

    For a word of a single token it masks the word and takes the most probable ones. A word of several has neighbours,
    by the cosine of input embeddings: its own is the mean over its tokens, where the authors look up GloVe. Proposals
    are tokens that begin a word and are letters alone. As in the authors' code, all proposals are for the text as it
    is, not for one in which words before it are replaced already.
    """

    def __init__(self, path: str, max_length: int, candidates: int, device: torch.device) -> None:
        """Load the model. Raise UserError when it is no masked language model, or shorter than `max_length` tokens."""
        self._tokenizer, self._device = load_tokenizer(path), device
        if self._tokenizer.mask_token_id is None:
            raise UserError(f"{path}: the tokenizer has no mask token; give a masked language model")
        self._mask, self._frame = self._tokenizer.mask_token_id, special_token_frame(self._tokenizer)
        self._model = FrozenModel(path, "mlm", device=device)
        check_length(self._model.model.config, path, max_length)
        self._room, self._count = max_length - self._frame.size, candidates
        starts = word_starts(self._tokenizer)
        ids = [number for number in ordinary_ids(self._tokenizer).tolist() if starts[number]]
        tokens = {number: str(self._tokenizer.decode([number])).strip() for number in ids}
        self._words = {number: token for number, token in tokens.items() if token.isalpha()}
        if len(self._words) < candidates:
            raise UserError(f"{path}: the vocabulary has {len(self._words)} words of letters, less than {candidates}")
        self._ids = torch.tensor(list(self._words), device=device)
        self._embeddings: Tensor = self._model.model.get_input_embeddings().weight.detach()

    def __call__(self, texts: Sequence[str]) -> list[list[Word]]:
        """Return the words of letters of each text, as far as its first `max_length` tokens go."""
        words = [list(self._words_of(text)) for text in texts]
        masked = [(ids, place) for each in words for _, _, ids, places in each if len(places) == 1 for place in places]
        proposals = iter(self._most_probable(masked))
        return [
            [
                Word(begin, end, next(proposals) if len(places) == 1 else self._neighbours(ids[places]))
                for begin, end, ids, places in each
            ]
            for each in words
        ]

    def _words_of(self, text: str) -> Iterator[tuple[int, int, np.ndarray, list[int]]]:
        """Yield of each word its characters, the ids of the text, and the places of its own ones in these."""
        encoding = rust_backend(self._tokenizer).encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids[: self._room], dtype=np.int64)
        for _, group in groupby(range(len(encoding.ids)), key=lambda place: encoding.word_ids[place]):
            # To sentencepiece the comma behind a word belongs to the word.
            places = [place for place in group if any(map(str.isalpha, text[slice(*encoding.offsets[place])]))]
            if not places or places[-1] >= self._room:
                continue
            begin, end = encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]
            begin += len(text[begin:end]) - len(text[begin:end].lstrip())  # a space that belongs to the token
            if text[begin:end].isalpha():
                yield begin, end, ids, places

    def _most_probable(self, masked: Sequence[tuple[np.ndarray, int]]) -> Iterator[list[str]]:
        """Yield the most probable words in each place, which is masked."""
        before, after = self._frame.before, self._frame.after
        for first in range(0, len(masked), BATCH_SIZE):
            chunk = masked[first : first + BATCH_SIZE]
            sequences = [np.concatenate([before, ids, after]) for ids, _ in chunk]
            rows = span_starts(sequences)[:-1]
            for number, (_, place) in enumerate(chunk):
                sequences[number][len(before) + place] = self._mask
                rows[number] += len(before) + place
            segments = [np.zeros(len(sequence), dtype=np.uint8) for sequence in sequences]
            batch = collate(sequences, segments, rows, np.zeros(len(rows), dtype=np.int64)).to(self._device)
            logits = self._model(batch, OutputSpec(logits=True)).logits
            assert logits is not None
            yield from map(self._named, logits[:, self._ids].topk(self._count).indices)

    def _neighbours(self, ids: np.ndarray) -> list[str]:
        mean = self._embeddings[torch.from_numpy(ids).to(self._device)].mean(dim=0)
        return self._named(F.cosine_similarity(self._embeddings[self._ids], mean, dim=1).topk(self._count).indices)

    def _named(self, indices: Tensor) -> list[str]:
        return [self._words[number] for number in self._ids[indices].tolist()]


def augment(texts: Texts, propose: WordProposer, settings: Augmentation) -> Iterator[tuple[str, ...]]:
    """Yield new texts, or pairs of texts, example by example: a function of the seed and the number of the example.

    Of each example there are at most `settings.samples`: those equal to it or to each other are left out.
    """
    examples = list(zip(*([texts.texts] if texts.pairs is None else [texts.texts, texts.pairs]), strict=True))
    for first in range(0, len(examples), EXAMPLES_AT_ONCE):
        progress.report("augmenting", first, len(examples), "examples")
        chunk = examples[first : first + EXAMPLES_AT_ONCE]
        words = iter(propose([text for example in chunk for text in example]))
        for number, example in enumerate(chunk, first):
            words_of_example = [next(words) for _ in example]
            keys = [derive_key(AUGMENTATION, settings.seed, number, sample) for sample in range(settings.samples)]
            samples = (_sample(example, words_of_example, settings, key) for key in keys)
            yield from (sample for sample in dict.fromkeys(samples) if sample != example)
    progress.report("augmenting", len(examples), len(examples), "examples")


def _sample(
    example: tuple[str, ...], words: Sequence[Sequence[Word]], settings: Augmentation, key: int
) -> tuple[str, ...]:
    """Return the texts of an example with some of the words replaced."""
    count = sum(map(len, words))
    draws = random_uint64(np.array([key], dtype=np.uint64), 0, 2 * count)[0]
    replace = iter(((draws[:count] >> np.uint64(11)) * 2.0**-53 < settings.probability).tolist())
    choice = iter((draws[count:] % np.uint64(settings.candidates)).tolist())
    result = []
    for text, words_of_text in zip(example, words, strict=True):
        pieces, end = [], 0
        for word in words_of_text:
            candidate = word.candidates[next(choice)]
            pieces += [text[end : word.begin], candidate if next(replace) else text[word.begin : word.end]]
            end = word.end
        result.append("".join([*pieces, text[end:]]))
    return tuple(result)
