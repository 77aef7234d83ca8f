"""The kernels that a model's training and serving launch, by step: what runtime/ dispatches for its calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.models import Model
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING, Flags, kernels

SERVING = "serving"  # beside TRAINING
Kernel = tuple[KernelSpec, Shape]


@dataclass(frozen=True)
class Call:
    """A kernel at one shape, and how often a step launches it."""

    spec: KernelSpec
    shape: Shape
    count: int


@dataclass(frozen=True)
class Step:
    """One step of training or serving: the kernels of all attention layers, each once.

    name    short, for a column of a table
    detail  its sizes, for a title
    """

    name: str
    detail: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Training:
    """Training steps of `batch` sequences of `seqlen` tokens on each card."""

    batch: int = 4
    seqlen: int = 4096

    def __post_init__(self) -> None:
        _check_sizes(self)

    @classmethod
    def for_model(cls, model: Model, **sizes: Any) -> Training:
        """The given sizes; by default not more tokens than the model's most."""
        return cls(**{"seqlen": min(cls.seqlen, model.max_len or cls.seqlen), **sizes})


@dataclass(frozen=True)
class Serving:
    """Serving of up to max_batch sequences of up to max_len tokens.

    page_size    keys per page of the cache; 0 for a cache without pages
    chunk        tokens of a prompt that one step computes
    cache_dtype  as in KernelSpec
    """

    max_len: int = 8192
    page_size: int = 0
    max_batch: int = 8
    chunk: int = 2048
    cache_dtype: str = ""

    def __post_init__(self) -> None:
        _check_sizes(self)

    @classmethod
    def for_model(cls, model: Model, **sizes: Any) -> Serving:
        """The given sizes; by default not more keys than the model's most."""
        return cls(**{"max_len": min(cls.max_len, model.max_len or cls.max_len), **sizes})

    @property
    def batches(self) -> list[int]:
        """The numbers of sequences in decode steps: powers of two, and max_batch."""
        return [*(2**n for n in range((self.max_batch - 1).bit_length())), self.max_batch]

    @property
    def ends(self) -> list[int]:
        """One sequence, and max_batch."""
        return sorted({1, self.max_batch})


def step_at(op: str, head_dim: int, dtype: str, shape: Shape, flags: Flags) -> Step:
    """The kernels of an op, or of TRAINING, at one shape, each launched once. Raises ArgumentError if there is none."""
    shape = flags.apply_window(shape)
    called = kernels(op, head_dim, dtype, shape, flags)
    return Step(op, str(shape), tuple(Call(spec, sizes, 1) for spec, sizes in called))


def title_of(spec: KernelSpec, op: str) -> str:
    """A kernel's title; for TRAINING with the part of `spec` that the step's kernels share."""
    return f"{TRAINING}, {str(spec.for_op('dqdr')).partition(', ')[2]}" if op == TRAINING else str(spec)


def steps_of(model: Model, training: Training | None, serving: Serving | None) -> list[Step]:
    """The steps of the given runs; None for a run that is left out."""
    steps = [] if training is None else training_steps(model, training)
    return steps if serving is None else [*steps, *serving_steps(model, serving)]


def training_steps(model: Model, run: Training) -> list[Step]:
    """The step of `nn.ParallaxAttention` or a converted model: the forward with statistics, and the backward."""
    calls: Counter[Kernel] = Counter()
    for window, layers in model.windows:
        shape = Shape(run.batch, model.heads, model.kv_heads, run.seqlen, run.seqlen)
        flags = Flags(causal=model.causal, window=window or None, **_options(model))
        calls.update(dict.fromkeys(kernels(TRAINING, model.head_dim, model.dtype, shape, flags), layers))
    return [Step("training", f"batch {run.batch}, {run.seqlen} tokens", _calls(calls))]


