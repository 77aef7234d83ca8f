"""Commands that errors and warnings name: they tune or lock the kernel of one place."""

from __future__ import annotations

import shlex
from pathlib import Path

from parallax_gen.environment import BATCH_INVARIANT, is_on
from parallax_gen.memory.place import Place, place_of
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import representative
from parallax_gen.problem.spec import FLAGS, batch_invariant_spec

NOT_MEASURED = "kernels for AMD GPUs are compiled, not measured"


def how_to_measure(place: Place, gpu: Gpu) -> str:
    """What a user does to measure a place on the card that calls run on, as a sentence."""
    return (
        f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}." if gpu.is_amd else f"Run `{tune_command(place)}` to measure it."
    )


def tune_command(place: Place) -> str:
    """The `parallax-gen tune` command that tunes a place, on the card it is run on."""
    return " ".join(["parallax-gen", "tune", *_options(place)])


def lock_command(place: Place, path: Path) -> str:
    """The `parallax-gen lock` command that writes today's kernel of a place into a lock."""
    card = ["--gpu", place.gpu] if place.gpu in GPUS else []  # another card is named only where it is
    return shlex.join(["parallax-gen", "lock", "--add", "-o", str(path), *card, *_options(place)])


def _options(place: Place) -> list[str]:
    """The options that name a place's kernel and sizes."""
    spec, shape = place.spec, representative(place.bucket, place.spec.group)
    heads = f"{shape.heads}" if spec.group == 1 else f"{shape.heads}/{shape.kv_heads}"
    one_length = shape.seqlen_q == (1 if spec.public_op == "decode" else shape.seqlen_kv)
    lengths = f"{shape.seqlen_kv}" if one_length else f"{shape.seqlen_q}x{shape.seqlen_kv}"
    command = ["--op", spec.public_op]
    command += ["--head-dim", f"{spec.head_dim}", "--dtype", spec.dtype, "--shape", f"{shape.batch},{heads},{lengths}"]
    if spec.window:  # a window over all keys would count as none; one key less rounds to the same bucket
        command += ["--window", f"{min(shape.window, shape.seqlen_kv - 1)}"]
    elif not spec.causal and (spec.multi_token or (spec.op in FLAGS["causal"] and not spec.per_sequence_lengths)):
        command.append("--full")
    command += [f"--{name}" for name in ("varlen", "stats", "ragged", "leftpad", "softcap") if spec.flat()[name]]
    command += ["--page-size", f"{spec.page_size}"] if spec.page_size else []
    command += ["--cache-dtype", spec.cache_dtype] if spec.cache_dtype else []
    command += ["--batch-invariant"] * spec.batch_invariant
    if is_on(BATCH_INVARIANT) and place != place_of(place.gpu, batch_invariant_spec(spec), place.bucket):
        command.append("--no-batch-invariant")
    return command
