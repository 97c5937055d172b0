"""A launch that was seen before is the kernel that Triton would have found anew: on a driver that launches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NOWHERE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []


class Launcher:
    def __init__(self, *_):
        pass

    def __call__(self, *words):
        # the binary, the grid, what the kernel is given, what whoever watches is told
        launched.append((words[4], words[:3], words[9:], words[6:9]))


class Utils:
    binaries = 0

    def load_binary(self, *_):
        self.binaries += 1
        return self.binaries, self.binaries, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}


class Nowhere:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Nowhere())
import fastlora_kernels as kernels
from fastlora_kernels import Tile, device

device.arch = lambda _: "sm_90"
"""

SEEN_AGAIN = (
    NOWHERE
    + """
from fastlora_kernels.launch import Launch, aligned

own, straight = Launch.__call__, 0


def both(launch, tensors, descriptors=()):
    # what Triton finds anew, what the launch does, and what it does again when nobody may ask Triton
    global straight
    kernel = launch.kernel
    kernel[launch.grid](*descriptors, *tensors, *launch.numbers, **launch.constants, **launch.options)
    compiled = kernel.run
    own(launch, tensors, descriptors)
    kernel.run = None
    lies_well = aligned([t for each in tensors for t in (each if isinstance(each, tuple) else (each,))])
    try:
        own(launch, tensors, descriptors)
        assert lies_well
        straight += 1
    except TypeError:
        assert not lies_well
        launched.append(launched[-1])
    finally:
        kernel.run = compiled
    (binary, size, given, _), *rest = launched[-3:]
    for other in rest:
        assert other[:2] == (binary, size), (kernel, other[:2], binary, size)
        kept = len(descriptors) + len(tensors) + len(launch.numbers)
        assert len(other[2]) == len(given)
        assert all(a is b or a == b for a, b in zip(other[2][:kept], given[:kept]))


Launch.__call__ = both

from fastlora_kernels.reduce import reduce


def at(offset, *shape, dtype=torch.float32):
    flat = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)
    return flat[offset:].view(shape)


for parts, size, offset in ((2, 16, 0), (3, 16, 0), (2, 1, 0), (2, 17, 0), (2, 16, 1)):
    reduce(at(offset, parts, size), at(0, size))
reduce(at(0, 2, 16), at(0, 16, dtype=torch.bfloat16))
for M, K, offset in ((1, 48, 0), (16, 48, 0), (17, 48, 0), (17, 50, 0), (17, 48, 4)):
    kernels.shrink(at(offset, M, K), at(0, 4, K))
for scale in (1.0, 0.5, 2):
    y = at(0, 4, 24)
    kernels.add_expand(y, at(0, 4, 1), at(0, 24, 1), scale, out=y)
for dtype, N in ((torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 72)):
    x, w, b = at(0, 40, 32, dtype=dtype), at(0, N, 32, dtype=dtype), at(0, N, 1)
    for weight in (w, at(0, 32, N, dtype=dtype).t()):
        kernels.expand(x, weight, None, at(0, 40, 1), b, 0.5, config=Tile(32, 32, 32, tma=True))
print(straight, Nowhere.utils.binaries)

M, K, N, R, seed = 32, 48, 64, 16, torch.zeros([], dtype=torch.int64)
wide, half = torch.float32, torch.bfloat16
for main, adapter, other in ((half, half, half), (half, wide, half), (half, half, wide), (wide, wide, wide)):
    x, dy, h = at(0, M, K, dtype=main), at(0, M, N, dtype=main), at(0, M, R)
    a, b = at(0, R, K, dtype=adapter), at(0, N, R, dtype=other)
    bias, g = at(0, N, dtype=other), at(0, M, K, dtype=main)
    for p, drawn in ((0.0, None), (0.1, seed), (0.1, None), (0.0, seed)):
        kernels.shrink(x, a, p=p, seed=drawn)
        kernels.x_pass(x, h, adapter, p=p, seed=drawn)
        kernels.glu(g, x, "silu", a, p=p, seed=drawn)
        kernels.low_rank_dx(h, a, main, p=p, seed=drawn)
    for want_dh, want_db in ((True, True), (True, False), (False, True)):
        kernels.dy_pass(dy, h if want_db else None, b, 0.5, want_dh=want_dh, want_db=want_db)
    for lora_bias in (None, bias):
        kernels.add_expand(dy, h, b, 0.5, lora_bias)
        kernels.low_rank(h, b, 0.5, main, lora_bias)
        kernels.add_expand(dy, h, b, 0.5, lora_bias, out=at(0, M, N))
        kernels.expand(x, at(0, N, K, dtype=main), lora_bias, h, b, 0.5, lora_bias)
    kernels.glu(g, x, "silu")
    for want_z in (False, True):
        kernels.glu_backward(g, x, g, "silu", want_z=want_z)
print(straight, Nowhere.utils.binaries)

from fastlora_kernels.dropout import empty_bits
from fastlora_kernels.routing import Routes

small, bits, ps = Tile(32, 64, 64, tma=True), empty_bits(3, at(0, M, K)), (0.1, 0.0, 0.2)
seeds, x, h = torch.zeros(3, dtype=torch.int64), at(0, M, K, dtype=half), at(0, M, R)
for adapter in (half, wide):  # masks that are drawn, and left and found
    a, w, dy = at(0, R, K, dtype=adapter), at(0, N, K, dtype=half), at(0, M, N, dtype=half)
    for masks in ({"seeds": seeds}, {"seeds": seeds, "bits": bits}):
        kernels.group_x_pass(x, [h] * 3, [adapter] * 3, ps=ps, **masks)
        for config in (small, None):
            kernels.group_dx([dy] * 3, [w] * 3, [h] * 3, [a] * 3, ps=ps, **masks, config=config)
        kernels.group_low_rank_dx([h] * 3, [a] * 3, half, ps=ps, **masks)
    kernels.group_shrink(x, [a, None, a], ps=ps, seeds=seeds)
G = 4
start, rank, routes = (torch.zeros(size, dtype=torch.int32) for size in ((G,), (1, G), (M,)))
slots, routes = routes, Routes.empty(M, G, "cpu")
kernels.route(slots, routes)
for pool in (half, wide, half):  # the pool's dtype alone tells these launches apart
    low = kernels.multi_shrink(x, at(0, 1, 64, K, dtype=pool), start, rank, R, routes)
    b_pool, scaling = at(0, 64, N, dtype=pool), at(0, 1, G)
    kernels.multi_expand([at(0, M, N, dtype=half)], low, [b_pool], start, rank, scaling, rank, routes)
    tables = start, rank[0], scaling[0], rank[0]
    kernels.multi_linear(x, at(0, N, K, dtype=half), None, low[:, 0], b_pool, *tables, slots)
    kernels.multi_outer(x, h, start, start, start, scaling[0], 64, routes, pool)
print(straight, Nowhere.utils.binaries)
"""
)

