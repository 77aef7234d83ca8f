"""DTensors: each rank attends with its own sequences or heads, and nothing is sent where all inputs are sharded alike.

Each mesh dimension shards sequences, kv heads with the query heads that attend with them, or neither. What is sharded
in another way (in a sequence, in head_dim) is redistributed first, by torch; gradients go back the same way. A strategy
that DTensor holds for an operator would not do: it sees one mesh dimension at a time, and kv heads must be divisible by
all that shard them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import stats_shape
from parallax_gen.runtime.autograd import plain
from parallax_gen.runtime.requests import INPUTS, CacheRequest, Request

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


class Dims(NamedTuple):
    """Which dimension of a tensor counts sequences, and which one heads; None for none."""

    batch: int | None
    heads: int | None


PACKED, STATS_OF_PACKED = Dims(None, 1), Dims(None, 0)
DENSE, STATS_OF_DENSE = Dims(0, 2), Dims(0, 1)
PAGES = Dims(None, 2)  # any sequence's, wherever its queries are
OF_SEQUENCES, OF_ALL = Dims(0, None), Dims(None, None)


def is_sharded(*inputs: Tensor) -> bool:
    """Whether there are DTensors among these."""
    if plain(*inputs) or not torch.distributed.is_available():
        return False
    if not torch.compiler.is_compiling() and "torch.distributed.tensor" not in sys.modules:
        return False  # nobody has made one, and importing it takes a second
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in inputs)


def refuse_shards(function: str, **inputs: Tensor) -> None:
    """For functions that know no DTensors. Raises ArgumentError, by the names that the caller has for them."""
    for name, x in inputs.items():
        if isinstance(x, Tensor) and is_sharded(x):
            raise ArgumentError(
                name, "a DTensor", f"a plain tensor: {function} takes no other (parallax_attn_func does)"
            )


def over_shards(
    attend: Callable[..., Sequence[Tensor]],
    asked: Request | CacheRequest,
    dims: Mapping[str, Dims],
    names: Sequence[str] = INPUTS,
) -> tuple[Tensor, ...]:
    """out, or out, lse, t̄ and v̄, as DTensors: what `attend` gives for this rank's part of what is asked.

    asked  a tensor that is no DTensor is taken to be the same on every rank, and whole
    dims   of each that may be a tensor, OF_ALL where nothing of it is sharded
    names  of the inputs, which are DTensors on one mesh

    Raises ArgumentError.
    """
    from torch.distributed.tensor import DTensor, Replicate

    inputs: list[Any] = [getattr(asked, name) for name in names]
    mesh = _mesh_of(inputs, names)
    kinds = _kinds(mesh, inputs, [dims[name] for name in names])
    local = []
    for name, x in zip(asked._fields, asked, strict=True):
        if isinstance(x, Tensor):
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
            x = x.redistribute(mesh, _placements(kinds, dims[name])).to_local()
        local.append(x)
    q = asked.q
    rows, stats = dims["q"], STATS_OF_DENSE if q.dim() == 4 else STATS_OF_PACKED
    shapes = (q.shape, stats_shape(q), stats_shape(q), q.shape)
    found = attend(*local)
    each = (rows, stats, stats, rows)[: len(found)]  # torch.compile of torch 2.9 takes any zip to be strict
    return tuple(
        DTensor.from_local(
            x, mesh, _placements(kinds, of), run_check=False, shape=torch.Size(shape), stride=_contiguous_strides(shape)
        )
        for x, of, shape in zip(found, each, shapes[: len(found)], strict=True)
    )


def _mesh_of(inputs: Sequence[Tensor], names: Sequence[str]) -> DeviceMesh:
    from torch.distributed.tensor import DTensor

    mesh: Any = next(x.device_mesh for x in inputs if isinstance(x, DTensor))
    for name, x in zip(names, inputs, strict=True):
        if not isinstance(x, DTensor):
            raise ArgumentError(name, "a plain tensor beside DTensors", "a DTensor, as the others are")
        if x.device_mesh != mesh:
            raise ArgumentError(name, f"on {x.device_mesh}", f"on {mesh}, the mesh of the others")
    return mesh  # type: ignore[no-any-return]


def _kinds(mesh: DeviceMesh, inputs: Sequence[Any], dims: Sequence[Dims]) -> list[str]:
    """Of each mesh dimension what it shards, a field of Dims or "": what the least has to be sent for."""
    q, k = inputs[0], inputs[2]
    batch, kv_heads = q.shape[0], k.shape[-2]
    shards = {"batch": 1, "heads": 1}
    kinds = []
    for at in range(mesh.ndim):
        size = mesh.size(at)
        possible = [""]
        if dims[0].batch is not None:
            # Sequences that do not come out even stay where they are, but none are moved to be so.
            even = batch % (shards["batch"] * size) == 0
            if even or q.placements[at].is_shard(dims[0].batch):
                possible.append("batch")
        if kv_heads % (shards["heads"] * size) == 0:
            possible.append("heads")
        costs = [0] * len(possible)
        for i, kind in enumerate(possible):  # torch.compile of torch 2.9 has no sum of a generator
            for x, of in zip(inputs, dims, strict=True):
                costs[i] += _cost(x, at, kind, of)
        kind = possible[costs.index(min(costs))]
        if kind:
            shards[kind] *= size
        kinds.append(kind)
    return kinds


def _cost(x: Any, at: int, kind: str, dims: Dims) -> int:
    """How much of x must be sent for a mesh dimension to shard it so, in parts of it that are about right."""
    now, then = x.placements[at], _placements([kind], dims)[0]
    if now == then or now.is_replicate():
        return 0
    return (1 if then.is_shard() else 4) * (2 if now.is_partial() else 1)


def _placements(kinds: Sequence[str], dims: Dims) -> list[Placement]:
    from torch.distributed.tensor import Replicate, Shard

    found: list[Placement] = []
    for kind in kinds:
        dim = dims.batch if kind == "batch" else dims.heads if kind == "heads" else None
        found.append(Replicate() if dim is None else Shard(dim))
    return found


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
