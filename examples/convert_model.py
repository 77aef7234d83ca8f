"""Convert a model of transformers to Parallax attention, fine-tune only its r_proj, save it and load it.

The model is a tiny Qwen3 with random weights, and the text is this package's source code, byte by byte, so nothing is
downloaded. A trained model from AutoModelForCausalLM.from_pretrained is converted in the same way. Needs transformers,
in the version of the extra `transformers`.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import parallax_gen
from parallax_gen.integrations.transformers import convert

STEPS, BATCH, SEQLEN = 50, 4, 32


def tiny_qwen3() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=256,  # bytes
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config)


def text() -> Tensor:
    files = sorted(Path(parallax_gen.__file__).parent.rglob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, data = tiny_qwen3().to(device), text()

    def batch() -> Tensor:
        starts = torch.randint(len(data) - SEQLEN, (BATCH, 1))
        return data[starts + torch.arange(SEQLEN)].to(device)

    tokens = batch()
    with torch.no_grad():
        before = model(tokens).logits
        convert(model)
        difference = (model(tokens).logits - before).abs().max()
    print(f"{type(model).__name__}: its logits differ by {difference:.1e} from the unconverted model's")

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("r_proj" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses: list[float] = []
    for step in range(1, STEPS + 1):
        tokens = batch()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"steps {step - 9:2} to {step}: loss {statistics.mean(losses[-10:]):.3f}")

    prompt = data[None, :16].to(device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(device)
    written = [each.generate(prompt, max_new_tokens=8, do_sample=False)[0] for each in (model, loaded)]
    print("loaded again, it writes the same:", torch.equal(*written))


if __name__ == "__main__":
    main()
