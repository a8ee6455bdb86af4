"""Training checkpoints: DCP files inside an atomic, fsynced, SHA-256-verified folder ``step-000100``.

A save goes to ``.tmp-step-000100``; when every rank has written, rank 0 adds meta.json and MANIFEST.json and renames.
A load verifies the manifest before it parses anything and then accounts for every key. Old checkpoints are renamed out
of sight before they are deleted. So a kill, a full disk or a flipped bit costs at most the newest checkpoint, and is
always noticed.
"""

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.tensor import DTensor

from infir2.checkpoint import manifest, safe_reader
from infir2.checkpoint.cause import reason
from infir2.checkpoint.folders import META, STEP, read_meta, step_folders
from infir2.checkpoint.state import cpu_copy, flatten
from infir2.durable import write_file
from infir2.errors import CheckpointError, some_of
from infir2.parallel.ranks import Ranks

_log = logging.getLogger(__name__)
# DCP says this at every save and load of a single process, where it is what we mean.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable", category=UserWarning)


class CheckpointStore:
    """The checkpoints of one run. With several ranks (torchrun) every method but ``poll`` is collective.

    Make it after the process group; ``close`` it before the group is destroyed. ``keep`` newest checkpoints are kept
    (0 = all), and those at multiples of ``keep_every`` for ever (0 = none). The folder must be shared by all ranks.
    """

    problems: list[str]
    """What the last ``latest`` or ``find`` saw in damaged checkpoints, one line each."""

    def __init__(self, root: Path, keep: int = 3, keep_every: int = 0, async_save: bool = True) -> None:
        self.root = Path(root)
        self.keep, self.keep_every, self.async_save = keep, keep_every, async_save
        self.problems = []
        self._ranks = Ranks()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._on_disk: list[int] = []
        self._damaged: set[Path] = set()
        self._verified: dict[Path, object] = {}
        self._clean = False

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / f"step-{step:06d}"

    def save(self, step: int, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Save a (nested) state dict of tensors and DTensors, and ``meta`` (JSON), as checkpoint ``step``.

        A tensor that is no DTensor is the same on every rank: one of them copies and writes it. With async_save tensors
        are copied before this returns and written in the background; a failure to write is then raised by the next
        ``poll``, ``wait``, ``save`` or ``close``. A step that is already there and intact is not written again; a
        damaged one is replaced. Raises CheckpointError; earlier checkpoints stay as they are.
        """
        self._settle()
        flat = self._own_part(flatten(tensors))
        text = json.dumps({"step": step, **meta}, indent=1)
        if not self.async_save:
            self._write(step, flat, text)
            return
        copies = {name: cpu_copy(tensor) for name, tensor in flat.items()}
        self._thread = threading.Thread(target=self._write_behind, args=(step, copies, text), name=f"save-{step}")
        self._thread.start()

    def save_streamed(
        self, step: int, shapes: Mapping[str, Any], read: Callable[[str], Tensor], meta: Mapping[str, Any]
    ) -> None:
        """``save`` for tensors that are not in memory together: ``read`` gives each when it is written.

        ``shapes`` is a state dict of meta tensors; ``read`` is called with its flat names. One process, at once.
        """
        self._write(step, flatten(shapes), json.dumps({"step": step, **meta}, indent=1), read)

    def poll(self) -> list[int]:
        """The steps whose checkpoints have come onto the disk since this or ``wait`` was last asked; returns at once.

        Raises CheckpointError if a background save has failed. Called between the micro-batches of training.
        """
        if self._thread is not None and self._thread.is_alive():
            return []
        return self.wait()

    def wait(self) -> list[int]:
        """``poll`` after the background save has ended."""
        self._settle()
        steps, self._on_disk = self._on_disk, []
        return steps

    def _settle(self) -> None:
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Return when the background save is on disk. Raises CheckpointError if it failed."""
        self._settle()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        else:
            self._join()  # The error that is on its way is the first one; do not hide it.

    def latest(self) -> Path | None:
        """The newest checkpoint whose every file is as it was written; None when there is no checkpoint at all.

        Damaged ones are passed over, with a warning and a line in ``problems``. Raises CheckpointError if there are
        checkpoints but none is intact, or if one cannot be read: nothing is wrong with it, so none is taken instead.
        """
        self._join()
        self.problems = []
        return self._newest_intact(self.root)

    def find(self, text: str) -> Path:
        """The checkpoint a user means: a step folder, or a run or checkpoints folder for its newest intact one.

        Raises CheckpointError if there is none, or if the step folder named is damaged.
        """
        self._join()
        self.problems = []
        path = Path(text).expanduser()
        kind = self._ranks.lead(lambda: _kind_of_folder(path))
        if kind == "missing":
            raise CheckpointError(f"{text}: no such checkpoint folder")
        if kind == "step":
            self._require_intact(path)
            return path
        for folder in (path / "checkpoints", path):
            if found := self._newest_intact(folder):
                return found
        hint = (
            "; it looks like a Hugging Face folder, which model.path takes" if (path / "config.json").exists() else ""
        )
        raise CheckpointError(f"{text}: no checkpoint in it (looked for step-N folders here and in checkpoints/){hint}")

    def load(
        self, path: Path, tensors: Mapping[str, Any], ignore: Collection[str] = (), cast: Collection[str] = ()
    ) -> dict[str, Any]:
        """Verify checkpoint ``path``, copy it into ``tensors`` (a state dict of live tensors) and return its meta.

        Works across world sizes. ``ignore`` names top-level sections of the checkpoint (such as "optim") that may stay
        unread, ``cast`` those in which one float dtype may be rounded to another. Raises CheckpointError, before any
        tensor is changed, if a file is damaged or if a key is missing, unexpected or differs in shape or dtype.
        """
        self._join()
        path, flat = Path(path), flatten(tensors)
        if self._verified.get(path) != self._ranks.lead(lambda: _fingerprint(path)):
            self._require_intact(path)
        read: list[tuple[Metadata, dict[str, Any]]] = []
        self._ranks.each(lambda: read.append(_read_index_and_meta(path, flat, ignore, cast)))
        index, meta = read[0]
        reader = safe_reader.VerifiedReader(path, index)
        try:
            dcp.load(flat, storage_reader=reader, process_group=self._ranks.group, no_dist=self._ranks.alone)
        except (Exception, dcp.CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {reason(error)}") from error
        return meta

    def _own_part(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes: its shards, and its share of the tensors that every process holds whole."""
        whole = [name for name, tensor in flat.items() if not isinstance(tensor, DTensor)]
        whole.sort(key=lambda name: (-flat[name].numel(), name))  # so that all get about as many bytes
        mine = self._ranks.share(whole)
        others = set(whole).difference(mine)
        return {name: tensor for name, tensor in flat.items() if name not in others}

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_behind(self, step: int, tensors: dict[str, Tensor], meta: str) -> None:
        try:
            self._write(step, tensors, meta)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # In a thread it would be printed and forgotten.
            self._failure = CheckpointError(f"{self.root}: step {step}: {reason(error)}")
            self._failure.__cause__ = error

    def _write(
        self, step: int, tensors: dict[str, Tensor], meta: str, read: Callable[[str], Tensor] | None = None
    ) -> None:
        final = self.folder(step)
        temporary = self.root / f"{manifest.TEMPORARY}{final.name}"
        try:
            if self._ranks.lead(final.exists) and not self._problems_of(final):
                _log.info("%s exists and is intact: not written again", final)
                return
            if not self._clean:  # Not before the first save: who only reads must not touch another process's folder.
                self._ranks.lead(lambda: self._tidy(lambda: manifest.remove_leftovers(self.root)))
                self._clean = True
            self._ranks.lead(lambda: _make_empty(temporary))
            # One thread: with more, DCP loses the errors of all but one of them.
            # Streamed, a file for each tensor: DCP holds the tensors of a file until it is closed.
            together = read is None
            writer = dcp.FileSystemWriter(temporary, together, sync_files=True, thread_count=1)
            planner = None if read is None else _ReadWhenWritten(read)
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=planner,
                process_group=self._ranks.group,
                no_dist=self._ranks.alone,
            )
            self._ranks.lead(lambda: write_file(temporary / META, meta.encode()))
            names = self._ranks.lead(lambda: sorted(path.name for path in temporary.iterdir()))
            measured = self._ranks.each(
                lambda: {name: manifest.measure(temporary / name, sync=True) for name in self._ranks.share(names)}
            )
            entries = {name: entry for part in measured for name, entry in part.items()}
            self._ranks.lead(lambda: self._commit(temporary, final, entries))
        except (Exception, dcp.CheckpointException) as error:  # DCP's exception is a BaseException.
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            why = reason(error)
            raise CheckpointError(
                f"{self.root}: step {step} could not be saved: {why}. Earlier checkpoints are untouched; make room or "
                "mend it, and run the same command again"
            ) from error
        self._on_disk.append(step)
        self._ranks.lead(lambda: self._retire(final))

    def _commit(self, temporary: Path, final: Path, entries: dict[str, manifest.Entry]) -> None:
        # What could not be read back must fail now, while the previous checkpoint is at hand.
        safe_reader.read_metadata(temporary, {name: entry.size for name, entry in entries.items()})
        write_file(temporary / manifest.MANIFEST, manifest.encode(entries))
        if final.exists():
            manifest.to_trash(final)
        manifest.publish(temporary, final)
        self._damaged.discard(final)

    def _retire(self, saved: Path) -> None:
        """Delete what retention does not keep. ``saved`` has just been written, so an intact one always remains."""

        def work() -> None:
            for path in self._surplus(saved) if self.keep else []:
                manifest.to_trash(path)
            manifest.empty_trash(self.root)

        self._tidy(work)

    def _tidy(self, work: Callable[[], None]) -> None:
        """Do ``work``, which only makes room: where it fails, checkpoints are saved all the same."""
        try:
            work()
        except OSError as error:
            _log.warning("%s: an old checkpoint could not be deleted: %s", self.root, reason(error))

    def _surplus(self, saved: Path) -> list[Path]:
        steps = step_folders(self.root)
        intact = [(step, path) for step, path in steps if path not in self._damaged]
        kept = {path for _, path in intact[: self.keep]} | {saved}
        kept |= {path for step, path in steps if self.keep_every and step % self.keep_every == 0}
        oldest = min(int(path.name.removeprefix("step-")) for path in kept)
        kept |= {path for step, path in steps if path in self._damaged and step > oldest}  # Still worth a look.
        return [path for _, path in steps if path not in kept]

    def _newest_intact(self, folder: Path) -> Path | None:
        steps = self._ranks.lead(lambda: step_folders(folder))
        for _, path in steps:
            problems = self._problems_of(path)
            if not problems:
                return path
            self.problems += problems
            self._damaged.add(path)
            if self._ranks.rank == 0:
                _log.warning("damaged checkpoint passed over: %s", problems[0])
        if steps:
            raise CheckpointError(
                f"{folder}: none of {len(steps)} checkpoints is intact: {self.problems[0]}. Put a good copy there, or "
                "move the damaged ones away to begin anew"
            )
        return None

    def _require_intact(self, path: Path) -> None:
        if problems := self._problems_of(path):
            self.problems = problems
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{problems[0]}{more}")

    def _problems_of(self, path: Path) -> list[str]:
        """Check every file of a checkpoint against its manifest; the ranks share the work and agree on the answer.

        Raises manifest.Unreadable where there is none.
        """
        before = self._ranks.lead(lambda: _fingerprint(path))
        try:
            entries = self._ranks.lead(lambda: manifest.read(path))
        except manifest.Unreadable:
            raise
        except CheckpointError as error:
            return [str(error)]
        missing = [f"{path / name}: not listed in the manifest" for name in (META, safe_reader.METADATA)]
        problems = [line for line, name in zip(missing, (META, safe_reader.METADATA)) if name not in entries]
        names = self._ranks.share(sorted(entries))
        found = self._ranks.each(lambda: [manifest.problem_with(path, name, entries[name]) for name in names])
        problems += [line for part in found for line in part if line]
        if not problems:
            self._verified[path] = before
        return problems


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans from meta tensors, and asks for each tensor's values only when they are written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _kind_of_folder(path: Path) -> Literal["missing", "step", "folder"]:
    if not path.is_dir():
        return "missing"
    return "step" if STEP.fullmatch(path.name) or (path / manifest.MANIFEST).exists() else "folder"


def _fingerprint(path: Path) -> list[tuple[str, int, int, int]]:
    """Changes when a file of the folder is written; lets ``load`` trust what ``latest`` has just verified."""
    try:
        facts = [(item.name, item.lstat()) for item in sorted(path.iterdir())]
    except OSError:
        return []
    return [(name, fact.st_size, fact.st_mtime_ns, fact.st_ino) for name, fact in facts]


def _read_index_and_meta(
    path: Path, flat: Mapping[str, Tensor], ignore: Collection[str], cast: Collection[str]
) -> tuple[Metadata, dict[str, Any]]:
    entries = manifest.read(path)
    index = safe_reader.read_metadata(path, {name: entry.size for name, entry in entries.items()})
    _account_for_keys(path, flat, index, ignore, cast)
    return index, read_meta(path)


def _account_for_keys(
    path: Path, flat: Mapping[str, Tensor], index: Metadata, ignore: Collection[str], cast: Collection[str]
) -> None:
    stored = index.state_dict_metadata
    ours, theirs = set(flat), {name for name in stored if name.partition(".")[0] not in ignore}
    lines = []
    if missing := sorted(ours - stored.keys()):
        lines.append(f"missing from the checkpoint: {some_of(missing)}")
    if unexpected := sorted(theirs - ours):
        lines.append(f"in the checkpoint but not expected: {some_of(unexpected)}")
    differ = []
    for name in sorted(ours & stored.keys()):
        want = (list(flat[name].shape), flat[name].dtype)
        have = (list(stored[name].size), stored[name].properties.dtype)  # type: ignore[union-attr]
        floats = want[1].is_floating_point and have[1].is_floating_point
        if want != have and not (want[0] == have[0] and floats and name.partition(".")[0] in cast):
            differ.append(f"{name} {have[0]} {have[1]} (expected {want[0]} {want[1]})")
    if differ:
        lines.append(f"different shape or dtype: {some_of(differ)}")
    if lines:
        raise CheckpointError(f"{path}: does not fit this model: {'; '.join(lines)}")
