"""Store: named extents in preallocated files, and the commit that moves all of them to the next step at once.

On disk: docs/store-format.md. The promise: what `commit` or `allocate` returned from survives a crash at any
later moment, and a crash inside of them leaves the state before or the state after, never a mixture.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import threading
import time
import uuid as uuid_module
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from io_engine.buffers import BufferPool
from io_engine.checkpoints import (
    CHECKPOINT_NAME,
    Checkpoint,
    checkpoint_layout,
    delete_checkpoint,
    make_checkpoint,
    read_checkpoints,
)
from io_engine.directories import (
    absolute_directories,
    check_store_ids,
    has_manifest,
    make_directory,
    refuse_foreign_files,
)
from io_engine.durable import (
    OWNER_ONLY,
    Json,
    encode_checked,
    keep_previous,
    read_bytes,
    replace_durably,
    sync_directory,
)
from io_engine.engine import Engine
from io_engine.errors import StoreCorruptError, StoreError
from io_engine.extents import Extent
from io_engine.inventory import StoreFile, list_files
from io_engine.layout import ExtentSpec, Layout, PlacedExtent, extend_layout
from io_engine.lock import StoreLock
from io_engine.manifest import (
    DAMAGED_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    NUMBERED_FILE,
    PREVIOUS_NAME,
    STORE_ID_NAME,
    TEMPORARY_FILE,
    Committed,
    Manifest,
    StoreId,
    read_committed,
    read_newest,
    stored_checksum,
)
from io_engine.scratch import ScratchSpace
from io_engine.space import check_space, rooms, total_free_bytes
from io_engine.striping import Striper, check_rates
from io_engine.verify import CHUNK_BYTES, copy_extent, describe_damage, find_damage, write_zeros, zero_extents

Directories = Sequence[str | Path] | str | Path


@dataclass(frozen=True)
class StoreSnapshot:
    """What a store's small files say, read without the lock; `extents` holds sizes and places by name."""

    directories: tuple[str, ...]
    uuid: str
    identity: Mapping[str, Json]
    step: int
    state: Mapping[str, Json]
    description: Mapping[str, Json]
    extents: Mapping[str, PlacedExtent]
    slots: Mapping[str, int]
    checksums: Mapping[str, str]
    size_bytes: int
    checkpoints: tuple[Checkpoint, ...]
    files: tuple[StoreFile, ...] = field(compare=False)
    """In its directories, whoever made them; they come and go without changing what the store holds."""
    notes: tuple[str, ...]


