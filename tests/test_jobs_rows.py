"""Whose rows are whose: a layer of several jobs takes the requests first, or says that it cannot know."""

from __future__ import annotations

import copy

import pytest
import torch
from crews import ids
from models import base_model
from tolerance import assert_same
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import fastlora
from fastlora import Jobs

K = 12
MIXED = ["a", "b", None, "a"]


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Experts(nn.Module):
    """Each token to one of two linear layers; `chosen` says to which, or the token's first number does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        first = rows[:, 0] > 0 if self.chosen is None else self.chosen
        y = torch.zeros_like(rows)
        for layer, mine in ((self.first, first), (self.second, ~first)):
            at = mine.nonzero()[:, 0]
            y = y.index_copy(0, at, layer(rows[at]))
        return y.view_as(x)


class Flattened(nn.Module):
    """Requests times tokens, as OPT's MLP, and of each request its first token, as BERT's pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.pooler = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.wide(x.flatten(0, 1)).view_as(x)[:, 0])


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=x).logits
        return logits


def crew_of(model: nn.Module, names: str = "ab", **options: object) -> Jobs:
    jobs = Jobs(model, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name in names:
            jobs.add(name, r=2)
            for p in jobs.parameters(name):
                p.copy_(0.3 * torch.randn_like(p))
    return jobs


def assert_each_is_as_alone(model: nn.Module, jobs: Jobs, x: Tensor) -> None:
    with jobs.use(MIXED), torch.no_grad():
        found = model(x)
    for row, name in enumerate(MIXED):
        with jobs.use([name]), torch.no_grad():
            torch.testing.assert_close(found[row : row + 1], model(x[row : row + 1]))


@pytest.mark.parametrize("tokens", [4, 3, 8])
def test_tokens_first_is_refused(tokens: int) -> None:
    """As many tokens as requests, where no shape tells, and other numbers of them."""
    model = TokensFirst()
    jobs = crew_of(model)
    with jobs.use(MIXED), pytest.raises(ValueError, match=r"x: got shape .* in layer linear, wanted the batch's 4 req"):
        model(torch.randn(4, tokens, K))


def test_routed_tokens_are_refused_however_many_there_are() -> None:
    """A multiple of the requests, or exactly their number, at each expert: the layer cannot know whose they are."""
    model = Experts()
    jobs = crew_of(model)
    for chosen in (None, [True, False] * 4, [True] * 8, [True] * 4 + [False] * 4, [False] * 8):
        model.chosen = None if chosen is None else torch.tensor(chosen)
        with (
            jobs.use(MIXED),
            pytest.raises(ValueError, match=r"in layer (first|second), wanted .* that a router picked"),
        ):
            model(torch.randn(4, 2, K))


@pytest.mark.parametrize("build", [TokensFirst, Experts, Flattened])
@pytest.mark.parametrize("requests", [1, 5])
def test_a_batch_of_one_job_may_have_its_rows_in_any_order(build: type[nn.Module], requests: int) -> None:
    """They are all its own: as every layer's weight with its update merged."""
    model = build()
    merged = copy.deepcopy(model)
    jobs = crew_of(model, "a")
    for name, layer in jobs.layers.items():
        job = layer.jobs["a"]
        with torch.no_grad():
            merged.get_submodule(name).weight += job.scaling * job.lora_B.weight @ job.lora_A.weight  # type: ignore
    x = torch.randn(requests, 3, K)
    with jobs.use(["a"] * requests):
        torch.testing.assert_close(model(x), merged(x))


def test_flattened_requests_and_one_row_of_each_are_served() -> None:
    model = Flattened()
    jobs = crew_of(model)
    assert_each_is_as_alone(model, jobs, torch.randn(4, 3, K))
    with jobs.use(["a", "b", None]), pytest.raises(ValueError, match="in layer wide, wanted the batch's 3 requests"):
        model(torch.randn(4, 5, K))
    with jobs.use(["a", "b"]), pytest.raises(ValueError, match="in layer pooler, wanted the batch's 2 requests"):
        jobs.layers["pooler"](torch.randn(4, K))


def test_opt_is_served() -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    assert_each_is_as_alone(Logits(model), crew_of(model), ids(4).clamp(max=63))


def test_switch_transformers_experts_are_refused_and_its_attention_is_served() -> None:
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2,
        expert_capacity=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    jobs = crew_of(model)
    for _ in range(3):
        words = torch.randint(3, 64, (2, 6))
        with jobs.use(["a", "b"]), pytest.raises(ValueError, match=r"\.mlp\..* wanted the batch's 2 requests"):
            model(input_ids=words, decoder_input_ids=words)
    jobs.close()
    jobs = crew_of(model, target_modules=["q", "v"])
    with torch.no_grad():
        with jobs.use(["a", "b"]):
            found = model(input_ids=words, decoder_input_ids=words).logits
        for row, name in enumerate("ab"):
            mine = words[row : row + 1]
            with jobs.use([name]):
                alone = model(input_ids=mine, decoder_input_ids=mine).logits
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_more_or_fewer_rows_than_requests_are_refused() -> None:
    """A multiple too: each of a request's beams is a request."""
    model = base_model("llama")
    jobs = crew_of(model)
    for names in (["a"] * 2, ["a", "b"], ["a", "b", None], ["a", "b"] * 4):
        with jobs.use(names), pytest.raises(ValueError, match=r"x: got shape \(4, 6, 64\) in layer model.layers.0"):
            model(input_ids=ids(4))


def test_a_layer_by_itself_takes_the_requests_first() -> None:
    layer = fastlora.MultiLoRALinear(nn.Linear(K, K), K, K)
    for name in "ab":
        layer.add_job(name, r=2)
    x = torch.randn(4, K)
    with layer.use_jobs(["a", "b", "b", "a"]):
        assert_same(layer(x), layer.base_layer(x))
    for names in (["a", "b"], ["a", "b"] * 3):
        with layer.use_jobs(names), pytest.raises(ValueError, match="in layer MultiLoRALinear, wanted the batch's"):
            layer(x)
