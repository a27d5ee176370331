"""Triton's kernels as machine code, which the compiler makes without a GPU, and what a device must have for them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seldom import SELDOM

from lora_tune.model.kernels import choice, readiness

# the extra of the tests brings it on Linux: there it may not be missing
triton = importlib.import_module("triton") if sys.platform == "linux" else pytest.importorskip("triton")


@pytest.fixture
def fresh_readiness() -> Iterator[None]:
    readiness.why_not.cache_clear()
    yield
    readiness.why_not.cache_clear()


@pytest.mark.usefixtures("fresh_readiness")
def test_reasons_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(readiness, "_tried", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert readiness.why_not("gated", device, torch.float16) == ""
    assert readiness.why_not("gated", device, torch.bfloat16) == "it needs compute capability 8.0, got 7.5"
    readiness.why_not.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in readiness.why_not("gated", device, torch.float16)
    readiness.why_not.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert readiness.why_not("gated", device, torch.float16) == "triton is not installed"


def test_a_cpu_asks_nothing_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_not", None)
    x, table = torch.ones(2, 4), torch.ones(1, 2, 4)
    assert choice.gated(x, x).shape == choice.gated_backward(x.clone(), x, x)[0].shape == x.shape
    normal, scale = choice.rms_norm(x, x[0], 1e-6)
    assert choice.rms_norm_backward(normal, x, x[0], scale).shape == x.shape
    choice.rope(torch.ones(1, 3, 2, 4), table, table)
    assert choice.loss_tile(x.clone(), torch.tensor([0, 3])).shape == (2,)


class Recorder:
    """Stands where a kernel is and keeps what it is started with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.started = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.started.append((grid, args, options))


LAUNCHES = ("dequantize", "gated", "gelu", "norm", "short norm", "rope", "loss", "capped loss")


def launch(name: str, dtype: torch.dtype) -> list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """The kernels and the arguments of a call over the shapes of an 8B model."""
    from types import SimpleNamespace

    from lora_tune.model.kernels import triton_dequantize, triton_gated, triton_loss, triton_norm, triton_rope

    def of(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    modules = (triton_dequantize, triton_gated, triton_loss, triton_norm, triton_rope)
    with pytest.MonkeyPatch.context() as patch:
        recorders = []
        for module in modules:
            for key, kernel in list(vars(module).items()):
                if isinstance(kernel, triton.JITFunction):
                    recorders.append(Recorder(kernel))
                    patch.setattr(module, key, recorders[-1])
        if name == "dequantize":
            nested = SimpleNamespace(
                absmax=of(64, dtype=torch.float32), code=of(256, dtype=torch.float32), blocksize=256
            )
            state = SimpleNamespace(
                absmax=of(16384, dtype=torch.uint8), code=of(16, dtype=torch.float32), dtype=dtype, blocksize=64,
                offset=of(1, dtype=torch.float32)[0], state2=nested,
            )  # fmt: skip
            triton_dequantize.dequantize(of(524288, dtype=torch.uint8), state, of(1048576))
        elif name in ("gated", "gelu"):
            activation = "silu" if name == "gated" else "gelu_tanh"
            triton_gated.gated(of(32, 14336), of(32, 14336), activation)
            wide = of(32, 28672)
            triton_gated.gated_backward(of(32, 14336), wide[:, :14336], wide[:, 14336:], activation)
        elif name.endswith("norm"):
            x = of(32, 4096) if name == "norm" else of(1, 32, 8, 128)
            triton_norm.rms_norm(x, of(x.shape[-1]), 1e-6, 0.0)
            triton_norm.rms_norm_backward(x, x, of(x.shape[-1]), of(*x.shape[:-1], 1, dtype=torch.float32), 0.0)
        elif name == "rope":
            triton_rope.rope(of(1, 16, 32, 128).transpose(1, 2), of(1, 16, 128), of(1, 16, 128), "backward")
        else:
            triton_loss.loss_tile(of(4, 128256), of(4, dtype=torch.long), 30.0 if name == "capped loss" else 0.0, 1.0)
    return [(recorder.kernel, *started) for recorder in recorders for started in recorder.started]


def machine_code(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], *, architecture: int) -> Any:
    """What Triton compiles for a GPU that is not here, of the arguments that it would be started with."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {p.name: options.pop(p.name) for p in kernel.params if p.name in options}
    assert all(p.is_constexpr == (p.name in constants) for p in kernel.params)
    kinds = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
        torch.int64: "i64",
    }
    signature, hints = {}, {}
    for number, (parameter, value) in enumerate(zip(kernel.params, [*args, *[None] * len(constants)], strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], hints[(number,)] = "*" + kinds[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                hints[(number,)] = [["tt.divisibility", 16]]
            if isinstance(value, int) and value == 1:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(
    "architecture", [75, 90, *(pytest.param(number, marks=SELDOM) for number in (80, 89, 100, 120))]
)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_gpus_without_one(
    name: str, architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Machine code for Turing to Blackwell: no spilled registers, memory read in pieces of 16 bytes, 64-bit offsets."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = torch.bfloat16 if architecture >= 80 else torch.float16
    launches = launch(name, dtype)
    assert len(launches) == (2 if name in ("gated", "gelu", "norm", "short norm") else 1)
    for kernel, grid, args, options in launches:
        assert len(grid) == 1 and 0 < grid[0] < 2**31
        done = machine_code(kernel, args, options, architecture=architecture)
        assert done.metadata.shared <= 48 * 1024
        assert re.search(r"ld\.global[\w.]*\.v4", done.asm["ptx"]) or name == "dequantize"
        assert re.search(r"st\.global[\w.]*\.v4", done.asm["ptx"])
        if dtype == torch.bfloat16:
            assert ".rn.bf16" in done.asm["ptx"]
        if name == "dequantize":  # the order of bitsandbytes' roundings
            assert "fma" not in done.asm["ptx"]
            assert len(re.findall(r"tt\.addptr .*i64>* loc", done.asm["ttir"])) == 4  # scales, theirs, bytes, values
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(done.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([dump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:0 .*LOCAL:0", usage), usage
