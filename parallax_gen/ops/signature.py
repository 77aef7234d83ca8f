"""What a rendered kernel takes and what its `launch` passes it, in order: said here once; templates loop over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallax_gen.problem.spec import KernelSpec

# What a kernel calls a tensor where that is not its name.
_SHORT = {"out": "o", "k_cache": "k", "v_cache": "v"}


@dataclass(frozen=True)
class Passed:
    """Some parameters of a kernel, and the expression that `launch` passes for them.

    parameters  as the kernel declares them: ("q_ptr",), or ("stride_qb", "stride_qm: tl.constexpr", "stride_qh")
    expression  of launch: "q", or "*q.stride()[:3]"
    """

    parameters: tuple[str, ...]
    expression: str


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters, in order.

    unspecialised  those that change from call to call: a kernel is not compiled anew where one is 1 or divisible by 16
    """

    passed: tuple[Passed, ...]
    unspecialised: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(parameter for passed in self.passed for parameter in passed.parameters)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(passed.expression for passed in self.passed)

    @property
    def shared(self) -> tuple[str, ...]:
        """Arguments before those of `unspecialised`, which come last: another kernel of the file may take the same."""
        return self.arguments[: -len(self.unspecialised)]

    @property
    def own(self) -> tuple[str, ...]:
        """The rest."""
        return self.arguments[-len(self.unspecialised) :]


@dataclass(frozen=True)
class Constant:
    """A named number at the top of a kernel, with its comment."""

    name: str
    value: int | float | str
    about: str = ""

    @property
    def line(self) -> str:
        return f"{self.name}: tl.constexpr = {self.value}" + (f"  # {self.about}" if self.about else "")


@dataclass(frozen=True)
class Padding:
    """What a kernel on packed sequences writes to rows that no sequence has. The device alone knows which those are.

    vectors  written as 0: the kernel's own names for them
    row      the letter of a row's stride in their names: m or n
    of       whose rows they are: q or k
    stats    whether v_mean, laid out as o, is 0 there too, lse -inf and t_mean 0
    width    a row's, in a tile: the next power of two
    padded   whether that is more than head_dim
    """

    vectors: tuple[str, ...]
    row: str
    of: str
    stats: bool
    width: int
    padded: bool

    @property
    def alike(self) -> dict[str, str]:
        """Vectors, each with that whose strides it has."""
        return {name: name for name in self.vectors} | ({"v_mean": "o"} if self.stats else {})

    @property
    def numbers(self) -> dict[str, str]:
        """One a row, in tensors of (heads, rows), and what is written."""
        return {"lse": 'float("-inf")', "t_mean": "0.0"} if self.stats else {}

    @property
    def passed(self) -> str:
        """Of the kernel's own parameters those that the function takes."""
        names = [f"{name}_ptr" for name in (*self.alike, *self.numbers)]
        for name in self.vectors:
            names += [f"stride_{name}{self.row}", f"stride_{name}h"]
        return ", ".join(names)


def pointers(tensors: Iterable[str]) -> tuple[Passed, ...]:
    """A pointer to each tensor, by the name that kernels have for it."""
    return tuple(Passed((f"{_SHORT.get(tensor, tensor)}_ptr",), tensor) for tensor in tensors)


def strides(spec: KernelSpec, tensor: str, row: str, constant: bool = False) -> Passed:
    """A tensor's but the last dimension's, which is 1, named by letters: those of batches, rows and heads.

    constant  whether the kernel is compiled for that of rows
    """
    name = _SHORT.get(tensor, tensor)
    row += ": tl.constexpr" if constant else ""
    letters = (row, "h") if spec.varlen else ("b", row, "h")
    return Passed(tuple(f"stride_{name}{letter}" for letter in letters), f"*{tensor}.stride()[:{len(letters)}]")


def number(parameter: str, expression: str = "") -> Passed:
    """A number, which `launch` has by the same name where no expression is given."""
    return Passed((parameter,), expression or parameter)


SOFTCAP_ABOUT = "scores s = softmax_scale q.k become softcap tanh(s / softcap); more than 0"


def score_scales(spec: KernelSpec) -> tuple[Passed, ...]:
    """The factors of scores: q·k times scale_log2 is a power of two's exponent; with a softcap see parts/softcap.j2."""
    if not spec.softcap:
        return (number("scale_log2", "softmax_scale * LOG2_E"),)
    cap_scale = number("cap_scale", "2.0 * LOG2_E * softmax_scale / softcap")
    return (cap_scale, number("scale_log2", "softcap * LOG2_E"))


def strides_of_rows(spec: KernelSpec) -> Passed:
    """Of what preprocess leaves of query rows, whose last dimension is contiguous: from number to number, and heads."""
    return Passed(("stride_rows", "stride_rowsh"), f"*rows.stride()[{':2' if spec.varlen else ':3:2'}]")
