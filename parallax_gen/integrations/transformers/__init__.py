"""Parallax attention in models of transformers: convert one, train its r_proj, save it, load it.

from parallax_gen.integrations.transformers import convert

model = convert(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"))  # the same function, with r_proj in it
model.save_pretrained("qwen3-parallax")
model = AutoModelForCausalLM.from_pretrained("qwen3-parallax")  # wherever this module has been imported
"""

from __future__ import annotations

from parallax_gen.integrations.transformers.attention import parallax_attention
from parallax_gen.integrations.transformers.masks import parallax_mask
from parallax_gen.integrations.transformers.models import convert

__all__ = ["convert", "parallax_attention", "parallax_mask"]
