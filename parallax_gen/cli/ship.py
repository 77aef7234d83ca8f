"""`parallax-gen ship`: for maintainers, turns the user's records into shipped records, and checks shipped records."""

from __future__ import annotations

from pathlib import Path

import click

from parallax_gen.cli.options import complete_gpu, json_option
from parallax_gen.cli.text import print_json, print_tables, print_text
from parallax_gen.errors import StoreError


@click.command()
@click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=complete_gpu,
    help="Such as h100 or h200. Default with --check: all.",
)
@click.option(
    "--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: the package's tuning_db."
)
@click.option("--check", is_flag=True, help="Write nothing: check that shipped records are no slower than the default.")
@json_option
@click.pass_context
def ship(ctx: click.Context, gpu: str | None, folder: Path | None, check: bool, as_json: bool) -> None:
    """For maintainers: ship your best results.

    Merges the best results of today's kernels with this toolchain, and the time of the default config, into
    tuning_db/GPU.jsonl.

    With --check, lists the kernels and sizes, by toolchain, for which the file has no time of today's default config,
    or a best config that is slower than the default. The exit status is 1 if there are any.

    \b
    Example
      parallax-gen ship --gpu h200
      parallax-gen ship --check
    """
    if check:
        ctx.exit(1 if _check(gpu, folder, as_json) else 0)
    if gpu is None:
        raise click.UsageError("--gpu NAME is required without --check")
    _ship(gpu, folder, as_json)


def _ship(gpu: str, folder: Path | None, as_json: bool) -> None:
    from parallax_gen.memory.descriptions import card_of, differences_from_here, name_in_records
    from parallax_gen.memory.ranking import default_of, is_rendered
    from parallax_gen.memory.shipped import load_shipped, write_shipped
    from parallax_gen.memory.store import Store

    with Store(read_only=True) as store:
        results = store.all()
        name = name_in_records(gpu, results)
        results = [r for r in results if r.place.gpu == name and not differences_from_here(r)]
        if not any(r.measured for r in results):
            raise StoreError(f"{store.path} has no measurement of today's kernels with this toolchain on {name}")
        before = set(load_shipped(name, folder))
        path = write_shipped(  # failures too, because they remove records that no longer work
            results,
            name,
            folder,
            also_keep=lambda r: r.config == default_of(r.place, card_of(r.place)),
            group=lambda r: (r.evidence.toolchain, is_rendered(r, card_of(r.place))),
        )
    after = set(load_shipped(name, folder))
    places, new, removed = len({r.place for r in after}), len(after - before), len(before - after)
    if as_json:
        counts = {"records": len(after), "places": places, "new_or_changed": new, "replaced_or_dropped": removed}
        print_json({"gpu": name, "file": str(path), **counts})
        return
    changes = f"{new} new or changed, {removed} replaced or dropped"
    print_text(f"{path}: {len(after)} records of {places} kernels and buckets; {changes}")


def _check(gpu: str | None, folder: Path | None, as_json: bool) -> int:
    """Print where shipped records may be slower than the default. Returns the number of such places and toolchains."""
    from parallax_gen.memory.descriptions import card_of, name_in_records
    from parallax_gen.memory.shipped import load_shipped, shipped_gpus
    from parallax_gen.report.shipping import check_card

    names = shipped_gpus(folder) if gpu is None else [name_in_records(gpu, load_shipped(gpu, folder))]
    if not names:
        raise StoreError("there are no shipped records" if folder is None else f"no records in {folder}")
    cards = []
    for name in names:
        records = load_shipped(name, folder)
        if not records:
            raise StoreError(f"there are no shipped records for {name}")
        cards.append(check_card(name, records, card_of(records[0].place)))
    if as_json:
        print_json({"cards": [card.to_json() for card in cards]})
        return sum(len(card.findings) for card in cards)
    for card in cards:
        if card.findings:
            print_tables([card.table()], gap=False)
        print_text(card.summary)
    return sum(len(card.findings) for card in cards)
