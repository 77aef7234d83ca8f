"""DTensors over gloo: with any sharding the results equal those of full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from dispatched_kernels import recorded_kernels
from forked import run_ranks
from packaging.version import Version
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.compat.parallax_kernel_triton import parallax_fwd
from parallax_gen.distributed import ring_attn_func
from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.sharded import DENSE, PACKED, _shardings

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings about CPU tensors and of torch

FP32 = {"rtol": 1e-4, "atol": 1e-4}


def draw(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in sizes]


def dense(kv_heads: int = 2, batch: int = 2) -> list[Tensor]:
    """q, r, k, v and the output's gradient: 4 query heads of width 16."""
    rows, keys = (batch, 4, 4, 16), (batch, 6, kv_heads, 16)
    return draw(rows, rows, keys, keys, rows)


def sharded(mesh: DeviceMesh, tensors: list[Tensor], placements: list[Any]) -> list[DTensor]:
    """One placement for each tensor."""
    pairs = zip(tensors, placements, strict=True)
    return [distribute_tensor(x, mesh, [place], src_data_rank=None) for x, place in pairs]  # all ranks have the full x


def same(result: Any, expected: Any) -> None:
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a.full_tensor(), b, **FP32)


def check_attention(
    mesh: DeviceMesh, placements: list[Any], out: Any, sent: bool, kv_heads: int = 2, batch: int = 2
) -> None:
    """Check outputs and gradients. out: the expected sharding; sent: whether the forward communicates."""
    *inputs, do = dense(kv_heads, batch)
    leaves = [x.requires_grad_() for x in inputs]
    expected = parallax_attn_func(*leaves, causal=True, return_stats=True)
    gradients = torch.autograd.grad(expected[0], leaves, do)
    shards = [x.requires_grad_() for x in sharded(mesh, [x.detach() for x in inputs], placements)]
    with CommDebugMode() as talk:
        result = parallax_attn_func(*shards, causal=True, return_stats=True)
    if not sent or mesh.size() > 1:  # torch 2.9 itself communicates on a mesh of one rank
        assert (talk.get_total_counts() > 0) == sent
    stats = {Shard(2): Shard(1)}.get(out, out)  # (batch, heads, seqlen_q)
    assert [x.placements for x in result] == [(out,), (stats,), (stats,), (out,)]
    same(result, expected)
    grads = torch.autograd.grad(result[0], shards, distribute_tensor(do, mesh, [out]))
    assert [x.placements for x in grads] == [x.placements for x in shards]
    same(grads, gradients)
    with torch.no_grad():
        room = distribute_tensor(torch.zeros_like(do), mesh, [Shard(1)])
        assert parallax_attn_func(*shards, causal=True, out=room) is room
        same([room], expected[:1])


def check_all_placements(mesh: DeviceMesh) -> None:
    both = mesh.size() == 2
    for place in (Shard(0), Shard(2), Replicate()):
        check_attention(mesh, [place] * 4, place, sent=False)
    check_attention(mesh, [Shard(1)] * 4, Shard(0), sent=True)
    check_attention(mesh, [Shard(3)] * 4, Shard(0), sent=True)
    check_attention(mesh, [Shard(1)] * 4, Shard(2), sent=True, batch=3) if both else None
    check_attention(mesh, [Shard(2), Shard(2), Replicate(), Replicate()], Shard(2), sent=False)
    check_attention(
        mesh, [Shard(0)] * 4, Shard(0), sent=False, batch=3
    )  # two sequences on the first rank, one on the second
    if both:  # one kv head and one sequence cannot be sharded, so query heads are gathered
        check_attention(
            mesh, [Shard(2), Shard(2), Replicate(), Replicate()], Replicate(), sent=True, kv_heads=1, batch=1
        )


