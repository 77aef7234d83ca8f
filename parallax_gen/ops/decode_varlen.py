"""Decode with per-sequence lengths, read on the device: pages, packed queries, windows, 8-bit caches."""

from __future__ import annotations

from collections.abc import Iterator

from parallax_gen.ops.base import CostHints, Knob, Scratch, Value, register
from parallax_gen.ops.decode import CacheOp
from parallax_gen.ops.decode_form import DecodeConfig
from parallax_gen.ops.decode_varlen_form import VarlenForm
from parallax_gen.ops.signature import SOFTCAP_ABOUT, Argument, Signature, number, pointers, score_scales
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, skewed_lengths, spread_lengths
from parallax_gen.problem.spec import KernelSpec


class DecodeVarlenOp(CacheOp):
    """Any number of queries per sequence. Longer sequences get more splits; the average number is NUM_SPLITS.

    spare_split_every  a launch has one spare split for this many sequences, or tiles with multi-token queries; long
                       sequences take them
    """

    name = "decode_varlen"
    template = "decode_varlen.py.j2"
    costs = CostHints(spill_bytes=200, merge_bytes_us=30e3)  # a step is short, and each step spills
    per_sequence_lengths = True
    spare_split_every = 8

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        if spec.batch_invariant and knob.name == "NUM_SPLITS":  # what is best at the timed sizes is not for all
            return (self.invariant_splits(spec),)
        if knob.name == "merge":
            return ("last",) if spec.multi_token else ("last", "kernel")
        return super().usable(spec, knob)

    def coerce(self, spec: KernelSpec, choices: dict[str, Value]) -> dict[str, Value]:
        return {**choices, "merge": "last"} if choices["merge"] == "none" or spec.multi_token else choices

    def why_not_merged(self, spec: KernelSpec, config: DecodeConfig) -> str | None:
        if config.merge == "none":
            return "merge 'none' cannot be combined with per-sequence lengths: the number of splits differs by sequence"
        if spec.multi_token and config.merge == "kernel":
            return "merge 'kernel' cannot be combined with multi-token queries: one program per row would be too many"
        return None

    def splits_wanted(self, spec: KernelSpec, programs: int, keys: int, gpu: Gpu) -> int:
        if spec.batch_invariant:
            return self.invariant_splits(spec)
        if spec.multi_token:
            return super().splits_wanted(spec, programs, keys, gpu)
        # Few sequences are as long as the longest, and their keys must be split too; but the more sequences there are,
        # the longer the short ones fill the card. From one H200 at 106 places, timed with `spread_lengths` and
        # `skewed_lengths`: four splits everywhere took up to 4 times as long.
        waves = programs / gpu.sms  # measured at 1, 2, 4, 8, 16 and 31; the limits are in between
        if waves < 0.75:
            wanted, least_keys = 3 * gpu.sms // programs, 32 if spec.group == 1 else 64
        elif waves < 6:
            wanted, least_keys = 4 if waves < 1.5 else 3 if waves < 3 else 2, 64 * min(spec.group, 8)
        else:
            wanted, least_keys = 2, programs
        return max(1, min(wanted, keys // least_keys))

    @staticmethod
    def invariant_splits(spec: KernelSpec) -> int:
        """NUM_SPLITS of batch-invariant kernels, for a sequence alone as for large batches."""
        return 8 if spec.multi_token else 16

    def merge_of(self, spec: KernelSpec, splits: int, programs: int) -> str:
        if splits == 1 or spec.multi_token:
            return "last"
        # A long sequence among short ones gets most of the splits, whatever the average is: its last program has many
        # states to merge. On an H200 that costs less than a second kernel if states are few and of one head, or if
        # programs are many: 256 at head_dim 128.
        is_small = spec.group == 1 and splits <= 16
        return "last" if is_small or programs * spec.head_dim >= 2**15 else "kernel"

    def first_tiles(
        self, spec: KernelSpec, block_h: int, programs: int, keys: int, splits: int, gpu: Gpu
    ) -> list[tuple[int, int, int, int]]:
        if spec.multi_token or spec.batch_invariant or spec.cache_dtype or not gpu.has_wgmma:
            return super().first_tiles(spec, block_h, programs, keys, splits, gpu)
        # On an H200 two warps and larger blocks are faster where programs are few for their keys.
        if programs <= 8 and keys <= 1024 and spec.head_dim > 64:
            return [(64, block_h, 4, 3)]
        if programs > 3 * gpu.sms and keys <= 1024 and spec.page_size and spec.head_dim <= 64:
            return [(32, block_h, 1, 3 if splits == 1 else 4)]  # one warp for few keys of many sequences
        few_with_groups = programs <= 8 and spec.group > 1 and spec.head_dim > 64
        few_splits = splits in (2, 3) and keys >= 2048 and programs <= 1024
        return [(64, block_h, 2, 3)] if few_with_groups or few_splits else []

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        lengths = ("cu_seqlens_q",) * spec.varlen + ("cache_seqlens",) + ("cache_leftpad",) * spec.leftpad
        return lengths + ("page_table",) * (spec.page_size > 0) + ("k_scale", "v_scale") * (spec.cache_dtype != "")

    def scratch(self, spec: KernelSpec, config: DecodeConfig, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        """A tile's state for every work item: see decode_varlen.py.j2."""
        form = self.form(spec, config)
        tiles = -(-spec.group * seqlen_q // config.BLOCK_H)
        if spec.batch_invariant:
            items = batch * kv_heads * config.NUM_SPLITS * (1 if spec.multi_token else tiles)
            return Scratch(items * form.state_rows * form.floats_per_row, items if config.merge == "last" else 0)
        split_units, tiles_per_unit = (batch * tiles, 1) if spec.multi_token else (batch, tiles)
        splits = split_units * config.NUM_SPLITS + -(-split_units // self.spare_split_every)
        items = tiles_per_unit * splits * kv_heads
        return Scratch(items * form.state_rows * form.floats_per_row, items if config.merge == "last" else 0)

    def signatures(self, spec: KernelSpec, config: DecodeConfig) -> dict[str, Signature]:
        paged, many = spec.page_size > 0, spec.multi_token
        counts_batch = spec.varlen or not spec.batch_invariant  # whether kernels look at the whole batch
        rows = {tensor: self._strides_of_rows(spec, tensor) for tensor in ("q", "r", "out")}
        keys = (Argument(tuple(f"stride_{c}{dim}" for dim in "bnh"), f"*{c}_cache.stride()[:3]") for c in "kv")
        pages = (
            number("stride_tableb", "page_table.stride(0)"),
            Argument(("stride_kvp", "stride_kvn", "stride_kvh"), "*k_cache.stride()[:3]"),
        )
        longest = number("max_seqlen_kv", f"page_table.shape[1] * {spec.page_size}" if paged else "k_cache.shape[1]")
        window = (number("window_size"),) * spec.window
        queries = number("total_q", "q.shape[0]") if spec.varlen else number("queries_per_seq", "q.shape[1]")
        passed = (
            *pointers(self.tensors(spec, config)),
            *rows["q"],
            *rows["r"],
            *(pages if paged else keys),
            *rows["out"],
            *(number("stride_scale", "1 if k_scale.shape[0] > 1 else 0"),) * (spec.cache_dtype != ""),
            *score_scales(spec),
            *(number("batch"),) * counts_batch,
            number("kv_heads"),
            *(queries,) * many,
            *(number("work_items_per_seq"),) * (many and spec.batch_invariant),
            longest,
            *window,
        )
        unspecialised = ("kv_heads", *("batch",) * counts_batch, "max_seqlen_kv", *("stride_tableb",) * paged)
        unspecialised += ("queries_per_seq",) * (many and not spec.varlen) + ("window_size",) * spec.window
        unspecialised += ("total_q",) * spec.varlen + ("work_items_per_seq",) * (many and spec.batch_invariant)
        kernels = {"decode_varlen": Signature(passed, unspecialised)}
        unspecialised_of_merge = ("kv_heads", *("batch",) * counts_batch, "max_seqlen_kv")
        unspecialised_of_merge += ("window_size",) * spec.window
        if config.merge == "kernel":
            lengths = ("cache_seqlens", *("cache_leftpad",) * spec.leftpad)
            tensors = pointers((*self.written(spec), *lengths, "scratch"))
            sizes = (*(number("batch"),) * counts_batch, number("kv_heads"), longest, *window)
            kernels["merge"] = Signature((*tensors, *rows["out"], *sizes), unspecialised_of_merge)
        return kernels

    def _strides_of_rows(self, spec: KernelSpec, tensor: str) -> tuple[Argument, ...]:
        """The strides between sequences, between queries and between heads."""
        name = tensor[0]
        if not spec.multi_token:
            return (number(f"stride_{name}b", f"{tensor}.stride(0)"), number(f"stride_{name}h", f"{tensor}.stride(2)"))
        dims = "mh" if spec.varlen else "bmh"
        return (Argument(tuple(f"stride_{name}{dim}" for dim in dims), f"*{tensor}.stride()[:{len(dims)}]"),)

    def form(self, spec: KernelSpec, config: DecodeConfig) -> VarlenForm:
        return VarlenForm(spec, config, self.spare_split_every)

    def argument_docs(self, spec: KernelSpec, config: DecodeConfig) -> Iterator[tuple[str, str]]:
        form = self.form(spec, config)
        heads, kv_heads = form.heads_doc, form.kv_heads_doc
        queries = f"({form.queries.shape}, {heads}, {spec.head_dim}) {spec.dtype}"
        yield "q, r, out", f"{queries}, any strides with a contiguous last dimension"
        if spec.stats:
            stats = f"{heads}, total_q" if spec.varlen else f"batch, {heads}, {form.queries.count}"
            yield "lse, t_mean", f"({stats}) fp32, contiguous"
            yield "v_mean", "like out, with its strides"
        rows = f"pages, {spec.page_size}" if spec.page_size else "batch, seqlen"
        width, dtype = spec.head_dim, spec.dtype
        if spec.cache_dtype:
            width, dtype = width // 4, f"int32, four {spec.cache_dtype} numbers in each"
        strides = "likewise, both with the same strides" if spec.page_size else "likewise"
        yield "k_cache, v_cache", f"({rows}, {kv_heads}, {width}) {dtype}, {strides}"
        if spec.varlen:
            begin = "the first query row of each sequence, and the end of the last one"
            yield "cu_seqlens_q", f"(batch + 1,) int32: {begin}"
            others = ", lse -inf, and t_mean and v_mean 0" if spec.stats else ""
            yield "", f"In rows that belong to no sequence out is 0{others}"
        most = "what its pages hold" if spec.page_size else "seqlen"
        yield "cache_seqlens", f"(batch,) int32: keys in each sequence, 0 to {most}; nothing past them is read"
        if spec.leftpad:
            yield "cache_leftpad", "(batch,) int32: the index of each sequence's first key; nothing before it is read"
        if spec.page_size:
            pages = "(batch, most pages of a sequence)"
            yield "page_table", f"{pages} int32: each sequence's pages, in order"
        if spec.cache_dtype:
            scaled = "factors of the stored keys and values"
            yield "k_scale, v_scale", f"(1,) or ({kv_heads},) fp32, of the same size: {scaled}"
        state_size = form.state_rows * form.floats_per_row
        items, computed = "work_items", ", work_items as computed below"
        if spec.batch_invariant and spec.multi_token:
            items, computed = "batch * NUM_SPLITS", ""
        yield "scratch", f"{items} * {kv_heads} * {state_size} fp32 numbers{computed}"
        if config.merge == "last":
            counters = "int32, 0 before and after every launch"
            yield "arrival_counters", f"{items} * {kv_heads} {counters}"
        if spec.softcap:
            yield "softcap", SOFTCAP_ABOUT
        if spec.window:
            yield "window_size", "a query sees its last window_size keys; 1 or more"
        if spec.varlen:
            yield "max_seqlen_q", "at least the number of queries of the longest sequence"

    def timed_lengths(self, spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """With one query per sequence, two batches: `spread_lengths` and `skewed_lengths`.

        A config that is fast for equal lengths only may leave the merge of a long sequence's many splits to one
        program. No length of the first batch is shorter than that of the same sequence in the second.
        """
        if spec.multi_token or shape.batch == 1:
            return super().timed_lengths(spec, shape)
        return spread_lengths(shape), skewed_lengths(shape)

    def bucket_suffix(self, spec: KernelSpec, bucket: Bucket) -> str:
        return super().bucket_suffix(spec, bucket) if spec.multi_token else f"_kv{bucket.seqlen_kv}"


register(DecodeVarlenOp())
