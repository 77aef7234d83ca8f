"""The backend and layer for SGLang, between stand-ins for its model runner, pools and RadixAttention."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_stub
import torch
from engine_stubs import STEPS, TOTALS, Requests, assert_overrides_fit, engine, imported, signatures
from sglang_stub import ForwardMode

import parallax_gen
from parallax_gen.errors import ArgumentError
from parallax_gen.integrations import sglang as integration

CONTEXT, SCALE = 48, 16**-0.5


@pytest.fixture(autouse=True)
def _sglang() -> Iterator[None]:
    with engine(sglang_stub):
        yield
    sglang_stub.ATTENTION_BACKENDS.clear()
    sglang_stub.CHOICES.clear()


class Server:
    """A layer, its backend, and a pool whose pages are given to the requests in a random order."""

    def __init__(self, requests: Requests, page_size: int, dtype: torch.dtype = torch.float32, **options: Any):
        self.requests, self.page_size = requests, page_size
        batch, pages = len(requests.totals), CONTEXT // page_size
        # Rows of req_to_token belong to requests in another order. Page 0 is a dummy.
        self.rows = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(2))[:batch]
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1)) + 1
        self.req_to_token = torch.full((batch + 2, CONTEXT), -1, dtype=torch.int32)
        tokens = order.view(batch, pages, 1) * page_size + torch.arange(page_size)
        self.req_to_token[self.rows] = tokens.view(batch, CONTEXT).int()
        pool = sglang_stub.MHATokenToKVPool(
            (batch * pages + 1) * page_size, requests.kv_heads, requests.head_dim, dtype
        )
        self.backend = integration.create_backend(sglang_stub.model_runner(pool, self.req_to_token, page_size))
        self.layer = imported("sglang.layer").ParallaxRadixAttention(
            requests.heads, requests.head_dim, SCALE, num_kv_heads=requests.kv_heads, layer_id=0, **options
        )
        self.layer.backend = self.backend

    def batch(self, counts: tuple[int, ...], mode: ForwardMode) -> Any:
        """The ForwardBatch of a step that was just advanced."""
        lengths = torch.tensor(self.requests.lengths)
        written = [
            self.req_to_token[row, length - count : length]
            for row, length, count in zip(self.rows, self.requests.lengths, counts, strict=True)
        ]
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(counts),
            req_pool_indices=self.rows,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            out_cache_loc=torch.cat(written).long(),
            extend_seq_lens=torch.tensor(counts),
            extend_seq_lens_cpu=list(counts),
            spec_info=None,
            encoder_lens=None,
        )

    def step(self, counts: tuple[int, ...], mode: ForwardMode) -> torch.Tensor:
        q, r, k, v = self.requests.advance(counts)
        batch = self.batch(counts, mode)
        self.backend.init_forward_metadata(batch)
        out: torch.Tensor = self.layer(q, r, k, v, batch)
        return out


def mode_of(counts: tuple[int, ...]) -> ForwardMode:
    return ForwardMode.DECODE if set(counts) == {1} else ForwardMode.MIXED


@pytest.mark.parametrize(
    ("page_size", "options", "ours"),
    [
        (1, {}, {}),
        (16, {}, {}),
        # SGLang's window is the keys before a query's own
        (4, {"sliding_window_size": 5, "logit_cap": 2.0}, {"window_size": 6, "softcap": 2.0}),
    ],
)
def test_steps_compute_parallax_attention(page_size: int, options: dict[str, Any], ours: dict[str, Any]) -> None:
    """Chunks of prompts and decode steps, over a pool that only the steps themselves wrote."""
    requests = Requests(TOTALS)
    server = Server(requests, page_size, **options)
    for counts in STEPS:
        out = server.step(counts, mode_of(counts))
        torch.testing.assert_close(out, requests.expected(counts, **ours), rtol=1e-4, atol=1e-5)


def test_decode_steps_in_the_mode_take_the_kernel_of_prompts() -> None:
    requests = Requests(TOTALS)
    server = Server(requests, 4)
    with parallax_gen.batch_invariant():
        for counts in (STEPS[0], (1, 1, 1)):
            out = server.step(counts, mode_of(counts))
            torch.testing.assert_close(out, requests.expected(counts), rtol=1e-4, atol=1e-5)
        assert server.backend.forward_metadata.max_seqlen_q == 1


def test_tokens_that_pad_a_batch_change_nothing() -> None:
    """SGLang cuts q, k and v to the real tokens, but not r, which it does not know."""
    requests = Requests((9, 4))
    server = Server(requests, 4)
    counts = (9, 4)
    q, r, k, v = requests.advance(counts)
    batch = server.batch(counts, ForwardMode.EXTEND)
    server.backend.init_forward_metadata(batch)
    out = server.layer(q, torch.nn.functional.pad(r, (0, 0, 0, 3), value=float("nan")), k, v, batch)
    torch.testing.assert_close(out, requests.expected(counts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_captured_decode_step_reads_the_same_tensors_in_every_replay(batch_invariant: bool) -> None:
    """In the mode, packed queries: the kernel of prompts, with which the other requests of a batch may come."""
    requests = Requests(TOTALS)
    server = Server(requests, 4)
    backend = server.backend
    with parallax_gen.batch_invariant(batch_invariant):
        check_captured_steps(backend, server, requests, packs=batch_invariant)


def check_captured_steps(backend: Any, server: Server, requests: Requests, *, packs: bool) -> None:
    backend.init_cuda_graph_state(8, 8)
    server.step(STEPS[0], ForwardMode.EXTEND)
    addresses = []
    for in_capture in (True, False):
        counts = (1, 1, 1)
        q, r, k, v = requests.advance(counts)
        batch = server.batch(counts, ForwardMode.DECODE)
        backend.init_forward_metadata_out_graph(batch, in_capture=in_capture)
        backend.init_forward_metadata_in_graph(batch)
        metadata = backend.forward_metadata
        addresses.append((metadata.page_table.data_ptr(), metadata.cache_seqlens.data_ptr(), metadata.page_table.shape))
        starts = metadata.cu_seqlens_q
        assert packs == (starts is not None)
        if packs:
            addresses[-1] += (starts.data_ptr(),)
            assert (starts.tolist(), metadata.max_seqlen_q) == ([0, 1, 2, 3], 1)
        out = server.layer(q, r, k, v, batch)
        torch.testing.assert_close(out, requests.expected(counts), rtol=1e-4, atol=1e-5)
    assert addresses[0] == addresses[1]
    assert backend.get_cuda_graph_seq_len_fill_value() == 1
    with pytest.raises(ArgumentError, match="in a CUDA graph"):
        backend.init_forward_metadata_out_graph(server.batch((1, 1, 1), ForwardMode.EXTEND))


def test_an_8_bit_pool_is_read_with_the_layers_scales() -> None:
    requests, rounded = Requests((12,)), Requests((12,))
    server = Server(requests, 4, torch.float8_e4m3fn)
    server.layer.k_scale, server.layer.v_scale = torch.tensor(0.5), torch.tensor(2.0)
    for name in ("q", "r", "k", "v"):
        setattr(requests, name, [x.bfloat16() for x in getattr(requests, name)])
        setattr(rounded, name, [x.float() for x in getattr(requests, name)])
    for x, scale in ((rounded.k, 0.5), (rounded.v, 2.0)):
        x[0] = (x[0] / scale).to(torch.float8_e4m3fn).float() * scale
    rounded.lengths = [12]
    keys = requests.k[0].clone()
    out = server.step((12,), ForwardMode.EXTEND)
    torch.testing.assert_close(out.float(), rounded.expected((12,)), rtol=2e-2, atol=2e-2)
    assert torch.equal(requests.k[0], keys)  # the pool's division in place is of a copy


# -- what is refused


def test_a_layer_without_r_is_refused() -> None:
    server = Server(Requests((3,)), 1)
    q, _, k, v = server.requests.advance((3,))
    batch = server.batch((3,), ForwardMode.EXTEND)
    server.backend.init_forward_metadata(batch)
    with pytest.raises(ArgumentError, match="r: got None; allowed: the probes"):
        sglang_stub.RadixAttention.forward(server.layer, q, k, v, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"spec_info": object()}, "no speculative decoding"), ({"encoder_lens": torch.ones(1)}, "no cross-attention")],
)
def test_batches_of_other_kinds_are_refused(change: dict[str, Any], message: str) -> None:
    server = Server(Requests((3,)), 1)
    server.requests.advance((3,))
    batch = SimpleNamespace(**{**vars(server.batch((3,), ForwardMode.EXTEND)), **change})
    with pytest.raises(ArgumentError, match=message):
        server.backend.init_forward_metadata(batch)


def test_attention_that_is_not_causal_is_refused() -> None:
    server = Server(Requests((3,)), 1, attn_type=sglang_stub.AttentionType.ENCODER_ONLY)
    with pytest.raises(ArgumentError, match="attention of type encoder_only"):
        server.step((3,), ForwardMode.EXTEND)


def test_a_pool_that_keeps_windowed_layers_apart_is_refused() -> None:
    pool = SimpleNamespace(translate_loc_from_full_to_swa=None)
    with pytest.raises(ArgumentError, match="--disable-hybrid-swa-memory"):
        integration.create_backend(sglang_stub.model_runner(pool, torch.zeros(1, 1), 1))


# -- registration and signatures


def test_register_adds_the_backend_once() -> None:
    for _ in range(2):
        integration.register()
    assert sglang_stub.ATTENTION_BACKENDS == {"parallax_gen": integration.create_backend}
    assert sglang_stub.CHOICES == ["parallax_gen"]


def test_register_in_another_sglang_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr("sglang.srt.server_args.add_attention_backend_choices")
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert "registers no attention backend with this SGLang" in caplog.text
    assert sglang_stub.ATTENTION_BACKENDS == {}


def test_overrides_take_what_sglang_passes() -> None:
    assert_overrides_fit(imported("sglang.backend").ParallaxAttnBackend, sglang_stub.AttentionBackend)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
@pytest.mark.parametrize(("name", "parameters"), signatures(sglang_stub).items())
def test_the_stand_in_has_sglangs_signatures(name: str, parameters: list[str]) -> None:
    module, _, path = name.partition(":")
    result = importlib.import_module(module)
    for part in path.split("."):
        result = getattr(result, part)
    assert list(inspect.signature(result).parameters) == parameters
