"""`parallax-gen render`: prints the source of one kernel."""

from __future__ import annotations

import json

import click

from parallax_gen.cli.models import ModelArgs, asked, asked_options
from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, shape_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.errors import BuildError
from parallax_gen.memory.old import config_of_record
from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import Sizes

COMPILE_TIMEOUT_S = 120.0


@click.command("render")
@gpu_option
@asked_options
@shape_option(more_help="Default: the first of the op's usual shapes.")
@click.option("--config", "config_json", metavar="JSON", help="All fields of a config. Default: the one a call gets.")
@click.option("--resources", is_flag=True, help="Also compile it; print registers, spills, shared memory to stderr.")
@json_option
def render_kernel(
    gpu: str | None,
    model: ModelArgs | None,
    requested: KernelArgs,
    shape: Sizes | None,
    config_json: str | None,
    resources: bool,
    as_json: bool,
) -> None:
    """Print the source of a kernel, exactly as it is launched.

    With --op training or --model, prints one source after another: parallax-gen export writes each to a file.

    \b
    Example
      parallax-gen render --gpu h200 --op forward --resources > kernel.py
    """
    from parallax_gen.codegen.render import render
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.memory.lock import lock_of_environment
    from parallax_gen.runtime.dispatch import choose

    kernels = asked(model, requested, [shape] if shape else [], usual=True)
    if config_json is not None and not kernels.one:
        raise click.UsageError("--config is the config of one kernel: give its --op")
    card, documents, printed = chosen_gpu(gpu), [], set()
    for call in kernels.calls:
        if config_json is None:
            config = choose(call.spec, call.shape, card, open_memory(), lock=lock_of_environment()).config
        else:
            config = _config(requested.op, config_json)
        source = render(call.spec, config, card)
        if source.text in printed:  # of another bucket
            continue
        printed.add(source.text)
        rendered = {"name": source.name, "sha256": source.sha256, "source": source.text}
        documents.append({"spec": call.spec.to_dict(), "config": config_to_dict(config), **rendered})
        if not as_json:
            click.echo(source.text, nl=False)
        if resources:
            print_text(_resources(call.spec, config, call.shape, card), err=True)
    if as_json:
        print_json({"gpu": card.name, **(documents[0] if kernels.one else {"kernels": documents})})


def _config(op: str, text: str) -> KernelConfig:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="'--config'") from error
    if not isinstance(data, dict):
        raise click.BadParameter('not an object such as {"BLOCK_N": 64, ...}', param_hint="'--config'")
    return config_of_record(op, data)


def _resources(spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu) -> str:
    """A line on the compiled kernel's resources. Compiles in a child process, which a compiler crash may end."""
    from contextlib import closing

    from parallax_gen.tuning.workers.messages import Compile, KernelInstance
    from parallax_gen.tuning.workers.worker import Worker

    with closing(Worker(device=None)) as worker:
        reply = worker.ask(Compile(KernelInstance(spec, config, shape, gpu)), COMPILE_TIMEOUT_S)
    if reply.resources is None:
        raise BuildError(f"compiling for {gpu.title}: {reply.outcome}: {reply.detail}")
    resources = reply.resources
    return (
        f"{gpu.title}: {resources.registers} registers per thread, {resources.spills} bytes spilled, "
        f"{resources.shared_bytes} bytes of shared memory; compiled in {reply.seconds:.1f} s"
    )
