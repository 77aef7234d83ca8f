"""DTensors: each rank computes its own sequences or heads; nothing is sent if all inputs are sharded alike.

Each mesh dimension shards sequences, kv heads together with their query heads, or neither. Tensors sharded in another
way (along a sequence or head_dim) are first redistributed by torch, and so are their gradients. A DTensor sharding
strategy for an operator cannot do this: it sees one mesh dimension at a time, but kv heads must be divisible by the
product of all mesh dimensions that shard them.
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
from parallax_gen.runtime.autograd import are_plain_tensors
from parallax_gen.runtime.requests import INPUTS, CacheRequest, Request

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


class Dims(NamedTuple):
    """The dimensions of a tensor that index sequences and heads; None if it has none."""

    batch: int | None
    heads: int | None


PACKED, STATS_OF_PACKED = Dims(None, 1), Dims(None, 0)
DENSE, STATS_OF_DENSE = Dims(0, 2), Dims(0, 1)
PAGES = Dims(None, 2)  # sequences share them, so every rank needs all of them
PER_SEQUENCE, REPLICATED = Dims(0, None), Dims(None, None)


def is_sharded(*inputs: Tensor) -> bool:
    """Whether any of these is a DTensor."""
    if are_plain_tensors(*inputs) or not torch.distributed.is_available():
        return False
    if not torch.compiler.is_compiling() and "torch.distributed.tensor" not in sys.modules:
        return False  # then no DTensor exists, and the import would take a second
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in inputs)


def refuse_dtensors(function: str, **inputs: Tensor) -> None:
    """Raise ArgumentError for a DTensor. inputs: by the caller's argument names."""
    for name, x in inputs.items():
        if isinstance(x, Tensor) and is_sharded(x):
            raise ArgumentError(
                name, "a DTensor", f"a plain tensor: {function} does not accept DTensors (parallax_attn_func does)"
            )


def run_on_shards(
    attend: Callable[..., Sequence[Tensor]],
    request: Request | CacheRequest,
    dims: Mapping[str, Dims],
    names: Sequence[str] = INPUTS,
) -> tuple[Tensor, ...]:
    """Run `attend` on this rank's shards of a request. Returns out, or out, lse, t_mean and v_mean, as DTensors.

    request  a plain tensor in it must be whole and the same on every rank
    dims     by field name, the Dims of each field that may be a tensor; REPLICATED if it is never sharded
    names    names of the inputs, which must be DTensors on one mesh

    Raises ArgumentError.
    """
    from torch.distributed.tensor import DTensor, Replicate

    inputs: list[Any] = [getattr(request, name) for name in names]
    mesh = _mesh_of(inputs, names)
    shardings = _shardings(mesh, inputs, [dims[name] for name in names])
    local = []
    for name, x in zip(request._fields, request, strict=True):
        if isinstance(x, Tensor):
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
            x = x.redistribute(mesh, _placements(shardings, dims[name])).to_local()
        local.append(x)
    q = request.q
    out_dims, stats_dims = dims["q"], STATS_OF_DENSE if q.dim() == 4 else STATS_OF_PACKED
    shapes = (q.shape, stats_shape(q), stats_shape(q), q.shape)
    outputs = attend(*local)
    # torch.compile of torch 2.9 treats every zip as strict, so the tuples are cut to the number of outputs.
    output_dims = (out_dims, stats_dims, stats_dims, out_dims)[: len(outputs)]
    return tuple(
        DTensor.from_local(
            x,
            mesh,
            _placements(shardings, x_dims),
            run_check=False,
            shape=torch.Size(shape),
            stride=_contiguous_strides(shape),
        )
        for x, x_dims, shape in zip(outputs, output_dims, shapes[: len(outputs)], strict=True)
    )


def _mesh_of(inputs: Sequence[Tensor], names: Sequence[str]) -> DeviceMesh:
    from torch.distributed.tensor import DTensor

    mesh: Any = next(x.device_mesh for x in inputs if isinstance(x, DTensor))
    for name, x in zip(names, inputs, strict=True):
        if not isinstance(x, DTensor):
            raise ArgumentError(name, "a plain tensor together with DTensors", "a DTensor, as the other inputs are")
        if x.device_mesh != mesh:
            raise ArgumentError(name, f"on {x.device_mesh}", f"on {mesh}, the mesh of the other inputs")
    return mesh  # type: ignore[no-any-return]


def _shardings(mesh: DeviceMesh, inputs: Sequence[Any], dims: Sequence[Dims]) -> list[str]:
    """For each mesh dimension the field of Dims that it shards, "" for none. The choice sends the least data."""
    q, k = inputs[0], inputs[2]
    batch, kv_heads = q.shape[0], k.shape[-2]
    shards = {"batch": 1, "heads": 1}
    shardings = []
    for mesh_dim in range(mesh.ndim):
        size = mesh.size(mesh_dim)
        possible = [""]
        if dims[0].batch is not None:
            # Uneven sequences may stay as they are sharded, but tensors are not redistributed into uneven shards.
            even = batch % (shards["batch"] * size) == 0
            if even or q.placements[mesh_dim].is_shard(dims[0].batch):
                possible.append("batch")
        if kv_heads % (shards["heads"] * size) == 0:
            possible.append("heads")
        costs = [0] * len(possible)
        for i, kind in enumerate(possible):  # torch.compile of torch 2.9 has no sum of a generator
            for x, x_dims in zip(inputs, dims, strict=True):
                costs[i] += _cost(x, mesh_dim, kind, x_dims)
        kind = possible[costs.index(min(costs))]
        if kind:
            shards[kind] *= size
        shardings.append(kind)
    return shardings


def _cost(x: Any, mesh_dim: int, kind: str, dims: Dims) -> int:
    """The approximate cost of redistributing x for a mesh dimension, in units of sending x once."""
    current, target = x.placements[mesh_dim], _placements([kind], dims)[0]
    if current == target or current.is_replicate():
        return 0
    return (1 if target.is_shard() else 4) * (2 if current.is_partial() else 1)


def _placements(shardings: Sequence[str], dims: Dims) -> list[Placement]:
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Placement] = []
    for kind in shardings:
        dim = dims.batch if kind == "batch" else dims.heads if kind == "heads" else None
        placements.append(Replicate() if dim is None else Shard(dim))
    return placements


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
