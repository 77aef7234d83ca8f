"""Answers that must not change in a refactoring, computed anew for test_same.py to compare with the stored ones.

Each topic is a file of tests/data/same. Its lines are pairs of JSON: a question, in the names that records use, and its
answer. same_questions.py has these forms, and draws what is random. The imports at the top of both are all that they
use of the package: when names move, only those lines change. When an answer changes on purpose, run this, which draws
the same questions again and answers them, and read the diff:

    python tests/same_samples.py --write [TOPIC ...]
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import optuna
from same_questions import (
    Json,
    by_chance,
    changes,
    config_from,
    draw_cases,
    draw_config,
    kind_of,
    spec_from,
    stored_config,
    stored_name,
    stored_spec,
    stored_value,
    text,
)

import parallax_gen
from parallax_gen.cli import main as command
from parallax_gen.codegen.fingerprint import below_header, fingerprint
from parallax_gen.codegen.render import render
from parallax_gen.describe import brief
from parallax_gen.errors import ConfigError
from parallax_gen.memory.commands import tune_command
from parallax_gen.memory.lines import from_line, read_file, to_line
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import best, default_of, is_rendered
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory, load_same_capability, load_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.space import (
    coerce,
    default_config,
    every_config,
    knobs_of,
    most_shared_bytes,
    neighbours,
    promising_configs,
    shared_bytes,
    timed_lengths,
    why_invalid,
)
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.work import work_of
from parallax_gen.runtime.export import ExportedKernel
from parallax_gen.tuning.claims import SharedClaims
from parallax_gen.tuning.job import Job, program_key
from parallax_gen.tuning.search.cost_model import guess_us
from parallax_gen.tuning.seeds import nearby_seeds, shipped_seeds

__all__ = ["Store", "command", "from_line", "to_line"]

FOLDER = Path(__file__).parent / "data" / "same"
LONGEST = 64_000  # bytes of an uncompressed file
TUNING_DB = Path(__file__).parents[1] / "tuning_db"

# Toolchains for looking up results, for any installed Triton: two with records, and one without.
TOOLCHAINS = {name: Toolchain(name, cuda) for name, cuda in {"3.6": "12.8/12.9", "3.9": "12.9/13.4", "3.5": ""}.items()}
FIXED = Toolchain("3.9.0", "12.9/13.4")

Line = tuple[Json, Json]


def job_of(place: Place) -> Job:
    return Job(place.spec, place.bucket, GPUS[place.gpu])


def study_of(place: Place, program: str) -> str:
    """The name of the study that workers on several hosts share for a place."""
    storage = optuna.storages.InMemoryStorage()
    SharedClaims(storage, place, program, "me", 60.0, nullcontext)
    (study,) = storage.get_all_studies()
    return str(study.study_name)


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:32]


# -- the topics


def ask_kernels() -> list[Json]:
    return [list(case) for case in draw_cases(1, 9)]


def kernels(question: Json) -> Json:
    """The default kernel of a spec: its file's name, its fingerprint, its text below the header, and its whole file."""
    gpu, stored, sizes = question
    spec, shape = spec_from(stored), Shape(*sizes)
    config = default_config(spec, shape, GPUS[gpu])
    result = render(spec, config, GPUS[gpu])
    name = ExportedKernel(spec, Place(gpu, spec, bucket_of(shape)), config, "").file_name(result)
    of_any_version = result.text.replace(f"parallax_gen {parallax_gen.__version__}", "parallax_gen", 1)
    return [name, fingerprint(result.text), digest(below_header(result.text)), digest(of_any_version)]


def ask_shipped_kernels() -> list[Json]:
    """25 shipped kernels of each kind."""
    kinds: dict[str, set[str]] = {}
    for path in sorted(TUNING_DB.glob("*.jsonl")):
        for result in read_file(path).results:
            question = text([result.place.gpu, stored_spec(result.place), stored_config(result.config)])
            kinds.setdefault(kind_of(result.place), set()).add(question)
    return [
        json.loads(question) for _, lines in sorted(kinds.items()) for question in sorted(lines, key=by_chance)[:25]
    ]


