"""One table of tuned kernels for all ranks: rank 0 sends it, and every rank says what it makes of it."""

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
from parallax_gen.ops.base import Layout, config_to_json, op_of
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.runtime.dispatch import RuntimeMemory, default_dispatcher
from parallax_gen.runtime.plan import Plans

# A kernel of every template: where ranks have the same templates and render these alike, they render all alike.
SPECS = tuple(KernelSpec(op, 64, "bf16") for op in OPS)

PROBLEM = "problem"  # where a rank's statement has it, it could not go on


def share_tuning(group: dist.ProcessGroup | None = None) -> int:
    """Let all ranks of a group choose kernels from rank 0's records from now on. All its ranks must make this call.

    Each rank's own choice rests on the database of its host, and two hosts may know different records: then ranks run
    kernels of different speed, and results differ in their last bits from rank to rank. Here rank 0 reads its database
    and what ships, and sends what the choices of its GPU's calls rest on (memory/sharing.py): once, as text, checked on
    arrival like a user's input. Then every rank says what its choices will rest on, and all must say the same; each
    ranks a place, and renders its kernel, when that is called.

    It is a call of its own, to be made after init_process_group and torch.cuda.set_device, because only there all ranks
    are known to take part. Inside an attention call it would wait forever wherever ranks differ in what they call: in
    pipelines, where one rank has an uneven batch, where one evaluates and the others do not.

    No rank ever tunes. What was chosen before is chosen anew; a CUDA graph that was captured keeps its kernels. Without
    a CUDA device there is nothing to choose, and ranks only compare versions. A later call shares what rank 0 knows by
    then.

    group  the default group if not given. Ranks with different GPUs need a group each

    Returns how many kernels and buckets the table holds. Raises DistributedError, alike on all ranks and naming those
    that differ, where GPU, Triton, ptxas, kernels or versions differ, or a rank could not go on; ArgumentError where
    there is no such group. Then every rank chooses as it did before.
    """
    rank, everyone = members(group)
    gpu, text = None, "\n"  # an empty line is no record, and no backend is asked to send nothing
    try:
        gpu = gpu_here()
        said = _facts(gpu)
        if rank == 0 and gpu is not None:
            with closing(RuntimeMemory()) as memory:
                text += "".join(map(to_line, records_to_share(memory, gpu)))
    except ParallaxGenError as error:
        said = {PROBLEM: str(error)}
    _agree(said, group, everyone)

    text = _from_first(text, group, everyone)
    records: list[Result] = []
    try:
        records = _checked(text, gpu)
        said = {"the choice of kernels": _choice(records, gpu)}
    except ParallaxGenError as error:
        said = {PROBLEM: str(error)}
    _agree(said, group, everyone)

    default_dispatcher().use(RecordTable(records))
    Plans.forget_all()
    return len({record.place for record in records})


def _facts(gpu: Gpu | None) -> dict[str, str]:
    """What ranks must have in common, by the words for it."""
    card = GPUS["h100"]
    places = [
        Place(card.name, spec, Bucket(8, 1 if op_of(spec).layout is Layout.CACHE else 1024, 1024)) for spec in SPECS
    ]
    rendered = [render(place.spec, default_of(place, card), card).text_hash for place in places]
    templates = [path.read_text(encoding="utf-8") for path in sorted(data_dir("templates").glob("*.j2"))]
    here = Toolchain.here()
    return {
        "GPU": "none" if gpu is None else gpu.name,
        "triton": here.triton,
        "cuda": here.cuda or "none",
        "kernels": _digest([rendered, templates]),
        "protocol": str(PROTOCOL),
        "parallax_gen": parallax_gen.__version__,
    }


def _checked(text: str, gpu: Gpu | None) -> list[Result]:
    """The records in what rank 0 sent. Raises DistributedError on anything but what this GPU's choices may rest on."""
    found = read_lines("the table of rank 0", text.encode().splitlines())
    cards = () if gpu is None else (gpu.name, *siblings(gpu))
    wrong = [r for r in found.results if r.place.gpu not in cards or not r.informative]
    if found.problems or wrong:
        what = (
            found.problems[0]
            if found.problems
            else f"{wrong[0].outcome} of {wrong[0].place.gpu}: no choice here rests on it"
        )
        raise DistributedError(what)
    return found.results


def _choice(records: list[Result], gpu: Gpu | None) -> str:
    """A digest of what the ranking makes of the table here: its own code has the last word.

    Where ranks agree on which records are valid and on each place's default, they choose alike: toolchain and templates
    are the same, and so is which records are of kernels that are rendered. So nothing needs to be rendered for it.
    """
    if gpu is None:
        return _digest([])
    places = places_served(records, gpu)
    defaults = [(place.digest, config_to_json(default_of(place, gpu))) for place in places]
    return _digest([defaults, [is_valid(record, gpu) for record in records]])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _agree(said: dict[str, str], group: dist.ProcessGroup | None, everyone: list[int]) -> None:
    """Raise the same DistributedError on all ranks unless all say the same and none has a problem."""
    statements = [json.loads(text) for text in _from_everyone(json.dumps(said), group, len(everyone))]
    by_problem: dict[str, list[int]] = {}
    for rank, statement in zip(everyone, statements, strict=True):
        if PROBLEM in statement:
            by_problem.setdefault(statement[PROBLEM], []).append(rank)
    if by_problem:
        raise DistributedError("; ".join(f"{ranks_text(ranks)}: {problem}" for problem, ranks in by_problem.items()))
    differing = []
    for name in said:
        by_value: dict[str, list[int]] = {}
        for rank, statement in zip(everyone, statements, strict=True):
            by_value.setdefault(statement[name], []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in by_value.items())
            differing.append(f"{name} is {values}")
    if differing:
        raise DistributedError(f"the ranks would not run the same kernels: {'; '.join(differing)}")


def ranks_text(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 4`: ascending ranks, however many."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {told}" if len(ranks) == 1 else f"ranks {told}"


def _from_first(text: str, group: dist.ProcessGroup | None, everyone: list[int]) -> str:
    """The first rank's text, on all ranks."""
    mine = _bytes(text, group)
    size = torch.tensor([len(mine)], device=mine.device)
    dist.broadcast(size, everyone[0], group=group)
    sent = mine if dist.get_rank() == everyone[0] else mine.new_empty(int(size))
    dist.broadcast(sent, everyone[0], group=group)
    return _text(sent)


def _from_everyone(text: str, group: dist.ProcessGroup | None, ranks: int) -> list[str]:
    """Every rank's text, on all ranks."""
    mine = _bytes(text, group)
    size = torch.tensor([len(mine)], device=mine.device)
    sizes = [torch.empty_like(size) for _ in range(ranks)]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(size) for size in sizes]
    padded = mine.new_zeros(max(lengths))
    padded[: len(mine)] = mine
    texts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(texts, padded, group=group)
    return [_text(text[:length]) for text, length in zip(texts, lengths, strict=True)]


def _bytes(text: str, group: dist.ProcessGroup | None) -> Tensor:
    """A text as numbers, where the group's backend takes them: never as pickled objects, which run what they say."""
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def _text(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).decode()