WATCHED = (
    NOWHERE
    + """
from triton import knobs

runtime, x, a = knobs.runtime, torch.zeros(40, 48), torch.zeros(4, 48)


def told():
    kernels.shrink(x, a)
    record, enter, leave = launched[-1][3]
    return record is not None and (enter, leave) == (runtime.launch_enter_hook, runtime.launch_exit_hook)


def hook(record):
    pass


kernels.shrink(x, a)
said = [told()]
for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
    chain.add(hook)
    said.append(told())
    chain.remove(hook)
    said.append(told())
runtime.launch_enter_hook = hook  # as before there were chains
print(*said, told(), Nowhere.utils.binaries)
"""
)


def ours(program: str) -> str:
    """What it prints, in a process that interprets nothing."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    env["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels"), env.get("PYTHONPATH", "")))
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_seen_is_what_triton_would_find() -> None:
    """By size and alignment, dtype and number: the same binary, grid and arguments, without asking Triton again."""
    (first, few), (second, some), (third, many) = (map(int, line.split()) for line in ours(SEEN_AGAIN).splitlines())
    assert first == 19 and few >= 13
    assert second - first == 4 * (4 * 4 + 3 + 2 * 4 + 1 + 2) and some >= 60
    assert third - second == 2 * (2 * 4 + 1) + 2 + 3 * 4 and many - some >= 18


def test_whoever_watches_launches_is_told() -> None:
    """Launches seen before too, from when a hook is there until it is gone."""
    assert ours(WATCHED).split() == ["False", "True", "False", "True", "False", "True", "1"]


TRAINER_SETS = """
import torch
from fastlora_kernels.device import place

x = torch.zeros(1)
said = [place(x).precision]
torch.set_float32_matmul_precision("high")
said.append(place(x).precision)
torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch.get_float32_matmul_precision() raises from here
said.append(place(x).precision)
torch.backends.cuda.matmul.fp32_precision = "ieee"
print(*said, place(x).precision)
"""


def test_either_way_of_setting_precision_is_understood() -> None:
    assert ours(TRAINER_SETS).split() == ["highest", "high", "high", "highest"]