def shipped_kernels(question: Json) -> Json:
    """The text below the header of a shipped kernel."""
    gpu, stored, config = question
    spec = spec_from(stored)
    return digest(below_header(render(spec, config_from(spec, config), GPUS[gpu]).text))


def ask_configs() -> list[Json]:
    return [list(case) for case in draw_cases(2, 29)]


def configs(question: Json) -> Json:
    """The first configs of a search and their cost: the default, other candidates, work, bytes, estimated time."""
    gpu, stored, sizes = question
    spec, shape, card = spec_from(stored), Shape(*sizes), GPUS[gpu]
    try:
        default = default_config(spec, shape, card)
    except ConfigError as error:
        return str(error)
    work = work_of(spec, shape)
    return {
        "default": stored_config(default),
        "promising": [changes(default, config) for config in promising_configs(spec, shape, card)],
        "shared": [shared_bytes(spec, default, card), most_shared_bytes(spec, default, card)],
        "work": [work.flops, work.bytes],
        "lengths": digest(text(timed_lengths(spec, shape)))[:8],
        "us": f"{guess_us(spec, default, shape, card):.5g}",  # the last digits may be the machine's
        "shown": brief(default),
    }


def ask_spaces() -> list[Json]:
    """A spec of each kind, small enough to be fast; decode_varlen with one query and with several."""
    plain = {"head_dim": 128, "dtype": "bf16", "group": 4}
    per_sequence = {"op": "decode", **plain, "ragged": True}
    return [
        ["h100", {"op": "forward", **plain, "head_dim": 64, "dtype": "fp32"}],
        ["h200", {"op": "preprocess", **plain, "group": 1}],
        ["b200", {"op": "dkdv", **plain, "head_dim": 256, "causal": True}],
        ["a100", {"op": "dqdr", **plain, "head_dim": 96}],
        ["h200", {"op": "decode", **plain}],
        ["h200", per_sequence],
        ["l40s", per_sequence | {"causal": True, "many_queries": True, "cache_dtype": "e4m3"}],
    ]


def spaces(question: Json) -> Json:
    """Knobs, and all valid configs, in the order that samplers and seeds see."""
    gpu, stored = question
    spec, card = spec_from(stored), GPUS[gpu]
    lines = [text(stored_config(config)) for config in every_config(spec, card)]
    default = default_config(spec, Shape(4, 4 * spec.group, 4, 1, 4096), card)
    return {
        "knobs": [[stored_name(k.name), [stored_value(k.name, v) for v in k.values]] for k in knobs_of(spec)],
        "count": len(lines),
        "sha256": digest("\n".join(lines)),
        "neighbours": [changes(default, config) for config in neighbours(spec, default, card)],
    }


def ask_refusals() -> list[Json]:
    """Invalid configs, and some valid ones: for each kind one per reason, ignoring numbers in reasons."""
    draw = random.Random(3)
    result: dict[str, Json] = {}
    for gpu, stored, _ in draw_cases(4, 60):
        for _ in range(8):
            question = [gpu, stored, draw_config(draw, spec_from(stored))]
            reason = refusals(question)["why"] or "none"
            kind = f"{stored['op']} {stored.get('ragged')}: "
            result.setdefault(kind + "".join(c for c in reason if not c.isdigit()), question)
    return list(result.values())


def refusals(question: Json) -> Json:
    """Why a config is invalid, and the nearest config with compatible knobs."""
    gpu, stored, choices = question
    spec = spec_from(stored)
    config = config_from(spec, choices)
    all_knobs = {knob.name: getattr(config, knob.name) for knob in knobs_of(spec)}
    return {"why": why_invalid(spec, config, GPUS[gpu]), "coerced": changes(config, coerce(spec, all_knobs))}


def ask_places() -> list[Json]:
    return [list(case) for case in draw_cases(6, 7)]


def places(question: Json) -> Json:
    """All names of a place: in records, look-ups, studies and output."""
    gpu, stored, sizes = question
    place = Place(gpu, spec_from(stored), bucket_of(Shape(*sizes)))
    assert Place.from_flat(json.loads(place.text)) == place
    return {
        "text": place.text,
        "digest": place.digest,
        "order": list(place.order),
        "spec": str(place.spec),
        "bucket": str(place.bucket),
        "study": study_of(place, "a program"),
        "tune": tune_command(place),
    }


