"""Train a small language model with Parallax attention, and its softmax twin: loss curves as a table and a picture.

The text is present on every machine that runs this: the Python sources of the standard library and of torch, byte by
byte. The twins have the same width, layers, initial weights, batches and optimizer, and differ only in attention.
Parallax has one more projection a layer, r. It starts at 0, where Parallax is softmax attention: both models start
as the same function.

The defaults are for one GPU. On a CPU: --steps 60 --layers 2 --width 64 --head-dim 16 --seqlen 64 --batch 8
"""

from __future__ import annotations

import csv
import hashlib
import platform
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallax_gen import parallax_attn_func

VOCABULARY = 256  # bytes
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
WEIGHT_DECAY = 0.1  # of the layers' matrices alone
VALIDATIONS = 20  # at most in a run, besides the one before the first step
VALIDATION_BATCHES = 16
# Other packages and tests are not on every machine; the encodings are tables, near copies of one another.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "testing", "encodings"}


@dataclass(frozen=True)
class Settings:
    steps: int = 800
    layers: int = 8
    width: int = 512
    head_dim: int = 64
    seqlen: int = 1024
    batch: int = 32
    learning_rate: float = 3e-3
    optimizer: str = "muon"
    seed: int = 0
    device: str = "cpu"
    compile: bool = False


class Attention(nn.Module):
    """Causal self-attention with RoPE and qk-norm: Parallax, or softmax without its r.

    With r it is `parallax_gen.nn.ParallaxAttention`, weight by weight; written out here so that the twins share all
    but the two lines that attend.
    """

    def __init__(self, width: int, head_dim: int, parallax: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(head_dim, NORM_EPS) for _ in range(2))
        self.r_proj = nn.Linear(width, width, bias=False) if parallax else None
        if self.r_proj is not None:
            nn.init.zeros_(self.r_proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(project: nn.Linear) -> Tensor:
            return project(x).unflatten(-1, (-1, self.head_dim))  # (batch, seqlen, heads, head_dim)

        # Norms and rotations in fp32. r has no norm, whose gradient would be unbounded at r = 0.
        v = heads(self.v_proj)
        q = rotate(self.q_norm(heads(self.q_proj).float()), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(heads(self.k_proj).float()), cos, sin).to(v.dtype)
        if self.r_proj is None:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        else:
            r = rotate(heads(self.r_proj).float(), cos, sin).to(v.dtype)
            out = parallax_attn_func(q, r, k, v, causal=True)
        return self.o_proj(out.flatten(-2))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotations(seqlen: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, (seqlen, 1, head_dim / 2)."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(seqlen, device=device)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int, parallax: bool):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, NORM_EPS), nn.RMSNorm(width, NORM_EPS)
        self.attention = Attention(width, head_dim, parallax)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, settings: Settings, parallax: bool):
        super().__init__()
        width, self.head_dim = settings.width, settings.head_dim
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, self.head_dim, parallax) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(width, NORM_EPS)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seqlen, VOCABULARY) of tokens (batch, seqlen)."""
        cos, sin = rotations(tokens.shape[1], self.head_dim, tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def twins(settings: Settings) -> dict[str, LanguageModel]:
    """Both models, with the same weights. r, which softmax lacks, is 0."""
    torch.manual_seed(settings.seed)
    softmax, parallax = LanguageModel(settings, parallax=False), LanguageModel(settings, parallax=True)
    parallax.load_state_dict(softmax.state_dict(), strict=False)
    return {"softmax": softmax.to(settings.device), "parallax": parallax.to(settings.device)}


def read_text(device: str) -> tuple[Tensor, Tensor]:
    """Training and validation text as bytes: one file in twenty is held out, by its name's hash."""
    kept, held_out = bytearray(), bytearray()
    for root in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if SKIPPED.isdisjoint(name.split("/")):
                number = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
                part = held_out if number % 20 == 0 else kept
                part += (root / name).read_bytes() + b"\0"
    train, validation = (torch.frombuffer(part, dtype=torch.uint8).to(device) for part in (kept, held_out))
    return train, validation


