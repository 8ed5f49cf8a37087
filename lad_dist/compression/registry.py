"""Registry of compressions: `compression.name` in a config -> class. A new one is one file and one line here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.heads import Heads
from lad_dist.compression.ladabert import LadaBERT
from lad_dist.compression.low_rank import LowRank
from lad_dist.compression.prune import Prune
from lad_dist.compression.quantize import Quantize
from lad_dist.compression.scale_position_embeddings import ScalePositionEmbeddings
from lad_dist.compression.theseus import Theseus
from lad_dist.config.errors import UserError
from lad_dist.config.load import find_class, own_code, validate_arguments
from lad_dist.config.schema import NamedOptions
from lad_dist.models.loading import PreTrainedModel

COMPRESSIONS: dict[str, type[Compression]] = {
    kind.name: kind for kind in (Heads, LadaBERT, LowRank, Prune, Quantize, ScalePositionEmbeddings, Theseus)
}


def create_compression(named: NamedOptions) -> Compression:
    """Return the compression of a `[[compression]]` table: a registered one, or "my_package.module:Class".

    Raises:
        UserError: The name is unknown, the class is no dataclass, or an argument does not fit.
    """
    kind: Callable[..., Compression] = find_class("compression.name", named.name, COMPRESSIONS, Compression)
    where = f"compression {named.name}"
    if not _is_keyword_dataclass(kind):
        raise UserError(f"{where}: no keyword-only dataclass; write @dataclass(frozen=True, kw_only=True) above it")
    if getattr(kind, "apply", None) is Compression.apply:
        raise UserError(f"{where}: has no method apply; write it as lad_dist.compression.base.Compression says")
    with own_code(where, named.name):
        return kind(**validate_arguments(where, kind, named.options))


def _is_keyword_dataclass(kind: Any) -> bool:
    return is_dataclass(kind) and all(field.kw_only for field in fields(kind) if field.init)


def check_compressions(compressions: Sequence[Compression], spec: RunSettings) -> None:
    """Check compressions against the config, and their order.

    Raises:
        UserError: One of them does not go with the config, or with those before it.
    """
    for number, compression in enumerate(compressions):
        where = f"compression {compression.name}"
        if spec.config.zero_stage == 3 and not compression.supports_zero3:
            raise UserError(
                f"{where}: cannot run under ZeRO 3, where a process has a share of the weights; set a stage up to 2"
            )
        for earlier in compressions[:number]:
            if not earlier.inserts <= compression.may_follow:
                in_turn = compression.inserts <= earlier.may_follow and compression.name != earlier.name
                advice = f"list it before {earlier.name}" if in_turn else "list one of them alone"
                raise UserError(f"{where}: cannot follow {earlier.name}, whose modules it cannot change; {advice}")
        compression.check(spec)


def apply_compressions(
    model: PreTrainedModel, compressions: Iterable[Compression], context: CompressionContext = NO_DATA
) -> PreTrainedModel:
    """Return the model after these compressions, in order."""
    for compression in compressions:
        model = compression.apply(model, context)
    return model
