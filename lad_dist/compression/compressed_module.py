"""Parts: compressed pieces of a student.

A Part stands where a plain module stood and trains with the student. `at(moment)` moves its schedule, `pruned()`
says which weights it has just taken away. Two plain modules have its function: `fold()` returns
one of the kind that stood there, for the ordinary folder that is exported; `compact()` the one that computes least.
Surgeries put Parts in: low_rank.py, pruning.py and theseus.py have their kinds.

    Part            the base of all
    parts           those of a model
    fold, compact   a model without them
    walk, weights   its modules and weights as they would be without them
"""

from collections.abc import Callable, Iterator
from operator import methodcaller

import torch
from torch import Tensor, nn

from lad_dist.core.step_state import StepState


class CompressedModule(nn.Module):
    def on_step_start(self, moment: StepState) -> None:
        """Moves schedules, once before the micro-batches of each step. What it leaves behind is a function of the
        moment and of what a checkpoint holds, and so the same on all processes and after a resumption."""

    def newly_pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Weights of which the last `at` took some away, with masks that are True where they stay: the optimizer
        forgets the rest."""
        return iter(())

    def merge(self) -> nn.Module | None:
        """The plain module with the same function, of the kind that the Part replaced; None where it replaced none."""
        raise NotImplementedError

    def to_compact(self) -> nn.Module | None:
        """The plain module with the same function that computes least."""
        return self.merge()


ToPlain = Callable[[CompressedModule], nn.Module | None]
MERGED, COMPACT = methodcaller("merge"), methodcaller("to_compact")


def compressed_modules(model: nn.Module) -> list[CompressedModule]:
    """The model's Parts, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, CompressedModule)]


def merge_all(model: nn.Module) -> nn.Module:
    """The model, each Part replaced by the module that it folds into, in place."""
    return _replaced(model, MERGED)


def compact_all(model: nn.Module) -> nn.Module:
    """The model, each Part replaced by the module that computes least, in place."""
    return _replaced(model, COMPACT)


def iter_modules(module: nn.Module, plain: ToPlain, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, as they would be with each Part `plain`; nothing is changed."""
    if isinstance(module, CompressedModule):
        with torch.device(next(module.parameters(), torch.empty(0)).device):
            made = plain(module)
        if made is not None:
            yield from iter_modules(made, plain, name)
        return
    yield name, module
    for child, inner in module.named_children():
        yield from iter_modules(inner, plain, f"{name}.{child}" if name else child)


def iter_weights(model: nn.Module, plain: ToPlain) -> Iterator[tuple[str, nn.Parameter]]:
    """All weights by name, as they would be with each Part `plain`; shared ones once, where they come first."""
    seen: set[int] = set()
    kept = list(iter_modules(model, plain))  # while they live, no two weights have one id
    for name, module in kept:
        for own, weight in module.named_parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield f"{name}.{own}" if name else own, weight


def _replaced(model: nn.Module, plain: ToPlain) -> nn.Module:
    for name, child in list(model.named_children()):
        own = plain(child) if isinstance(child, CompressedModule) else child
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, _replaced(own, plain))
    return model
