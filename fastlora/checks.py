"""What comes in is checked before anything is written: one comparison chain when all is well, words when it is not."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, nn
from torch._C import _are_functorch_transforms_active as transformed
from torch.autograd import forward_ad

from fastlora.reference import ACTIVATIONS, Projection

_PLAIN = {Tensor, nn.Parameter}
FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_REAL: tuple[Any, ...] = (int, float, Real)
"""NumPy's numbers too; the builtin ones first, for the abstract class takes longer to ask."""
_WHOLE: tuple[Any, ...] = (int, Integral)
_OPTIONAL = {"bias", "lora_bias", "source"}


def _tensors(**named: Tensor | None) -> None:
    """Every argument is a floating tensor, all on one device; of them only `_OPTIONAL` may be None."""
    first: tuple[str, torch.device] | None = None
    for name, t in named.items():
        if t is None and name in _OPTIONAL:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor")
        if t.dtype not in FLOATS:
            check_dtype(name, t.dtype)
        if first is None:
            first = name, t.device
        elif t.device != first[1]:
            raise ValueError(f"{name}: got device {t.device}, wanted {first[1]}, where {first[0]} is")


def check_dtype(name: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {dtype}, wanted a floating dtype (bf16, fp16, fp32, fp64)")


def _shape(name: str, t: Tensor | None, wanted: tuple[int, ...], meaning: str) -> None:
    if t is not None and tuple(t.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {wanted}: {meaning}")


def check_finite(name: str, value: Any) -> float:
    """The value as a float.   Raises TypeError, ValueError unless it is a finite number, NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a whole number that no float holds, wanted a finite number") from None
    if not abs(number) < math.inf:  # NaN fails too; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return number


def check_probability(name: str, value: Any) -> float:
    """The value as a float.   Raises TypeError, ValueError unless it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, wanted a probability in [0, 1)")
    return float(value)


def check_whole(name: str, value: Any, least: int) -> int:
    """The value as an int.   Raises ValueError unless it is a whole number ≥ least, NumPy's too."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name}: got {value!r}, wanted a whole number ≥ {least}")
    return number


def check_numbers(scaling: float | Tensor, dropout_p: float) -> None:
    """scaling: a finite number or a 0-d tensor (whose value is not read: that would sync).   dropout_p: in [0, 1)."""
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.dim() > 1:
            raise ValueError(f"scaling: got a tensor of shape {tuple(scaling.shape)}, wanted a number or a 0-d tensor")
        if scaling.dtype == torch.bool or scaling.is_complex():
            raise TypeError(
                f"scaling: got a tensor of dtype {scaling.dtype}, wanted a real number or a 0-d tensor of one"
            )
    elif type(scaling) is not float or not -math.inf < scaling < math.inf:
        check_finite("scaling", scaling)
    if type(dropout_p) is not float or not 0 <= dropout_p < 1:
        check_probability("dropout_p", dropout_p)


def _scaling_here(scaling: float | Tensor, x: Tensor) -> None:
    """A scaling in a tensor is where x is, or 0-d on the host, as torch takes it everywhere."""
    if isinstance(scaling, Tensor) and scaling.device != x.device and (scaling.dim() or not scaling.is_cpu):
        raise ValueError(f"scaling: got device {scaling.device}, wanted {x.device}, where x is")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None when it is off, or x is fp64, which autocast leaves alone.

    The meta device has no autocast, and torch does not let one ask.
    Raises RuntimeError under torch.func's transforms and in forward-mode AD, which need a rule of their own for every
    op: without one a tangent may be lost in silence.
    """
    if transformed() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "fastlora: torch.func (grad, vmap, jvp, …) and forward-mode AD do not see through the fused ops; "
            "fastlora.reference has the same signatures in plain torch, and a layer that fastlora.patch took runs "
            "PEFT's own forward there"
        )
    if x.is_cpu:
        device = "cpu"
    elif x.is_meta:
        return None
    else:
        device = x.device.type
    if not is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _adapter(K: int, N: int, lora_A: Tensor, lora_B: Tensor, lora_bias: Tensor | None) -> None:
    """lora_A: [R, K], lora_B: [N, R], R ≥ 1, lora_bias: [N]."""
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted two dimensions")
    R = lora_A.shape[0]
    if R == 0:
        raise ValueError(f"lora_A: got rank 0 (shape {tuple(lora_A.shape)}), wanted [R, K] with R ≥ 1")
    _shape("lora_A", lora_A, (R, K), "[R, K], K the last dimension of x")
    _shape("lora_B", lora_B, (N, R), "[N, R], R the first dimension of lora_A and N the layer's out features")
    _shape("lora_bias", lora_bias, (N,), "[N], N the layer's out features")


def _dims(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x: got a 0-d tensor, wanted [..., K]")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [N, K]")


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    lora_bias: Tensor | None,
) -> torch.dtype | None:
    """Raise ValueError or TypeError, naming the argument, unless these make a LoRA layer.

    Returns the dtype that autocast wants x and weight in, None when it is off.
    """
    if (  # the usual case in 1.5 µs
        bias is None
        and lora_bias is None
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(lora_A) in _PLAIN
        and type(lora_B) in _PLAIN
        and type(scaling) is float
        and type(dropout_p) is float
        and -math.inf < scaling < math.inf
        and 0 <= dropout_p < 1
        and (dtype := x.dtype) is weight.dtype
        and dtype in FLOATS
        and lora_A.dtype in FLOATS
        and lora_B.dtype in FLOATS
        and (device := x.device) == weight.device
        and device == lora_A.device
        and device == lora_B.device
        and weight.dim() == lora_A.dim() == lora_B.dim() == 2
        and x.dim()
    ):
        (N, K), (R, width) = weight.shape, lora_A.shape
        if R and x.shape[-1] == K == width and lora_B.shape == (N, R):
            return _autocast_dtype(x)
    check_numbers(scaling, dropout_p)
    _tensors(x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias)
    _scaling_here(scaling, x)
    _dims(x, weight)
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {K}]: weight is [N, K] = {tuple(weight.shape)}")
    autocast = _autocast_dtype(x)
    if x.dtype != weight.dtype and autocast is None:
        raise TypeError(f"x: got dtype {x.dtype}, wanted weight's {weight.dtype} (autocast is off)")
    _shape("bias", bias, (N,), "[N], N the first dimension of weight")
    _adapter(K, N, lora_A, lora_B, lora_bias)
    return autocast


