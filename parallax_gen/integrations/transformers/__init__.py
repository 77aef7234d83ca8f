"""Parallax attention in transformers models: convert a model, train its r_proj, save it, load it.

    from parallax_gen.integrations.transformers import convert

    model = convert(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"))  # the same function, but with an r_proj
    model.save_pretrained("qwen3-parallax")
    model = AutoModelForCausalLM.from_pretrained("qwen3-parallax")  # wherever this module has been imported

Importing this module registers the attention and its mask with transformers, and the converted classes with the Auto
classes. Saved models have a model_type such as "parallax_qwen3"; Auto classes and stock classes such as
Qwen3ForCausalLM load them as Parallax models. Without this module both refuse to load them, because they would drop
r_proj.

Caches, including static ones, contain k and v as before: r is per query, like q. Padding may be before a sequence's
tokens, after them, or both. Packed sequences are given by position_ids with use_cache=False, as in transformers, or by
cu_seq_lens_q and the like. Windows, gradient checkpointing, torch.compile and tensor parallelism work. Dropout,
attention weights, masks of four dimensions and padding between tokens are refused.
"""

from __future__ import annotations

from parallax_gen.errors import install_command

try:
    from parallax_gen.integrations.transformers.attention import parallax_attention, parallax_mask
    from parallax_gen.integrations.transformers.models import ProbeLoader, convert
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    line = f"{__name__} needs transformers: {install_command('transformers')}"
    raise ModuleNotFoundError(line, name=error.name) from None

__all__ = ["ProbeLoader", "convert", "parallax_attention", "parallax_mask"]
