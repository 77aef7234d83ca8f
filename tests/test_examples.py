"""Every example runs in its own process, as a user would run it."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parallax_gen.nn import ParallaxAttention

FOLDER = Path(__file__).parents[1] / "examples"
TRAINING = FOLDER / "train_language_model.py"
NEEDS = {"convert_model": "transformers"}  # the others run without extras, in test_packaging.py


def run(example: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}  # these are small, and other tests use the other cores
    environment |= {"PARALLAX_GEN_DB": str(folder / "tuning.db"), "PARALLAX_GEN_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", NEEDS)
def test_example(example: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[example])
    assert run(FOLDER / f"{example}.py", tmp_path).strip()


def test_both_models_learn(tmp_path: Path) -> None:
    steps = 30
    tiny = f"--device cpu --steps {steps} --layers 1 --width 32 --head-dim 16 --seqlen 32 --batch 8"
    printed = run(TRAINING, tmp_path, *tiny.split(), "--learning-rate", "0.01", "--out", str(tmp_path / "out"))
    with (tmp_path / "out" / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"softmax", "parallax"}
    starts = set()
    for model in ("softmax", "parallax"):
        train, validation = (
            {int(row["step"]): float(row["loss"]) for row in rows if (row["model"], row["split"]) == (model, split)}
            for split in ("train", "validation")
        )
        assert list(train) == list(range(1, steps + 1))
        assert (min(validation), max(validation)) == (0, steps)
        assert validation[steps] < validation[0] - 1  # it starts at ln 256 = 5.5 plus the effect of the initial weights
        assert f"\n{model:9} " in printed.partition("tokens/s")[2]
        starts.add(round(validation[0], 4))
    assert len(starts) == 1  # the same function
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "losses.png").exists() == has_matplotlib
    assert ("no picture" in printed) != has_matplotlib


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(TRAINING.stem)


# fp32 against the fp64 reference of CPU tensors: rounding errors of 6e-8, amplified by a few sums and layers.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def test_the_twins_start_as_the_same_function(training: ModuleType) -> None:
    models = training.twins(training.Settings(layers=3, width=64, head_dim=16))
    tokens = torch.randint(training.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(models["parallax"](tokens), models["softmax"](tokens), **FP32)
    parameters = {name: dict(model.named_parameters()) for name, model in models.items()}
    more = parameters["parallax"].keys() - parameters["softmax"].keys()
    assert more == {f"blocks.{i}.attention.r_proj.weight" for i in range(3)}
    # r must matter, or the equality above would show nothing.
    torch.nn.init.normal_(parameters["parallax"]["blocks.0.attention.r_proj.weight"], std=0.1)
    assert (models["parallax"](tokens) - models["softmax"](tokens)).abs().max() > 0.01


def test_the_examples_attention_equals_the_packages_layer(training: ModuleType) -> None:
    torch.manual_seed(0)
    attention = training.Attention(64, head_dim=16, parallax=True)
    torch.nn.init.normal_(attention.r_proj.weight, std=0.1)
    layer = ParallaxAttention(64, num_heads=4, qk_norm=True, rope_theta=training.ROPE_THETA)
    layer.load_state_dict(attention.state_dict())
    x = torch.randn(2, 40, 64)
    out = attention(x, *training.rotations(40, 16, x.device))
    torch.testing.assert_close(out, layer(x), **FP32)


def test_every_weight_has_one_optimizer(training: ModuleType) -> None:
    settings = training.Settings(layers=2, width=32, head_dim=16)
    model = training.twins(settings)["parallax"]
    inner, others = (
        [p for group in optimizer.param_groups for p in group["params"]]
        for optimizer in training.optimizers_of(model, settings)
    )
    assert all(p.ndim == 2 for p in inner)
    assert len(inner) == 2 * (5 + 2)  # q, r, k, v, o and two MLP weights
    assert sorted(map(id, inner + others)) == sorted(map(id, model.parameters()))