def one_each(p: Any, count: int) -> Any:
    """A number for all as a list; a list as it came, for the checks to look at."""
    return [p] * count if isinstance(p, _REAL) else p


def check_list(name: str, entries: Any, of: str) -> int:
    """How many entries there are.   Raises TypeError unless they can be counted."""
    try:
        return len(entries)
    except TypeError:
        raise TypeError(f"{name}: got {type(entries).__name__}, wanted a list, {of}") from None


def _lengths(lists: dict[str, Any], of: str, count: int) -> None:
    for name, entries in lists.items():
        length = check_list(name, entries, f"an entry for each of {of}")
        if length != count:
            raise ValueError(f"{name}: got {length} entries, wanted {count}, one for each of {of}")


def check_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float | Tensor],
    ps: Sequence[float],
    lora_biases: Sequence[Tensor | None],
) -> torch.dtype | None:
    """As `check_linear` for every member, those without lora_A and lora_B being plain layers; lists of one length."""
    lists = {"biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings}
    _lengths({**lists, "dropout_p": ps, "lora_biases": lora_biases}, "weights", len(weights))
    if len(weights) == 0:
        raise ValueError("weights: got an empty list, wanted one [N, K] for each member")
    autocast: torch.dtype | None = None
    members = zip(weights, biases, lora_As, lora_Bs, scalings, ps, lora_biases, strict=True)
    for i, (weight, bias, a, b, scaling, p, lora_bias) in enumerate(members):
        try:
            if (a is None) != (b is None):
                raise ValueError("lora_A and lora_B: got one of them, wanted both, or neither for a plain layer")
            if a is None or b is None:  # a plain layer: any factors that fit
                a, b = _any_factors(x, weight)
                scaling, p, lora_bias = 1.0, 0.0, None
            autocast = check_linear(x, weight, bias, a, b, scaling, p, lora_bias)
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {i}: {error}") from None
    return autocast


def _any_factors(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return x.new_empty(1, x.shape[-1]), x.new_empty(len(weight), 1)
    except (AttributeError, TypeError, IndexError):
        _tensors(x=x, weight=weight)
        _dims(x, weight)
        raise


def check_gated(x: Tensor, gate: Any, up: Any, down: Any, activation: str) -> torch.dtype | None:
    """As `check_linear` for the layers of a gated MLP, each a `Projection`: gate and up of x, down of their outputs."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {tuple(ACTIVATIONS)}")
    read = x
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(layer, Projection):
            raise TypeError(f"{name}: got {type(layer).__name__}, wanted a fastlora.functional.Projection")
        weight, bias, a, b, scaling, lora_bias, p = layer
        if name == "down" and isinstance(weight, Tensor):
            read = x.new_empty((0, gate.weight.shape[0]))
        try:
            autocast = check_group(read, [weight], [bias], [a], [b], [scaling], [p], [lora_bias])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {str(error).removeprefix('member 0: ')}") from None
        if name == "up" and weight.shape[0] != gate.weight.shape[0]:
            raise ValueError(
                f"up: weight: got shape {tuple(weight.shape)}, wanted {tuple(gate.weight.shape)}, the shape of gate's"
            )
    return autocast


def check_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    lora_bias: Tensor | None,
    source: Tensor | None = None,
) -> torch.dtype | None:
    """As `check_linear`, with a base output y: [..., N] in the place of weight and bias."""
    check_numbers(scaling, dropout_p)
    _tensors(y=y, x=x, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias, source=source)
    _scaling_here(scaling, x)
    if x.dim() == 0:
        raise ValueError("x: got a 0-d tensor, wanted [..., K]")
    _shape("y", y, (*x.shape[:-1], y.shape[-1] if y.dim() else 0), "[..., N] with the leading dimensions of x")
    _shape("source", source, tuple(x.shape), "x's")
    _adapter(x.shape[-1], y.shape[-1], lora_A, lora_B, lora_bias)
    return _autocast_dtype(x)


def check_jobs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    jobs: Sequence[int],
    dropout_p: float | Sequence[float],
    lora_biases: Sequence[Tensor | None] | None,
    salts: Tensor | None,
    update: bool = False,
) -> torch.dtype | None:
    """As `check_linear` for every job, lists of one length, and a mapping that fits x.

    update: weight is a base output, as in `check_update`.
    """
    count = check_list("lora_As", lora_As, "one [R, K] for each job")
    if count == 0:
        raise ValueError("lora_As: got an empty list, wanted one [R, K] for each job")
    ps = one_each(dropout_p, count)
    lists = {"lora_Bs": lora_Bs, "scalings": scalings, "dropout_p": ps}
    _lengths(lists if lora_biases is None else {**lists, "lora_biases": lora_biases}, "lora_As", count)
    for name, t in (("x", x), ("weight", weight), ("lora_As", lora_As[0]), ("lora_Bs", lora_Bs[0])):
        if hasattr(t, "full_tensor"):
            raise TypeError(f"{name}: got a DTensor, wanted a whole tensor: unshard it first")
    autocast: torch.dtype | None = None
    for j, (a, b, scaling, p) in enumerate(zip(lora_As, lora_Bs, scalings, ps, strict=True)):
        lora_bias = lora_biases[j] if lora_biases is not None else None
        try:
            if isinstance(scaling, Tensor):
                raise TypeError("scaling: got a tensor, wanted a number")
            if update:
                autocast = check_update(weight, x, a, b, scaling, p, lora_bias)
            else:
                autocast = check_linear(x, weight, bias, a, b, scaling, p, lora_bias)
            for name, t, first in (("lora_A", a, lora_As[0]), ("lora_B", b, lora_Bs[0])):
                if t.dtype != first.dtype:
                    raise TypeError(f"{name}: got dtype {t.dtype}, wanted job 0's {first.dtype}")
            if lora_bias is not None and lora_bias.dtype != b.dtype:
                raise TypeError(f"lora_bias: got dtype {lora_bias.dtype}, wanted lora_B's {b.dtype}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"job {j}: {error}") from None
    if salts is not None:
        if not isinstance(salts, Tensor) or salts.dtype != torch.int64:
            came = getattr(salts, "dtype", type(salts).__name__)
            raise TypeError(f"salts: got {came}, wanted a tensor of torch.int64")
        _shape("salts", salts, (count,), "[G], one for each of lora_As")
        if salts.device != x.device:
            raise ValueError(f"salts: got device {salts.device}, wanted {x.device}, where x is")
    rows, requests = x.shape[:-1].numel(), check_list("jobs", jobs, "a job's number for each request")
    if requests == 0 or rows % requests:
        raise ValueError(f"jobs: got {requests} entries, wanted a number that divides the {rows} rows of x")
    for job in jobs:
        if not isinstance(job, _WHOLE):
            raise TypeError(f"jobs: got a {type(job).__name__} among its entries, wanted whole numbers")
    if not all(-1 <= job < count for job in jobs):
        raise ValueError(f"jobs: got {sorted(set(jobs))}, wanted numbers from −1 (the base alone) to {count - 1}")
    return autocast
