"""Tensor descriptors, by which a kernel loads blocks of a tensor: one instruction copies a whole block.

The card computes the addresses from the sizes and strides in the descriptor, and loads zeros past the tensor's end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallax_gen.ops.base import Knob
from parallax_gen.ops.head_dim import Chunk
from parallax_gen.ops.signature import Argument
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec

LOADS = Knob("LOADS", ("pointers", "descriptors"))
FIRST_CAPABILITY = (9, 0)  # Hopper: older cards have no such instruction
# Bytes: the start of a tensor and all strides but the last are multiples of this. Strides are below the limit.
ALIGNED_TO, STRIDE_LIMIT = 16, 2**40


@dataclass(frozen=True)
class Descriptor:
    """A descriptor of blocks of a dense (batch, rows, heads, head_dim) tensor, or of q and r as one tensor.

    name     the kernel's name for it
    tensors  what it describes: one tensor; or q and r, of which each block has the same rows. q is at the lower address
    rows     rows of a block
    width    dimensions of a block
    """

    name: str
    tensors: tuple[str, ...]
    rows: int
    width: int

    @property
    def stacks_qr(self) -> bool:
        return len(self.tensors) == 2

    @property
    def line(self) -> str:
        """The line of `launch` that makes it."""
        block = f"[1, {self.rows}, 1, {self.width}]"
        if self.stacks_qr:
            sizes = f"[2, *q.shape], [stride_qr, *q.stride()], [2, {block[1:]}"
            return f"{self.name} = TensorDescriptor(q, {sizes})"
        tensor = self.tensors[0]
        return f"{self.name} = TensorDescriptor({tensor}, {tensor}.shape, {tensor}.stride(), {block})"


def other_loads(loads: str) -> str:
    """The other value of LOADS."""
    return LOADS.values[1 - LOADS.values.index(loads)]  # type: ignore[return-value]


def descriptors_of(tensors: tuple[str, ...], rows: int, chunks: Iterable[Chunk]) -> tuple[Descriptor, ...]:
    """One descriptor for each width of the chunks of a head."""
    name = "qr_desc" if len(tensors) == 2 else f"{tensors[0]}_desc"
    widths = tuple(dict.fromkeys(chunk.width for chunk in chunks))
    return tuple(Descriptor(f"{name}_{w}" if len(widths) > 1 else name, tensors, rows, w) for w in widths)


def descriptor_arguments(descriptors: tuple[Descriptor, ...]) -> tuple[Argument, ...]:
    """The kernel's parameters for descriptors."""
    return tuple(Argument((descriptor.name,), descriptor.name) for descriptor in descriptors)


def why_no_descriptors(spec: KernelSpec, gpu: Gpu) -> str | None:
    """Why no kernel of a spec can load blocks by descriptors on a GPU; None if some can."""
    if gpu.capability < FIRST_CAPABILITY:
        has = f"is AMD's {gpu.gfx}" if gpu.is_amd else "has {}.{}".format(*gpu.capability)
        return f"LOADS 'descriptors' needs a GPU of capability 9.0 or later; {gpu.name} {has}"
    if spec.varlen:
        return "LOADS 'descriptors' cannot be combined with packed sequences: a block would have the next one's rows"
    if spec.bytes_per_element != 2:
        return f"LOADS 'descriptors' needs bf16 or fp16, not {spec.dtype}"
    return None
