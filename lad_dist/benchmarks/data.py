"""Benchmark of the data: how fast text becomes token shards, and token shards become batches.

    measure(config)   figures of both, on a sample of the config's sources -> rows for a table

Preparing is compared, on the same text and cores, with the tokenizer alone and with the customary path: `datasets.map`
to tokenize, and again to cut the tokens into blocks, with nothing cached. They take turns, several times, and the best
time of each counts: other work on the machine makes all of them slower, but not alike. Memory is the peak of the
largest process.
"""

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist.config.schema import CorpusDataConfig, PrepareConfig, PretrainConfig
from lad_dist.data.datasets import CorpusDataset
from lad_dist.data.loader import load_batches
from lad_dist.data.shards.prepare import prepare
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.loading import load_tokenizer

SAMPLE = 32_000_000  # characters of text
TIMES = 10  # how much longer the text is that memory is measured on beside it
ROUNDS = 3
AT_ONCE = 1000  # texts that the tokenizer alone is given
SMALL = "round-0/shards"  # of the text once
TOKENS_PER_SLOT = 4096
BATCHES = 2000
STUDENT = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Figure(NamedTuple):
    seconds: float
    megabytes: float  # of memory, at the peak
    value: Any = None


def measure(config: PrepareConfig) -> list[tuple[str, str]]:
    """Rows of (what, figure)."""
    cores = config.num_workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        size = _write_sample(config, texts, 1) / 1e6
        rounds = [_round(config, texts, cores, Path(folder) / f"round-{number}") for number in range(ROUNDS)]
        alone, ours, peer = (min(figures, key=lambda figure: figure.seconds) for figures in zip(*rounds, strict=True))
        _write_sample(config, texts, TIMES)
        large = _run(_prepare, config, texts, cores, Path(folder) / "often")
        rows = [
            ("text", f"{size:.1f} MB, {cores} cores"),
            ("the tokenizer alone", f"{size / alone.seconds / cores:.2f} MB/s per core"),
            ("prepare_corpus", f"{size / ours.seconds / cores:.2f} MB/s per core"),
            ("  of the tokenizer alone", f"{alone.seconds / ours.seconds:.0%}"),
            ("  times datasets.map", f"{peer.seconds / ours.seconds:.2f}"),
            ("  memory", f"{ours.megabytes:.0f} MB"),
            (f"  memory at {TIMES} times the text", f"{large.megabytes:.0f} MB"),
        ]
        return rows + _serving(Path(folder))


def _round(config: PrepareConfig, texts: Path, cores: int, folder: Path) -> tuple[Figure, Figure, Figure]:
    """The tokenizer alone, prepare_corpus, and datasets.map."""
    alone = min((_run(_tokenize, config, texts, n) for n in (1, cores)), key=lambda figure: figure.seconds)
    ours = _run(_prepare, config, texts, cores, folder / "shards")
    return alone, ours, _run(_map, config, texts, cores, folder / "cache")


def _serving(folder: Path) -> list[tuple[str, str]]:
    rows = []
    for length in (128, 512):
        figure = _run(_serve, folder / SMALL, length)
        sequences, tokens, full = figure.value
        rows += [
            (f"a loader process at length {length}", f"{tokens / figure.seconds:,.0f} tokens/s"),
            ("", f"{sequences / figure.seconds:,.0f} sequences/s"),
            ("  real tokens in a slot", f"{full:.3%}"),
        ]
    small, large = (_run(_serve, folder / name, 128) for name in (SMALL, "often"))
    waited = _run(_train, folder / SMALL).value
    return [
        *rows,
        ("  memory", f"{small.megabytes:.0f} MB"),
        (f"  memory at {TIMES} times the text", f"{large.megabytes:.0f} MB"),
        ("training 2 x 128 waits for data", f"{waited:.2%} of the time"),
    ]


def _write_sample(config: PrepareConfig, file: Path, times: int) -> int:
    """The sample, `times` over, a document a line and no two the same; its bytes."""
    written = 0
    with open(file, "w", encoding="utf-8") as out:
        for copy in range(times):
            left = SAMPLE
            for text in chain.from_iterable(map(corpus.documents, config.source)):
                marked = f"{copy} {text}"
                out.write(json.dumps({"text": marked}) + "\n")
                written += len(marked.encode())
                left -= len(text)
                if left <= 0:
                    break
    return written


