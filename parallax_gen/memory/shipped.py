"""The records that ship, one reviewable text file a GPU, under the user's own database."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

from parallax_gen.data import data_dir
from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.keys import Key
from parallax_gen.memory.lines import from_line, write_lines
from parallax_gen.memory.results import NO_RESULT, Diff, Result, near_misses, reading_order, supersedes
from parallax_gen.memory.store import Store


def load_shipped(gpu: str, folder: Path | None = None) -> list[Result]:
    """What ships for a GPU, in reading order; nothing for a GPU without a file.

    Raises StoreError, naming file and line, on a line that is not a measured result of that GPU.
    """
    path = _path(gpu, folder)
    try:
        stat = path.stat()
        return list(_parse(path, gpu, (stat.st_mtime_ns, stat.st_size, stat.st_ino)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def write_shipped(results: Iterable[Result], gpu: str, folder: Path | None = None, keep: int = 3) -> Path:
    """Merge results of a GPU into its file, keep the fastest `keep` measured ones a key, and return its path.

    A result replaces the one of the same key and config in the file as it would in the database: a config that
    now fails is dropped. The file is replaced as a whole, or not at all.
    """
    merged: dict[tuple[str, str], Result] = {}
    for result in [*load_shipped(gpu, folder), *map(_rounded, results)]:
        if result.key.gpu != gpu:
            raise ArgumentError("results", f"one of {result.key.gpu!r}", f"results of {gpu!r}")
        old = merged.get(result.identity)
        if old is None or supersedes(result, old):
            merged[result.identity] = result
    measured = sorted((r for r in merged.values() if r.measured), key=reading_order)
    best = [r for _, group in groupby(measured, key=lambda r: r.key) for r in islice(group, keep)]
    path = _path(gpu, folder)
    write_lines(path, best)
    return path


class Memory:
    """All that is known: the user's own records, and under them those that ship.

    A config that was tried here, whether it was fast, wrong or crashed, hides the shipped record of it. One that
    was only predicted does not, nor one that the machine failed: what was measured elsewhere on the same GPU tells
    more.
    """

    def __init__(self, store: Store | None = None, folder: Path | None = None) -> None:
        """`store`: the user's database, None to do without. `folder`: of the shipped files, by default our own."""
        self.store = store
        self.folder = folder

    def best(self, key: Key) -> Result | None:
        """The fastest config measured under `key`, here or, of configs not tried here, where the records ship from."""
        return next((r for r in self.results(key) if r.measured), None)

    def results(self, key: Key) -> list[Result]:
        """All that is known under `key`, the measured first, from fast to slow."""
        own = self.own(lambda store: store.results(key))
        return _merge(own, (r for r in load_shipped(key.gpu, self.folder) if r.key == key))

    def all(self, gpu: str | None = None, op: str | None = None) -> list[Result]:
        """Everything, or that of a GPU or an op, sorted by key and then from fast to slow."""
        own = self.own(lambda store: store.all(gpu, op))
        gpus = [path.stem for path in _folder(self.folder).glob("*.jsonl")] if gpu is None else [gpu]
        shipped = (r for name in gpus for r in load_shipped(name, self.folder))
        return _merge(own, (r for r in shipped if op is None or r.key.spec.op == op))

    def own(self, ask: Callable[[Store], list[Result]]) -> list[Result]:
        """What the user's database answers; nothing where there is none."""
        return ask(self.store) if self.store else []

    def near_misses(self, key: Key) -> list[tuple[Result, Diff]]:
        """What explains that nothing was found under `key`: see `results.near_misses`."""
        return near_misses(key, self.all(key.gpu, key.spec.op))


def _merge(own: list[Result], shipped: Iterable[Result]) -> list[Result]:
    """One result a (key, config): the user's own if it was tried, else the shipped one, else the prediction."""
    tried = {r.identity: r for r in own if r.outcome != "predicted" and not r.of_machine}
    merged = {r.identity: r for r in own if r.identity not in tried}
    merged |= {r.identity: r for r in shipped}
    merged |= tried
    return sorted(merged.values(), key=reading_order)


def _folder(folder: Path | None) -> Path:
    return data_dir("tuning_db") if folder is None else folder


def _path(gpu: str, folder: Path | None) -> Path:
    return _folder(folder) / f"{gpu}.jsonl"


@lru_cache(maxsize=16)
def _parse(path: Path, gpu: str, stamp: tuple[int, ...]) -> tuple[Result, ...]:
    """The file of that time, size and inode: once it changes, it is another entry of the cache."""
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            result = from_line(line)
        except NO_RESULT as error:
            raise StoreError(f"{path}, line {number}: not a record: {error}") from error
        if result.key.gpu != gpu or not result.measured:
            raise StoreError(f"{path}, line {number}: {result.outcome} of {result.key.gpu}, not measured on {gpu}")
        results.append(result)
    return tuple(results)


def _rounded(result: Result) -> Result:
    """With numbers to six digits: more than a timing is worth, and few enough to be read."""
    data = result.to_dict()
    return Result.from_dict({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in data.items()})
