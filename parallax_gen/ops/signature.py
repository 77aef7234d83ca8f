"""The parameters of a rendered kernel and the arguments that its `launch` passes, in order, for templates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallax_gen.ops.head_dim import power_of_2
from parallax_gen.problem.spec import KernelSpec

# Tensor -> a kernel's name for it, where that differs.
_SHORT = {"out": "o", "k_cache": "k", "v_cache": "v"}


@dataclass(frozen=True)
class Argument:
    """Some parameters of a kernel, and the expression that `launch` passes for them.

    parameters  as the kernel declares them: ("q_ptr",), or ("stride_qb", "stride_qm: tl.constexpr", "stride_qh")
    expression  in `launch`: "q", or "*q.stride()[:3]"
    """

    parameters: tuple[str, ...]
    expression: str


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters and what `launch` passes for them, in order.

    unspecialized  those that change from call to call: Triton compiles no variant for 1 or for multiples of 16
    """

    kernel_arguments: tuple[Argument, ...]
    unspecialized: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(parameter for argument in self.kernel_arguments for parameter in argument.parameters)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(argument.expression for argument in self.kernel_arguments)

    @property
    def specialized_arguments(self) -> tuple[str, ...]:
        """The arguments before the unspecialized ones. Another kernel of the file may take the same."""
        return self.arguments[: -len(self.unspecialized)]

    @property
    def unspecialized_arguments(self) -> tuple[str, ...]:
        """The unspecialized arguments, which come last."""
        return self.arguments[-len(self.unspecialized) :]


@dataclass(frozen=True)
class Index:
    """The kernels' names for an index.

    letter  m for query rows, n for keys, h for heads: also of strides
    """

    letter: str

    @property
    def block(self) -> str:
        """The constant with the size of a tile or block."""
        return f"BLOCK_{self.letter.upper()}"

    @property
    def start(self) -> str:
        """The first index of a tile or block."""
        return f"start_{self.letter}"

    @property
    def range(self) -> str:
        """The indices of a tile or block, counted from its first."""
        return f"range_{self.letter}"

    @property
    def offs(self) -> str:
        """The indices of a tile or block, within the sequence or the group of heads."""
        return f"offs_{self.letter}"

    @property
    def mask(self) -> str:
        """The mask of the indices that exist."""
        return f"mask_{self.letter}"


@dataclass(frozen=True)
class Constant:
    """A named constant at the top of a kernel, with its comment."""

    name: str
    value: int | float | str
    about: str = ""

    @property
    def line(self) -> str:
        return f"{self.name}: tl.constexpr = {self.value}" + (f"  # {self.about}" if self.about else "")


LN_2 = Constant("LN_2", 0.6931471805599453)
# The initial m of an online softmax.
LOWEST_M = Constant("LOWEST_M", "-3.0e38", "finite: a row that has seen no key must not compute exp2(-inf + inf) = NaN")
# Below any d1 of a row that has seen a key, but for a fixed reference that is far larger than its scores.
MIN_D1 = Constant("MIN_D1", "1e-30", "stands in for d1 while it is 0, so that d2 / d1 is 0 and not NaN")


def dim_constants(head_dim: int, row_width: int) -> tuple[Constant, ...]:
    """HEAD_DIM, and the width of a tile's rows if that is another."""
    padded = Constant("PADDED_DIM", row_width, "width of a tile's rows, a power of two; rows are 0 past HEAD_DIM")
    return (Constant("HEAD_DIM", head_dim), *[padded] * (row_width != head_dim))


@dataclass(frozen=True)
class Padding:
    """What a kernel on packed sequences writes to rows of no sequence. Only the device knows which rows those are.

    vectors   tensors of rows of head_dim elements, which are set to 0: the kernel's names for them
    letter    m or n: names the row stride
    tensor    the input with the same rows: q or k
    stats     whether v_mean, with the strides of o, and t_mean are set to 0 too, and lse to -inf
    head_dim  the elements of a row
    """

    vectors: tuple[str, ...]
    letter: str
    tensor: str
    stats: bool
    head_dim: int

    @property
    def padded(self) -> bool:
        """Whether a row's width in a tile, a power of two, is more than head_dim."""
        return power_of_2(self.head_dim) != self.head_dim

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of the function that writes it."""
        dims = dim_constants(self.head_dim, power_of_2(self.head_dim))
        return (*dims, Constant("BLOCK_HEADS", 16, "heads per iteration"))

    @property
    def strides_like(self) -> dict[str, str]:
        """Vector -> the vector whose strides it has."""
        return {name: name for name in self.vectors} | ({"v_mean": "o"} if self.stats else {})

    @property
    def row_values(self) -> dict[str, str]:
        """Tensor of shape (heads, rows) -> the value that is written."""
        return {"lse": 'float("-inf")', "t_mean": "0.0"} if self.stats else {}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The kernel's parameters that the padding function takes too."""
        names = [f"{name}_ptr" for name in (*self.strides_like, *self.row_values)]
        for name in self.vectors:
            names += [f"stride_{name}{self.letter}", f"stride_{name}h"]
        return tuple(names)


def pointers(tensors: Iterable[str]) -> tuple[Argument, ...]:
    """A pointer to each tensor, by the kernel's name for it."""
    return tuple(Argument((f"{_SHORT.get(tensor, tensor)}_ptr",), tensor) for tensor in tensors)


def strides(spec: KernelSpec, tensor: str, letter: str, constant: bool = False) -> Argument:
    """A tensor's strides, named by letters: of batches, rows and heads. The last dimension has stride 1.

    letter    of the row stride
    constant  whether the row stride is a compile-time constant
    """
    name = _SHORT.get(tensor, tensor)
    letter += ": tl.constexpr" if constant else ""
    letters = (letter, "h") if spec.varlen else ("b", letter, "h")
    return Argument(tuple(f"stride_{name}{letter}" for letter in letters), f"*{tensor}.stride()[:{len(letters)}]")


def head_strides(tensor: str) -> tuple[Argument, Argument]:
    """The strides of batches and of heads of a dense tensor, for a kernel that needs no other."""
    return number(f"stride_{tensor}b", f"{tensor}.stride(0)"), number(f"stride_{tensor}h", f"{tensor}.stride(2)")


def number(parameter: str, expression: str = "") -> Argument:
    """A number. Without an expression, `launch` has a variable of the same name."""
    return Argument((parameter,), expression or parameter)


SOFTCAP_ABOUT = "scores z = softmax_scale q.k become softcap tanh(z / softcap); greater than 0"


def score_scales(spec: KernelSpec) -> tuple[Argument, ...]:
    """scale_log2: 2^(scale_log2 q·k) is exp(softmax_scale q·k). With a softcap see parts/softcap.j2."""
    if not spec.softcap:
        return (number("scale_log2", "softmax_scale * LOG2_E"),)
    cap_scale = number("cap_scale", "softmax_scale / softcap")
    return (cap_scale, number("scale_log2", "softcap * LOG2_E"))


def row_stats_strides(spec: KernelSpec) -> tuple[Argument, Argument]:
    """The strides of preprocess's output between statistics and between heads; the last dimension is contiguous."""
    head = number("stride_stath", f"row_stats.stride({1 if spec.varlen else 2})")
    return number("stride_stat", "row_stats.stride(0)"), head
