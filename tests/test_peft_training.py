"""Training through `patch`: ten steps as PEFT takes them, dropout's distribution, Hugging Face's Trainer, TRL's."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from models import FAMILIES, VOCABULARY, assert_parity, base_model, batch, counted, lora_config, lora_layers, peft_model
from peft import PeftModel
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn

import fastlora


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 10, lr: float = 1e-2) -> list[Tensor]:
    """The loss before each step of AdamW on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_have_pefts_losses(family: str) -> None:
    """As near to float64's losses and trained adapters as PEFT's are, and the loss falls."""

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = train(model, inputs)
        assert losses[-1] < losses[0]
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {**{f"loss {i}": loss for i, loss in enumerate(losses)}, **adapters}

    assert_parity(lambda: peft_model(family, init_lora_weights=True), run, family, draws=2)


SEEDS = 96


def late_losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Over seeds, the loss after two steps at p > 0, itself with dropout on."""
    start, losses = copy.deepcopy(model.state_dict()), []
    for seed in range(SEEDS):
        model.load_state_dict(start)
        torch.manual_seed(seed)
        losses.append(train(model, inputs, steps=3, lr=3e-2)[-1])
    model.load_state_dict(start)
    return torch.stack(losses).double()


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How many standard errors apart are the means of two samples, and the logarithms of their deviations?"""
    means = (a.mean() - b.mean()) / ((a.var() + b.var()) / SEEDS).sqrt()
    spreads = (a.std() / b.std()).log() * math.sqrt(SEEDS - 1)
    return abs(float(means)), abs(float(spreads))


def test_with_dropout_the_losses_have_pefts_distribution() -> None:
    """Mean and deviation within four standard errors over 96 seeds; a wrong rate, or none, is found beyond them."""
    model, inputs = peft_model("llama", layers=1, lora_alpha=4, lora_dropout=0.4), batch(rows=8)
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    plain, actual = late_losses(model, inputs), late_losses(ours, inputs)
    assert not torch.equal(plain, actual), "our masks are PEFT's: is it patched?"
    assert max(apart(actual, plain)) < 4
    for wrong in (0.0, 0.6):
        for layer in lora_layers(ours).values():
            layer.lora_dropout["default"].p = wrong
        assert apart(late_losses(ours, inputs), plain)[0] > 8, f"this test cannot tell p = {wrong} from p = 0.4"


def test_the_seed_decides_the_masks() -> None:
    model, inputs = peft_model("llama", lora_dropout=0.4), batch()
    fastlora.patch(model)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(train(copy.deepcopy(model), inputs, steps=3)[-1])
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def examples(count: int = 16) -> list[dict[str, Tensor]]:
    return [{name: value[0] for name, value in batch(rows=1).items()} for _ in range(count)]


def trainer_losses(model: PeftModel, data: list[dict[str, Tensor]], path: Path, **options: object) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_as_results(losses: list[float]) -> dict[str, Tensor]:
    return {f"step {i}": torch.tensor(loss) for i, loss in enumerate(losses)}


def test_trainer(tmp_path: Path) -> None:
    """Hugging Face's Trainer takes the same steps, checkpointing on; ours are counted."""
    model, data = peft_model("llama"), examples()
    ours = copy.deepcopy(model)
    fastlora.patch(ours, strict=True)
    exact = trainer_losses(copy.deepcopy(model).double(), data, tmp_path)
    with counted() as calls:
        actual = trainer_losses(ours, data, tmp_path)
    assert calls == (5 * 14, 0) and len(actual) == 5
    plain = trainer_losses(model, data, tmp_path)
    assert_all_close([tuple(map(losses_as_results, (actual, plain, exact)))])
    ours.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    for name, value in loaded.state_dict().items():
        if "lora_" in name:
            assert_same(value, ours.state_dict()[name])


def test_trainer_in_bf16_with_checkpointing_and_dropout(tmp_path: Path) -> None:
    model = peft_model("llama", lora_dropout=0.1)
    fastlora.patch(model, strict=True)
    with counted() as calls:
        losses = trainer_losses(model, examples(), tmp_path, bf16=True, gradient_checkpointing=True)
    assert calls.linear.call_count == 2 * 5 * 14 and losses[-1] < losses[0]


def tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


@pytest.mark.parametrize("given", ["patched", "registered"])
def test_trl_sfttrainer(given: str, tmp_path: Path) -> None:
    """TRL trains a patched PEFT model, and makes a fused one itself from a registered config."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    text = [{"text": " ".join(f"w{int(i)}" for i in row["input_ids"])} for row in examples()]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
    )
    model: nn.Module = peft_model("llama")
    options = {}
    if given == "patched":
        fastlora.patch(model, strict=True)
    else:
        model, options = base_model(), {"peft_config": fastlora.register(lora_config())}
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(text),
        processing_class=tokenizer(),
        **options,
    )
    with counted() as calls:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert calls.linear.call_count >= 4 * 14 and calls.update.call_count == 0
