"""Checkpoints: folders that are there whole or not at all.

    <folder>/step-000000120/manifest.json    facts, and the size and sha256 of every file
                            state/…          what the engine wrote
             latest                          the newest one's name, for people; the manifests decide
             step-….draft                    being written
             step-….damaged                  did not hold what its manifest says when it was to be resumed from
             step-….removed                  being removed

    Checkpoints(folder, keep, keep_every)    draft, commit, discard, newest, go_back, tidy: for the main process
    facts_of(checkpoint)                     what was recorded with it

Files become durable before the manifest that lists them, this before the folder's new name, and all of it before an
older checkpoint goes: whenever the machine stops, the newest name without a suffix is whole.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lad_dist.config.errors import EXIT_NO_CHECKPOINT, UserError
from lad_dist.utils.atomic_io import Digest, commit, file_digest, list_files, write_text

FORMAT = 1
MANIFEST = "manifest.json"


class NoValidCheckpoint(UserError):
    """Checkpoints are there, none of them valid: a fresh start would hide the loss."""

    code = EXIT_NO_CHECKPOINT


@dataclass(frozen=True)
class CheckpointStore:
    """keep: how many of the newest stay; keep_every: every so many-th stays for good, 0 for none of them."""

    folder: Path
    keep: int = 2
    keep_every: int = 0

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        draft = self._path(step).with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def abort(self, draft: Path) -> None:
        shutil.rmtree(draft, ignore_errors=True)

    def commit(self, draft: Path, facts: Mapping[str, Any], digests: Mapping[str, Digest]) -> Path:
        """Makes a draft a checkpoint. `digests`: of its files, by their path in it."""
        final = draft.with_suffix("")
        number = 1 + max((_number(saved) for saved in self._saved()), default=0)
        body = {"format": FORMAT, "name": final.name, "number": number, "facts": facts, "files": digests}
        write_text(draft / MANIFEST, _render(body))
        if final.exists():
            _remove(final)
        commit(draft, final)
        try:
            write_text(self.folder / "latest", final.name)
            self._prune()
        except OSError as error:  # it is committed all the same
            print(f"{self.folder}: {error}", file=sys.stderr)
        return final

    def newest(self) -> Path | None:
        """The newest valid checkpoint, None when there never was one. Newer ones that are damaged are reported and put
        aside. Raises NothingToResume."""
        saved = self._saved()
        damaged: list[Path] = []
        for checkpoint in reversed(saved):
            fault = _fault(checkpoint)
            if fault is None:
                for each in damaged:
                    _put_aside(each, ".damaged")
                return checkpoint
            damaged.append(checkpoint)
            print(f"{checkpoint}: damaged ({fault}), trying the one before it", file=sys.stderr)
        if saved:
            raise NoValidCheckpoint(
                f"{self.folder}: none of the {len(saved)} checkpoints is valid; remove the run folder to start afresh"
            )
        return None

    def go_back(self, step: int) -> str | None:
        """Removes those later than the step, but the first of them where there is no earlier one; the newest one's
        name then."""
        for later in [path for path in self._saved()[1:] if path > self._path(step)][::-1]:
            _remove(later)
        return self.newest_name()

    def cleanup(self, *suffixes: str) -> None:
        """Removes what has these suffixes; by default what a crash has left half written or half removed: it takes the
        room of a checkpoint."""
        for suffix in suffixes or ("draft", "removed"):
            for left in self.folder.glob(f"step-*.{suffix}"):
                shutil.rmtree(left, ignore_errors=True)

    def newest_name(self) -> str | None:
        """Of the newest one, whether it is valid or not."""
        return max((path.name for path in self._saved()), default=None)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _saved(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if not path.suffix) if self.folder.exists() else []

    def _prune(self) -> None:
        """Removes what is older than the newest, and what crashes have left behind."""
        for old in self._saved()[: -self.keep]:
            if not (self.keep_every and _number(old) % self.keep_every == 0):
                _remove(old)
        self.cleanup("*")
        for left in self.folder.glob("latest.*"):
            left.unlink(missing_ok=True)


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """What was recorded with a checkpoint."""
    return _manifest(checkpoint)["facts"]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())["manifest"]


def _render(manifest: Mapping[str, Any]) -> str:
    """The manifest's file, which vouches for itself too."""
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": own}, indent=1) + "\n"


def _number(checkpoint: Path) -> int:
    """How many checkpoints of the run there were when it was made, with itself; 0 where that cannot be read."""
    try:
        return int(_manifest(checkpoint)["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _remove(checkpoint: Path) -> None:
    """By a rename first: a checkpoint of which half is removed must not look like one."""
    shutil.rmtree(_put_aside(checkpoint, ".removed"), ignore_errors=True)


def _put_aside(checkpoint: Path, suffix: str) -> Path:
    aside = checkpoint.with_suffix(suffix)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with it, None when it is what was written."""
    try:
        manifest = _manifest(checkpoint)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, and this version reads {FORMAT}"
        if _render(manifest) != (checkpoint / MANIFEST).read_text() or manifest["name"] != checkpoint.name:
            return f"{MANIFEST} is not what was written"
        return _damaged_file(checkpoint, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _damaged_file(checkpoint: Path, expected: Mapping[str, Digest]) -> str | None:
    found = {str(path.relative_to(checkpoint)) for path in list_files(checkpoint)} - {MANIFEST}
    if added := found - expected.keys():
        return f"{min(added)} was added"
    wrong = [name for name, written in expected.items() if file_digest(checkpoint / name) != written]
    return f"{wrong[0]} is not what was written" if wrong else None
