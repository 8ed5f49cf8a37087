"""Benchmark of data preparation: how fast text becomes token shards, and token shards become batches.

Preparation is compared, on the same text and cores, with the tokenizer alone and with the usual way: `datasets.map` to
tokenize, and again to cut the tokens into blocks, with nothing cached. They take turns, several times, and the best
time of each counts: other work on the machine slows all of them down, but not equally. Memory is the peak of the
largest process.
"""

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.schema import CorpusDataConfig, PretrainConfig
from lad_dist.data.datasets import CorpusDataset
from lad_dist.data.loader import load_batches
from lad_dist.data.shards.prepare import prepare
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.loading import load_tokenizer

SAMPLE_CHARACTERS = 32_000_000
LARGE_FACTOR = 10  # how many times longer the second text is, on which memory alone is measured
ROUNDS = 3
TEXTS_PER_CALL = 1000  # of the tokenizer alone
SMALL = "round-0/shards"  # shards of the text
LARGE = "large"  # shards of the text LARGE_FACTOR times
MICRO_BATCH_TOKENS = 4096
BATCHES = 2000
STUDENT = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Measurement(NamedTuple):
    """What a piece of work took, and what it returned."""

    seconds: float
    megabytes: float  # of memory, at the peak
    value: Any = None


def measure(config: PrepareConfig) -> list[tuple[str, str]]:
    """Return rows of (name, figure)."""
    cores = config.num_workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        size = _write_sample(config, texts, 1) / 1e6
        rounds = [_round(config, texts, cores, Path(folder) / f"round-{number}") for number in range(ROUNDS)]
        tokenizer, shards, datasets = map(min, zip(*rounds, strict=True))  # the least seconds of each
        _write_sample(config, texts, LARGE_FACTOR)
        large = _run(_prepare, config, texts, cores, Path(folder) / LARGE)
        rows = [
            ("text", f"{size:.1f} MB, {cores} cores"),
            ("the tokenizer alone", f"{size / tokenizer.seconds / cores:.2f} MB/s per core"),
            ("lad-dist prepare", f"{size / shards.seconds / cores:.2f} MB/s per core"),
            ("  of the tokenizer alone", f"{tokenizer.seconds / shards.seconds:.0%}"),
            ("  times datasets.map", f"{datasets.seconds / shards.seconds:.2f}"),
            ("  memory", f"{shards.megabytes:.0f} MB"),
            (f"  memory at {LARGE_FACTOR} times the text", f"{large.megabytes:.0f} MB"),
        ]
        return rows + _loading(Path(folder))


def _round(
    config: PrepareConfig, texts: Path, cores: int, folder: Path
) -> tuple[Measurement, Measurement, Measurement]:
    """Measure the tokenizer alone, `lad-dist prepare` and datasets.map."""
    tokenizer = min(_run(_tokenize, config, texts, n) for n in (1, cores))
    shards = _run(_prepare, config, texts, cores, folder / "shards")
    return tokenizer, shards, _run(_map, config, texts, cores, folder / "cache")


def _loading(folder: Path) -> list[tuple[str, str]]:
    rows = []
    for length in (128, 512):
        measurement = _run(_load, folder / SMALL, length)
        sequences, tokens, filled = measurement.value
        rows += [
            (f"a loader process at length {length}", f"{tokens / measurement.seconds:,.0f} tokens/s"),
            ("", f"{sequences / measurement.seconds:,.0f} sequences/s"),
            ("  real tokens in a micro-batch", f"{filled:.3%}"),
        ]
    small, large = (_run(_load, folder / name, 128) for name in (SMALL, LARGE))
    data_share = _run(_train, folder / SMALL).value
    return [
        *rows,
        ("  memory", f"{small.megabytes:.0f} MB"),
        (f"  memory at {LARGE_FACTOR} times the text", f"{large.megabytes:.0f} MB"),
        ("training 2 x 128 waits for data", f"{data_share:.2%} of the time"),
    ]


def _write_sample(config: PrepareConfig, file: Path, times: int) -> int:
    """Write the sample `times` over, a document a line and no two the same; return the bytes of the texts."""
    size = 0
    with open(file, "w", encoding="utf-8") as out:
        for copy in range(times):
            characters_left = SAMPLE_CHARACTERS
            for text in chain.from_iterable(map(corpus.documents, config.source)):
                unique_text = f"{copy} {text}"
                out.write(json.dumps({"text": unique_text}) + "\n")
                size += len(unique_text.encode())
                characters_left -= len(text)
                if characters_left <= 0:
                    break
    return size


