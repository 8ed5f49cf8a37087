from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_text import WORDS

from lad_dist.config import Source, UserError
from lad_dist.data import corpus, tokenizers

pytest_plugins = ["data_fixtures"]


def source(kind: str, path: Path | str, **rest: str) -> Source:
    return Source(kind=kind, path=str(path), **rest)


def wiki_file(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def article(title: str, *paragraphs: str) -> str:
    return f'<doc id="1" url="u" title="{title}">\n{title}\n\n' + "".join(f"{p}\n" for p in paragraphs) + "</doc>\n"


def test_wikiextractor_folders_are_walked_in_sorted_order(tmp_path: Path) -> None:
    wiki_file(tmp_path, "AB/wiki_00", article("Last", "x"))
    wiki_file(tmp_path, "AA/wiki_10", article("Third", "x"))
    wiki_file(tmp_path, "AA/wiki_02", article("First", "one", "two") + "\n" + article("Second"))
    wiki_file(tmp_path, "AA/notes.txt", "not a part of it")
    texts = list(corpus.documents(source("wikiextractor", tmp_path)))
    assert texts == ["First\none\ntwo", "Second", "Third\nx", "Last\nx"]


def test_a_book_is_a_document_with_its_hard_wrapped_lines_joined(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffCHAPTER I\r\n\r\n\r\nIt was\r\na dark night.\r\n \r\nThe end\r\n".encode())
    (tmp_path / "a.txt").write_text("")
    assert list(corpus.documents(source("text", tmp_path))) == ["", "CHAPTER I\nIt was a dark night.\nThe end"]
    assert len(list(corpus.documents(source("text", tmp_path / "b.txt")))) == 1


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028still one\x0cstill\n\ntwo")
    assert list(corpus.documents(source("text", tmp_path))) == ["one\u2028still one\x0cstill\ntwo"]


def test_hub_rows_come_from_the_named_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load_dataset(path: str, config: str, **options: object) -> object:
        asked.update(path=path, config=config, **options)
        return datasets.Dataset.from_dict({"id": [1, 2, 3], "body": ["a", None, "b"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = list(corpus.documents(source("hub", "w/pedia", config="20231101.en", split="train", column="body")))
    assert texts == ["a", "", "b"]
    assert asked == {"path": "w/pedia", "config": "20231101.en", "split": "train", "streaming": True}
    with pytest.raises(UserError, match=r'w/pedia: no column "bodi": did you mean "body"\?'):
        list(corpus.documents(source("hub", "w/pedia", column="bodi")))


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match="w/pedia: cannot load the dataset, split train: no route to host"):
        list(corpus.documents(source("hub", "w/pedia")))


@pytest.mark.parametrize("kind", ["wikiextractor", "text"])
def test_check_refuses_what_is_missing_or_empty(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        corpus.check(source(kind, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no .* in it"):
        corpus.check(source(kind, tmp_path))


def test_check_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    corpus.check(source("text", tmp_path))
    corpus.check(source("hub", "no/such"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (article("A", "x") + '<doc id="2">\ntext\n', "wiki_00:6: this <doc …> is not closed"),
        ('<doc id="2">\ntext\n' + article("A", "x"), "wiki_00:1: this <doc …> is not closed"),
        ("\nplain text\n", "wiki_00:2: text outside <doc …>"),
    ],
)
def test_damaged_wikiextractor_files_are_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    wiki_file(tmp_path, "AA/wiki_00", text)
    with pytest.raises(UserError, match=message):
        list(corpus.documents(source("wikiextractor", tmp_path)))


def test_invalid_utf8_is_named_with_file_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nna\xefve\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8 \(byte 0xef\)"):
        list(corpus.documents(source("text", tmp_path)))


@pytest.mark.data
def test_real_wikipedia_and_books_are_read_whole(real_data: Path) -> None:
    folder = real_data / "wikipedia"
    opened = sum(file.read_text().count("\n<doc id=") + 1 for file in folder.glob("AA/wiki_*"))
    texts = list(corpus.documents(source("wikiextractor", folder)))
    assert len(texts) == opened
    assert sum(map(len, texts)) > 20_000_000
    assert not any("<doc " in text or "</doc>" in text for text in texts)
    books = list(corpus.documents(source("text", real_data / "books")))
    assert len(books) == 10
    assert "Alice was beginning to get very tired of sitting by her sister on the bank, and of" in "".join(books)


def test_trained_wordpiece_is_uncased_and_framed_like_berts(toy_tokenizer) -> None:
    encoded = toy_tokenizer("The FOX", "dog", return_token_type_ids=True)
    tokens = toy_tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "the", "fox", "[SEP]", "dog", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert toy_tokenizer.mask_token == "[MASK]"
    assert toy_tokenizer.pad_token_id == 0
    assert toy_tokenizer.tokenize("zebra ζωή") == ["z", "##e", "##b", "##r", "##a", "[UNK]"]


def test_training_again_gives_the_same_tokenizer(toy_tokenizer, tmp_path: Path) -> None:
    tokenizers.train_wordpiece([" ".join(WORDS)] * 50, 200, tmp_path)
    assert tokenizers.fingerprint(tokenizers.load_tokenizer(tmp_path)) == tokenizers.fingerprint(toy_tokenizer)


def test_fingerprint_depends_on_the_tokens_alone(toy_tokenizer, toy_tokenizer_folder: Path, tmp_path: Path) -> None:
    before = tokenizers.fingerprint(toy_tokenizer)
    toy_tokenizer("the fox", truncation=True, max_length=8, padding="max_length")
    assert tokenizers.fingerprint(toy_tokenizer) == before
    toy_tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizers.fingerprint(tokenizers.load_tokenizer(tmp_path / "copy")) == before
    toy_tokenizer.add_tokens(["extra"])
    assert tokenizers.fingerprint(toy_tokenizer) != before


def test_frame_and_plain_encoding_ignore_what_an_earlier_call_left_behind(toy_tokenizer) -> None:
    toy_tokenizer("the fox", truncation=True, max_length=4, padding="max_length")
    frame = tokenizers.frame(toy_tokenizer)
    assert (frame.before.tolist(), frame.after.tolist(), frame.size) == ([2], [3], 2)
    (ids,) = tokenizers.encode_plain(toy_tokenizer, ["the quick [SEP] fox jumps over"])
    assert not set(ids.tolist()) & {toy_tokenizer.sep_token_id, toy_tokenizer.cls_token_id, toy_tokenizer.pad_token_id}
    assert len(ids) >= 6


def test_a_missing_or_empty_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer there") as caught:
        tokenizers.load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 200}')
    with pytest.raises(UserError, match="without a vocabulary"):
        tokenizers.load_tokenizer(tmp_path)
