"""`parallax-gen ship`: for maintainers, the user's records become those that ship."""

from __future__ import annotations

from pathlib import Path

import click

from parallax_gen.cli.options import complete_gpu, json_option
from parallax_gen.cli.text import print_json
from parallax_gen.errors import StoreError


@click.command()
@click.option("--gpu", metavar="NAME", required=True, shell_complete=complete_gpu, help="Such as h100 or h200.")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: the package's tuning_db."
)
@json_option
def ship(gpu: str, folder: Path | None, as_json: bool) -> None:
    """For maintainers: make your best results those that ship.

    Merges the best that were measured of today's kernels with this toolchain, and beside them the default's own time,
    into tuning_db/GPU.jsonl.

    \b
    Example
      parallax-gen ship --gpu h200
    """
    from parallax_gen.cli.known import card_of, name_in_records, unlike_here
    from parallax_gen.memory.ranking import default_of, is_rendered
    from parallax_gen.memory.shipped import load_shipped, write_shipped
    from parallax_gen.memory.store import Store

    with Store(read_only=True) as store:
        results = store.all()
        name = name_in_records(gpu, results)
        results = [r for r in results if r.place.gpu == name and not unlike_here(r)]
        if not any(r.measured for r in results):
            raise StoreError(
                f"{store.path} holds nothing that was measured on {name} of today's kernels with this toolchain"
            )
        before = set(load_shipped(name, folder))
        path = write_shipped(  # failures too: they take out what does not work any more
            results,
            name,
            folder,
            kept_too=lambda r: r.config == default_of(r.place, card_of(r.place)),
            group=lambda r: (r.evidence.toolchain, is_rendered(r, card_of(r.place))),
        )
    after = set(load_shipped(name, folder))
    places, new, gone = len({r.place for r in after}), len(after - before), len(before - after)
    if as_json:
        counts = {"records": len(after), "places": places, "new_or_changed": new, "replaced_or_dropped": gone}
        print_json({"gpu": name, "file": str(path), **counts})
        return
    changes = f"{new} new or changed, {gone} replaced or dropped"
    click.echo(f"{path}: {len(after)} records of {places} kernels and buckets; {changes}")
