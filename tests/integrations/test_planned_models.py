"""`tune --model` reads a config.json as transformers does, and plans the kernels that a converted model launches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dispatched_kernels import kernels_of, recorded_kernels
from hf_samples import CONFIGS, converted_model, padding, prompts
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import parallax_gen
from parallax_gen.problem.models import FAMILIES, Model
from parallax_gen.problem.steps import Serving, Training, serving_steps, training_steps
from parallax_gen.tuning.plan import read_model

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")
LAYERS = 8  # both kinds of layers in every pattern
FAMILIES_HERE = sorted(set(FAMILIES) & set(CONFIG_MAPPING))  # fla's, and families of newer versions, are not


def windows_of(model: torch.nn.Module) -> list[int]:
    """The window of each attention layer, as transformers passes it on; 0 for none."""
    attentions = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "head_dim")]
    of_config = getattr(model.config, "sliding_window", None)
    return [getattr(attention, "sliding_window", of_config) or 0 for attention in attentions]


@pytest.mark.parametrize("uses_windows", [False, True])
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_a_saved_config_is_read_as_transformers_does(name: str, uses_windows: bool, tmp_path: Path) -> None:
    kind = type(AutoConfig.for_model(name))
    sizes: dict[str, Any] = {kind.attribute_map.get("num_hidden_layers", "num_hidden_layers"): LAYERS}
    if name == "ministral":  # its model, unlike Mistral's, cannot be made without head_dim
        sizes["head_dim"] = 64
    if uses_windows and hasattr(kind, "sliding_window"):
        sizes["sliding_window"] = 100
        sizes |= {"use_sliding_window": True} if hasattr(kind, "use_sliding_window") else {}
        sizes |= {"max_window_layers": 3} if hasattr(kind, "max_window_layers") else {}
    config = kind(**sizes, dtype="float16", pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config.save_pretrained(tmp_path / "saved")
    result = read_model(tmp_path / "saved")
    config.vocab_size = 64
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = next(m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "head_dim"))
    group = getattr(attention, "num_key_value_groups", 1)
    heads = config.num_attention_heads
    assert (result.name, result.heads, result.kv_heads) == ("saved", heads, heads // group)
    assert (result.head_dim, result.dtype, result.layers) == (attention.head_dim, "fp16", LAYERS)
    windows = windows_of(model)
    assert dict(result.windows) == {window: windows.count(window) for window in windows}
    assert result.softcap == (getattr(config, "attn_logit_softcapping", None) is not None)
    assert result.max_len == config.max_position_embeddings


def saved(name: str, folder: Path) -> Any:
    """A converted model, and the same model as its config.json describes it."""
    model = converted_model(name)
    model.save_pretrained(folder)
    return model, read_model(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_of_a_converted_model(name: str, tmp_path: Path) -> None:
    model, described = saved(name, tmp_path)
    with recorded_kernels() as launched:
        model.train()(prompts(2, 11)).logits.sum().backward()
    assert launched == kernels_of(training_steps(described, Training(batch=2, seqlen=11)))


def test_a_converted_model_follows_the_mode(tmp_path: Path) -> None:
    model, described = saved("mistral", tmp_path)
    described, run = replace(described, batch_invariant=True), Serving(max_len=11, max_batch=1)
    steps = {step.name: step for step in serving_steps(described, run)}
    with parallax_gen.batch_invariant():
        with recorded_kernels() as launched:
            model.train()(prompts(2, 11)).logits.sum().backward()
        assert launched == kernels_of(training_steps(described, Training(batch=2, seqlen=11)))
        assert launched_by_the_last_step(model.eval(), described, 1) == kernels_of([steps["generate, batch 1"]])


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_of_a_converted_model(name: str, tmp_path: Path) -> None:
    """A prompt, then steps up to the last one, which is planned: it has max_len keys."""
    model, described = saved(name, tmp_path)
    run = Serving(max_len=11, max_batch=2)
    steps = {step.name: step for step in serving_steps(described, run)}
    with recorded_kernels() as launched, torch.no_grad():
        model(prompts(1, 11))
    assert launched == kernels_of([steps["generate, prompt"]])
    with recorded_kernels() as launched, torch.no_grad():
        model(prompts(2, 11), attention_mask=padding([0, 3], [0, 0], 11))
    assert launched == kernels_of([steps["generate, prompts"]])
    assert launched_by_the_last_step(model, described, 1) == kernels_of([steps["generate, batch 1"]])
    assert launched_by_the_last_step(model, described, 2) == kernels_of([steps["generate, batch 2"]])


def launched_by_the_last_step(model: Any, described: Model, batch: int) -> Any:
    """What `generate` launches for the last of 11 tokens. With several sequences, the second has padding before it."""
    before = [0, 3, 5][:batch]
    tokens, mask = prompts(batch, 9), padding(before, [0] * batch, 9)
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    totals = []
    for new_tokens in (2, 3):
        with recorded_kernels() as launched:
            model.generate(tokens, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
        totals.append(launched)
    assert described.layers == 2
    return totals[1] - totals[0]
