"""One table of tuned kernels for all ranks: rank 0 broadcasts it, and all ranks check that they make equal choices."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

import parallax_gen
from parallax_gen.codegen.device import gpu_here
from parallax_gen.codegen.render import render
from parallax_gen.distributed.ring import members
from parallax_gen.errors import DistributedError, ParallaxGenError
from parallax_gen.files import data_dir
from parallax_gen.memory.lines import read_lines, to_line
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, default_of, is_valid, siblings
from parallax_gen.memory.result import PROTOCOL, Result
from parallax_gen.memory.sharing import places_served, records_to_share
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import OpKind, config_to_json, op_of
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.runtime.dispatch import RuntimeMemory, default_dispatcher
from parallax_gen.runtime.plan import PlanCache

# One kernel per template: ranks that have the same templates and render these kernels equally render all equally.
SPECS = tuple(KernelSpec(op, 64, "bf16") for op in OPS)

PROBLEM = "problem"  # key in the properties of a rank that failed


def share_tuning(group: dist.ProcessGroup | None = None) -> int:
    """Make all ranks of a group choose kernels from rank 0's records. All ranks must make this call.

    By default each rank chooses from the database of its host, and hosts may have different records. Then ranks run
    kernels of different speed, and their results differ in the last bits. Here rank 0 reads its database and the
    shipped records, and broadcasts once, as text, the records that choices for its GPU depend on (memory/sharing.py).
    Receivers check the text like user input. Then all ranks compare a digest of the choices they will make. Ranking and
    rendering happen at the first call of a bucket.

    Call it after init_process_group and torch.cuda.set_device. It is a separate call because all ranks must take part:
    inside an attention call it would hang wherever ranks make different calls, as in pipelines, with uneven batches, or
    when only one rank evaluates.

    From then on no rank tunes at a call. Kernels that were chosen before are chosen again; captured CUDA graphs keep
    their kernels. Without a CUDA device ranks only compare versions. A later call shares rank 0's records of that time.
    If a lock is on (`parallax_gen.use_lock`), it decides before the table, and all ranks must hold the same one.

    group  by default the default group. Ranks with different GPUs need separate groups

    Returns the number of kernels and buckets in the table. Raises DistributedError, with the same message on all
    ranks, which names the ranks concerned, if GPU, Triton, ptxas, kernels, versions or locks differ or a rank fails;
    ArgumentError if there is no such group. After an error every rank chooses as before.
    """
    rank, global_ranks = members(group)
    gpu, text = None, "\n"  # an empty line, which is not a record, makes the broadcast non-empty
    try:
        gpu = gpu_here()
        properties = _rank_properties(gpu)
        if rank == 0 and gpu is not None:
            with closing(RuntimeMemory()) as memory:
                text += "".join(map(to_line, records_to_share(memory, gpu)))
    except ParallaxGenError as error:
        properties = {PROBLEM: str(error)}
    _check_all_agree(properties, group, global_ranks)

    text = _broadcast_text(text, group, global_ranks)
    records: list[Result] = []
    try:
        records = _parse_records(text, gpu)
        properties = {"the choice of kernels": _choice_digest(records, gpu)}
    except ParallaxGenError as error:
        properties = {PROBLEM: str(error)}
    _check_all_agree(properties, group, global_ranks)

    default_dispatcher().use(RecordTable(records))
    PlanCache.clear_all()
    return len({record.place for record in records})


def _rank_properties(gpu: Gpu | None) -> dict[str, str]:
    """The properties that must be equal on all ranks, by name."""
    card = GPUS["h100"]
    places = [
        Place(card.name, spec, Bucket(8, 1 if op_of(spec).kind is OpKind.CACHE else 1024, 1024)) for spec in SPECS
    ]
    rendered = [render(place.spec, default_of(place, card), card).text_hash for place in places]
    templates = [path.read_text(encoding="utf-8") for path in sorted(data_dir("templates").rglob("*.j2"))]
    here, lock = Toolchain.here(), default_dispatcher().lock
    return {
        "GPU": "none" if gpu is None else gpu.name,
        "triton": here.triton,
        "cuda": here.cuda or "none",
        "kernels": _digest([rendered, templates]),
        "protocol": str(PROTOCOL),
        "parallax_gen": parallax_gen.__version__,
        "the lock": "none" if lock is None else f"({lock.identity})",
    }


def _parse_records(text: str, gpu: Gpu | None) -> list[Result]:
    """Parse the records from rank 0. Raises DistributedError for a line that choices for this GPU cannot use."""
    parsed = read_lines("the table of rank 0", text.encode().splitlines())
    cards = () if gpu is None else (gpu.name, *siblings(gpu))
    unusable = [r for r in parsed.results if r.place.gpu not in cards or not r.informative]
    if parsed.problems:
        raise DistributedError(parsed.problems[0])
    if unusable:
        first = unusable[0]
        raise DistributedError(f"rank 0 sent a record of {first.place.gpu} ({first.outcome}) that this GPU cannot use")
    return parsed.results


def _choice_digest(records: list[Result], gpu: Gpu | None) -> str:
    """A digest of the table's effect on this rank's ranking.

    Ranks that agree on the valid records and on each place's default config make equal choices, because their
    toolchains and templates are known to be equal. So the digest needs no rendering.
    """
    if gpu is None:
        return _digest([])
    places = places_served(records, gpu)
    defaults = [(place.digest, config_to_json(default_of(place, gpu))) for place in places]
    return _digest([defaults, [is_valid(record, gpu) for record in records]])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _check_all_agree(properties: dict[str, str], group: dist.ProcessGroup | None, global_ranks: list[int]) -> None:
    """Raise the same DistributedError on all ranks unless their properties are equal and no rank failed."""
    gathered = [json.loads(text) for text in _gather_texts(json.dumps(properties), group, len(global_ranks))]
    by_problem: dict[str, list[int]] = {}
    for rank, rank_properties in zip(global_ranks, gathered, strict=True):
        if PROBLEM in rank_properties:
            by_problem.setdefault(rank_properties[PROBLEM], []).append(rank)
    if by_problem:
        raise DistributedError("; ".join(f"{ranks_text(ranks)}: {problem}" for problem, ranks in by_problem.items()))
    differing = []
    for name in properties:
        by_value: dict[str, list[int]] = {}
        for rank, rank_properties in zip(global_ranks, gathered, strict=True):
            by_value.setdefault(rank_properties[name], []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in by_value.items())
            differing.append(f"{name} is {values}")
    if differing:
        raise DistributedError(f"the ranks would not run the same kernels: {'; '.join(differing)}")


def ranks_text(ranks: list[int]) -> str:
    """Ascending ranks as text: `rank 3`, `ranks 0-2, 4`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _broadcast_text(text: str, group: dist.ProcessGroup | None, global_ranks: list[int]) -> str:
    """The first rank's text, on all ranks."""
    own = _bytes(text, group)
    size = torch.tensor([len(own)], device=own.device)
    dist.broadcast(size, global_ranks[0], group=group)
    broadcast = own if dist.get_rank() == global_ranks[0] else own.new_empty(int(size))
    dist.broadcast(broadcast, global_ranks[0], group=group)
    return _text(broadcast)


def _gather_texts(text: str, group: dist.ProcessGroup | None, ranks: int) -> list[str]:
    """Every rank's text, on all ranks."""
    own = _bytes(text, group)
    size = torch.tensor([len(own)], device=own.device)
    sizes = [torch.empty_like(size) for _ in range(ranks)]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(size) for size in sizes]
    padded = own.new_zeros(max(lengths))
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(texts, padded, group=group)
    return [_text(text[:length]) for text, length in zip(texts, lengths, strict=True)]


def _bytes(text: str, group: dist.ProcessGroup | None) -> Tensor:
    """A text as a byte tensor on a device that the group's backend supports. Pickles are avoided: they can run code."""
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def _text(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).decode()