def _run(work: Callable[..., Any], *arguments: Any) -> Figure:
    """work(clock, *arguments) in a process of its own; what happens within `clock()` counts."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_measured, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        figure: Figure = receiver.recv()
    finally:
        process.join()
    return figure


def _measured(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    seconds = 0.0

    @contextmanager
    def clock() -> Iterator[None]:
        nonlocal seconds
        began = time.perf_counter()
        yield
        seconds += time.perf_counter() - began

    value = work(clock, *arguments)
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sender.send(Figure(seconds, kilobytes / 1024, value))


def _texts(file: Path) -> list[str]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _tokenize(clock: Any, config: PrepareConfig, file: Path, processes: int) -> None:
    """The tokenizer on texts that lie in memory: on its own threads, or in several processes on one each."""
    texts = _texts(file)
    tokenizer = load_tokenizer(config.tokenizer).backend_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"
    parts = [partial(_encode, tokenizer, texts[number::processes]) for number in range(processes)]
    children = [get_context("fork").Process(target=part) for part in parts[1:]]
    with clock():
        for child in children:
            child.start()
        parts[0]()
        for child in children:
            child.join()


def _encode(tokenizer: Any, texts: list[str]) -> None:
    for begin in range(0, len(texts), AT_ONCE):
        tokenizer.encode_batch(texts[begin : begin + AT_ONCE], add_special_tokens=False)


def _prepare(clock: Any, config: PrepareConfig, file: Path, processes: int, out: Path) -> None:
    changes = {"source": [{"kind": "jsonl", "path": str(file)}], "out": str(out), "num_workers": processes}
    with clock():
        prepare(PrepareConfig.model_validate(config.model_dump() | changes), lambda line: None)


def _map(clock: Any, config: PrepareConfig, file: Path, processes: int, cache: Path) -> None:
    """As in the recipes that train masked language models with `datasets`."""
    import datasets  # noqa: PLC0415 (slow, and needed only here)

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.model_max_length = 10**9
    with clock():
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        columns = rows.column_names
        encoded = rows.map(partial(_encode_rows, tokenizer), batched=True, num_proc=processes, remove_columns=columns)
        encoded.map(_blocks, batched=True, num_proc=processes)


def _encode_rows(tokenizer: Any, rows: Mapping[str, list[str]]) -> Any:
    return tokenizer(rows["text"], return_special_tokens_mask=True)


def _blocks(rows: Mapping[str, list[list[int]]], length: int = 128) -> dict[str, list[list[int]]]:
    joined = {name: list(chain(*values)) for name, values in rows.items()}
    whole = len(next(iter(joined.values()))) // length * length
    return {name: [values[i : i + length] for i in range(0, whole, length)] for name, values in joined.items()}


def _serve(clock: Any, shards: Path, length: int) -> tuple[int, int, float]:
    """(sequences, tokens, share of the slots that they fill)"""
    tables = {"shards": str(shards), "max_length": length, "micro_batch_tokens": TOKENS_PER_SLOT}
    feed = CorpusDataset(CorpusDataConfig.model_validate(tables), load_tokenizer(shards / "tokenizer"), seed=0)
    batches = load_batches(feed, range(BATCHES), range(1), workers=1)
    next(batches)
    sequences = tokens = 0
    with clock():
        for (batch,) in batches:
            sequences, tokens = sequences + int((batch.lengths > 0).sum()), tokens + batch.num_tokens
    return sequences, tokens, tokens / (BATCHES - 1) / TOKENS_PER_SLOT


def _train(clock: Any, shards: Path) -> float:
    """Share of a step that waits for data, with a small student."""
    from lad_dist.benchmarks import step  # noqa: PLC0415 (slow, and needed only here)

    tables = {
        "run": {"name": "data", "steps": 1},
        "student": {"architecture": STUDENT},
        "data": {"shards": str(shards), "micro_batch_tokens": TOKENS_PER_SLOT},
        "objective": {"name": "mlm"},
        "optim": {"lr": 1e-4},
    }
    figures = step.measure(PretrainConfig.model_validate(tables), steps=50)
    return figures.phases["data"] / figures.seconds
