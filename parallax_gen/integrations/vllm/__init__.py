"""Parallax attention in vLLM: an attention backend, and a layer that takes r beside q.

vLLM calls `register` in each process, by the entry-point group `vllm.general_plugins`. A model builds
`layer.ParallaxAttention` in place of Attention: docs/engines.md says what else it needs. Names and signatures are those
of vLLM's commit 0014ca6b (2026), which is not installed where this is tested: stand-ins with its signatures are.

Importing this module imports no vLLM.
"""

from __future__ import annotations

import logging

BACKEND_CLASS = "parallax_gen.integrations.vllm.backend.ParallaxAttentionBackend"


def register() -> None:
    """Make the backend vLLM's CUSTOM one, unless another is. Warns if this vLLM lacks what it needs.

    Layers of `ParallaxAttention` name their backend themselves, so they work beside another CUSTOM backend, too.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        logging.getLogger(__name__).warning("parallax_gen registers no attention backend with this vLLM: %s", error)
        return
    try:
        AttentionBackendEnum.CUSTOM.get_path()
    except ValueError:  # not taken
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_CLASS)