def serving_steps(model: Model, run: Serving) -> list[Step]:
    """The steps of an engine, which calls `parallax_attn_with_kvcache`, and of a converted model's `generate`.

    An engine passes each sequence's length and packs the queries of prompts. `generate` has neither pages nor an 8-bit
    cache. It computes prompts at once, then decodes: one sequence, or max_batch sequences with padding before their
    prompts. Prompts with padding are packed sequences, three for each: the padding before it, the prompt, and the
    padding after it. They are planned as if each had max_len tokens, so their times are upper bounds. Layers with a
    window keep only the last `window` keys, so their decode kernels need no window unless they are batch-invariant, and
    none for padding once it has left the cache.
    """
    where = f"pages of {run.page_size}" if run.page_size else "no pages"
    keys, chunk = f"up to {run.max_len} keys", min(run.chunk, run.max_len)
    cache: dict[str, Any] = {"page_size": run.page_size, "cache_dtype": run.cache_dtype, **_options(model)}
    capacity = -(-run.max_len // run.page_size) * run.page_size if run.page_size else run.max_len
    steps = []
    for batch in run.batches:
        calls: Counter[Kernel] = Counter()
        for window, layers in model.windows:
            flags = Flags(per_sequence_lengths=True, window=window or None, **cache)
            calls.update({_cached(model, batch, 1, capacity, flags): layers})
        steps.append(Step(f"decode, batch {batch}", f"{keys}, {where}", _calls(calls)))
    for batch in run.ends:
        calls = Counter()
        for window, layers in model.windows:
            flags = Flags(varlen=True, window=window or None, **cache)
            calls.update({_cached(model, batch, chunk, capacity, flags): layers})
        steps.append(Step(f"chunk, batch {batch}", f"{chunk} tokens of each prompt, {keys}, {where}", _calls(calls)))
    return steps if run.page_size or run.cache_dtype else [*steps, *_generation_steps(model, run)]


def _generation_steps(model: Model, run: Serving) -> list[Step]:
    steps = [Step("generate, prompt", f"{run.max_len} tokens at once", _prompts(model, run, 1, padded=False))]
    if run.max_batch > 1:
        detail = f"{run.max_batch} of up to {run.max_len} tokens, with padding"
        steps.append(Step("generate, prompts", detail, _prompts(model, run, 3 * run.max_batch, padded=True)))
    for batch in run.ends:
        calls: Counter[Kernel] = Counter()
        for window, layers in model.windows:
            keys = min(window or run.max_len, run.max_len)
            flags = Flags(leftpad=batch > 1 and keys == run.max_len, window=window or None, **_options(model))
            calls.update({_cached(model, batch, 1, keys, flags): layers})
        padding = ", with padding before prompts" if batch > 1 else ""
        steps.append(Step(f"generate, batch {batch}", f"{run.max_len} keys{padding}", _calls(calls)))
    return steps


def _prompts(model: Model, run: Serving, sequences: int, *, padded: bool) -> tuple[Call, ...]:
    calls: Counter[Kernel] = Counter()
    for window, layers in model.windows:
        shape = Shape(sequences, model.heads, model.kv_heads, run.max_len, run.max_len)
        flags = Flags(varlen=padded, window=window or None, **_options(model))
        calls.update(dict.fromkeys(kernels("forward", model.head_dim, model.dtype, shape, flags), layers))
    return _calls(calls)


def _options(model: Model) -> dict[str, Any]:
    return {"softcap": model.softcap, "batch_invariant": model.batch_invariant}


def _cached(model: Model, batch: int, queries: int, keys: int, flags: Flags) -> Kernel:
    shape = Shape(batch, model.heads, model.kv_heads, queries, keys)
    ((spec, shape),) = kernels("decode", model.head_dim, model.dtype, shape, flags)
    return spec, shape


def _calls(counts: Counter[Kernel]) -> tuple[Call, ...]:
    return tuple(Call(spec, shape, count) for (spec, shape), count in counts.items())


def _check_sizes(run: Training | Serving) -> None:
    for name, value in vars(run).items():
        minimum = 0 if name == "page_size" else 1
        if name != "cache_dtype" and (type(value) is not int or value < minimum):
            raise ArgumentError(name, f"{value!r:.80}", f"an int of {minimum} or more")
