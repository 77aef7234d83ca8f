"""render and export write what is rendered."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from cli_samples import (
    CALL,
    DKDV_CALL,
    DKDV_PLACE,
    DKDV_SPEC,
    H200,
    OTHER_KERNEL,
    OTHER_TOOLCHAIN,
    PLACE,
    SPEC,
    config,
    dkdv_record,
    make_record,
    run,
    start_python,
)

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.hub import records as hub_records
from parallax_gen.memory.guard import cache_resources
from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import config_to_json
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape

EXPORT = ("export", "--gpu", "h200", "--op", "decode", "-o")
FILE = "decode_d128_bf16_g4_rows256_kv8192.py"


# render


def test_render_prints_the_kernel_of_dispatch(store: Store) -> None:
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    assert run("render", *CALL).stdout == render(SPEC, default, H200).text
    store.save(make_record(200.0, splits=3))
    assert run("render", *CALL).stdout == render(SPEC, config(3), H200).text


def test_render_takes_a_config() -> None:
    result = run("render", *CALL, "--config", config_to_json(config(6)))
    assert result.stdout == render(SPEC, config(6), H200).text


@pytest.mark.parametrize("op", ["forward", "preprocess", "dkdv", "dqdr", "decode"])
def test_render_of_every_op_and_width(op: str) -> None:
    flags = () if op == "preprocess" else ("--window", "100", "--varlen")
    text = run("render", "--gpu", "h200", "--op", op, "--head-dim", "72", *flags).stdout
    ast.parse(text)
    assert f"spec       {op}, head_dim 72, bf16" in text
    assert ("window, varlen" in text) is bool(flags)
    assert "cu_seqlens" in text or not flags


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("{", 2, "not JSON"),
        ("[1]", 2, "not an object"),
        ("{}", 2, "error: a decode config has the fields"),
        (config_to_json(dataclasses.replace(config(2), BLOCK_N=7)), 2, "BLOCK_N is 7"),
    ],
)
def test_render_refuses_an_invalid_config(text: str, status: int, message: str) -> None:
    result = run("render", *CALL, "--config", text)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""


def test_render_reports_resources() -> None:
    result = run("render", "--gpu", "h200", "--op", "decode", "--head-dim", "64", "--resources")
    assert "registers per thread" in result.stderr
    ast.parse(result.stdout)


# export


def test_export_of_every_known_bucket(store: Store, tmp_path: Path) -> None:
    long = dataclasses.replace(PLACE, bucket=Bucket(8, 1, 16384))
    other_kernel = dataclasses.replace(PLACE, spec=dataclasses.replace(SPEC, head_dim=64))
    for result in (
        make_record(200.0, splits=2),
        make_record(210.0, splits=3),
        make_record(20.0, splits=32, place=long, source="measured on a card"),
        make_record(5.0, place=other_kernel),
        make_record(1.0, "predicted", place=dataclasses.replace(PLACE, bucket=Bucket(1, 1, 128))),
    ):
        store.save(result)
    result = run(*EXPORT, tmp_path, "--all")
    assert result.exit_code == 0, result.output
    names = ["README.md", FILE, "decode_d128_bf16_g4_rows8_kv16384.py"]
    assert sorted(p.name for p in tmp_path.glob("*.*") if p.suffix != ".db" and "db-" not in p.name) == names
    assert (tmp_path / FILE).read_text(encoding="utf-8") == render(SPEC, config(2), H200).text
    assert (tmp_path / names[2]).read_text(encoding="utf-8") == render(SPEC, config(32), H200).text
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "launch(q, r, k_cache, v_cache, out, scratch, arrival_counters, softmax_scale)" in readme
    assert "0 before and after every launch" in readme
    for text in (readme, result.stdout):
        assert "your record; measured on a card; 2026-01-01" in text
        assert FILE in text


def test_multi_token_kernels_have_a_file_per_query_bucket(store: Store, tmp_path: Path) -> None:
    shapes = ("--shape", "1,32/8,16x8192", "--shape", "1,32/8,512x8192", "--shape", "1,32/8,8192")
    result = run(*EXPORT, tmp_path / "out", *shapes)
    assert result.exit_code == 0, result.output
    multi_token_prefix = "decode_d128_bf16_g4_causal_ragged_many_queries_rows8"
    single_query_file = "decode_d128_bf16_g4_rows8_kv8192.py"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.py")) == sorted(
        [f"{multi_token_prefix}_q128_kv8192.py", f"{multi_token_prefix}_q512_kv8192.py", single_query_file]
    )


def test_export_of_a_shape_without_a_record_writes_the_default(store: Store, tmp_path: Path) -> None:
    store.save(make_record(200.0))
    result = run(*EXPORT, tmp_path / "out", "--shape", "1,32/8,1024", "--shape", "32,32/8,8192")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.py"))
    assert files == [FILE, "decode_d128_bf16_g4_rows8_kv1024.py"]
    default = default_config(SPEC, Shape(1, 32, 8, 1, 1024), H200)
    assert (tmp_path / "out" / files[1]).read_text(encoding="utf-8") == render(SPEC, default, H200).text
    assert "the default config, not measured: no record can be used" in result.stdout


def test_export_without_records_writes_one_default(tmp_path: Path) -> None:
    run("export", "--gpu", "h100", "--op", "forward", "--stats", "-o", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.py")
    assert file.name == "forward_d128_bf16_g1_causal_stats_rows64_q4096_kv4096.py"


def test_export_of_a_kernel_with_a_window(store: Store, tmp_path: Path) -> None:
    """Only kernels with the given window are exported."""
    longer = dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 16384, 16384, 512))
    for place in (DKDV_PLACE, longer, dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 4096, 4096, 1024))):
        store.save(dkdv_record(place=place))
    whole = dataclasses.replace(
        DKDV_PLACE, spec=dataclasses.replace(DKDV_SPEC, window=False), bucket=Bucket(16, 512, 512)
    )
    store.save(dkdv_record(place=whole))
    call = ("export", *DKDV_CALL[:6], "--all", "-o")
    assert run(*call, tmp_path / "a", *DKDV_CALL[6:8]).exit_code == 0
    name = "dkdv_d96_bf16_g4_causal_window_rows16_q4096_kv4096_w512.py"
    files = sorted(p.name for p in (tmp_path / "a").glob("*.py"))
    assert files == ["dkdv_d96_bf16_g4_causal_window_rows16_q16384_kv16384_w512.py", name]
    assert (tmp_path / "a" / name).read_text(encoding="utf-8") == render(DKDV_SPEC, dkdv_record().config, H200).text
    assert "window_size" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    run(*call, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").glob("*.py")] == ["dkdv_d96_bf16_g4_causal_rows16_q512_kv512.py"]
    run("export", *DKDV_CALL, "-o", tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").glob("*.py")] == [name]


def test_a_window_over_all_keys_is_reported_and_left_out(tmp_path: Path) -> None:
    """As at run time, where a window of all keys counts as none."""
    call = ("export", "--gpu", "h200", "--op", "forward", "--shape", "2,4,512", "-o", tmp_path, "--window")
    result = run(*call, "512")
    assert "--window 512 covers all 512 keys, so it is ignored" in result.stderr
    (file,) = tmp_path.glob("*.py")
    assert "window_size" not in file.read_text(encoding="utf-8")
    assert "includes all" not in run(*call, "511").stderr


def test_export_of_preprocess_has_no_key_size(tmp_path: Path) -> None:
    run("export", "--gpu", "h200", "--op", "preprocess", "--shape", "2,32/8,4096", "-o", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.py")] == ["preprocess_d128_bf16_g1_rows64_q4096.py"]


def test_export_prefers_this_toolchain_then_the_newest(store: Store, tmp_path: Path) -> None:
    old, new = {"triton": "3.3"}, {"triton": "3.4"}
    store.save(make_record(100.0, splits=1, evidence_changes=old))
    store.save(make_record(120.0, splits=2, evidence_changes=new, created_at="2026-03-01T00:00:00+00:00"))
    store.save(make_record(10.0, splits=4, evidence_changes=OTHER_KERNEL))
    export = (*EXPORT, tmp_path / "out", "--all")
    result = run(*export)
    assert (tmp_path / "out" / FILE).read_text(encoding="utf-8") == render(SPEC, config(2), H200).text
    unchecked = "not checked here: the file launches it even if it spills far more than the default"
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for text in (result.stdout, " ".join(readme.split())):
        assert f"; triton 3.4 (here {minor(Toolchain.here().triton)}); {unchecked}" in text
        assert "not yet checked" not in text  # an exported file has no check
    cache_resources(render(SPEC, config(2), H200), H200, Resources(168, 0, 1000))
    assert unchecked not in run(*export).stdout
    store.save(make_record(150.0, splits=3))
    run(*export)
    assert (tmp_path / "out" / FILE).read_text(encoding="utf-8") == render(SPEC, config(3), H200).text


def test_export_of_a_sibling_cards_record(store: Store, tmp_path: Path) -> None:
    sibling = dataclasses.replace(PLACE, gpu="h100")
    store.save(make_record(100.0, splits=3, place=sibling, evidence_changes=OTHER_TOOLCHAIN))
    result = run("export", *CALL, "-o", tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_text(encoding="utf-8") == render(SPEC, config(3), H200).text
    assert "your record, measured on h100; " in result.stdout
    assert "; triton 3.4 (here " in result.stdout
    assert run("render", *CALL).stdout == render(SPEC, config(3), H200).text


def test_export_skips_a_record_of_another_kernel(store: Store, tmp_path: Path) -> None:
    store.save(make_record(10.0, splits=4, evidence_changes=OTHER_KERNEL))
    assert "the default config" in run(*EXPORT, tmp_path / "out", "--shape", "32,32/8,8192").stdout
    run(*EXPORT, tmp_path / "all", "--all")
    assert FILE not in [path.name for path in (tmp_path / "all").glob("*.py")]  # nor does its bucket count as known


def test_export_marks_shipped_records(tmp_path: Path) -> None:
    write_shipped([make_record(200.0)], "h200")
    assert "a shipped record" in run(*EXPORT, tmp_path / "out", "--all").stdout


def test_a_later_export_keeps_the_readme_entries_of_other_files(tmp_path: Path) -> None:
    run(*EXPORT, tmp_path / "out", "--shape", "1,8,1024")
    run(*EXPORT, tmp_path / "out", "--shape", "1,8,4096")
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert readme.count("## decode_d128_bf16_g1") == 2
    run(*EXPORT, tmp_path / "out", "--shape", "1,8,4096")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == readme


def test_export_does_not_overwrite_a_foreign_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    result = run(*EXPORT, tmp_path)
    assert result.exit_code == 1
    assert "is not from an export" in result.stderr
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Mine\n"
    assert not list(tmp_path.glob("*.py"))


def test_a_package_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    for name, most in (("MOST_KV_ROWS", 16), ("LONGEST", 256)):
        monkeypatch.setattr(hub_records, name, most)
    store.save(make_record(200.0, splits=3, place=dataclasses.replace(PLACE, bucket=Bucket(8, 1, 256))))
    call = ("export", "--gpu", "h100,h200", "--op", "decode", "--shape", "1,32/8,256", "--hub", tmp_path / "hub")
    result = run(*call, "--repo-id", "me/attention")
    assert result.exit_code == 0, result.output
    build = tmp_path / "hub" / "build" / "torch-cuda"
    assert f"kernels of\n    {SPEC}\n{build}: " in result.stdout
    assert sorted(path.name for path in (build / "configs").iterdir()) == ["h100.json", "h200.json", "kernels.json"]
    texts = [path.read_text(encoding="utf-8") for path in (build / "rendered").iterdir()]
    assert render(SPEC, config(3), gpu_by_name("h100")).text in texts  # a sibling's record, which came first
    data = json.loads(run(*call, "--json").stdout)
    assert (data["build"], data["specs"], data["kernels"]) == (str(build), [SPEC.to_dict()], len(texts) - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either -o, or --hub"),
        (("-o", "a", "--hub", "b"), "give either -o, or --hub"),
        (("-o", "a", "--repo-id", "me/attention"), "give either -o, or --hub"),
        (("--hub", "b", "--all"), "give either -o, or --hub"),
        (("--hub", "b", "--cubin"), "but not --all or --cubin"),
        (("--hub", "b", "--repo-id", "attention"), "repo_id: got 'attention'"),
    ],
)
def test_export_to_a_folder_or_a_package(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("export", "--gpu", "h200", "--op", "decode", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_export_needs_no_torch_and_its_files_import(tmp_path: Path) -> None:
    code = f"""
import sys
from parallax_gen.cli import main
main({[*EXPORT, str(tmp_path / "out")]!r}, standalone_mode=False)
assert "torch" not in sys.modules and "triton" not in sys.modules
sys.path.insert(0, {str(tmp_path / "out")!r})
from decode_d128_bf16_g1_rows8_kv1024 import launch
print("imported", json.dumps(launch.__module__))
"""
    out, err = start_python("-c", "import json" + code).communicate(timeout=60)
    assert out.splitlines()[-1] == "imported " + json.dumps("decode_d128_bf16_g1_rows8_kv1024"), err


def test_without_a_card_it_is_for_the_h200(tmp_path: Path) -> None:
    result = run("export", *CALL[2:], "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["gpu"] == "h200"
    assert result.stderr == "no CUDA device here, so this is for h200: --gpu names another card\n"