def ask_standings() -> list[Json]:
    """The places of the sample."""
    stored = {text(r.place.flat()) for name in ("h100", "h200") for r in load_shipped(name, sample())}
    return [json.loads(flat) for flat in sorted(stored, key=by_chance)]


def standings(question: Json) -> Json:
    """The config of a call, its tier and its record, from the sample of shipped records.

    For each toolchain, on a sibling card, and at twice the keys, where there may be no records.
    """
    elsewhere = {"h100-pcie": {"gpu": "h100-pcie"}, "twice": {"bucket.seqlen_kv": 2 * question["bucket.seqlen_kv"]}}
    cases = {name: (Place.from_flat(question), name) for name in TOOLCHAINS}
    cases |= {name: (Place.from_flat(question | other), "3.6") for name, other in elsewhere.items()}
    answers = {}
    for name, (place, toolchain) in cases.items():
        result = best(place, GPUS[place.gpu], Memory(folder=sample()), TOOLCHAINS[toolchain])
        whose = result.record and result.record.place.digest[:8]
        answers[name] = [int(result.tier), whose, changes(default_of(place, GPUS[place.gpu]), result.config)]
    return answers


def ask_seeds() -> list[Json]:
    """Some of the sample's places, and places with twice their keys."""
    flats = ask_standings()
    return flats[::2] + [flat | {"bucket.seqlen_kv": 2 * flat["bucket.seqlen_kv"]} for flat in flats[1::3]]


def seeds(question: Json) -> Json:
    """The seed configs of a tune with the sample of shipped records, and the name of its shared study."""
    place = Place.from_flat(question)
    job = job_of(place)
    default = default_config(job.spec, job.shape, job.gpu)
    with patch.object(Toolchain, "here", lambda: FIXED):
        program = program_key(job)
    return {
        "program": program,
        "study": study_of(place, program),
        "proven": [
            changes(default, config) for config in shipped_seeds(place, load_same_capability(job.gpu, sample()))
        ],
        "nearby": [changes(default, config) for config in nearby_seeds(place, Memory(folder=sample()).all(place.gpu))],
    }


TOPICS: dict[str, tuple[Callable[[], list[Json]], Callable[[Json], Json]]] = {
    "kernels": (ask_kernels, kernels),
    "shipped_kernels": (ask_shipped_kernels, shipped_kernels),
    "configs": (ask_configs, configs),
    "spaces": (ask_spaces, spaces),
    "refusals": (ask_refusals, refusals),
    "places": (ask_places, places),
    "standings": (ask_standings, standings),
    "seeds": (ask_seeds, seeds),
}


# -- shipped records: a fixed sample, and all of them


@cache
def sample() -> Path:
    """A folder with a fixed sample of shipped records, which later releases do not change."""
    folder = Path(tempfile.mkdtemp(prefix="parallax_gen_same_"))
    atexit.register(shutil.rmtree, folder)
    for path in (FOLDER / "shipped").glob("*.jsonl.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


def write_sample() -> None:
    """Write all records on both cards of five places of each kind."""
    lines: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for path in sorted(TUNING_DB.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            place = {name: value for name, value in json.loads(line)["place"].items() if name != "gpu"}
            kind = lines.setdefault("ragged" if place["spec.ragged"] else place["spec.op"], {})
            kind.setdefault(text(place), []).append((path.name, line))
    sampled = [one for kind in lines.values() for place in sorted(kind, key=by_chance)[:5] for one in kind[place]]
    for name in sorted({name for name, _ in sampled}):
        whole = "".join(line for card, line in sampled if card == name)
        path = FOLDER / "shipped" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(whole.encode(), mtime=0))
    sample.cache_clear()


def write_results() -> None:
    """Write some results of each kind and outcome, in the order of an export."""
    places: dict[str, list[Result]] = {}
    for name in ("h100", "h200"):
        for result in load_shipped(name, sample()):
            places.setdefault(f"{name} {kind_of(result.place)}", []).append(result)
    results = [result for _, actual in sorted(places.items()) for result in (actual[0], actual[-1])]
    results += read_file(FOLDER / "of_431f796.jsonl").results
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"PARALLAX_GEN_DB": f"{folder}/tuning.db"}):
        with Store() as store:
            store.merge(results)
        command.main(["db", "export", str(FOLDER / "results.jsonl")], standalone_mode=False)


