"""Attention of a decode step as a CUDA graph: captured once, replayed while lengths, pages and queries change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.kvcache import kvcache_workspace_size, parallax_attn_with_kvcache
from parallax_gen.runtime.states import State
from parallax_gen.runtime.transforms import refuse_transforms, transform_is_active

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from parallax_gen.runtime.kvcache import CacheOptions

Output = TypeVar("Output", bound="Tensor | State")


class GraphedDecode(Generic[Output]):
    """`parallax_attn_with_kvcache` captured in a CUDA graph over fixed tensors.

    Every call replays the graph on the current stream and returns the same output tensors with new values. The graph
    reads q, r, the caches, cache_seqlens, page_table and all other given tensors in place: write the next step's data
    into them. Sizes are fixed; lengths, pages and cu_seqlens_q may change from step to step. Each object has its own
    workspace, so several may run at once. `graph` is the CUDAGraph.

    An engine that captures its whole step should call `parallax_attn_with_kvcache` in its own capture instead.
    """

    @overload
    def __init__(
        self: GraphedDecode[Tensor],
        q: Tensor,
        r: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        return_state: Literal[False] = False,
        **arguments: Unpack[CacheOptions],
    ): ...

    @overload
    def __init__(
        self: GraphedDecode[State],
        q: Tensor,
        r: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        return_state: Literal[True],
        **arguments: Unpack[CacheOptions],
    ): ...

    @overload
    def __init__(
        self: GraphedDecode[Tensor | State],
        q: Tensor,
        r: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        return_state: bool,
        **arguments: Unpack[CacheOptions],
    ): ...

    def __init__(self, q: Tensor, r: Tensor, k_cache: Tensor, v_cache: Tensor, **arguments: Any):
        """arguments: those of `parallax_attn_with_kvcache` except workspace. Raises ArgumentError as it does."""
        if "workspace" in arguments:
            raise ArgumentError("workspace", "a tensor", "none: a GraphedDecode has its own")
        needed = kvcache_workspace_size(q, r, k_cache, v_cache, **arguments)
        if not q.is_cuda:
            raise ArgumentError("q", f"on {q.device}", "a CUDA tensor: a CUDA graph can only replay CUDA launches")
        self.q, self.r = q, r
        self._keep_alive = (k_cache, v_cache, arguments)  # the graph reads them
        self._workspace = torch.zeros(needed, dtype=torch.uint8, device=q.device) if needed else None
        arguments = {**arguments, "workspace": self._workspace}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(q.device):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # compiles and allocates before the capture
                parallax_attn_with_kvcache(q, r, k_cache, v_cache, **arguments)
            torch.cuda.current_stream().wait_stream(side_stream)
            with torch.cuda.graph(self.graph):
                self._output: Any = parallax_attn_with_kvcache(q, r, k_cache, v_cache, **arguments)

    def __call__(self, q: Tensor | None = None, r: Tensor | None = None) -> Output:
        """The output, or State, of the next step. q, r: copied to where the graph reads them; None if already there."""
        if transform_is_active():
            refuse_transforms("GraphedDecode", q=q, r=r)
        for own, new in ((self.q, q), (self.r, r)):
            if new is not None:
                own.copy_(new)
        self.graph.replay()
        output: Output = self._output
        return output
