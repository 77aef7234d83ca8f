"""Shipped records, one reviewable text file per GPU, and their merge with the user's own database."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from pathlib import Path

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.files import data_dir
from parallax_gen.memory.lines import from_line, write_lines
from parallax_gen.memory.place import Place, Scalar
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED, Result, reading_order, supersedes
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import GPUS, Gpu


def shipped_gpus(folder: Path | None = None) -> list[str]:
    """The names of the GPUs that have shipped records."""
    return sorted(path.stem for path in _folder(folder).glob("*.jsonl"))


def load_shipped(gpu: str, folder: Path | None = None) -> list[Result]:
    """The shipped records of a GPU in `reading_order`; none for a GPU without a file.

    Raises StoreError, naming file and line, on a line that is not a measured result of that GPU.
    """
    path, stamp = _file(gpu, folder)
    return [] if stamp is None else [r for place in _lines(path, stamp) for r in _results(path, gpu, stamp, place)]


def load_same_capability(gpu: Gpu, folder: Path | None = None) -> list[Result]:
    """The shipped records of all GPUs with this GPU's compute capability, card by card in the order of GPUS."""
    names = [card.name for card in GPUS.values() if card.arch == gpu.arch]
    return [result for name in names for result in load_shipped(name, folder)]


def write_shipped(
    results: Iterable[Result],
    gpu: str,
    folder: Path | None = None,
    keep: int = 3,
    also_keep: Callable[[Result], bool] = lambda result: False,
    group: Callable[[Result], Hashable] = lambda result: result.evidence.toolchain,
) -> Path:
    """Merge results of a GPU into its file, keep the best of each place, and return the file's path.

    A result replaces the one of the same identity as it would in the database (`supersedes`): a config that now fails
    is dropped. The file is replaced atomically.

    keep       how many of the fastest measured results of each place and group are kept
    also_keep  selects further results to keep
    group      the results that compete with each other; by default those of one toolchain
    """
    merged: dict[tuple[Scalar, ...], Result] = {}
    for result in [*load_shipped(gpu, folder), *map(_rounded, results)]:
        if result.place.gpu != gpu:
            raise ArgumentError("results", f"a result of {result.place.gpu!r}", f"results of {gpu!r}")
        old = merged.get(result.identity)
        if old is None or supersedes(result, old):
            merged[result.identity] = result
    counts: Counter[tuple[Place, Hashable]] = Counter()
    best = []
    for result in sorted((r for r in merged.values() if r.measured), key=reading_order):
        key = result.place, group(result)
        counts[key] += 1
        if counts[key] <= keep or also_keep(result):
            best.append(result)
    path, _ = _file(gpu, folder)
    write_lines(path, best)
    return path


class Memory:
    """The user's own records, merged with the shipped ones.

    The result of a config that was tried here, whether it was fast, wrong or crashed, hides the shipped record of that
    config. A prediction or a fault of the machine does not: a measurement on another card of the same model is more
    informative.
    """

    def __init__(self, store: Store | None = None, folder: Path | None = None) -> None:
        """store: the user's database, or None. folder: of the shipped files, by default the installed tuning_db."""
        self.store = store
        self.folder = folder

    def results(self, place: Place) -> list[Result]:
        """All results of a place, of any kernel and toolchain: the measured ones first, from fast to slow."""
        own = self.query_store(lambda store: store.results(place))
        return _merge(own, _shipped_at(place, self.folder))

    def all(self, gpu: str | None = None, op: str | None = None) -> list[Result]:
        """All results, or those of a GPU or an op, sorted by place and then from fast to slow."""
        own = self.query_store(lambda store: store.all(gpu, op))
        gpus = shipped_gpus(self.folder) if gpu is None else [gpu]
        shipped = (r for name in gpus for r in load_shipped(name, self.folder))
        return _merge(own, (r for r in shipped if op is None or r.place.spec.public_op == op))

    def query_store(self, query: Callable[[Store], list[Result]]) -> list[Result]:
        """The answer of the user's database to a query; an empty list without a database."""
        return query(self.store) if self.store else []


def _merge(own: list[Result], shipped: Iterable[Result]) -> list[Result]:
    """One result for each identity: the user's if it was tried, else the shipped one, else the user's prediction."""
    tried = {r.identity: r for r in own if r.informative}
    merged = {r.identity: r for r in own if r.identity not in tried}
    merged |= {r.identity: r for r in shipped}
    merged |= tried
    return sorted(merged.values(), key=reading_order)


def _shipped_at(place: Place, folder: Path | None) -> tuple[Result, ...]:
    """The shipped records of a place. Only the beginning of other lines is read: a call has no time to parse them."""
    path, stamp = _file(place.gpu, folder)
    if stamp is None:
        return ()
    index = _lines(path, stamp)
    places = [key for key in (json.dumps(place.flat()).encode(), b"") if key in index]
    results = (result for key in places for result in _results(path, place.gpu, stamp, key))
    return tuple(result for result in results if result.place == place)


def _file(gpu: str, folder: Path | None) -> tuple[Path, tuple[int, ...] | None]:
    """A GPU's file, and its mtime, size and inode, which key the caches below; None if there is no file."""
    path = _folder(folder) / f"{gpu}.jsonl"
    try:
        stat = path.stat()
    except FileNotFoundError:
        return path, None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    return path, (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _folder(folder: Path | None) -> Path:
    return data_dir("tuning_db") if folder is None else folder


@lru_cache(maxsize=16)
def _lines(path: Path, stamp: tuple[int, ...]) -> dict[bytes, list[tuple[int, bytes]]]:
    """The (number, line) pairs of a file by the JSON of their place; b"" for lines that do not begin with a place."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    index: dict[bytes, list[tuple[int, bytes]]] = {}
    for number, line in enumerate(lines, start=1):
        place, rest, _ = line.removeprefix(b'{"place": ').partition(b', "evidence": ')
        index.setdefault(place if rest and place != line else b"", []).append((number, line))
    return index


@lru_cache(maxsize=4096)
def _results(path: Path, gpu: str, stamp: tuple[int, ...], place_json: bytes) -> tuple[Result, ...]:
    """The results of the lines that `_lines` has for this place. stamp: mtime, size and inode of the file."""
    results = []
    for number, line in _lines(path, stamp)[place_json]:
        try:
            result = from_line(line)
        except MALFORMED as error:
            raise StoreError(f"{path}, line {number}: not a record: {str(error)[:LONGEST_REASON]}") from error
        if result.place.gpu != gpu or not result.measured:
            raise StoreError(f"{path}, line {number}: {result.outcome} of {result.place.gpu}, not measured on {gpu}")
        results.append(result)
    return tuple(results)


def _rounded(result: Result) -> Result:
    """A result with floats rounded to six digits: more than a timing's precision, and few enough to read."""
    data = result.to_dict()
    return Result.from_dict({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in data.items()})
