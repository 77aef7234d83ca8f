"""The attention of a model, from the config.json that transformers saves with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import LARGEST_HEAD_DIM


@dataclass(frozen=True)
class Model:
    """The attention layers of a model, which differ only in their windows.

    heads     query heads
    windows   (window, layers): how many layers see only the last `window` keys, 0 for every key; each window once
    softcap   whether scores have a cap
    causal    whether a token sees only itself and earlier tokens
    max_len   the most tokens of a sequence, None if unknown

    batch_invariant  whether its calls are
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[tuple[int, int], ...] = ((0, 1),)
    softcap: bool = False
    dtype: str = "bf16"
    max_len: int | None = None
    causal: bool = True
    batch_invariant: bool = False

    @property
    def layers(self) -> int:
        return sum(layers for _, layers in self.windows)

    def split(self, ranks: int, argument: str = "tp") -> Model:
        """One rank's part under tensor parallelism. Raises ArgumentError unless every rank gets whole kv heads."""
        if ranks < 1 or self.kv_heads % ranks or self.heads % ranks:
            raise ArgumentError(argument, ranks, f"a divisor of the model's {self.kv_heads} kv heads")
        return replace(self, heads=self.heads // ranks, kv_heads=self.kv_heads // ranks)

    def __str__(self) -> str:
        """`Llama-3.2-1B: 16 layers, heads 32/8, head_dim 64, bf16`."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        layers = f"{self.layers} layer{'s' * (self.layers > 1)}"
        windows = [f"{count} with window {window}" for window, count in self.windows if window]
        parts = [f"{layers} ({', '.join(windows)})" if windows else layers]
        parts += [f"heads {heads}", f"head_dim {self.head_dim}", self.dtype, *["softcap"] * self.softcap]
        parts += ["not causal"] * (not self.causal) + ["batch-invariant"] * self.batch_invariant
        return f"{self.name}: {', '.join(parts)}"


# -- What the files of each model_type have.

# Names of fields in a config.json, as in Llama's.
LLAMA = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "window": "sliding_window",
    "max_len": "max_position_embeddings",
}


@dataclass(frozen=True)
class Family:
    """How the config.json of a model_type describes its attention.

    windows     the layers with a window if the file has no `layer_types`: "none", "all", "late" (from the layer
                max_window_layers on), or "pattern" (all but every nth)
    full_every  n of "pattern"; a file's sliding_window_pattern goes before it
    needs       fields that a file must have, because transformers does not derive them from others
    names       names that differ from LLAMA's
    defaults    transformers' values of fields that published files leave out
    """

    windows: str = "none"
    full_every: int = 0
    needs: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def name(self, of: str) -> str:
        return self.names.get(of, LLAMA[of])


_PLAIN = Family()
_GQA = ("num_key_value_heads",)
_GEMMA = ("num_key_value_heads", "head_dim")
_GEMMA3_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_GPT2_NAMES = {"heads": "n_head", "hidden": "n_embd", "layers": "n_layer", "max_len": "n_positions"}
_FLA_NAMES = {"heads": "num_heads", "kv_heads": "num_kv_heads", "window": "window_size"}

FAMILIES = {
    "arcee": _PLAIN,
    "cohere": _PLAIN,
    "cohere2": Family("pattern", 4, ("sliding_window",)),
    "gemma": Family(needs=_GEMMA),
    "gemma2": Family("pattern", 2, (*_GEMMA, "sliding_window", "attn_logit_softcapping")),
    "gemma3_text": Family("pattern", 6, (*_GEMMA, "sliding_window"), defaults=_GEMMA3_DEFAULTS),
    "glm": Family(needs=_GEMMA),
    "glm4": Family(needs=_GEMMA),
    "gpt2": Family(names=_GPT2_NAMES),
    "granite": _PLAIN,
    "llama": _PLAIN,
    "ministral": Family("late", needs=(*_GEMMA, "sliding_window")),  # from the first layer on
    "ministral3": Family("all", needs=_GEMMA),
    "mistral": Family("all", needs=(*_GQA, "sliding_window")),
    "mixtral": Family("all", needs=_GQA),
    "nanochat": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": Family("pattern", 4, ("sliding_window",)),
    "olmoe": _PLAIN,
    "parallax": Family("all", names=_FLA_NAMES),  # of flash-linear-attention
    "phi3": Family("all"),
    "qwen2": Family("late", needs=_GQA),
    "qwen3": Family("late", needs=_GEMMA),
    "qwen3_moe": Family("all", needs=_GQA),
    "seed_oss": Family(needs=_GEMMA),
    "smollm3": Family(needs=_GQA),  # its windows are in layer_types, or there are none
    "starcoder2": Family("all", needs=_GQA),
}
CONVERTED = "parallax_"  # what the model_type of a converted model begins with

# model_type -> what its attention has that Parallax attention does not.
REFUSED = {
    "deepseek_v2": "latent attention, whose keys and values differ in width",
    "deepseek_v3": "latent attention, whose keys and values differ in width",
    "gpt_oss": "attention sinks",
    "llama4": "chunked attention",
    "llama4_text": "chunked attention",
    "mamba": "no attention",
    "mamba2": "no attention",
    "qwen3_next": "linear attention",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# A dtype in a file -> its name in specs. A file without a dtype has "auto".
DTYPE_NAMES = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def model_of(config: Mapping[str, Any], source: str, name: str = "model") -> Model:
    """The attention of the model with this config.json.

    config  the parsed file. Of a model with several parts, such as Gemma 3 with vision, its text_config counts
    source  the file's name, for errors

    Raises ArgumentError, which names the file, the field and what is allowed: for an unknown model_type, a field that
    is missing or has an unusable value, and attention that Parallax attention does not have.
    """
    fields = _Fields(config, source)
    if isinstance(text := config.get("text_config"), Mapping):
        fields = _Fields({"dtype": config.get("dtype", config.get("torch_dtype")), **text}, f"{source}: text_config")
    family = fields.family()
    fields = replace(fields, config={**family.defaults, **fields.config})
    heads, layers = fields.size(family.name("heads")), fields.size(family.name("layers"))
    kv_name = family.name("kv_heads")
    kv_heads = heads if fields.get(kv_name) is None and kv_name not in family.needs else fields.size(kv_name)
    if heads % kv_heads:
        raise fields.error(kv_name, kv_heads, f"a divisor of the {heads} query heads")
    if fields.get("head_dim") is None and "head_dim" not in family.needs:
        head_dim = fields.size(family.name("hidden")) // heads
    else:
        head_dim = fields.size("head_dim")
    if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        raise fields.error("head_dim", head_dim, f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    return Model(
        name=name,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=fields.windows(family, layers),
        softcap=fields.cap(family),
        dtype=fields.dtype(),
        max_len=None if fields.get(family.name("max_len")) is None else fields.size(family.name("max_len")),
    )


@dataclass(frozen=True)
class _Fields:
    """The fields of a config.json, and errors that name it."""

    config: Mapping[str, Any]
    source: str

    def get(self, name: str) -> Any:
        return self.config.get(name)

    def error(self, name: str, got: object, allowed: str) -> ArgumentError:
        return ArgumentError(f"{self.source}: {name}", got, allowed)

    def size(self, name: str) -> int:
        """A field that must be an int of 1 or more."""
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise self.error(name, "nothing" if name not in self.config else f"{value!r:.80}", "an int of 1 or more")
        return value

    def family(self) -> Family:
        model_type = self.get("model_type")
        name = model_type.removeprefix(CONVERTED) if isinstance(model_type, str) else None
        if name in REFUSED:
            raise self.error("model_type", f"{model_type!r}, which has {REFUSED[name]}", ", ".join(FAMILIES))
        if name not in FAMILIES:
            raise self.error("model_type", f"{model_type!r:.80}" if model_type else "nothing", ", ".join(FAMILIES))
        if self.get("attention_chunk_size"):
            raise self.error("attention_chunk_size", self.get("attention_chunk_size"), "null: no chunked attention")
        if self.get("use_bidirectional_attention"):
            raise self.error("use_bidirectional_attention", True, "false: attention is causal")
        return FAMILIES[name]

    def windows(self, family: Family, layers: int) -> tuple[tuple[int, int], ...]:
        """(window, layers), the layers that see every key first."""
        types = self.layer_types(family, layers)
        counts = Counter(self.size(family.name("window")) if t == "sliding_attention" else 0 for t in types)
        return tuple(sorted(counts.items()))

    def layer_types(self, family: Family, layers: int) -> list[str]:
        """The type of each layer: the file's, or those that transformers derives for the family."""
        full, sliding = LAYER_TYPES
        window = family.name("window")
        types = self.get("layer_types")
        if types is not None:
            unknown = [t for t in types if t not in LAYER_TYPES] if isinstance(types, list) else [types]
            if unknown:
                raise self.error("layer_types", f"{unknown[0]!r:.80}", " or ".join(map(repr, LAYER_TYPES)))
            if len(types) != layers:
                raise self.error("layer_types", f"{len(types)} layers", f"{layers}, as {family.name('layers')} says")
        if window in family.needs and window not in self.config:
            raise self.error(window, "nothing", "an int of 1 or more, or null for no window")
        if not self.get(window) or self.get("use_sliding_window") is False:
            return [full] * layers
        if family.windows == "all":  # transformers ignores layer_types
            return [sliding] * layers
        if types is not None:
            return list(types)
        if family.windows == "none":
            return [full] * layers
        if family.windows == "late":
            first = self.size("max_window_layers") if self.get("max_window_layers") else 0
            return [full if i < first else sliding for i in range(layers)]
        every = self.size("sliding_window_pattern") if self.get("sliding_window_pattern") else family.full_every
        return [sliding if (i + 1) % every else full for i in range(layers)]

    def cap(self, family: Family) -> bool:
        """Whether scores have a cap."""
        name = "attn_logit_softcapping"
        if name in family.needs and name not in self.config:
            raise self.error(name, "nothing", "a number, or null for no cap")
        return self.get(name) is not None

    def dtype(self) -> str:
        name = "dtype" if self.get("dtype") is not None else "torch_dtype"
        value = self.get(name)
        short = "auto" if value is None else str(value).removeprefix("torch.")
        if short not in DTYPE_NAMES:
            raise self.error(name, f"{value!r:.80}", ", ".join(DTYPE_NAMES))
        return DTYPE_NAMES[short]
