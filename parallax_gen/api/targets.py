"""What `parallax_gen.tune` and `parallax_gen.prepare` are given: a model in any form, or kernels, as steps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.models import CONVERTED, DTYPE_NAMES, Model, model_of
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, QUERY_ROW_OPS, KernelSpec
from parallax_gen.problem.steps import SERVING, Call, Serving, Step, Training, steps_of
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.tuning.plan import read_model

if TYPE_CHECKING:
    from torch import nn

    AnyModel = str | os.PathLike[str] | nn.Module

Kernel = tuple[KernelSpec, Shape]
Sizes = bool | Mapping[str, Any] | None  # of a run: whether there is one, or some of its sizes
_Run = TypeVar("_Run", Training, Serving)

A_MODEL = (
    "a folder of transformers or its config.json, or an nn.Module with layers of parallax_gen.nn.ParallaxAttention, "
    "or converted by parallax_gen.integrations.transformers.convert"
)


@dataclass(frozen=True)
class Target:
    """The steps whose kernels are meant."""

    title: str
    steps: list[Step]

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel at every shape, each once."""
        return list(dict.fromkeys((call.spec, call.shape) for step in self.steps for call in step.calls))


def only_one(**given: object) -> None:
    """Raises ArgumentError unless exactly one of the arguments is given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(", ".join(given), " and ".join(names) or "none of them", "one of them")


def check_count(name: str, value: int | None) -> None:
    """Raises ArgumentError unless a value is an int of 1 or more, or None."""
    if value is not None and (type(value) is not int or value < 1):
        raise ArgumentError(name, f"{value!r:.80}", "an int of 1 or more")


def check_seconds(name: str, value: float) -> None:
    """Raises ArgumentError unless a value is a number above 0."""
    if not isinstance(value, int | float) or not value > 0:
        raise ArgumentError(name, f"{value!r:.80}", "a number above 0")


def refuse_options_of_models(**options: object) -> None:
    """Raises ArgumentError if one of the options that only models have is given."""
    for name, value in options.items():
        if value is not None and (name, value) != ("tp", 1):
            raise ArgumentError(name, f"{value!r:.80}", "this only with a model")


def target_of(
    model: AnyModel | None,
    kernels: Kernel | Iterable[Kernel] | None,
    *,
    training: Sizes,
    serving: Sizes,
    tp: int,
    dtype: str | None,
) -> Target:
    """The steps of a model or of kernels; the arguments are those of `parallax_gen.tune`. Raises ArgumentError."""
    if model is not None:
        return target_of_model(model, training=training, serving=serving, tp=tp, dtype=dtype)
    refuse_options_of_models(training=training, serving=serving, tp=tp, dtype=dtype)
    return target_of_kernels(kernels or ())


def target_of_model(model: AnyModel, *, training: Sizes, serving: Sizes, tp: int, dtype: str | None) -> Target:
    """The steps of a model in any form. Raises ArgumentError."""
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError("dtype", f"{dtype!r:.80}", ", ".join(map(repr, DTYPES)))
    if isinstance(model, str | os.PathLike):
        models = [replace(read_model(Path(model).expanduser(), "model"), batch_invariant=is_batch_invariant(None))]
    else:
        models = models_of_module(model, dtype)
    models = [replace(part.split(tp), dtype=dtype or part.dtype) for part in models]
    if serving is None:
        serving = all(part.causal for part in models)
    elif serving is not False and not all(part.causal for part in models):
        raise ArgumentError("serving", serving, "False for layers that are not causal")
    calls: dict[tuple[str, str], Counter[Kernel]] = {}
    for part in models:
        runs = _run(Training, TRAINING, training, part), _run(Serving, SERVING, serving, part)
        for step in steps_of(part, *runs):
            counts = calls.setdefault((step.name, step.detail), Counter())
            counts.update({(call.spec, call.shape): call.count for call in step.calls})
    if not calls:
        raise ArgumentError("training and serving", "False", "True or sizes for at least one")
    steps = [_step(name, detail, counts) for (name, detail), counts in calls.items()]
    return Target("; ".join(map(str, models)), steps)


def target_of_kernels(kernels: Kernel | Iterable[Kernel]) -> Target:
    """One step of the given kernels, each once. Raises ArgumentError."""
    given: Sequence[Any] = [*kernels] if isinstance(kernels, Iterable) and not _is_kernel(kernels) else [kernels]
    for kernel in given:
        if not _is_kernel(kernel):
            raise ArgumentError("kernels", f"{kernel!r:.80}", "(KernelSpec, Shape), or several")
        spec, shape = kernel
        group = 1 if spec.op in QUERY_ROW_OPS else spec.group
        if shape.group != group:
            raise ArgumentError("kernels", f"{spec} at {shape}", f"a shape with {group} query heads per kv head")
        if spec.window != (shape.window > 0):
            raise ArgumentError("kernels", f"{spec} at {shape}", "a window in both or in neither")
    if not given:
        raise ArgumentError("kernels", "none", "(KernelSpec, Shape), or several")
    count = len(set(given))
    return Target(f"{count} kernel{'s' * (count > 1)}", [_step("kernels", "as given", Counter(given))])


def models_of_module(module: Any, dtype: str | None = None) -> list[Model]:
    """The attention of an nn.Module: a model for each kind of layer, which differ in more than their windows.

    Layers of `ParallaxAttention` say it themselves; converted models of transformers in their config. These are
    batch-invariant if the process's mode is: see `parallax_gen.batch_invariant`.

    dtype  by default that of each layer's weights

    Raises ArgumentError.
    """
    from torch import nn

    from parallax_gen.nn import ParallaxAttention

    if not isinstance(module, nn.Module):
        raise ArgumentError("model", f"{module!r:.80}", A_MODEL)
    windows: dict[Model, Counter[int]] = {}
    configs: dict[int, tuple[Any, str]] = {}
    name = type(module).__name__
    for layer in module.modules():
        config = getattr(layer, "config", None)
        if isinstance(layer, ParallaxAttention):
            kind = Model(name, layer.num_heads, layer.num_kv_heads, layer.head_dim, dtype=dtype or _dtype_of(layer))
            kind = replace(kind, softcap=layer.softcap is not None, causal=layer.causal)
            kind = replace(kind, batch_invariant=is_batch_invariant(layer.batch_invariant))
            windows.setdefault(kind, Counter())[layer.window_size or 0] += 1
        elif isinstance(getattr(layer, "r_proj", None), nn.Module) and _is_converted(config):
            configs.setdefault(id(config), (config, dtype or _dtype_of(layer)))
    models = [replace(kind, windows=tuple(sorted(counts.items()))) for kind, counts in windows.items()]
    mode = is_batch_invariant(None)
    converted = ((model_of(c.to_dict(), f"{name}.config", name), own) for c, own in configs.values())
    models += [replace(model, dtype=own, batch_invariant=mode) for model, own in converted]
    if not models:
        raise ArgumentError("model", f"a {name} without such layers", A_MODEL)
    return models


def _is_converted(config: Any) -> bool:
    return str(getattr(config, "model_type", "")).startswith(CONVERTED)


def _dtype_of(layer: nn.Module) -> str:
    """The dtype of a layer's weights, as a spec has it."""
    dtypes = (str(p.dtype).removeprefix("torch.") for p in layer.parameters() if p.is_floating_point())
    name = next(dtypes, "nothing")
    if name not in DTYPE_NAMES:
        raise ArgumentError("model", f"weights of {name}", f"weights of {', '.join(DTYPE_NAMES)}, or dtype=")
    return DTYPE_NAMES[name]


def _run(kind: type[_Run], name: str, sizes: Sizes, model: Model) -> _Run | None:
    if sizes is False:
        return None
    if sizes is None or sizes is True:
        sizes = {}
    names = [field.name for field in fields(kind)]
    if not isinstance(sizes, Mapping) or not set(sizes) <= set(names):
        raise ArgumentError(name, f"{sizes!r:.80}", f"True, False, or a dict of {', '.join(names)}")
    return kind.for_model(model, **sizes)


def _step(name: str, detail: str, counts: Counter[Kernel]) -> Step:
    return Step(name, detail, tuple(Call(spec, shape, count) for (spec, shape), count in counts.items()))


def _is_kernel(kernel: object) -> bool:
    types = KernelSpec, Shape
    return isinstance(kernel, tuple) and len(kernel) == 2 and all(map(isinstance, kernel, types))
