"""LoRALinear: a torch.nn.Linear with a trained low-rank update beside its frozen weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrize import is_parametrized

from fastlora import dispatch
from fastlora.checks import check_dtype, check_finite, check_linear, check_probability, check_whole
from fastlora.functional import lora_linear

_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def own(module: Any, name: str) -> Any:
    """module.name, by way of its parameters: nn.Module's own lookup costs 0.4 µs."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _check_plain(linear: Any) -> None:
    """Raise TypeError, ValueError, with what to use instead, unless the layer is x·weightᵀ + bias of plain tensors."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: got {type(linear).__name__}, wanted a torch.nn.Linear")
    weight = linear.weight
    if type(weight) not in _PLAIN:
        raise TypeError(
            f"linear: got a {type(linear).__name__} whose weight is a {type(weight).__name__}, wanted a plain tensor; "
            "for a quantised base use PEFT's LoRA and fastlora.patch"
        )
    check_dtype("linear: weight", weight.dtype)
    kind = type(linear).__name__
    if is_parametrized(linear):
        raise ValueError(
            f"linear: got a {kind} with parametrizations, wanted none; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    if (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
    ):
        raise ValueError(
            f"linear: got a {kind} with hooks or a forward of its own, wanted none, for they would not run; "
            "remove them, and register hooks on the LoRALinear"
        )
    if type(linear).forward is not nn.Linear.forward:
        raise TypeError(
            f"linear: got a {kind}, which has a forward of its own, wanted a torch.nn.Linear's; "
            "use PEFT's LoRA, or torch.nn.Linear"
        )


class LoRALinear(nn.Module):
    """y = x·weightᵀ + bias + scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias), scaling = lora_alpha / r.

    in_features, out_features: K, N.   r: rank R ≥ 1.   lora_alpha: scaling is lora_alpha / r, or lora_alpha / √r with
    use_rslora (Kalajdzievski 2023).   lora_dropout: probability in [0, 1), on x before lora_A while training.
    bias: a frozen bias.   lora_bias: a trained bias inside the update.
    dtype: of the frozen weight; on a 16-bit weight the adapters are fp32, as PEFT makes them. `.to(dtype)` casts all.

    weight: [N, K] and bias: [N] are frozen; `lora_A.weight`: [R, K] starts uniform (Kaiming, a = √5), `lora_B.weight`:
    [N, R] at zero, so that a new layer equals its base.   Forward takes x: [..., K], returns y: [..., N] in x's dtype,
    and saves x (an alias), h (M·R fp32) and a seed.   Raises ValueError, TypeError.   (Hu et al. 2021, §4.1)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        lora_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check_whole("in_features", in_features, 0)
        out_features = check_whole("out_features", out_features, 0)
        if dtype is not None:
            check_dtype("dtype", dtype)
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(base, r, lora_alpha, lora_dropout, use_rslora, lora_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> LoRALinear:
        """A LoRALinear over an existing layer: it shares linear's weight and bias, copies nothing, and freezes them.

        Raises TypeError, ValueError for a layer that computes more than x·weightᵀ + bias, or whose weight is no plain
        floating tensor.
        """
        _check_plain(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._attach(linear, r, lora_alpha, lora_dropout, use_rslora, lora_bias=False)
        return layer.train(linear.training)

    def _attach(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, lora_bias: bool
    ) -> None:
        self.r, self.lora_alpha = check_whole("r", r, 1), lora_alpha
        self.lora_dropout = check_probability("lora_dropout", lora_dropout)
        self.scaling = check_finite("lora_alpha", lora_alpha) / (math.sqrt(self.r) if use_rslora else self.r)
        self.in_features, self.out_features = base.in_features, base.out_features
        base.requires_grad_(False)
        self.weight = base.weight  # type: ignore[assignment]  # torch declares it a Tensor
        self.bias = base.bias
        adapter: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            adapter["dtype"] = torch.float32
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False, **adapter)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=lora_bias, **adapter)
        self.reset_lora_parameters()
        self._frozen: tuple[nn.Parameter, nn.Parameter | None] | None = None  # the base while merged

    def reset_lora_parameters(self) -> None:
        """lora_A Kaiming-uniform with a = √5 (PEFT's and loralib's start), lora_B and lora_bias zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    @property
    def merged(self) -> bool:
        """Whether weight holds the update at the moment, so that forward is the plain linear layer."""
        return self._frozen is not None

    @torch.no_grad()
    def merge(self) -> None:
        """weight ← weight + scaling·lora_B·lora_A, as a new tensor; the frozen one is kept for `unmerge`.

        Computed in fp32 and rounded once. Other layers that share the frozen weight do not see the merge; the state
        dict is the same merged or not.
        Raises RuntimeError when already merged, ValueError when there is a lora_bias and no bias to merge it into.
        """
        if self.merged:
            raise RuntimeError("merge: the layer is merged already; unmerge() first")
        if self.lora_B.bias is not None and self.bias is None:
            raise ValueError("merge: the layer has a lora_bias and no bias to merge it into")
        self._frozen = self.weight, self.bias
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide) * self.scaling
        self.weight = nn.Parameter((self.weight.to(wide) + delta).to(self.weight.dtype), requires_grad=False)
        if self.bias is not None and self.lora_B.bias is not None:
            shifted = self.bias.to(wide) + self.scaling * self.lora_B.bias.to(wide)
            self.bias = nn.Parameter(shifted.to(self.bias.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """weight ← the frozen weight from before `merge`, bit for bit.   Raises RuntimeError when not merged."""
        if self._frozen is None:
            raise RuntimeError("unmerge: the layer is not merged; merge() first")
        (weight, bias), like = self._frozen, self.weight
        self._frozen = None
        if weight.device != like.device or weight.dtype != like.dtype:  # the layer was moved while merged
            weight = nn.Parameter(weight.detach().to(like), weight.requires_grad)
            bias = None if bias is None else nn.Parameter(bias.detach().to(like), bias.requires_grad)
        self.weight, self.bias = weight, bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._frozen is not None:
            for name, t in zip(("weight", "bias"), self._frozen, strict=True):
                if t is not None:
                    destination[prefix + name] = t if keep_vars else t.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError("load_state_dict: the layer is merged; unmerge() first")
        super()._load_from_state_dict(*args, **kwargs)

    def decide(self, x: Tensor) -> dispatch.Decision:
        """Which path forward would take for x, and why.   Raises as forward does."""
        if self.merged:
            return dispatch.Decision("torch", None, None, "merged: the plain linear layer")
        A, B, drops = self.lora_A.weight, self.lora_B.weight, self.training and self.lora_dropout > 0
        autocast = check_linear(x, self.weight, self.bias, A, B, self.scaling, self.lora_dropout, self.lora_B.bias)
        return dispatch.decide(x, self.out_features, self.r, dtype=autocast, drops=drops)

    def forward(self, x: Tensor) -> Tensor:
        if self._frozen is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        lora_A, lora_B = self._modules["lora_A"], self._modules["lora_B"]
        return lora_linear(
            x,
            own(self, "weight"),
            own(self, "bias"),
            own(lora_A, "weight"),
            own(lora_B, "weight"),
            self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            lora_bias=own(lora_B, "bias"),
        )

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"]
        parts.append(f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, bias={self.bias is not None}")
        return ", ".join(parts + (["merged"] if self.merged else []))
