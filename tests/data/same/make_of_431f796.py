"""Writes of_431f796.jsonl and of_431f796.db, which hold the same results, by the code of commit 431f796 itself.

    git worktree add FOLDER 431f796
    PYTHONPATH=FOLDER python tests/data/same/make_of_431f796.py FOLDER

Three records an op that shipped then: one as it was measured, one that failed, and one that was predicted.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from parallax_gen.memory.lines import read_file, write_lines  # of that commit
from parallax_gen.memory.store import Store

HERE = Path(__file__).parent
FAILURES = ("wrong", "crash", "timeout", "resources", "compile", "slow")

kinds: dict[tuple[str, bool], list] = {}
for name in ("h200", "h100"):
    for record in read_file(Path(sys.argv[1], "tuning_db", f"{name}.jsonl")).results:
        spec = record.key.spec
        kinds.setdefault((spec.op, spec.ragged), []).append(record)

results = []
for failure, (_, records) in zip(FAILURES, sorted(kinds.items()), strict=True):
    plain, failed, predicted = records[0], records[len(records) // 3], records[-1]
    gone = {"time_us": None, "time_us_p20": None, "time_us_p80": None, "error": None, "shape": None}
    if failure == "wrong":
        gone["error"] = float("inf")
    if failure == "slow":
        gone = {}
    unmeasured = {"time_us_p20": None, "time_us_p80": None, "error": None, "source": "predicted"}
    results += [
        plain,
        replace(failed, outcome=failure, detail="" if failure == "slow" else f"what {failure} says, ½", **gone),
        replace(predicted, outcome="predicted", **unmeasured),
    ]
# Whose ptxas was not recorded, as in the oldest lines.
environment = replace(results[0].key.environment, cuda="")
results.append(replace(results[0], key=replace(results[0].key, environment=environment)))

write_lines(HERE / "of_431f796.jsonl", results)
(HERE / "of_431f796.db").unlink(missing_ok=True)
with Store(HERE / "of_431f796.db") as store:
    for result in results:
        store.record(result)
