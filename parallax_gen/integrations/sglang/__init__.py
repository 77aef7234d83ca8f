"""Parallax attention in SGLang: a backend for `--attention-backend parallax_gen`, and a layer that takes r beside q.

SGLang calls `register` by the entry-point group `sglang.srt.plugins`. A model builds `layer.ParallaxRadixAttention` in
place of RadixAttention: docs/engines.md says what else it needs. Names and signatures are those of SGLang 0.5.23, which
is not installed where this is tested: stand-ins with its signatures are.

Importing this module imports no SGLang.
"""

from __future__ import annotations

import logging
from typing import Any

BACKEND = "parallax_gen"


def register() -> None:
    """Make the backend known to this process's SGLang. Warns if this SGLang lacks what it needs."""
    try:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
        from sglang.srt.server_args import add_attention_backend_choices
    except ImportError as error:
        logging.getLogger(__name__).warning("parallax_gen registers no attention backend with this SGLang: %s", error)
        return
    if BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(BACKEND)(create_backend)
        add_attention_backend_choices([BACKEND])


def create_backend(model_runner: Any) -> Any:
    """The backend for SGLang's ModelRunner."""
    from parallax_gen.integrations.sglang.backend import ParallaxAttnBackend

    return ParallaxAttnBackend(model_runner)
