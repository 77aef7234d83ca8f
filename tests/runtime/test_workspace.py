"""How a caller's workspace is divided, and which scratch launches share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallax_gen.ops.base import Scratch
from parallax_gen.runtime.workspace import Workspace, split_workspace, workspace_bytes


@pytest.mark.parametrize("scratch", [Scratch(12, 1), Scratch(12, 4), Scratch(8, 5), Scratch(4096, 77), Scratch(8, 0)])
def test_counters_and_split_kv_scratch_are_adjacent_and_aligned(scratch: Scratch) -> None:
    size = workspace_bytes(scratch)
    workspace = torch.zeros(size, dtype=torch.uint8)
    states, counters = split_workspace(workspace, scratch)
    assert (states.dtype, states.numel()) == (torch.float32, scratch.floats)
    assert (counters.dtype, counters.numel()) == (torch.int32, scratch.counters)
    begin = workspace.data_ptr()
    assert counters.data_ptr() == begin or not scratch.counters
    assert (states.data_ptr() - begin) % 16 == 0
    assert states.data_ptr() - begin >= 4 * scratch.counters
    assert states.data_ptr() - begin + 4 * scratch.floats == size < 4 * (scratch.counters + scratch.floats) + 16
    states.fill_(float("nan"))
    assert not counters.any()
    counters.fill_(-1)
    assert states.isnan().all()


def test_a_larger_workspace_is_divided_like_an_exact_one() -> None:
    scratch = Scratch(12, 3)
    workspace = torch.zeros(workspace_bytes(scratch) + 100, dtype=torch.uint8)
    for part in split_workspace(workspace, scratch):
        part.fill_(-1)
    assert workspace[:12].all()
    assert not workspace[12:16].any()  # the gap between them
    assert not workspace[workspace_bytes(scratch) :].any()


def test_no_scratch_needs_no_bytes() -> None:
    assert workspace_bytes(Scratch()) == 0


def test_scratch_is_shared_on_a_stream_but_not_with_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    shared = Workspace(torch.device("cpu"))

    def addresses(floats: int, stream: int) -> list[int]:
        states, counters = shared.get(floats, 4, stream)
        assert states.numel() >= floats
        assert not counters.any()
        return [states.data_ptr(), counters.data_ptr()]

    default, other = addresses(64, 0), addresses(64, 7)
    assert addresses(32, 0) == default
    assert addresses(64, 7) == other
    assert not {*default} & {*other}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [shared.get(32, 4, 7) for _ in range(2)]  # both are kept, so their memory is not reused
    assert len({x.data_ptr() for pair in captured for x in pair} | {*other}) == 6
