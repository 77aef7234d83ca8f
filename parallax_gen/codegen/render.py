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
    sha256     of the text, in hex: the same text is the same kernel
    kernel     its fingerprint: what it does is the same where this is
    text_hash  of the text below its header
    """

    name: str
    text: str
    sha256: str
    kernel: str = ""
    text_hash: str = ""


# Stands where the header says which kernel it is until the rest is there to be identified.
_UNKNOWN = "0" * 12


@lru_cache(maxsize=256)
def render(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> KernelSource:
    """The kernel of `spec` done as `config` says, for `gpu`. Raises ConfigError where that cannot be.

    The fingerprint in its header is that of its text, whatever records say of that.
    """
    text, hashed = _unnamed(spec, config, gpu)
    kernel = cached_fingerprint(text, hashed)
    text = text.replace(f"kernel {_UNKNOWN}", f"kernel {kernel[:12]}", 1)
    return KernelSource(_name(spec), text, hashlib.sha256(text.encode()).hexdigest(), kernel, hashed)


def text_hash_of(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> str:
    """The `text_hash` of what `render` gives, sooner: a text needs no parsing for it."""
    return _unnamed(spec, config, gpu)[1]


@lru_cache(maxsize=256)
def _unnamed(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> tuple[str, str]:
    """A kernel's text, which does not say yet which kernel it is, and the hash of it below the header."""
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
            config_text=_wrapped(describe(config)),
            form=op.form(spec, config),
            kernels=op.signatures(spec, config),
            parameters=op.parameters(spec, config),
            gpu_title=gpu.title,
            version=parallax_gen.__version__,
            kernel=_UNKNOWN,
        )
    )
    return text, text_hash(text)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(data_dir("templates")),
        auto_reload=False,  # no look at the files for every macro that is imported: they stay as they are
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Python, not HTML
    )


def _wrapped(text: str) -> str:
    """Of the header, where a line begins with what it is of."""
    return "\n".join(textwrap.wrap(text, 105, subsequent_indent=" " * 11))


def _name(spec: KernelSpec) -> str:
    words = [spec.family, f"d{spec.head_dim}", spec.dtype, f"g{spec.group}"]
    words += [name for name, value in spec.flat().items() if value is True]
    words += [f"p{spec.page_size}"] * (spec.page_size > 0)
    words += [spec.cache_dtype] * (spec.cache_dtype != "")
    return "_".join(words)
