"""Our adapters beside peft's: the same mathematics on linear maps, and the same files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.compress.lora import LoRA


def test_equal_to_peft(tmp_path):
    """Outputs and every gradient, from one set of weights in the layout that peft writes."""
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.ModuleDict({"q_proj": nn.Linear(12, 8), "up_proj": nn.Linear(8, 20, bias=False)})
            self.layers = nn.ModuleList([layer])

        def forward(self, x):
            return self.layers[0]["up_proj"](self.layers[0]["q_proj"](x).tanh())

    net = Net()
    targets = {"0.q_proj": net.layers[0]["q_proj"], "0.up_proj": net.layers[0]["up_proj"]}
    ours = LoRA(targets, rank=3, alpha=6.0)
    for p in ours.parameters():
        nn.init.normal_(p)
    stored = {}
    for name in targets:
        key = name.replace(".", "/")
        stored[f"base_model.model.layers.{name}.lora_A.weight"] = ours.down[key].detach().clone()
        stored[f"base_model.model.layers.{name}.lora_B.weight"] = ours.up[key].detach().clone()
    x = torch.randn(5, 12, requires_grad=True)
    with ours.on():
        y = net(x)
    weights = torch.randn_like(y)
    (gx,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    grads = torch.autograd.grad((y * weights).sum(), list(ours.parameters()))

    config = peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    theirs = peft.get_peft_model(net, config)
    save_file(stored, tmp_path / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(theirs, stored)
    z = theirs(x)
    assert torch.allclose(z, y, atol=1e-5)
    assert torch.allclose(torch.autograd.grad((z * weights).sum(), x, retain_graph=True)[0], gx, atol=1e-4)
    named = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    z_grads = dict(zip(named, torch.autograd.grad((z * weights).sum(), list(named.values()))))
    for (name, _), g in zip(ours.named_parameters(), grads):
        part, _, key = name.partition(".")
        letter = "lora_A" if part == "down" else "lora_B"
        match = [v for n, v in z_grads.items() if f".{key.replace('/', '.')}." in n and letter in n]
        assert len(match) == 1 and torch.allclose(match[0], g, atol=1e-4), name


def test_a_published_adapter_is_read(tmp_path):
    layer = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    ours = LoRA({"0.q_proj": layer["q_proj"]}, rank=2, alpha=2.0)
    stored = {
        "base_model.model.model.layers.0.self_attn.0.q_proj.lora_A.weight": torch.randn(2, 6),
        "base_model.model.model.layers.0.self_attn.0.q_proj.lora_B.weight": torch.randn(4, 2),
    }
    save_file(stored, tmp_path / "adapter_model.safetensors")
    ours.load_published(tmp_path)
    x = torch.randn(3, 6)
    a, b = stored.values()
    with ours.on():
        assert torch.allclose(layer["q_proj"](x), nn.functional.linear(x, layer["q_proj"].weight + b @ a,
                              layer["q_proj"].bias), atol=1e-5)  # fmt: skip