def of_before(name: str = "of_431f796.jsonl") -> list[Line]:
    """For each result in a file of commit 431f796: whether it counts, and its form today."""
    actual = read_file(FOLDER / name)
    assert actual.problems == []
    return [(is_rendered(result, GPUS[result.place.gpu]), result.to_dict()) for result in actual.results]


def of_all() -> Json:
    """For all shipped records, by card and kind: tiers by toolchain, a hash of kernels and a hash of seed configs."""
    memory = Memory()
    counts: dict[str, dict[str, int]] = {}
    lines_by_key: dict[str, list[str]] = {}
    for gpu in ("h100", "h200"):
        results, card = memory.all(gpu), GPUS[gpu]
        for place in dict.fromkeys(result.place for result in results):
            key, job = f"{gpu} {kind_of(place)}", job_of(place)
            for name, toolchain in TOOLCHAINS.items():
                tier = f"{name} {best(place, card, memory, toolchain).tier.name}"
                counts.setdefault(key, {}).setdefault(tier, 0)
                counts[key][tier] += 1
            begin = [*shipped_seeds(place, load_same_capability(job.gpu)), *nearby_seeds(place, results)]
            lines_by_key.setdefault(f"{key}: seeds", []).append(text([place.flat(), *map(stored_config, begin)]))
        for result in results:
            spec, config = result.place.spec, result.config
            kernel = why_invalid(spec, config, card) or digest(below_header(render(spec, config, card).text))
            counted = is_rendered(result, card)
            key = f"{gpu} {kind_of(result.place)}"
            counts[key]["records"] = counts[key].get("records", 0) + 1
            counts[key]["records that count"] = counts[key].get("records that count", 0) + counted
            lines_by_key.setdefault(f"{key}: kernels", []).append(f"{kernel} {counted} {to_line(result)}")
    return {"counts": counts, "sha256": {key: digest("".join(lines)) for key, lines in lines_by_key.items()}}


def shipped_now() -> str:
    """A hash of all shipped records."""
    return digest("".join(path.read_text(encoding="utf-8") for path in sorted(TUNING_DB.glob("*.jsonl"))))


# -- reading and writing


def lines_of(topic: str) -> list[Line]:
    """The stored questions and answers of a topic."""
    path = FOLDER / f"{topic}.jsonl"
    stored = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    return [(question, answer) for question, answer in map(json.loads, stored.splitlines())]


def write(topic: str) -> None:
    """Answer a topic's questions and write its file, compressed if it is long."""
    ask, answer = TOPICS[topic]
    result = "".join(text([question, answer(question)]) + "\n" for question in ask()).encode()
    plain = FOLDER / f"{topic}.jsonl"
    packed = Path(f"{plain}.gz")
    for path in (plain, packed):
        path.unlink(missing_ok=True)
    if len(result) > LONGEST:
        packed.write_bytes(gzip.compress(result, mtime=0))
    else:
        plain.write_bytes(result)


def main(arguments: list[str]) -> None:
    if arguments[:1] != ["--write"]:
        sys.exit(__doc__)
    topics = arguments[1:] or ["sample", "results", "of_431f796_today", *TOPICS, "of_all"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PARALLAX_GEN_CACHE_DIR"] = cache
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for topic in topics:
            if topic == "sample":
                write_sample()
            elif topic == "results":
                write_results()
            elif topic == "of_431f796_today":
                lines = [text(line) + "\n" for line in of_before()]
                (FOLDER / "of_431f796_today.jsonl").write_text("".join(lines), encoding="utf-8")
            elif topic == "of_all":
                stored = json.dumps({"shipped": shipped_now(), **of_all()}, indent=1) + "\n"
                (FOLDER / "of_all.json").write_text(stored, encoding="utf-8")
            else:
                write(topic)


if __name__ == "__main__":
    main(sys.argv[1:])