def _run(work: Callable[..., Any], *arguments: Any) -> Measurement:
    """Call work(clock, *arguments) in a process of its own; what happens within `clock()` counts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, work, arguments).result()


def _measured(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Measurement:
    seconds = 0.0

    @contextmanager
    def clock() -> Iterator[None]:
        nonlocal seconds
        begin = time.perf_counter()
        yield
        seconds += time.perf_counter() - begin

    value = work(clock, *arguments)
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Measurement(seconds, kilobytes / 1024, value)


def _tokenize(clock: Any, config: PrepareConfig, file: Path, processes: int) -> None:
    """Run the tokenizer on texts in memory: on threads of the tokenizer, or in several processes on one thread each."""
    with open(file, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer = load_tokenizer(config.tokenizer).backend_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"
    shares = [partial(_encode, tokenizer, texts[number::processes]) for number in range(processes)]
    children = [get_context("fork").Process(target=share) for share in shares[1:]]
    with clock():
        for child in children:
            child.start()
        shares[0]()
        for child in children:
            child.join()


def _encode(tokenizer: Any, texts: list[str]) -> None:
    for begin in range(0, len(texts), TEXTS_PER_CALL):
        tokenizer.encode_batch(texts[begin : begin + TEXTS_PER_CALL], add_special_tokens=False)


def _prepare(clock: Any, config: PrepareConfig, file: Path, processes: int, out: Path) -> None:
    changes = {"source": [{"kind": "jsonl", "path": str(file)}], "out": str(out), "num_workers": processes}
    with clock():
        prepare(PrepareConfig.model_validate(config.model_dump() | changes))


def _map(clock: Any, config: PrepareConfig, file: Path, processes: int, cache: Path) -> None:
    """Prepare text as the recipes do that train masked language models with `datasets`."""
    import datasets  # noqa: PLC0415 (slow, and needed only here)

    datasets.disable_progress_bars()
    tokenizer: Any = load_tokenizer(config.tokenizer)
    tokenizer.model_max_length = 10**9
    with clock():
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        encode = partial(tokenizer, return_special_tokens_mask=True)
        options = {"batched": True, "num_proc": processes}
        rows.map(encode, input_columns="text", remove_columns=rows.column_names, **options).map(_blocks, **options)


def _blocks(rows: Mapping[str, list[list[int]]], length: int = 128) -> dict[str, list[list[int]]]:
    joined = {name: list(chain(*values)) for name, values in rows.items()}
    whole = len(next(iter(joined.values()))) // length * length
    return {name: [values[i : i + length] for i in range(0, whole, length)] for name, values in joined.items()}


def _load(clock: Any, shards: Path, length: int) -> tuple[int, int, float]:
    """Return sequences, tokens, and the share of the micro-batches that they fill."""
    tables = {"shards": str(shards), "max_length": length, "micro_batch_tokens": MICRO_BATCH_TOKENS}
    dataset = CorpusDataset(CorpusDataConfig.model_validate(tables), load_tokenizer(shards / "tokenizer"), seed=0)
    batches = load_batches(dataset, range(BATCHES), range(1), num_workers=1)
    next(batches)
    sequences = tokens = 0
    with clock():
        for (batch,) in batches:
            sequences, tokens = sequences + int((batch.lengths > 0).sum()), tokens + batch.num_tokens
    return sequences, tokens, tokens / (BATCHES - 1) / MICRO_BATCH_TOKENS


def _train(clock: Any, shards: Path) -> float:
    """Return the share of a step that waits for data, with a small student."""
    from lad_dist.benchmarks import step  # noqa: PLC0415 (slow, and needed only here)

    tables = {
        "run": {"name": "data", "steps": 1},
        "student": {"architecture": STUDENT},
        "data": {"shards": str(shards), "micro_batch_tokens": MICRO_BATCH_TOKENS},
        "objective": {"name": "mlm"},
        "optim": {"lr": 1e-4},
    }
    figures = step.measure(PretrainConfig.model_validate(tables), steps=50)
    return figures.phases["data"] / figures.seconds
