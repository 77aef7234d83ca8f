"""A converted model of transformers says which kernels it launches, as its saved config.json does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from hf_samples import CONFIGS, converted_model
from torch import nn
from transformers import AutoModelForCausalLM

from parallax_gen.api.targets import models_of_module, target_of
from parallax_gen.errors import ArgumentError
from parallax_gen.tuning.plan import read_model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_model_is_read_like_its_file(name: str, tmp_path: Path) -> None:
    model = converted_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    saved = read_model(tmp_path / "saved")
    (read,) = models_of_module(nn.ModuleList([model]))  # inside another module
    for field in ("heads", "kv_heads", "head_dim", "windows", "softcap", "dtype", "max_len", "causal"):
        assert getattr(read, field) == getattr(saved, field), field
    (named,) = models_of_module(model)
    assert str(named).startswith(f"{type(model).__name__}: 2 layers")


def test_a_model_that_is_not_converted_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(ArgumentError, match=r"model: got a LlamaForCausalLM without such layers; allowed: .*convert"):
        target_of(model, None, training=None, serving=None, tp=1, dtype=None)