def optimizers_of(model: LanguageModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon, or AdamW, for the layers' matrices, and AdamW for embedding, head and gains."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inner = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inner]
    adamw: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95)}
    first: torch.optim.Optimizer
    if settings.optimizer == "muon":
        # In torch since 2.9. Its steps are scaled to the size of AdamW's, so one learning rate serves both.
        lr, scaled = settings.learning_rate, "match_rms_adamw"
        first = torch.optim.Muon(matrices, lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn=scaled)
    else:
        first = torch.optim.AdamW(matrices, weight_decay=WEIGHT_DECAY, **adamw)
    return [first, torch.optim.AdamW(others, weight_decay=0.0, **adamw)]


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: warm-up over a twentieth of the steps, constant, down to 0 over the last third."""
    return min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / max(1, steps // 3))


@dataclass(frozen=True)
class Curve:
    train: list[float]  # the loss of each step, nats a byte
    validation: dict[int, float]  # after this many steps
    tokens_per_second: float  # the median, without validation

    @property
    def last_train(self) -> float:
        """The mean over the last twentieth of the steps, because a single step's loss is noisy."""
        return statistics.mean(self.train[-max(1, len(self.train) // 20) :])

    @property
    def last_validation(self) -> float:
        return self.validation[max(self.validation)]


def loss_of(model: LanguageModel, windows: Tensor) -> Tensor:
    """windows (batch, seqlen + 1) of bytes. bf16 on a GPU, with fp32 weights; fp32 on a CPU."""
    windows = windows.long()
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(name: str, model: LanguageModel, text: Tensor, held_out: Tensor, settings: Settings) -> Curve:
    if settings.compile:
        model.compile()
    optimizers = optimizers_of(model, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, settings.steps)) for o in optimizers]
    generator = torch.Generator().manual_seed(settings.seed)  # seeded anew, so that both models see the same batches
    window = torch.arange(settings.seqlen + 1, device=text.device)
    count = VALIDATION_BATCHES * settings.batch
    spread = held_out.unfold(0, settings.seqlen + 1, max(settings.seqlen + 1, len(held_out) // count))[:count]

    def step() -> Tensor:
        starts = torch.randint(len(text) - settings.seqlen, (settings.batch, 1), generator=generator)
        loss = loss_of(model, text[starts.to(text.device) + window])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def validate() -> float:
        return torch.stack([loss_of(model, windows) for windows in spread.split(settings.batch)]).mean().item()

    def now() -> float:
        if text.is_cuda:
            torch.cuda.synchronize(text.device)
        return time.perf_counter()

    losses: list[Tensor] = []  # kept on the device: reading one would wait for its step
    validation = {0: validate()}
    speeds: list[float] = []
    every = -(-settings.steps // VALIDATIONS)
    for done in range(0, settings.steps, every):
        some = min(every, settings.steps - done)
        began = now()
        losses += [step() for _ in range(some)]
        speeds.append(some * settings.batch * settings.seqlen / (now() - began))
        validation[done + some] = validate()
        seen = f"train {losses[-1]:.4f}  validation {validation[done + some]:.4f}"
        print(f"{name:9} step {done + some:5}  {seen}", flush=True)
    return Curve(torch.stack(losses).tolist(), validation, statistics.median(speeds))


def write_table(path: Path, curves: dict[str, Curve], settings: Settings) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("model", "split", "step", "tokens", "loss"))
        for name, curve in curves.items():
            points = {"train": dict(enumerate(curve.train, 1)), "validation": curve.validation}
            for split, losses in points.items():
                for step, loss in losses.items():
                    table.writerow((name, split, step, step * settings.batch * settings.seqlen, f"{loss:.5f}"))


def draw(path: Path, curves: dict[str, Curve], title: str) -> bool:
    """Plot the curves. False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    softmax, parallax = curves["softmax"], curves["parallax"]
    figure = Figure(figsize=(8, 6), dpi=160, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for (name, curve), color in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        above.plot(range(1, len(curve.train) + 1), curve.train, color=color, alpha=0.3, linewidth=0.6)
        label = f"{name}, {curve.last_validation:.4f} at the end"
        above.plot(curve.validation.keys(), curve.validation.values(), color=color, marker="o", ms=3, label=label)
    # The axis ends at the second-highest validation loss: that before the first step would dominate it.
    above.set(title=title, ylabel="loss, nats a byte", ylim=(None, sorted(softmax.validation.values())[-2]))
    above.legend(title="validation (thin: training)")
    difference = [parallax.validation[step] - loss for step, loss in softmax.validation.items()]
    below.plot(softmax.validation.keys(), difference, color="tab:blue", marker="o", ms=3)
    below.axhline(0, color="tab:gray")
    below.set(xlabel="step", ylabel="parallax − softmax")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path)
    return True


def option(name: str, help: str, **more: Any) -> Any:
    default = getattr(Settings, name.replace("-", "_"))
    return click.option(f"--{name}", default=default, show_default=True, help=help, **more)


@click.command(help=__doc__)
@option("steps", "Steps of each model.", type=click.IntRange(1))
@option("layers", "Layers of attention and an MLP, each after a norm.", type=click.IntRange(1))
@option("width", "Width of the residual stream: a multiple of --head-dim.", type=click.IntRange(8))
@option("head-dim", "Size of an attention head: a multiple of 8 up to 256.", type=click.IntRange(8, 256))
@option("seqlen", "Bytes in a sequence.", type=click.IntRange(1))
@option("batch", "Sequences in a step.", type=click.IntRange(1))
@option("learning-rate", "The peak, after a warm-up; it decays to 0 over the last third of the steps.", type=float)
@option("optimizer", "For the layers' matrices; the other parameters use AdamW.", type=click.Choice(["muon", "adamw"]))
@option("seed", "For the initial weights and the batches.", type=int)
@option("compile", "Compile both models with torch.compile.", is_flag=True)
@click.option("--device", default=None, help="cuda, cpu, ...  [default: cuda where there is one]")
@click.option(
    "--out",
    default="language_model",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The folder for losses.csv and losses.png.",
)
def main(out: Path, device: str | None, **options: Any) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device=device, **options)
    if settings.width % settings.head_dim or settings.head_dim % 8:
        raise click.UsageError("--width must be a multiple of --head-dim, and --head-dim a multiple of 8")
    out.mkdir(parents=True, exist_ok=True)

    text, held_out = read_text(device)
    print(f"{len(text) / 1e6:.1f} MB of text to train on, {len(held_out) / 1e6:.1f} MB held out")
    models = twins(settings)
    curves = {name: train(name, model, text, held_out, settings) for name, model in models.items()}

    card = torch.cuda.get_device_name(text.device) if text.is_cuda else "a CPU"
    title = f"{settings.layers} layers, width {settings.width}, {settings.optimizer}, on {card}"
    print(f"\n{title}; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{'model':9} {'parameters':>11} {'tokens seen':>12} {'train':>7} {'validation':>11} {'tokens/s':>9}")
    for name, curve in curves.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        tokens = settings.steps * settings.batch * settings.seqlen
        losses = f"{curve.last_train:7.4f} {curve.last_validation:11.4f}"
        print(f"{name:9} {parameters:11,} {tokens:12,} {losses} {curve.tokens_per_second:9,.0f}")
    table, picture = out / "losses.csv", out / "losses.png"
    write_table(table, curves, settings)
    print(f"losses in {table}, nats a byte")
    drawn = draw(picture, curves, title)
    print(f"curves in {picture}" if drawn else "no picture: it needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    main()
