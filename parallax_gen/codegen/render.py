"""Renders a kernel's source. The only user of Jinja."""

from __future__ import annotations

import hashlib
import textwrap
from dataclasses import dataclass
from functools import cache, lru_cache

import jinja2

import parallax_gen
from parallax_gen.codegen.fingerprint import cached_fingerprint, text_hash
from parallax_gen.describe import describe
from parallax_gen.errors import ConfigError
from parallax_gen.files import data_dir
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel: one Python file that needs torch and triton only.

    name       a readable module name, for files and traces
    text       the file
    sha256     of the text, in hex
    kernel     the fingerprint: kernels with equal fingerprints are the same program
    text_hash  of the text below the header
    """

    name: str
    text: str
    sha256: str
    kernel: str = ""
    text_hash: str = ""


# The placeholder for the fingerprint in the header, until the rest is rendered and the fingerprint is known.
_PLACEHOLDER = "0" * 12


@lru_cache(maxsize=256)
def render(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> KernelSource:
    """The kernel of `spec` with `config`, for `gpu`. Raises ConfigError if the config is invalid.

    The fingerprint in its header is computed from its text, never taken from a record.
    """
    text, hashed = _without_fingerprint(spec, config, gpu)
    kernel = cached_fingerprint(text, hashed)
    text = text.replace(f"kernel {_PLACEHOLDER}", f"kernel {kernel[:12]}", 1)
    return KernelSource(_name(spec), text, hashlib.sha256(text.encode()).hexdigest(), kernel, hashed)


def text_hash_of(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> str:
    """The `text_hash` of the rendered kernel. Faster than `render`, which parses the text for its fingerprint."""
    return _without_fingerprint(spec, config, gpu)[1]


@lru_cache(maxsize=256)
def _without_fingerprint(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> tuple[str, str]:
    """A kernel's text with the placeholder for its fingerprint, and the hash of the text below the header."""
    if reason := why_invalid(spec, config, gpu):
        raise ConfigError(f"{describe(config)}: {reason}")
    op = op_of(spec)
    text = (
        _environment()
        .get_template(op.template)
        .render(
            spec=spec,
            op=op,
            config=config,
            spec_text=_wrapped(str(spec)),
            config_text=_wrapped(describe(config)),
            form=op.form(spec, config),
            kernels=op.signatures(spec, config),
            parameters=op.parameters(spec, config),
            gpu_title=gpu.title,
            inline_ptx=not gpu.is_amd,
            version=parallax_gen.__version__,
            kernel=_PLACEHOLDER,
        )
    )
    return text, text_hash(text)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(data_dir("templates")),
        auto_reload=False,  # templates do not change: do not check their files for every imported macro
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Python, not HTML
    )


def _wrapped(text: str) -> str:
    """A text wrapped for the header, whose lines begin with a label of 11 characters."""
    return "\n".join(textwrap.wrap(text, 105, subsequent_indent=" " * 11))


def _name(spec: KernelSpec) -> str:
    words = [spec.public_op, f"d{spec.head_dim}", spec.dtype, f"g{spec.group}"]
    words += [name for name, value in spec.flat().items() if value is True]
    words += [f"p{spec.page_size}"] * (spec.page_size > 0)
    words += [spec.cache_dtype] * (spec.cache_dtype != "")
    return "_".join(words)
