"""PEFT's layers with our forward: each class of ours is mixed in ahead of the class of PEFT's that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, is_autocast_enabled, nn
from torch.compiler import is_compiling

from fastlora import dispatch, functional
from fastlora.dispatch import Decision, env
from fastlora.modules import own
from fastlora.peft.judge import LIBRARY, PASSED_OVER, autocast_of, judge_call, librarys, path_of
from fastlora.peft.siblings import Siblings


class _Fused(nn.Module):
    """The forward of every patched layer: one fused op on a plain base, or base_layer and then one op an adapter.

    Mixed into a class of PEFT's, ahead of it in the method order, so that super().forward is PEFT's own.
    """

    _name = ""  # where it sits in the model, for messages
    _strict = False
    _siblings: Siblings | None = None  # the layers that are called with the same tensor
    _index = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, y = base(x) + Σ scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias) over the active adapters.

        x: [..., K].   Returns y: [..., N], rounded once, to the base output's dtype.
        """
        if not isinstance(self, _Fused):  # unpatched, and somebody kept this method of it
            return type(self).forward(self, x, *args, **kwargs)
        if env.disable or self._disable_adapters:
            return super().forward(x, *args, **kwargs)
        plan = judge_call(self, x, args, kwargs)
        if isinstance(plan, str):
            if not is_compiling() or env.strict or self._strict:  # a log record would break the graph
                dispatch.fell_back(self._name or type(self).__name__, plan, self._strict)
            return super().forward(x, *args, **kwargs)
        base, weight, adapters = plan
        on_torch = not is_compiling() and dispatch.backend_for(x) == "torch"
        if (
            self._siblings is not None
            and weight is not None
            and len(adapters) <= 1
            and not (on_torch and dispatch.few_rows(x))
        ):
            mine = self._siblings.run(self._index, x, plan)
            if mine is not None:
                return mine
        if weight is not None and len(adapters) == 1:
            a, b, scaling, lora_bias, p, training = adapters[0]
            bias = own(base, "bias")
            # of what may not, for the rest is as PEFT made it; with what is left on meta torch computes any numbers
            fits = x.shape[-1:] == weight.shape[1:] and x.is_cpu and weight.is_cpu and a.is_cpu and b.is_cpu
            if on_torch and fits and type(scaling) is float and not is_autocast_enabled("cpu"):
                p = p if training else 0.0
                return functional.lora_linear_on_torch(x, weight, bias, a, b, lora_bias, scaling, p)
            return functional.lora_linear(
                x, weight, bias, a, b, scaling, dropout_p=p, training=training, lora_bias=lora_bias
            )
        y = base(x)
        dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
        source = x
        if len(adapters) > 1:  # as PEFT does: their gradients to x then add up in fp32 and are rounded once
            x = x.to(torch.promote_types(x.dtype, adapters[0].a.dtype))
        for done, (a, b, scaling, lora_bias, p, training) in enumerate(adapters, 1):
            out = wide if done < len(adapters) else dtype
            y = functional.lora_update(
                y, x, a, b, scaling, dropout_p=p, training=training, lora_bias=lora_bias, dtype=out, source=source
            )
        return y

    def decide(self, x: Tensor) -> Decision:
        """Which path forward would take for x, and why."""
        path, why = path_of(self)
        plan = judge_call(self, x, (), {}) if path in ("fused", "split") else why
        if isinstance(plan, str):
            return Decision("peft", None, None, plan)
        N, R = plan.adapters[0].b.shape[0], max(adapter.a.shape[0] for adapter in plan.adapters)
        decision = dispatch.decide(
            x, N, R, dtype=autocast_of(x), drops=any(adapter.p > 0 and adapter.training for adapter in plan.adapters)
        )
        if path == "fused":
            if self._siblings is None:
                return decision
            return replace(decision, why=f"{decision.why}; {self._siblings.explain(self._index, x, plan)}")
        strategy = "split" if decision.strategy else None
        return replace(decision, strategy=strategy, tile=None, why=f"split over {why}; {decision.why}")


class FusedLinear(_Fused, lora.Linear):
    """lora.Linear, fused: over torch.nn.Linear and transformers' Conv1D."""


class FusedTorchaoLoraLinear(_Fused, TorchaoLoraLinear):
    """TorchaoLoraLinear, split: torchao's kernel, then the low-rank term."""


LIBRARY[FusedLinear] = ""
LIBRARY[FusedTorchaoLoraLinear] = "torchao"

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(_Fused, Linear8bitLt):
        """Linear8bitLt, split: bitsandbytes' kernel, then the low-rank term."""

    LIBRARY |= dict.fromkeys((Linear8bitLt, FusedLinear8bitLt), "bitsandbytes")
    PASSED_OVER.append((Linear8bitLt, "forward", librarys(Linear8bitLt, "forward")))

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(_Fused, Linear4bit):
        """Linear4bit, split: bitsandbytes' kernel, then the low-rank term."""

    LIBRARY |= dict.fromkeys((Linear4bit, FusedLinear4bit), "bitsandbytes")
    PASSED_OVER.append((Linear4bit, "forward", librarys(Linear4bit, "forward")))

FUSED: dict[type, type] = {fused.__bases__[1]: fused for fused in _Fused.__subclasses__()}
PEFT: dict[type, type] = {fused: original for original, fused in FUSED.items()}
