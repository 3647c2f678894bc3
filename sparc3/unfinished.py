"""A run that writes its output piece by piece, and that can be killed at any moment and go on where it was.

Beside the output folder OUT lies .OUT.unfinished while the run goes on:

    run.json   what the run depends on; another run is refused
    new/       the output so far; it becomes OUT in the end
    scratch/   what only this run needs (in --offload-dir, where one is given)

Every file is written beside its place, waited for until it is on the disk, and renamed: it is there whole or not at
all. The files of a block come before the one that says that the block is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparc3.checkpoint import read_header, sync, write_tensors
from sparc3.errors import InputError
from sparc3.export import check_new, replace_folder

try:
    import fcntl
except ImportError:  # Windows: two processes that write one output are not told apart there
    fcntl = None  # type: ignore[assignment]

_PART = ".part"
_NOTE = "note"


class Unfinished:
    """The folders of one run.

    Args:
        out: the output folder; only its parent is touched before ``finish``.
        identity: what the run depends on, plain JSON values.
        resume: go on with a run that was broken off, if there is one.
        force: replace ``out``, and give up a run that was broken off.
        scratch: where scratch files go; None: beside ``out``.
        writer: False for a process that only reads what another one of the same run writes.

    Attributes:
        identity: what the run depends on.
        complete: the run that was to go on has put its output in place; nothing is left to do.

    Raises:
        InputError: ``out`` exists, a run was broken off and is neither resumed nor given up, it depends on
            something else (what, is said), another process is writing, or the folders cannot be written.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        resume: bool = False,
        force: bool = False,
        scratch: Path | None = None,
        writer: bool = True,
    ) -> None:
        self.out, self.force = out, force
        self.root, self.scratch = _folders(out, scratch)
        self.new = self.root / "new"
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.complete = False
        if writer:
            self._open(self.identity, resume)

    def _open(self, identity: dict[str, Any], resume: bool) -> None:
        manifest = self.root / "run.json"
        if manifest.is_file() and resume:
            _compare(manifest, identity)
            if self.out.exists() and not self.new.exists():
                self.complete = True
                return self.discard()
        elif manifest.is_file() and not self.force:
            raise InputError(
                f"a run into {self.out} was broken off: go on with it with --resume, or give it up with --force"
            )
        elif resume and (finished := _finished(self.out)) is not None:
            changed = list(_differences(finished, identity, {"machine"}))
            if not changed:
                self.complete = True
                return
            if not self.force:
                raise InputError(
                    f"{self.out} is finished, and it is of another run: {'; '.join(changed[:3])}. Give another "
                    "--out, or --force to replace it"
                )
        check_new(self.out, self.force)
        with writing(self.root):
            self.root.mkdir(exist_ok=True)
            self._lock()
            if not (manifest.is_file() and resume):
                for left in (manifest, self.new, self.scratch):
                    _remove(left)
            for folder in (self.new, self.scratch):
                folder.mkdir(parents=True, exist_ok=True)
            # What was being written when the run was broken off.
            for folder in (self.root, self.new, self.scratch):
                for part in folder.glob(f"*{_PART}"):
                    part.unlink()
            if not manifest.is_file():
                with self.write(manifest) as file:
                    file.write((json.dumps(identity, indent=1) + "\n").encode())

    def _lock(self) -> None:
        self._locked = (self.root / "lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another process is writing {self.out}; wait for it or end it") from None

    @contextmanager
    def write(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write to, which is at ``path`` when the block ends well; InputError where the disk is full."""
        part = path.with_name(path.name + _PART)
        with writing(path):
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)

    def save(
        self,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        note: Any = None,
        metadata: Mapping[str, str] = {},
    ) -> None:
        """Write a safetensors file with a note, plain JSON values, in its header."""
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        notes = {} if note is None else {_NOTE: json.dumps(note)}
        with self.write(path) as file:
            write_tensors(file, shapes, tensors.values(), {**metadata, **notes})

    def discard(self) -> None:
        """Remove everything of this run but ``out``."""
        for folder in (self.scratch, self.new):
            shutil.rmtree(folder, ignore_errors=True)
        # The manifest last: as long as it is there, what it stands for is known.
        shutil.rmtree(self.root, ignore_errors=True)

    def finish(self) -> None:
        """Put the output in its place, and remove the rest."""
        with writing(self.out):
            for file in self.new.iterdir():
                file.chmod(0o644)
            if self.out.exists():
                replace_folder(self.new, self.out)
            else:
                self.new.rename(self.out)
            sync(self.out.parent)
        self.discard()


def _folders(out: Path, scratch: Path | None) -> tuple[Path, Path]:
    root = out.parent / f".{out.name}.unfinished"
    # Outputs of the same name in other folders may share an --offload-dir.
    where = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return root, scratch / f"sparc3-{where}" if scratch else root / "scratch"


def free_space(out: Path, scratch: Path | None) -> tuple[int, int | None]:
    """Bytes that a run may write where the output goes and in ``scratch``, None where that is the same disk.

    What a run that was broken off has written counts as free: it goes on with it, or it is removed.
    """
    root, inside = _folders(out.absolute(), scratch)
    folder = next(parent for parent in root.parents if parent.is_dir())
    apart = scratch is not None and _disk_of(scratch) != _disk_of(folder)
    written, spilled = _bytes_in(root), _bytes_in(inside) if scratch else 0
    free = shutil.disk_usage(folder).free + written
    if not apart:
        return free + spilled, None
    assert scratch is not None
    return free, shutil.disk_usage(scratch).free + spilled


def _disk_of(folder: Path) -> int:
    return folder.stat().st_dev


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def note_of(path: Path) -> Any:
    """The note of a file that ``Unfinished.save`` wrote."""
    return json.loads(read_header(path)[1][_NOTE])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """InputError for what can go wrong when files are written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; what is finished is kept: make room or mend it, and "
            "give the same command with --resume"
        ) from error


def _compare(manifest: Path, identity: Mapping[str, Any]) -> None:
    """InputError unless the run that was broken off depended on the same."""
    try:
        before = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{manifest} cannot be read ({error}); give this run up with --force") from error
    changed = list(_differences(before, identity))
    if changed:
        raise InputError(
            f"the run that was broken off is another one: {'; '.join(changed[:3])}. Give the same command, another "
            "--out, or --force to give that run up"
        )


def _finished(out: Path) -> dict[str, Any] | None:
    """What the run depended on that wrote ``out`` block by block; None for anything else."""
    try:
        identity = json.loads((out / "report.json").read_text(encoding="utf-8"))["streamed"]["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if isinstance(identity, dict) else None


def _differences(before: Any, now: Any, but: Container[str] = (), path: str = "") -> Iterable[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in but:
                inside = f"{path}.{key}" if path else str(key)
                yield from _differences(before.get(key), now.get(key), (), inside)
    elif before != now:
        yield f"{path} was {json.dumps(before)} and is {json.dumps(now)}"
