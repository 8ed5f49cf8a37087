"""Compressed modules: what stands in a student in the place of plain modules while it trains.

Two plain modules have the function of a compressed one. One is of the kind that it replaced: the exported folder has
that one. The other computes least. Low rank, pruning of weights and of heads, and Theseus have their own kinds.
"""

from collections.abc import Callable, Iterator
from operator import methodcaller

import torch
from torch import Tensor, nn

from lad_dist.core.step_state import StepState


class CompressedModule(nn.Module):
    """A module that replaces plain modules of a student while it trains."""

    def on_step_start(self, state: StepState) -> None:
        """Move schedules, once before the micro-batches of each step.

        The result is a function of the state and of what a checkpoint holds, and so the same on all processes and after
        a resumption.
        """

    def on_step_end(self) -> None:
        """Take note of what the micro-batches of a step showed, once after the last of them.

        All processes call it together, and must have the same state afterwards.
        """

    def is_final(self, state: StepState) -> bool:
        """Return whether the module has its final form after this step, so that later ones change weights alone.

        Until then a student is another model than the one in the end, and `run.best_metric` does not choose it.
        """
        return True

    def newly_pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Return the weights that the last `on_step_start` pruned, with masks that are True where they stay.

        The optimizer resets its state where a mask is False.
        """
        return iter(())

    def merge(self) -> nn.Module | None:
        """Return the plain module with the same function, of the kind that was replaced; None where none was."""
        raise NotImplementedError

    def to_compact(self) -> nn.Module | None:
        """Return the plain module with the same function that computes least."""
        return self.merge()


ToPlain = Callable[[CompressedModule], nn.Module | None]
MERGED, COMPACT = methodcaller("merge"), methodcaller("to_compact")


def compressed_modules(model: nn.Module) -> list[CompressedModule]:
    """Return the model's compressed modules, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, CompressedModule)]


def merge_all(model: nn.Module) -> nn.Module:
    """Replace each compressed module of the model by the module that it merges into, in place."""
    return replace_all(model, MERGED)


def as_plain(module: nn.Module, to_plain: ToPlain) -> nn.Module | None:
    """Return the module's plain module, or the module where it is one. A plain module may be a compressed one again."""
    plain: nn.Module | None = module
    while isinstance(plain, CompressedModule):
        plain = to_plain(plain)
    return plain


def replace_all(model: nn.Module, to_plain: ToPlain) -> nn.Module:
    """Replace each compressed module of the model by its plain module, in place."""
    for name, child in list(model.named_children()):
        plain = as_plain(child, to_plain)
        if plain is None:
            delattr(model, name)
        else:
            setattr(model, name, replace_all(plain, to_plain))
    return model


def iter_modules(module: nn.Module, to_plain: ToPlain, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name, as they are after `to_plain` of each compressed module. The model stays as it is."""
    if isinstance(module, CompressedModule):
        with torch.device(next(module.parameters(), torch.empty(0)).device):
            plain = to_plain(module)
        if plain is not None:
            yield from iter_modules(plain, to_plain, name)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from iter_modules(child, to_plain, f"{name}.{child_name}" if name else child_name)


def iter_weights(model: nn.Module, to_plain: ToPlain) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all weights by name, as they are after `to_plain`. Shared ones come once, by their first name."""
    visited: set[int] = set()
    modules = list(iter_modules(model, to_plain))  # while they live, no two weights have one id
    for module_name, module in modules:
        for weight_name, weight in module.named_parameters(recurse=False):
            if id(weight) not in visited:
                visited.add(id(weight))
                yield f"{module_name}.{weight_name}" if module_name else weight_name, weight
