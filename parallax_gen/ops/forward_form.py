"""The values that the template of the forward derives from a spec and a config, beside those of every tiled op."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.head_dim import width_of
from parallax_gen.ops.signature import LN_2, LOWEST_M, MIN_D1, Constant
from parallax_gen.ops.tile_form import TileForm


@dataclass(frozen=True)
class ForwardVariant:
    """The variant of the tile computation in forward_kernel or fixup_kernel.

    fixup           whether it is fixup_kernel's, which loops over the tiles whose sums overflowed
    online          whether a row's running maximum is subtracted from its scores; if not, the score of one key, the
                    reference
    stacks          whether p and p·t are stacked for one matmul, whose accumulator stacks o1 and o2
    separate_zeros  whether each element of o1 and o2 starts from a zero of its own
    k_base, v_base  the pointers to the first block of k and of v
    by_descriptors  whether it loads blocks of k and v by descriptors
    """

    fixup: bool
    online: bool
    stacks: bool
    separate_zeros: bool
    k_base: str
    v_base: str
    by_descriptors: bool

    def constants(self, stats: bool) -> list[Constant]:
        """The constants that a kernel of this variant has beside those of its tiles."""
        max_sum = Constant("MAX_SUM", "1.8446744e19", "2^64: sums of p t v fit fp32 while |t v| is below 2^64")
        return [*[LN_2] * stats, LOWEST_M if self.online else max_sum]


@dataclass(frozen=True)
class ForwardForm(TileForm):
    """The form of the forward.

    fixed_reference  whether SOFTMAX is "fixed_reference": the reference is the first key, or with a window each row's
                     last key. fixup_kernel recomputes tiles whose sums overflowed
    """

    fixed_reference: bool

    @property
    def main_variant(self) -> ForwardVariant:
        """The variant in forward_kernel.

        From one H200, with a fixed reference: small accumulators of four warps (head_dim 64, 64 rows) take 5 % less
        time stacked, under Triton 3.6 and 3.9. Others take 1 % less as two, and 2 to 6 % less with zeros of
        their own: if all elements start from one zero, Triton 3.6 compiles loops that take 1.1 to 1.3 times as long.
        Where a tile has fewer than 16 rows per warp, a stacked tile has another layout, for which p would move between
        warps.
        """
        config = self.config
        registers = 2 * config.BLOCK_M * width_of(self.spec.head_dim, config.HEAD_DIM_LAYOUT) // (32 * config.num_warps)
        small = registers <= 64 and config.num_warps <= 4
        stacks = self.fixed_reference and small and config.BLOCK_M >= 16 * config.num_warps
        separate_zeros = self.fixed_reference and not stacks and self.is_centered
        online = not self.fixed_reference
        return ForwardVariant(False, online, stacks, separate_zeros, "k_ptr", "v_ptr", self.by_descriptors)

    @property
    def fixup_variant(self) -> ForwardVariant:
        """The variant in fixup_kernel, which hardly ever computes a tile: by pointers in any case."""
        return ForwardVariant(True, True, False, False, "k_head", "v_head", False)

    @property
    def is_centered(self) -> bool:
        """Whether t is centered on its running mean, which keeps what rounding p and p·t adds to o small."""
        return self.spec.dtype != "fp32"  # fp32 matmuls do not round their operands

    @property
    def fixup_launch_options(self) -> tuple[str, ...]:
        """The options of fixup_kernel's launch."""
        return (f"num_warps={self.config.num_warps}", "num_stages=1", "enable_fp_fusion=True")

    def constants(self, grouped: bool = True) -> list[Constant]:
        return [*super().constants(grouped), *[MIN_D1] * self.is_centered]

    @property
    def last_key(self) -> str:
        return "last_key[:, None]"

    @property
    def last_key_before_loop(self) -> bool:
        return True

    @property
    def rows_may_see_no_key(self) -> bool:
        """Whether some row may see no key."""
        return self.spec.causal or self.spec.varlen

    @property
    def loop_range(self) -> str:
        """The range of keys that a program streams."""
        begin, end = ("key_begin" if self.spec.window else "0"), ("key_end" if self.spec.causal else "seqlen_kv")
        return f"{begin}, {end}"

    @property
    def head_dim_text(self) -> str:
        """head_dim as the kernel writes it: by name if it has the constant."""
        return "HEAD_DIM" if self.names_head_dim else str(self.spec.head_dim)

    @property
    def padding_rows_doc(self) -> str:
        return "out, t_mean and v_mean are 0, and lse is -inf" if self.spec.stats else "out is 0"
