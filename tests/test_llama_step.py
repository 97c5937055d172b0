"""A tiny Llama trains one step through patch on the Triton kernels, the launches counted by kernel."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from launches import watch
from peft import LoraConfig, get_peft_model
from tolerance import assert_close

import fastlora
from fastlora import dispatch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    watch(monkeypatch, lambda name: counts.update([name]))
    return counts


def gradients(
    model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, logits, gradients by name)."""
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach(), grads


def test_one_step_on_the_kernels(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = get_peft_model(
        transformers.LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(0, 64, (2, 17))
    _, plain_logits, plain = gradients(model, tokens)
    _, exact_logits, exact = gradients(model.double(), tokens)
    model.float()

    monkeypatch.setattr(dispatch.env, "backend", "triton")
    report = fastlora.patch(model, strict=True)
    layers = len(report.patched)
    assert layers == 14 and set(report.patched.values()) == {"fused"}
    loss, logits, grads = gradients(model, tokens)

    # Four inputs a decoder layer, (q k v) (o) (gate up) (down), each with one dy pass, one x pass and one dx backward
    # and one shrink forward, which for down is that of glu; an expand a linear. The embedding is frozen, so the first
    # layer's q, k and v need no dx.
    assert launches == {"shrink": 6, "expand": layers + 7, "dy": 8, "x": 8, "glu": 2, "glu_backward": 2}
    assert_close(logits, plain_logits, exact_logits, "logits")  # the loss is one number: its error is luck
    assert set(grads) == set(plain)
    joined = [torch.cat([g[name].flatten() for name in plain]) for g in (grads, plain, exact)]
    assert_close(*joined, "all gradients")

    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    after, _, _ = gradients(model, tokens)
    assert after < loss
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
