"""The plan: the course's numbers and the lab's, PEFT's own counts, and the bytes of models that are really there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TARGETS, base_model, lora_config
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, Qwen3MoeConfig, T5Config
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import fastlora
from fastlora.__main__ import main
from fastlora.plan import Plan, lora_parameters, plan, plan_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FLAN_T5_BASE: dict[str, Any] = dict(
    vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = ("llama", "t5", "gpt2")
BATCH, LENGTH, TOKENS = 2, 16, 5


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flan-t5-base")
    T5Config(**FLAN_T5_BASE).save_pretrained(folder)
    return folder


def of_family(family: str, targets: Any = "all-linear") -> Plan:
    return plan_config(base_model(family).config, family, (4,), targets, TOKENS, (BATCH, LENGTH))


def prompted(family: str) -> Any:
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    return get_peft_model(base_model(family), PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS))


def test_the_course_weight_of_512_by_64() -> None:
    adapted = lora_parameters([(64, 512)], r=8)
    assert (512 * 64, adapted) == (32_768, 4_608)
    assert round(100 * (1 - adapted / (512 * 64))) == 86


def test_the_lab_flan_t5_base_with_rank_32_on_q_and_v(flan: Path) -> None:
    full, lora, prompt = plan(str(flan), [32], ["q", "v"], 20, (1, 8)).costs
    assert (lora.trainable, lora.parameters, f"{lora.share:.2%}") == (3_538_944, 251_116_800, "1.41%")
    assert full.trainable == full.parameters == 251_116_800 - 3_538_944
    assert (lora.optimizer_bytes, lora.gradient_bytes, lora.file_bytes) == tuple(3_538_944 * n for n in (8, 4, 4))
    assert prompt.trainable == 2 * 20 * 768


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_parameters_are_those_that_peft_prints(family: str, targets: str) -> None:
    wanted: Any = targets if targets == "all-linear" else TARGETS[family][:2]
    _, lora, prompt = of_family(family, wanted).costs
    model = get_peft_model(base_model(family), lora_config(family, target_modules=wanted))
    assert (lora.trainable, lora.parameters) == model.get_nb_trainable_parameters()
    assert (prompt.trainable, prompt.parameters) == prompted(family).get_nb_trainable_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_as_long_as_those_that_peft_saves(family: str, tmp_path: Path) -> None:
    full, lora, prompt = of_family(family).costs
    get_peft_model(base_model(family), lora_config(family, target_modules="all-linear")).save_pretrained(tmp_path / "l")
    prompted(family).save_pretrained(tmp_path / "p")
    base_model(family).save_pretrained(tmp_path / "f")
    for cost, file in ((full, "f/model"), (lora, "l/adapter_model"), (prompt, "p/adapter_model")):
        assert cost.file_bytes == sum(t.nbytes for t in load_file(tmp_path / f"{file}.safetensors").values())


def kept(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a real forward keeps for backward beside the parameters."""
    own = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.train()(**inputs)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_models_that_are_there(family: str) -> None:
    full, lora, prompt = of_family(family).costs
    ids, mask = torch.ones(BATCH, LENGTH, dtype=torch.long), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 0] = 0  # or SDPA goes without a mask
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    adapted = get_peft_model(base_model(family), lora_config(family, target_modules="all-linear"))
    fastlora.patch(adapted)
    real = {"full": kept(base_model(family), inputs), "lora r=4": kept(adapted, inputs)}
    real[f"prompt {TOKENS}"] = kept(prompted(family), inputs)
    for cost in (full, lora, prompt):
        assert cost.activation_bytes == pytest.approx(real[cost.method], rel=0.02), cost.method
    assert len({cost.activation_bytes for cost in (full, lora, prompt)}) == 3


def test_adapters_on_a_16_bit_base_are_fp32() -> None:
    config = base_model().config
    config.dtype = torch.bfloat16
    full, lora, _ = plan_config(config, "", (8,), "all-linear", 4, (1, 8)).costs
    assert (full.gradient_bytes, full.optimizer_bytes) == (2 * full.trainable, 8 * full.trainable)
    assert lora.file_bytes == lora.gradient_bytes == 4 * lora.trainable


def test_a_large_model_is_never_allocated() -> None:
    sizes = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64)
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, dtype="bfloat16", **sizes)
    before = Path("/proc/self/statm").read_text().split()[1]
    planned = plan_config(config, "", (8,), "all-linear", 20, (1, 8192))
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - int(before)) * os.sysconf("SC_PAGE_SIZE")
    assert planned.costs[0].file_bytes > 10 * 2**30 and grown < 2**30


def test_activations_that_cannot_be_counted_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "forward", lambda self, x: x * int(x.argmax()))
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=2, head_dim=16)
    planned = plan_config(Qwen3MoeConfig(**sizes, **experts), "", (8,), ["q_proj"], 4, (1, 8))
    assert planned.costs[1].trainable == 8 * (32 + 32)
    assert {cost.activation_bytes for cost in planned.costs} == {None}
    assert str(planned).count("unknown") == 3 and "does not run on fake tensors" in str(planned)


def test_the_command_prints_a_table_and_json(flan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(flan), "--r", "32", "--target", "q,v", "--tokens", "2x8"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for said in ("3,538,944", "1.41%", "247,577,856 parameters", "LoRA on 72 layers", "2 × 8 tokens", "prompt 20"):
        assert said in shown
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [cost["trainable"] for cost in facts["costs"]] == [247_577_856, 3_538_944, 30_720]
    assert len(facts["targets"]) == 72 and facts["tokens"] == [2, 8]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "nobody/nothing"], "model: got 'nobody/nothing', wanted a folder with a config.json or an id"),
        (["--target", "q,query"], "target: got 'query', which no linear layer is called; the model has"),
        (["--r", "0"], "ranks: got 0, wanted whole numbers ≥ 1"),
        (["--virtual-tokens", "0"], "virtual_tokens: got 0"),
        (["--tokens", "0x4"], "tokens: got 0, 4"),
    ],
)
def test_mistakes_are_named(change: list[str], said: str, flan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(flan), *change]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}") and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit"}, "model: Unrecognized configuration class"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "model: got '{folder}', wanted"),
    ],
)
def test_a_config_of_no_language_model_is_one_line(
    config: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said.format(folder=tmp_path)}") and shown.count("\n") == 1


def test_a_batch_that_is_none_names_what_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", "any", "--tokens", "4by512"])
    assert "--tokens: got '4by512', wanted rows x tokens, as 4x512, or tokens\n" in capsys.readouterr().err