def check_packed(mesh: DeviceMesh) -> None:
    *inputs, do = draw((7, 4, 16), (7, 4, 16), (9, 2, 16), (9, 2, 16), (7, 4, 16))
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7], [0, 5, 9])]
    leaves = [x.requires_grad_() for x in inputs]
    expected = parallax_attn_varlen_func(*leaves, *starts, 4, 5, causal=True, return_stats=True)
    gradients = torch.autograd.grad(expected[0], leaves, do)
    for place in (Shard(1), Shard(0)):
        shards = [x.requires_grad_() for x in sharded(mesh, [x.detach() for x in inputs], [place] * 4)]
        arguments = starts if place == Shard(1) else sharded(mesh, starts, [Replicate()] * 2)
        result = parallax_attn_varlen_func(*shards, *arguments, 4, 5, causal=True, return_stats=True)
        assert [x.placements for x in result] == [(Shard(1),), (Shard(0),), (Shard(0),), (Shard(1),)]
        same(result, expected)
        same(torch.autograd.grad(result[0], shards, distribute_tensor(do, mesh, [place])), gradients)


def check_caches(mesh: DeviceMesh) -> None:
    q, r, k, v = dense()[:4]
    pages = [x.reshape(6, 2, 2, 16) for x in (k, v)]
    ints = {"cache_seqlens": torch.tensor([5, 2], dtype=torch.int32)}
    table = {**ints, "page_table": torch.tensor([[3, 1, 0], [5, 2, 4]], dtype=torch.int32)}
    eight = {**ints, "k_scale": torch.tensor([0.5, 2.0]), "v_scale": 2.0}
    starts = {**ints, "cu_seqlens_q": torch.tensor([0, 3, 8], dtype=torch.int32), "max_seqlen_q": 5}
    float8 = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    half = [x.bfloat16() for x in (q, r)]
    whole, heads = [Shard(0)] * 4, [Shard(2)] * 4
    pool = [Shard(0), Shard(0), Replicate(), Replicate()]
    rows = [Shard(1), Shard(1), Shard(2), Shard(2)]
    for tensors, placements, options in (
        ([q, r, k, v], whole, ints),
        ([q, r, k, v], heads, {**ints, "cache_leftpad": torch.tensor([1, 0], dtype=torch.int32)}),
        ([q, r, k, v], heads, {"cache_seqlens": 4}),
        ([q, r, *pages], heads, table),
        ([q, r, *pages], pool, table),
        ([*half, *float8], heads, eight),
        ([q.flatten(0, 1), r.flatten(0, 1), k, v], rows, starts),
    ):
        shards = sharded(mesh, tensors, placements)
        expected = parallax_attn_with_kvcache(*tensors, causal=True, return_state=True, **options)
        with CommDebugMode() as talk:
            result = parallax_attn_with_kvcache(*shards, causal=True, return_state=True, **options)
        assert talk.get_total_counts() == 0
        assert result[0].placements == (placements[0],)
        same(result, expected)
    shards = sharded(mesh, [q, r, k, v], whole)
    lengths = {"cache_seqlens": distribute_tensor(ints["cache_seqlens"], mesh, [Shard(0)])}
    room = distribute_tensor(torch.zeros_like(q), mesh, [Replicate()])
    assert parallax_attn_with_kvcache(*shards, **lengths, out=room) is room
    same([room], [parallax_attn_with_kvcache(q, r, k, v, **ints)])


def check_batch_invariance(mesh: DeviceMesh) -> None:
    """Sequences are whole where they are computed, also if the caller shards them."""
    inputs = dense()[:4]
    for place in (Shard(0), Shard(1), Shard(2)):
        shards = [x.requires_grad_() for x in sharded(mesh, inputs, [place] * 4)]
        with recorded_kernels() as launched:
            parallax_attn_func(*shards, batch_invariant=True).sum().backward()
            with torch.no_grad():
                parallax_attn_with_kvcache(*shards, batch_invariant=True)
        assert {(spec.op, spec.batch_invariant) for spec, _ in launched} == {
            (op, True) for op in ("forward", "preprocess", "dkdv", "dqdr", "decode_varlen")
        }
        whole = {(bucket.seqlen_q, bucket.seqlen_kv) for spec, bucket in launched if spec.op == "forward"}
        assert whole == {(128, 128)}


def check_refused(mesh: DeviceMesh) -> None:
    inputs = dense()[:4]
    shards = sharded(mesh, inputs, [Shard(2)] * 4)
    for function, name in ((parallax_attn_func, "k"), (parallax_attn_with_kvcache, "k_cache")):
        with pytest.raises(
            ArgumentError, match=rf"^{name}: got a plain tensor together with DTensors; allowed: a DTensor"
        ):
            function(*shards[:2], *inputs[2:])  # type: ignore[operator]
    for other in (ring_attn_func, lambda *x: parallax_fwd(*x, 1.0, 1)):
        with pytest.raises(ArgumentError, match=r"^q: got a DTensor; allowed: a plain tensor: "):
            other(*shards)
    with pytest.raises(ArgumentError, match=r"^out: got a tensor, where gradients are recorded"):
        parallax_attn_func(*[x.requires_grad_() for x in shards], out=shards[0].detach())


