"""Random damage to a checkpoint, and content that executes something."""

import os
import random
from pathlib import Path
from typing import Any

from lad_dist.utils.atomic_io import list_files


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def random_damage(checkpoint: Path, draw: random.Random) -> str:
    """Flips, cuts, deletes, swaps or zeroes something in it: what was done."""
    file = draw.choice(sorted(list_files(checkpoint)))
    content = file.read_bytes()
    place = draw.randrange(len(content))
    kind = draw.choice(["flip", "cut", "delete", "swap", "zero"])
    if kind == "flip":
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    elif kind == "cut":
        file.write_bytes(content[:place])
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(draw.choice([path for path in list_files(checkpoint) if path != file]).read_bytes())
    else:
        file.write_bytes(content[:place] + bytes(len(content) - place))
    return f"{kind} {file.relative_to(checkpoint)} at {place} of {len(content)}"