class Store:
    """A store that this process has open and locked; made by `create` and `open`, not by the constructor.

    Methods may be called from any thread; those that change the store block until the drive has it. The
    engine stays the caller's and must outlive the store. Not usable in a forked child.
    """

    def __init__(
        self,
        directories: tuple[str, ...],
        engine: Engine,
        lock: StoreLock,
        committed: Committed,
        notes: Iterable[str],
        bytes_per_second: tuple[float, ...] | None,
        read_only: bool = False,
    ) -> None:
        self._directories = directories
        self._read_only = read_only
        self._engine = engine
        self._lock_file = lock
        self._committed = committed
        self._bytes_per_second = bytes_per_second or committed.layout.bytes_per_second
        self._scratch = ScratchSpace(directories, self._rates(), engine)
        self._process_id = os.getpid()
        self._mutex = threading.RLock()
        self._closed = False
        self._checkpoints: list[Checkpoint] = []
        self._doubt: str | None = None  # why memory and disk may disagree
        self.notes: list[str] = list(notes)
        """Sentences on what was found and repaired at opening."""
        self.committed_seconds = 0.0
        """How long the last `commit` took."""
        self.contents: Callable[[str, int, int], Sequence[str]] = lambda _name, _begin_bytes, _num_bytes: ()
        """Names what lies in so many bytes of an extent, for messages; set by whoever knows what the extents mean."""

    # ---- making, opening, closing

    @staticmethod
    def exists(directories: Directories) -> bool:
        """Return whether the first directory holds a store with at least one manifest, damaged or not; no
        lock.
        """
        return has_manifest(absolute_directories(directories)[0])

    @classmethod
    def create(
        cls,
        directories: Directories,
        *,
        identity: Mapping[str, Json],
        engine: Engine,
        directory_bytes_per_second: Sequence[float] | None = None,
    ) -> Store:
        """Make an empty store (step -1, no extents) in new or empty directories, one per drive, and open it.

        Extents are spread over the directories in proportion to `directory_bytes_per_second`, which
        `probe_directory` measures (one number each, in their order; None: alike), and to where there is room.
        StoreError if a directory holds a store or any foreign file, StoreLockedError, OSError with the path.
        """
        paths = absolute_directories(directories)
        rates = check_rates(directory_bytes_per_second, len(paths))
        for path in paths:
            make_directory(path)
        for path in paths:
            refuse_foreign_files(path, paths[0])  # before the lock file is made: a refusal leaves no trace
        lock = StoreLock(os.path.join(paths[0], LOCK_NAME))
        try:
            for path in paths:
                refuse_foreign_files(path, paths[0])  # again: another process may have been creating it
            store_uuid = str(uuid_module.uuid4())
            # The first directory first: a crash from here on leaves one with an identity but no manifest, by
            # which the next create recognises the others as leftovers.
            for index, path in enumerate(paths):
                replace_durably(os.path.join(path, STORE_ID_NAME), StoreId(store_uuid, index, len(paths)).to_bytes())
            manifest = Manifest(store_uuid, json.loads(json.dumps(dict(identity), allow_nan=False)))
            data = manifest.to_bytes()
            replace_durably(os.path.join(paths[0], MANIFEST_NAME), data)
            return cls(paths, engine, lock, Committed(manifest, data, Layout()), (), rates)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(
        cls,
        directories: Directories,
        *,
        engine: Engine,
        directory_bytes_per_second: Sequence[float] | None = None,
        read_only: bool = False,
    ) -> Store:
        """Open a store at its last committed state and remove what a crash left over.

        `directory_bytes_per_second` is for extents to come, as in `create`; None: as at the last allocation. With
        `read_only` nothing on disk is changed, then or later, and others may open it read-only at the same time;
        nobody may open it otherwise until all of them have closed it.
        StoreError if it is not there or not whole, StoreLockedError if in use, StoreCorruptError if damaged.
        """
        paths = absolute_directories(directories)
        rates = check_rates(directory_bytes_per_second, len(paths))
        check_store_ids(paths)  # before the lock file is made: a refusal leaves no trace
        lock = StoreLock(os.path.join(paths[0], LOCK_NAME), shared=read_only)
        try:
            store_uuid = check_store_ids(paths)
            committed, note = read_newest(paths, store_uuid)
            store = cls(paths, engine, lock, committed, () if note is None else (note,), rates, read_only)
            store._check_data_files()
            if read_only:
                if note is not None:
                    raise StoreCorruptError(f"{note}; `fuyou verify {paths[0]}` repairs it if its data are whole")
                return store
            store._checkpoints, problems = read_checkpoints(paths, store_uuid)
            if note is None:
                store._remove_leftovers(problems.keys())
            else:
                store._adopt_previous()
            store.notes += problems.values()
            return store
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def peek(directories: Directories) -> StoreSnapshot:
        """Return what the store's small files say; takes no lock, writes nothing, works while others train in
        it.
        """
        paths = absolute_directories(directories)
        committed, note = read_newest(paths, check_store_ids(paths))
        manifest, layout = committed.manifest, committed.layout
        checkpoints, problems = read_checkpoints(paths, manifest.uuid)
        return StoreSnapshot(
            directories=paths,
            uuid=manifest.uuid,
            identity=manifest.identity,
            step=manifest.step,
            state=manifest.state,
            description=layout.description,
            extents=layout.extents,
            slots={name: manifest.slots.get(name, 0) for name in layout.extents},
            checksums=manifest.checksums,
            size_bytes=sum(file.num_bytes for file in layout.files),
            checkpoints=tuple(checkpoints),
            files=list_files(paths, committed, checkpoints, problems.keys()),
            notes=(*(() if note is None else (note,)), *problems.values()),
        )

    def _check_data_files(self) -> None:
        for index, file in enumerate(self._layout.files):
            path = self._layout.path(index, self._directories)
            if os.path.islink(path):
                raise StoreCorruptError(
                    f"{path} is a link, and no store makes one: what it leads to would be overwritten"
                )
            try:
                size_bytes = self._engine.file_size(path)
            except FileNotFoundError:
                raise StoreCorruptError(
                    f"{path} is missing, but the store's layout has extents in it; restore it from a backup, "
                    "or delete the store's files and start anew"
                ) from None
            if size_bytes < file.num_bytes:
                raise StoreCorruptError(
                    f"{path} has {size_bytes} bytes instead of {file.num_bytes}; restore it from a backup, "
                    "or delete the store's files and start anew"
                )

    def _remove_leftovers(self, unreadable_checkpoints: Collection[int]) -> None:
        """Delete what an earlier process left: scratch, files of an unfinished allocation, old layouts,
        temporary files.
        """
        wanted = {(file.directory, file.name) for file in self._layout.files}
        wanted.add((0, self._committed.manifest.layout_name or ""))
        with contextlib.suppress(StoreCorruptError, StoreError, FileNotFoundError):
            previous = read_committed(self._directories, PREVIOUS_NAME, self.uuid)
            wanted.add((0, previous.manifest.layout_name or ""))
        # What cannot be read may be worth saving.
        kept = {checkpoint.number for checkpoint in self._checkpoints} | set(unreadable_checkpoints)
        for index, directory in enumerate(self._directories):
            for name in sorted(os.listdir(directory)):
                if (index, name) in wanted or not (NUMBERED_FILE.fullmatch(name) or TEMPORARY_FILE.fullmatch(name)):
                    continue
                match = NUMBERED_FILE.fullmatch(name)
                if match is not None and "checkpoint" in match.groups() and int(match[2] or match[4]) in kept:
                    continue
                self._engine.remove(os.path.join(directory, name))
                superseded = match is not None and match[3] == "layout" and int(match[4]) < self._layout.generation
                if not superseded:
                    self.notes.append(f"removed {name} of an unfinished run from {directory}")

    def _adopt_previous(self) -> None:
        """Go on from the previous manifest, if the data it names are still there: later writes reuse their
        slots.
        """
        problems = self.verify()
        if problems:
            raise StoreCorruptError(
                f"{self.notes[0]}; but the data of that step have been overwritten since: "
                f"{'; '.join(problems[:3])}{' ...' if len(problems) > 3 else ''}. Restore {MANIFEST_NAME} "
                "from a backup, or start anew"
            )
        num_unchecked = len(self._layout.extents) - len(self.checksums)
        self.notes.append(
            f"all {len(self.checksums)} extents with a checksum match that step"
            + (f"; {num_unchecked} have none and could not be checked" if num_unchecked else "")
        )
        path = os.path.join(self._directories[0], MANIFEST_NAME)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, os.path.join(self._directories[0], DAMAGED_NAME))
        replace_durably(path, self._committed.manifest_bytes)

    def close(self) -> None:
        """Delete the scratch files and release the lock; what was not committed is lost. Idempotent."""
        if os.getpid() != self._process_id:
            return  # a forked child: neither the files nor the lock are its own, and the mutex may be held for ever
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            try:
                self._scratch.close()
                for path in self._data_paths():
                    self._engine.forget(path)
            finally:
                self._lock_file.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def delete(self) -> None:
        """Delete exactly the store's own files and close it; the directories stay, and foreign files in them
        too.
        """
        with self._mutex:
            self._check_changeable()
            # The manifests first: a crash in the middle then leaves files that nobody can take for a whole
            # store.
            for name in (MANIFEST_NAME, PREVIOUS_NAME, DAMAGED_NAME):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._directories[0], name))
            sync_directory(self._directories[0])
            self._scratch.close()
            for path in self._data_paths():
                with contextlib.suppress(FileNotFoundError):
                    self._engine.remove(path)
            for directory in self._directories:
                for name in os.listdir(directory):
                    if NUMBERED_FILE.fullmatch(name) or TEMPORARY_FILE.fullmatch(name):
                        self._engine.remove(os.path.join(directory, name))
                os.unlink(os.path.join(directory, STORE_ID_NAME))
                sync_directory(directory)
            self._closed = True
            self._lock_file.release(remove=True)

    def _check_changeable(self) -> None:
        self._check_usable()
        if self._read_only:
            raise StoreError(
                f"the store in {self._directories[0]} is open for reading only: nothing in it may be changed"
            )

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError(f"the store in {self._directories[0]} is closed; open it again")
        if os.getpid() != self._process_id:
            raise RuntimeError(
                f"the store in {self._directories[0]} belongs to process {self._process_id}, not to this "
                "forked child; use it in the process that opened it"
            )
        if self._doubt is not None:
            raise StoreError(
                f"the store in {self._directories[0]} cannot go on, because what is on disk is unknown "
                f"({self._doubt}); close it and open it again"
            )

    # ---- what is in it

    @property
    def _layout(self) -> Layout:
        return self._committed.layout

    @property
    def directories(self) -> tuple[str, ...]:
        """Absolute paths; the first one holds the manifest."""
        return self._directories

    @property
    def uuid(self) -> str:
        """What tells this store from all others."""
        return self._committed.manifest.uuid

    @property
    def identity(self) -> dict[str, Json]:
        """The JSON given to `create`; never changes."""
        return copy.deepcopy(dict(self._committed.manifest.identity))

    @property
    def step(self) -> int:
        """The last committed step; -1 when nothing was committed."""
        return self._committed.manifest.step

    @property
    def state(self) -> dict[str, Json]:
        """The JSON given to the last `commit`, as it reads back from disk."""
        return copy.deepcopy(dict(self._committed.manifest.state))

    @property
    def description(self) -> dict[str, Json]:
        """The JSON given to the last `allocate` that had one; large, so not copied: do not change it."""
        return dict(self._layout.description)

    @property
    def slots(self) -> dict[str, int]:
        """The active slot of every extent, as last committed."""
        slots = self._committed.manifest.slots
        return {name: slots.get(name, 0) for name in self._layout.extents}

    @property
    def checksums(self) -> dict[str, str]:
        """The checksum of the active slot of every extent that has one, as last committed."""
        return dict(self._committed.manifest.checksums)

    def names(self) -> list[str]:
        """Return the names of all extents, in the order of their allocation."""
        return list(self._layout.extents)

    def spec(self, name: str) -> ExtentSpec:
        """Return sizes and number of slots of an extent."""
        placed = self._placed(name)
        return ExtentSpec(name, placed.num_bytes, len(placed.slots), placed.piece_bytes)

    def num_slots(self, name: str) -> int:
        """Return 1 or 2."""
        return len(self._placed(name).slots)

    def active_slot(self, name: str) -> int:
        """Return the slot that holds the last committed content."""
        self._placed(name)
        return self._committed.manifest.slots.get(name, 0)

    def inactive_slot(self, name: str) -> int:
        """Return the slot to write the next step to; with a single slot that is the active one."""
        return (self.active_slot(name) + 1) % self.num_slots(name)

    def extent(self, name: str, slot: int | None = None) -> Extent:
        """Return where a slot of an extent lies (None: the active one); its length is num_bytes rounded up to
        4096.
        """
        num_slots = self.num_slots(name)
        slot = self.active_slot(name) if slot is None else slot
        if not 0 <= slot < num_slots:
            raise ValueError(f"extent {name!r} has no slot {slot}, only {num_slots}; widen it with add_slots()")
        return self._layout.extent(name, slot, self._directories)

    def _placed(self, name: str) -> PlacedExtent:
        placed = self._layout.extents.get(name)
        if placed is None:
            near = difflib.get_close_matches(name, self._layout.extents, 1)
            hint = f"did you mean {near[0]!r}?" if near else "allocate it first"
            raise StoreError(f"the store has no extent {name!r} among its {len(self._layout.extents)}; {hint}")
        return placed

    def _data_paths(self) -> list[str]:
        return [self._layout.path(index, self._directories) for index in range(len(self._layout.files))]

    @property
    def size_bytes(self) -> int:
        """Bytes of all data files, scratch included."""
        return sum(file.num_bytes for file in self._layout.files) + self._scratch.size_bytes

    def free_bytes(self) -> int:
        """Return the free bytes of the drives, each counted once."""
        return total_free_bytes(self._directories)

    # ---- changing it

    def allocate(
        self,
        specs: Iterable[ExtentSpec],
        *,
        description: Mapping[str, Json] | None = None,
        prewrite: bool = True,
        second_slots_for: Iterable[str] = (),
    ) -> None:
        """Add extents, and second slots for the one-slot extents named, all of them or, on any failure, none.

        Blocks. Their content is zeros. `prewrite` writes those zeros now, so that the first real writes run
        at full speed. `description` replaces the store's; None keeps it. Raises OSError(ENOSPC) before
        anything is written, StoreError for names that exist (or, for second slots, do not).
        """
        with self._mutex:
            self._check_changeable()
            specs, widened = tuple(specs), tuple(second_slots_for)
            self._check_names(specs, widened)
            if not specs and not widened and description is None:
                return
            if description is not None:
                description = json.loads(json.dumps(dict(description), allow_nan=False))
            generation = self._next_generation()
            stored_bytes = [0] * len(self._directories)
            for file in self._layout.files:
                stored_bytes[file.directory] += file.num_bytes
            striper = Striper(self._rates(), rooms(self._directories), other_bytes=stored_bytes)
            layout = extend_layout(
                self._layout, specs, widened, striper, generation, description, self._bytes_per_second
            )
            new_files = range(len(self._layout.files), len(layout.files))
            needed_bytes = {self._directories[layout.files[i].directory]: layout.files[i].num_bytes for i in new_files}
            check_space(needed_bytes, f"the new file extents-{generation}.bin")
            made: list[str] = []
            try:
                for index in new_files:
                    path = layout.path(index, self._directories)
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, OWNER_ONLY))
                    made.append(path)
                    self._engine.preallocate(path, layout.files[index].num_bytes)
                sizes = {path: layout.files[index].num_bytes for index, path in zip(new_files, made, strict=True)}
                if prewrite:
                    write_zeros(self._engine, sizes)
                else:
                    for path in sizes:
                        self._engine.sync(path)
                for path in sizes:
                    sync_directory(os.path.dirname(path))
                layout_path = os.path.join(self._directories[0], f"layout-{generation}.json")
                layout_bytes = encode_checked(layout.to_json(self.uuid))
                made.append(layout_path)
                replace_durably(layout_path, layout_bytes)
                manifest = replace(
                    self._committed.manifest,
                    layout_name=os.path.basename(layout_path),
                    layout_checksum=stored_checksum(layout_bytes),
                )
                self._publish(manifest, layout)
            except BaseException:
                if self._layout is not layout and self._doubt is None:  # else the files are in use
                    for path in made:
                        with contextlib.suppress(OSError):
                            self._engine.remove(path)
                raise

    def add_slots(self, names: Iterable[str], num_slots: int = 2, *, prewrite: bool = True) -> None:
        """Give one-slot extents a second slot, all of them or, on any failure, none; blocks."""
        if num_slots != 2:
            raise ValueError(f"num_slots={num_slots}: an extent has at most 2 slots, the one read and the one written")
        self.allocate((), prewrite=prewrite, second_slots_for=names)

    def _check_names(self, specs: tuple[ExtentSpec, ...], widened: tuple[str, ...]) -> None:
        seen = set(self._layout.extents)
        for spec in specs:
            if spec.name in seen:
                raise StoreError(f"the extent {spec.name!r} exists already or is named twice; give each its own name")
            seen.add(spec.name)
        if len(set(widened)) != len(widened):
            raise StoreError("an extent is named twice in second_slots_for; name each once")
        for name in widened:
            if self.num_slots(name) != 1:
                raise StoreError(f"the extent {name!r} has {self.num_slots(name)} slots already; leave it out")

    def _rates(self) -> tuple[float, ...]:
        return self._bytes_per_second or (1.0,) * len(self._directories)

    def _next_generation(self) -> int:
        """Return a number that no file here bears, not even one that a failed allocation could not remove."""
        numbers = [self._layout.generation]
        for directory in self._directories:
            for name in os.listdir(directory):
                match = NUMBERED_FILE.fullmatch(name)
                if match and match[1] != "scratch":
                    numbers.append(int(match[2] or match[4]))
        return max(numbers) + 1

    def commit(
        self, *, step: int, slots: Mapping[str, int], checksums: Mapping[str, str], state: Mapping[str, Json]
    ) -> None:
        """Make everything written so far the state of `step`; blocks until it survives a power loss.

        Only the names in `slots` and `checksums` change; a slot that changes without a new checksum loses its
        old one. All writes of the step must be done. On any failure the store stays at the step before, in
        memory and on disk. ValueError if `step` goes back, StoreError for unknown names, OSError from the
        drive, StoreCorruptError if another process has truncated or removed a file.
        """
        with self._mutex:
            self._check_changeable()
            started_seconds = time.perf_counter()
            old = self._committed.manifest
            if step < old.step:
                raise ValueError(f"step={step} goes back behind the committed step {old.step}; steps only grow")
            for name, slot in slots.items():
                if not 0 <= slot < self.num_slots(name):
                    raise ValueError(f"extent {name!r} has no slot {slot}, only {self.num_slots(name)}")
            for name in checksums:
                self._placed(name)
            new_slots = dict(old.slots) | {name: int(slot) for name, slot in slots.items()}
            kept = {name: text for name, text in old.checksums.items() if name not in slots}
            manifest = replace(
                old,
                step=int(step),
                slots=new_slots,
                checksums=kept | dict(checksums),
                state=json.loads(json.dumps(dict(state), allow_nan=False)),
            )
            # First the data, then the manifest that names them: the other way round, a crash in between would
            # leave a manifest of data that never reached the drive.
            self._sync_data_files()
            self._check_data_files()
            self._publish(manifest, self._layout)
            self.committed_seconds = time.perf_counter() - started_seconds

    def _sync_data_files(self) -> None:
        paths = self._data_paths()
        if len(self._directories) == 1:
            for path in paths:
                self._engine.sync(path)
            return
        with ThreadPoolExecutor(len(self._directories), "store-sync") as threads:  # drives flush side by side
            for future in [threads.submit(self._engine.sync, path) for path in paths]:
                future.result()

    def _publish(self, manifest: Manifest, layout: Layout) -> None:
        """Make the manifest durable, and memory equal to it; on failure put both back to what they were."""
        data = manifest.to_bytes()
        path = os.path.join(self._directories[0], MANIFEST_NAME)
        new = Committed(manifest, data, layout)
        try:
            keep_previous(path, os.path.join(self._directories[0], PREVIOUS_NAME), self._committed.manifest_bytes)
            replace_durably(path, data)
            self._committed = new
        except BaseException as error:
            # It may have failed before or after the rename (a KeyboardInterrupt even after everything).
            try:
                if read_bytes(path) != self._committed.manifest_bytes:
                    replace_durably(path, self._committed.manifest_bytes)
            except OSError as second_error:
                self._doubt = f"{error}; then {second_error}"
            raise

    # ---- checkpoints

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """What `checkpoint` has made, the oldest first."""
        return tuple(self._checkpoints)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that a checkpoint takes, at the latest when training has written everything once more."""
        slots = self._committed.manifest.slots
        return sum(file.num_bytes for file in checkpoint_layout(self._layout, slots, 0).files)

    def checkpoint(self, name: str) -> Checkpoint:
        """Keep what is committed now as a named checkpoint: a copy of all active slots. Blocks until it is durable.

        Nothing may be written to them meanwhile: flush first. A checkpoint of the same name is replaced when the new
        one is there. OSError(ENOSPC) before anything is written; StoreCorruptError for data that are not as committed;
        ValueError for a name of other than letters, digits, dots, dashes and underscores.
        """
        with self._mutex:
            self._check_changeable()
            if not CHECKPOINT_NAME.fullmatch(name):
                raise ValueError(
                    f"checkpoint name {name!r}: use up to 64 letters, digits, dots, dashes and underscores, "
                    "a letter or digit first"
                )
            made = make_checkpoint(
                self._committed, name, self._next_generation(), self._directories, self._engine, self.damaged
            )
            replaced = [checkpoint for checkpoint in self._checkpoints if checkpoint.name == name]
            self._checkpoints.append(made)
            for checkpoint in replaced:
                self._delete(checkpoint)
            return made

    def remove_checkpoint(self, name: str) -> None:
        """Delete a checkpoint's files; StoreError if there is none of that name."""
        with self._mutex:
            self._check_changeable()
            self._delete(self._find_checkpoint(name))

    def restore(self, name: str) -> Checkpoint:
        """Make a checkpoint the committed state, by a new commit; blocks until it is durable. The checkpoint stays.

        It is copied to the inactive slots, so that a failure leaves the store as it was. Extents that were made after
        the checkpoint are zeros again. StoreError if there is none of that name, StoreCorruptError if it is damaged.
        """
        with self._mutex:
            self._check_changeable()
            checkpoint = self._find_checkpoint(name)
            if checkpoint.layout.extents.keys() - self._layout.extents.keys():
                raise StoreCorruptError(f"the checkpoint {name!r} has extents that the store lacks; it is not its own")
            slots, old = {}, self._committed.manifest
            with BufferPool(2 * CHUNK_BYTES, name="restore") as pool:
                for extent_name in self._layout.extents:
                    slots[extent_name] = self._restore_extent(extent_name, checkpoint, pool)
            self._sync_data_files()
            self._check_data_files()
            manifest = replace(
                old, step=checkpoint.step, slots=slots, checksums=checkpoint.checksums, state=checkpoint.state
            )
            self._publish(manifest, self._layout)
            return checkpoint

    def _restore_extent(self, name: str, checkpoint: Checkpoint, pool: BufferPool) -> int:
        """Bring one extent into the state of the checkpoint; return the slot in which that is."""
        placed, stored = self._placed(name), checkpoint.checksums.get(name)
        target_slot = self.inactive_slot(name)
        target = self.extent(name, target_slot)
        if name not in checkpoint.layout.extents:
            if len(placed.slots) == 1:
                raise StoreError(
                    f"extent {name!r} is not in the checkpoint {checkpoint.name!r}, and has no second slot"
                )
            zero_extents(self._engine, [target])
            return target_slot
        kept = checkpoint.layout.extents[name]
        if (kept.num_bytes, kept.piece_bytes) != (placed.num_bytes, placed.piece_bytes):
            raise StoreCorruptError(f"extent {name!r} has another size in the checkpoint {checkpoint.name!r}")
        if len(placed.slots) == 1:
            # In place, which is safe for the bytes that are committed anyway, and only for those.
            if stored is None or stored != self.checksums.get(name):
                raise StoreError(f"extent {name!r} has one slot, and differs in the checkpoint {checkpoint.name!r}")
            if not find_damage(self._engine, target, placed.num_bytes, placed.piece_bytes, stored, pool):
                return target_slot
        source = checkpoint.layout.extent(name, 0, self._directories)
        damage = copy_extent(self._engine, source, target, placed.num_bytes, placed.piece_bytes, stored, pool)
        if damage:
            raise StoreCorruptError(
                f"the checkpoint {checkpoint.name!r} cannot be restored: {self.describe_damage(name, source, *damage[0])}; "
                "take another one, or a backup"
            )
        return target_slot

    def _find_checkpoint(self, name: str) -> Checkpoint:
        for checkpoint in self._checkpoints:
            if checkpoint.name == name:
                return checkpoint
        known = ", ".join(checkpoint.name for checkpoint in self._checkpoints) or "none"
        raise StoreError(f"the store in {self._directories[0]} has no checkpoint {name!r}; it has {known}")

    def _delete(self, checkpoint: Checkpoint) -> None:
        delete_checkpoint(checkpoint, self._directories, self._engine)
        self._checkpoints.remove(checkpoint)

    def describe_damage(self, name: str, extent: Extent, begin_bytes: int, num_bytes: int) -> str:
        """Say which bytes of an extent differ, in the slot or copy that is `extent`, and what they are."""
        return describe_damage(name, extent, begin_bytes, num_bytes, self.contents(name, begin_bytes, num_bytes))

    def damaged(self, name: str, extent: Extent, begin_bytes: int, num_bytes: int) -> StoreCorruptError:
        """Return the error that says so, and how to go on."""
        return StoreCorruptError(f"{self.describe_damage(name, extent, begin_bytes, num_bytes)}. {self.way_out()}")

    def way_out(self) -> str:
        """Say how to go on with damaged data."""
        if not self._checkpoints:
            return "There is no checkpoint to go back to: restore the store's files from a backup, or start anew"
        listed = ", ".join(f"{checkpoint.name} (step {checkpoint.step})" for checkpoint in self._checkpoints[-5:])
        return (
            f"Go back to a checkpoint, {listed}, with `fuyou checkpoint STORE --restore NAME`; or restore the store's files "
            "from a backup"
        )

    # ---- scratch and checks

    def scratch(self, name: str, num_bytes: int) -> Extent:
        """Return the scratch extent of that name, made if missing; content undefined, gone at close.

        Another size gives another place. OSError(ENOSPC) before anything is written.
        """
        with self._mutex:
            self._check_changeable()
            return self._scratch.extent(name, num_bytes)

    def release_scratch(self, name: str) -> None:
        """Let other scratch extents of its size have the place of this one; KeyError if there is none."""
        with self._mutex:
            self._check_usable()
            self._scratch.release(name)

    def verify(self) -> list[str]:
        """Read every active extent that has a checksum and return a sentence for each that differs; blocks,
        long.
        """
        problems: list[str] = []
        with BufferPool(2 * CHUNK_BYTES, name="verify") as pool:
            for name, stored in self.checksums.items():
                placed, extent = self._placed(name), self.extent(name)
                where = f"extent {name!r} ({extent.path} at {extent.offset_bytes})"
                try:
                    damage = find_damage(self._engine, extent, placed.num_bytes, placed.piece_bytes, stored, pool)
                except (OSError, ValueError) as error:
                    problems.append(f"{where} cannot be checked: {error}")
                    continue
                problems += [self.describe_damage(name, extent, *piece) for piece in damage]
        return problems