def work(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for check in (check_all_placements, check_packed, check_caches, check_batch_invariance, check_refused):
        check(mesh)


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(work, 2, tmp_path)


class Mesh(NamedTuple):
    """Stands in for a DeviceMesh of these sizes."""

    sizes: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    def size(self, at: int) -> int:
        return self.sizes[at]


class Placed(NamedTuple):
    """Stands in for a DTensor."""

    shape: tuple[int, ...]
    placements: tuple[Any, ...]


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "places", "kinds"),
    [
        ((2, 4), 4, (Shard(0), Shard(2)), ["batch", "heads"]),
        ((2, 4), 4, (Replicate(), Shard(2)), ["", "heads"]),  # replicas stay replicas
        (
            (2, 2),
            6,
            (Shard(2), Shard(2)),
            ["heads", "batch"],
        ),  # 6 kv heads are not divisible by 4
        ((2, 2), 8, (Shard(2), Shard(2)), ["heads", "heads"]),
        ((8,), 2, (Shard(1),), ["batch"]),  # all-to-all, since gathering would send more
        ((16,), 16, (Shard(1),), ["heads"]),  # 8 sequences are too few
        ((16,), 3, (Shard(1),), [""]),
        ((16,), 3, (Shard(0),), ["batch"]),  # some ranks have no sequence
        ((2,), 2, (Partial(),), ["batch"]),
    ],
)
def test_the_sharding_of_each_mesh_dimension(
    sizes: tuple[int, ...], kv_heads: int, places: tuple[Any, ...], kinds: list[str]
) -> None:
    shapes = [(8, 5, 48, 16)] * 2 + [(8, 7, kv_heads, 16)] * 2
    inputs = [Placed(shape, places) for shape in shapes]
    assert _shardings(Mesh(sizes), inputs, [DENSE] * 4) == kinds  # type: ignore[arg-type]


def test_packed_sequences_are_not_sharded() -> None:
    inputs = [Placed((8, heads, 16), (Shard(0),)) for heads in (4, 4, 2, 2)]
    assert _shardings(Mesh((2,)), inputs, [PACKED] * 4) == ["heads"]  # type: ignore[arg-type]
    assert _shardings(Mesh((8,)), inputs, [PACKED] * 4) == [""]  # type: ignore[arg-type]


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("each", [check_all_placements, check_packed, check_caches, check_refused])
def test_one_rank(one_rank: DeviceMesh, each: Any) -> None:
    each(one_rank)


def test_compiled(one_rank: DeviceMesh) -> None:
    inputs = dense()[:4]
    shards = [x.requires_grad_() for x in sharded(one_rank, inputs, [Shard(2)] * 4)]
    torch._dynamo.reset()
    call = torch.compile(lambda *x: parallax_attn_func(*x, causal=True), backend="aot_eager", fullgraph=True)
    result, expected = call(*shards), parallax_attn_func(*shards, causal=True)
    same([result], [expected.full_tensor()])
    gradients = (torch.autograd.grad(out.sum(), shards) for out in (result, expected))
    same(next(gradients), [x.full_tensor() for x in next(gradients)])
    cached = torch.compile(parallax_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        same([cached(*shards)], [parallax_attn_with_kvcache(*inputs)])
    torch._dynamo.reset()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.9 cannot shard aten.alias")
def test_unrelated_tangents_do_not_matter(one_rank: DeviceMesh) -> None:
    """torch itself has no gradients of DTensors inside torch.func.grad."""
    *inputs, do = dense()
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(parallax_attn_func(*leaves, causal=True), leaves, do)
    shards = [x.requires_grad_() for x in sharded(one_rank, [x.detach() for x in inputs], [Shard(0)] * 4)]
    with forward_ad.dual_level():
        out = parallax_attn_func(*shards, causal=True)
        same(torch.autograd.grad(out, shards, distribute_tensor(do, one_rank, [Shard(0)])), expected)
