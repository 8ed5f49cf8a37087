"""Checkpoints on disk: folders that exist as a whole or not at all.

    <folder>/step-000000120/manifest.json    metadata, and the size and sha256 of every file
                            state/…          what the engine wrote
             latest                          the newest one's name, for people; the manifests decide
             step-….draft                    being written
             step-….damaged                  did not hold what its manifest lists when a run wanted to resume
             step-….removed                  being removed

Files become durable before the manifest that lists them, the manifest before the folder's new name, and all of it
before an older checkpoint is removed. So whenever the machine stops, the newest name without a suffix is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lad_dist.config.errors import EXIT_NO_CHECKPOINT, UserError
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.atomic_io import Digest, commit, file_digest, list_files, write_text

FORMAT = 2
MANIFEST = "manifest.json"

logger = get_logger(__name__)


class NoValidCheckpoint(UserError):
    """Checkpoints exist and none is valid: a fresh start would hide the loss."""

    code = EXIT_NO_CHECKPOINT


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of a run in one folder; the main process alone calls the methods.

    `keep` of the newest stay; every `keep_every`-th stays for good, none of them for 0. Metadata may name, as
    `best: {"step": …}`, an earlier checkpoint that a resumed run exports: that one stays as well, and without it the
    later one is not valid.
    """

    folder: Path
    keep: int = 2
    keep_every: int = 0

    def begin(self, step: int) -> Path:
        """Return an empty folder to write the checkpoint of `step` into."""
        draft = self._path(step).with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def abort(self, draft: Path) -> None:
        """Remove a draft."""
        shutil.rmtree(draft, ignore_errors=True)

    def commit(self, draft: Path, metadata: Mapping[str, Any], digests: Mapping[str, Digest]) -> Path:
        """Make a draft a checkpoint. `digests`: of the files, by their path in the draft."""
        final = draft.with_suffix("")
        number = 1 + max((_number(path) for path in self._checkpoint_paths()), default=0)
        body = {"format": FORMAT, "name": final.name, "number": number, "metadata": metadata, "files": digests}
        write_text(draft / MANIFEST, _render(body))
        if final.exists():
            _remove(final)
        commit(draft, final)
        try:
            write_text(self.folder / "latest", final.name)
            self._prune()
        except OSError as error:  # the checkpoint is committed all the same
            logger.warning("%s: %s", self.folder, error)
        return final

    def newest(self) -> Path | None:
        """Return the newest valid checkpoint, None where none exists.

        Newer damaged ones are reported and set aside. Raises NoValidCheckpoint where all are damaged.
        """
        checkpoints = self._checkpoint_paths()
        damaged: list[Path] = []
        for checkpoint in reversed(checkpoints):
            fault = _fault(checkpoint) or _fault_of_best(checkpoint)
            if fault is None:
                for newer in damaged:
                    _set_aside(newer, ".damaged")
                return checkpoint
            if _is_of_earlier_version(checkpoint):
                raise NoValidCheckpoint(
                    f"{checkpoint}: written by an earlier version of lad_dist; choose another run.name, or remove the "
                    "run folder"
                )
            damaged.append(checkpoint)
            logger.warning("%s: damaged (%s), trying the one before it", checkpoint, fault)
        if checkpoints:
            raise NoValidCheckpoint(
                f"{self.folder}: none of {len(checkpoints)} checkpoints is valid; remove the run folder to start afresh"
            )
        return None

    def verified(self, step: int) -> Path:
        """Return the checkpoint of a step; raise NoValidCheckpoint where it is not what was written."""
        checkpoint = self._path(step)
        if fault := _fault(checkpoint):
            raise NoValidCheckpoint(f"{checkpoint}: damaged ({fault}); the same command resumes from an earlier one")
        return checkpoint

    def go_back(self, step: int) -> str | None:
        """Remove the checkpoints later than the step; return the newest one's name.

        The first checkpoint stays in any case.
        """
        for later in [path for path in self._checkpoint_paths()[1:] if path > self._path(step)][::-1]:
            _remove(later)
        return self.newest_name()

    def cleanup(self, *suffixes: str) -> None:
        """Remove the folders with these suffixes, by default those that a crash left half written or half removed.

        Each of them takes the room of a checkpoint.
        """
        for suffix in suffixes or ("draft", "removed"):
            for leftover in self.folder.glob(f"step-*.{suffix}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def newest_name(self) -> str | None:
        """Return the name of the newest checkpoint, whether it is valid or not."""
        return max((path.name for path in self._checkpoint_paths()), default=None)

    def _path(self, step: int) -> Path:
        return self.folder / _name(step)

    def _checkpoint_paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if not path.suffix) if self.folder.exists() else []

    def _prune(self) -> None:
        """Remove what is older than the newest, and what crashes have left behind."""
        checkpoints = self._checkpoint_paths()
        stay = {path for path in checkpoints if self.keep_every and _number(path) % self.keep_every == 0}
        stay |= {*checkpoints[-self.keep :]}
        for old in {*checkpoints} - stay - {*map(_best_of, stay)}:
            _remove(old)
        self.cleanup("*")
        for leftover in self.folder.glob("latest.*"):
            leftover.unlink(missing_ok=True)


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return what was recorded with a checkpoint."""
    return _manifest(checkpoint)["metadata"]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())["manifest"]


def _render(manifest: Mapping[str, Any]) -> str:
    """Return the text of the manifest's file, with a digest of the manifest itself."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": digest}, indent=1) + "\n"


def _number(checkpoint: Path) -> int:
    """Return the number of the checkpoint among all of the run, from 1; 0 where it cannot be read."""
    try:
        return int(_manifest(checkpoint)["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint that this one names as the best so far; None where it names none or cannot be read."""
    try:
        return checkpoint.with_name(_name(read_metadata(checkpoint)["best"]["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fault_of_best(checkpoint: Path) -> str | None:
    """Return what is wrong with the checkpoint that this one names as the best so far."""
    best = _best_of(checkpoint)
    fault = _fault(best) if best is not None and best != checkpoint else None
    return f"{best.name}, the best so far: {fault}" if best is not None and fault else None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, by a rename first: half a checkpoint must not look like one."""
    shutil.rmtree(_set_aside(checkpoint, ".removed"), ignore_errors=True)


def _set_aside(checkpoint: Path, suffix: str) -> Path:
    aside = checkpoint.with_suffix(suffix)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _fault(checkpoint: Path) -> str | None:
    """Return what is wrong with the checkpoint, None where it is what was written."""
    try:
        manifest = _manifest(checkpoint)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, and this version reads {FORMAT}"
        if _render(manifest) != (checkpoint / MANIFEST).read_text() or manifest["name"] != checkpoint.name:
            return f"{MANIFEST} is not what was written"
        return _damaged_file(checkpoint, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _is_of_earlier_version(checkpoint: Path) -> bool:
    """Return whether the manifest is whole, and of a lower format."""
    try:
        manifest = _manifest(checkpoint)
        return _render(manifest) == (checkpoint / MANIFEST).read_text() and int(manifest["format"]) < FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _damaged_file(checkpoint: Path, expected: Mapping[str, Digest]) -> str | None:
    actual = {str(path.relative_to(checkpoint)) for path in list_files(checkpoint)} - {MANIFEST}
    if added := actual - expected.keys():
        return f"{min(added)} was added"
    changed = [name for name, digest in expected.items() if file_digest(checkpoint / name) != digest]
    return f"{changed[0]} is not what was written" if changed else None
