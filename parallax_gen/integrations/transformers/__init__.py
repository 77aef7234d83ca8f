"""Parallax attention in models of transformers: convert one, train its r_proj, save it, load it.

    from parallax_gen.integrations.transformers import convert

    model = convert(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"))  # the same function, with r_proj in it
    model.save_pretrained("qwen3-parallax")
    model = AutoModelForCausalLM.from_pretrained("qwen3-parallax")  # wherever this module has been imported

Importing it registers attention and mask with transformers, and the converted classes, of every head, with its Auto
classes. What is saved says "parallax_qwen3" and the like, and Auto classes as well as stock ones such as
Qwen3ForCausalLM load it as a Parallax model. Without this module both refuse it, and do not load it without its r_proj.

Caches, static ones too, hold k and v as before: r is per query, as q is. Padding may lie before a sequence's tokens,
behind them, or both. Packed sequences are told by position_ids, with use_cache=False, as transformers looks for them,
or by cu_seq_lens_q and the like. Windows, gradient checkpointing, torch.compile and tensor parallelism work. Dropout,
attention weights, masks of four dimensions and padding between tokens are refused.
"""

from __future__ import annotations

from parallax_gen.integrations.transformers.attention import parallax_attention, parallax_mask
from parallax_gen.integrations.transformers.models import ProbeLoader, convert

__all__ = ["ProbeLoader", "convert", "parallax_attention", "parallax_mask"]
