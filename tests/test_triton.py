"""Triton's kernels against PyTorch: in Triton's interpreter on a CPU, and on a GPU where there is one.

The tests of numbers are marked `gpu`; `test_the_same_in_the_interpreter` makes all of them on the CPU in a process of
its own, because Triton is interpreted only where its switch was set before it was imported. What the interpreter
cannot show (that a kernel compiles, how it reads memory, in which order it rounds) is in `test_triton_code.py`.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lora_tune.model.base import is_read_wrongly
from lora_tune.model.kernels import choice, plain, readiness
from lora_tune.model.kernels.loss_tile import loss_tile

# the extra of the tests brings it on Linux: there it may not be missing
triton = importlib.import_module("triton") if sys.platform == "linux" else pytest.importorskip("triton")
DEVICE = torch.device("cpu" if readiness.INTERPRETED else "cuda")
numbers = pytest.mark.gpu if not readiness.INTERPRETED else pytest.mark.usefixtures("quick_interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the size of a result, against float64: the interpreter cuts float32 off to bfloat16 where a GPU rounds.
NEAR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def test_the_same_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 65


if readiness.INTERPRETED:
    test_the_same_in_the_interpreter.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies whole storages back to where they came from; on a CPU they never left."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be left to PyTorch fails."""
    monkeypatch.setattr(choice, "plain", None)
    monkeypatch.setattr(choice, "plain_loss", None)


def near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """As near to the exact numbers as the dtype allows, in size and one by one."""
    assert found.shape == exact.shape and not found.isnan().any()
    error, size = found.double() - exact, exact.norm().clamp_min(1e-9)
    assert float(error.norm() / size) <= NEAR[dtype]
    assert float(error.abs().max()) <= 8 * NEAR[dtype] * max(float(exact.abs().max()), 1e-9)


class Draw:
    """Random sizes and tensors of a seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.source, self.dtype = torch.Generator().manual_seed(seed), dtype

    def size(self, *sizes: int) -> int:
        return sizes[int(torch.randint(len(sizes), (1,), generator=self.source))]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.source).to(self.dtype).to(DEVICE)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64, as a leaf."""
    return tensor.detach().double().requires_grad_()


@numbers
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("seed", range(2))
def test_gated_products(seed: int, activation: Any, dtype: torch.dtype) -> None:
    draw = Draw(seed, dtype)
    rows, columns = draw.size(1, 3, 5), draw.size(1, 63, 1000, 1025, 1300)
    wide = draw.normal(rows, 2 * columns) * 3
    for gate, up in (wide.chunk(2, dim=1), (draw.normal(rows, columns) * 8, draw.normal(columns, rows).T)):
        own = (
            torch.nn.functional.silu
            if activation == "silu"
            else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
        )
        leaves, dh = (exact(gate), exact(up)), draw.normal(rows, columns)
        expected = own(leaves[0]) * leaves[1]
        expected.backward(dh.double())
        before = wide.clone()
        near(choice.gated(gate, up, activation=activation), expected.detach(), dtype)
        d_gate, d_up = choice.gated_backward(dh.clone(), gate, up, activation=activation)
        near(d_gate, leaves[0].grad, dtype)  # type: ignore[arg-type]
        near(d_up, leaves[1].grad, dtype)  # type: ignore[arg-type]
        assert torch.equal(wide, before)


@numbers
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_rms_norm(seed: int, offset: float, dtype: torch.dtype) -> None:
    draw = Draw(seed, dtype)
    columns = draw.size(7, 48, 128, 300, 1100)
    weight = draw.normal(columns) if draw.size(0, 1) else draw.normal(columns).float()
    heads = draw.normal(2, 3, 5, columns)  # as a view of another layout, and as rows
    for x in (heads.transpose(1, 2), heads.view(-1, columns) * 20):
        leaf, dy = exact(x), draw.normal(*x.shape)
        quotient = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5)
        expected = quotient * (weight.double() + offset)
        expected.backward(dy.double())
        found, scale = choice.rms_norm(x, weight, 1e-5, offset=offset)
        near(found, expected.detach(), dtype)
        near(scale, (leaf.square().mean(-1, keepdim=True) + 1e-5).rsqrt().detach(), torch.float32)
        near(choice.rms_norm_backward(dy, x, weight, scale, offset=offset), leaf.grad, dtype)  # type: ignore[arg-type]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By the definition: x cos + rotate_half(x) sin of the first R values of a head."""
    size = cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    turned = x[..., :size] * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((turned, x[..., size:]), dim=-1)


@numbers
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rope(seed: int, dtype: torch.dtype) -> None:
    draw = Draw(seed, dtype)
    batch, tokens, heads = draw.size(1, 2), draw.size(1, 3, 5), draw.size(1, 3, 37)
    size, beyond = draw.size(2, 20, 64, 128), draw.size(0, 6)
    tables = [draw.normal(draw.size(1, batch), tokens, size)]
    tables.append(draw.normal(*tables[0].shape).to(torch.float32 if draw.size(0, 1) else dtype))
    room = draw.normal(batch, tokens, heads + 1, size + beyond)  # the last head must stay as it is
    for transposed in (True, False):
        kept = room.clone() if transposed else room.transpose(1, 2).contiguous()
        x = kept[:, :, :-1].transpose(1, 2) if transposed else kept[:, :-1]
        beside = (kept[:, :, -1] if transposed else kept[:, -1]).clone()
        leaf, dy = exact(x), draw.normal(*x.shape)
        expected = rotated(leaf, *(table.double() for table in tables))
        expected.backward(dy.double())
        choice.rope(x, tables[0], tables[1])
        choice.rope(dy, tables[0], tables[1], direction="backward")
        near(x, expected.detach(), dtype)
        near(dy, leaf.grad, dtype)  # type: ignore[arg-type]
        assert torch.equal(kept[:, :, -1] if transposed else kept[:, -1], beside)


@numbers
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "multiplier"), [(0.0, 1.0), (30.0, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("vocabulary", [97, 4097])
def test_loss(vocabulary: int, softcap: float, multiplier: float, dtype: torch.dtype) -> None:
    draw = Draw(vocabulary, dtype)
    room = draw.normal(4, vocabulary + 3) * 5
    beside = room[:, vocabulary:].clone()
    logits = room[:, :vocabulary]
    targets = torch.tensor([0, vocabulary - 1, -100, 1], device=DEVICE)
    leaf = exact(logits)
    z = leaf * multiplier
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    expected.sum().backward()
    losses = choice.loss_tile(logits, targets, softcap=softcap, multiplier=multiplier)
    near(losses, expected.detach(), torch.float32)
    near(logits, leaf.grad, dtype)  # type: ignore[arg-type]
    assert torch.equal(room[:, vocabulary:], beside) and not logits[2].any() and losses[2] == 0


@numbers
@pytest.mark.usefixtures("only_triton")
def test_loss_of_odd_logits() -> None:
    """Large ones, ones that exclude a token, a whole tile of those, and what must not pass: NaN, a foreign target."""
    logits = torch.zeros(5, 9000, device=DEVICE)
    logits[0, 7], logits[1, 3], logits[2, :5000] = 3e4, float("-inf"), float("-inf")
    logits[3, 8000] = float("nan")
    targets = torch.tensor([7, 5, 8999, 1, 9000], device=DEVICE)
    expected, found = logits.clone(), logits.clone()
    reference = loss_tile(expected[:3], targets[:3])
    losses = choice.loss_tile(found, targets)
    assert torch.allclose(losses[:3], reference, atol=1e-5) and torch.allclose(found[:3], expected[:3], atol=1e-6)
    assert losses[3:].isnan().all()


# bitsandbytes' own numbers


def quantized(draw: Draw, *, kind: str, nested: bool, block: int, storage: torch.dtype) -> tuple[torch.Tensor, Any]:
    """A packed weight of a random shape, and its state."""
    from bitsandbytes.functional import quantize_4bit

    rows, columns = draw.size(2, 37, 128), draw.size(64, 254, 1024)
    if storage == torch.uint8:
        columns = draw.size(columns, 515, 192)
    return quantize_4bit(
        draw.normal(rows, columns) * 0.1,
        blocksize=block,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
    )


def refuse() -> torch.Tensor:
    """In the place of bitsandbytes."""
    raise AssertionError("Triton has a kernel for this weight")


@numbers
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("nested", [True, False], ids=["double quantized", "once"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("seed", range(3))
def test_four_bits_are_bitsandbytes_own(seed: int, kind: str, nested: bool) -> None:
    """Bit for bit in float32 and float16; in bfloat16 on a GPU (the interpreter cuts off: one unit at most)."""
    from bitsandbytes.functional import dequantize_4bit

    draw = Draw(seed, DTYPES[seed % 3])
    for block, storage in ((64, torch.uint8), (64, DTYPES[seed]), ((128, 4096)[seed % 2], torch.uint8)):
        packed, state = quantized(draw, kind=kind, nested=nested, block=block, storage=storage)
        whole = plain.dequantize(packed, state, state.dtype)
        if DEVICE.type == "cuda" or not is_read_wrongly(state.shape[1], block):
            assert torch.equal(whole, dequantize_4bit(packed, state))
        for dtype in DTYPES:
            found, expected = choice.dequantize(packed, state, dtype, otherwise=refuse), whole.to(dtype)
            if readiness.INTERPRETED and torch.bfloat16 in (dtype, state.dtype):
                assert ((found.double() - expected.double()).abs() <= 2**-7 * expected.double().abs()).all()
            else:
                assert torch.equal(found, expected)


@numbers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_share_one_buffer_and_stale_ones_raise() -> None:
    draw = Draw(0, torch.float32)
    weights = [quantized(draw, kind="nf4", nested=True, block=64, storage=torch.uint8) for _ in range(4)]
    choice.free_buffers()
    largest = max(weights, key=lambda weight: weight[1].shape.numel())
    place = choice.dequantize(*largest, torch.float32, otherwise=refuse).data_ptr()
    assert {choice.dequantize(*weight, torch.float32, otherwise=refuse).data_ptr() for weight in weights} == {place}
    other = choice.dequantize(*largest, torch.float16, otherwise=refuse)
    assert other.data_ptr() != place
    x = torch.ones(1, largest[1].shape[1], device=DEVICE, requires_grad=True)
    y = x @ choice.dequantize(*largest, torch.float32, otherwise=refuse).T
    choice.dequantize(*largest, torch.float32, otherwise=refuse)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@numbers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_the_kernel_does_not_read_is_left_to_bitsandbytes() -> None:
    draw = Draw(1, torch.float32)
    weight = torch.randn(16, 128, generator=draw.source).to(DEVICE)
    from bitsandbytes.functional import quantize_4bit

    def changed(change: Callable[[torch.Tensor, Any], torch.Tensor | None]) -> str:
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        given = change(packed, state)
        answer = torch.zeros(16, 128)
        found = choice.dequantize(packed if given is None else given, state, torch.float32, otherwise=lambda: answer)
        return "bitsandbytes" if found is answer else "triton"

    def put(owner: Callable[[Any], Any], name: str, value: Callable[[Any], Any]) -> Callable[..., None]:
        return lambda _, state: setattr(owner(state), name, value(getattr(owner(state), name)))

    def own(state: Any) -> Any:
        return state

    def second(state: Any) -> Any:
        return state.state2

    assert changed(lambda packed, state: None) == "triton"
    for change in (
        lambda packed, _: packed.T,  # lying: bitsandbytes gives the transposed matrix
        lambda packed, _: packed.repeat(1, 2)[:, ::2],  # not contiguous
        lambda packed, _: packed[:-1],  # too short
        put(own, "blocksize", lambda _: 48),
        put(own, "shape", tuple),
        put(own, "absmax", lambda absmax: absmax[:-1]),
        put(own, "absmax", lambda absmax: absmax.float()),
        put(own, "offset", lambda _: None),
        put(own, "dtype", lambda _: torch.float64),
        put(second, "dtype", lambda _: torch.float16),
        put(second, "absmax", lambda absmax: absmax.double()),
        put(second, "code", lambda code: code[:128]),
        put(second, "state2", lambda _: second),
    ):
        assert changed(change) == "bitsandbytes"


# one training step through all of them


@numbers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_of_our_functions_over_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm, projections, rotation, gated MLP and loss over NF4, all parts by Triton and all by PyTorch."""
    from bitsandbytes.nn import Linear4bit

    from lora_tune.model.base import weight_reader
    from lora_tune.model.kernels.loss_head import Head, SummedLoss
    from lora_tune.model.kernels.projections import Frozen, GatedMlp, Projections
    from lora_tune.model.kernels.rms_norm import RmsNorm
    from lora_tune.model.kernels.rotary import Rotate

    torch.manual_seed(0)
    sizes = {"q": (64, 64), "gate": (64, 192), "up": (64, 192), "down": (192, 64)}
    layers = {name: Linear4bit(*size, bias=False, quant_type="nf4").to(DEVICE) for name, size in sizes.items()}
    frozen = {name: Frozen(weight_reader(layer), None, 0.5) for name, layer in layers.items()}  # type: ignore[arg-type]
    factors = {
        name: [torch.randn(shape, device=DEVICE).mul_(0.1).requires_grad_() for shape in ((4, size[0]), (size[1], 4))]
        for name, size in sizes.items()
    }
    head, weight = torch.nn.Linear(64, 300, bias=False).to(DEVICE).requires_grad_(False), torch.rand(64, device=DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE, requires_grad=True)
    cos, sin = (torch.randn(1, 9, 16, device=DEVICE) for _ in range(2))

    def step() -> list[torch.Tensor]:
        for leaf in (x, *(factor for pair in factors.values() for factor in pair)):
            leaf.grad = None
        normal = RmsNorm.apply(x, weight, 1e-6, 0.0)
        (q,) = Projections.apply(normal, [frozen["q"]], torch.float32, *factors["q"])
        turned = Rotate.apply(q.view(2, 9, 4, 16).transpose(1, 2), cos, sin).transpose(1, 2).reshape(2, 9, 64)
        both = [factor for name in ("gate", "up", "down") for factor in factors[name]]
        mlp = GatedMlp.apply(turned, [frozen[name] for name in ("gate", "up", "down")], torch.float32, "silu", *both)
        predicts = torch.tensor([0, 3, 5, 17], device=DEVICE)
        loss = SummedLoss.apply(x + mlp, Head(head), predicts, predicts * 7, torch.float32, "gradient")
        loss.backward()
        gradients = [leaf.grad for leaf in (x, *(factor for pair in factors.values() for factor in pair))]
        return [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]

    with monkeypatch.context() as patch:
        patch.setattr(choice, "plain", None)
        patch.setattr(choice, "plain_loss", None)
        found = step()
    monkeypatch.setattr(choice, "_takes", lambda *_, **__: False)
    expected = step()
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        near(one, other.double(), torch.float32)


# what goes wrong beside the numbers


@numbers
def test_what_the_kernels_do_not_take_is_computed_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(0, torch.float64)
    monkeypatch.setattr(choice, "_WIDEST_NORM", 8)
    gate, up = draw.normal(3, 5), draw.normal(3, 5)
    assert torch.equal(choice.gated(gate, up), plain.gated(gate, up, "silu"))
    assert choice.gated(gate[:0].float(), up[:0].float()).shape == (0, 5)  # no program can be started for nothing
    mixed = choice.gated(gate.float(), up.half())
    assert torch.equal(mixed, plain.gated(gate.float(), up.half(), "silu"))
    x, weight = draw.normal(4, 9).float(), draw.normal(9).float()
    assert torch.equal(choice.rms_norm(x, weight, 1e-6)[0], plain.rms_norm(x, weight, 1e-6, 0.0)[0])
    heads, table = draw.normal(1, 2, 3, 8).float(), draw.normal(1, 3, 8).float()
    doubled = heads[..., ::2]  # values of a head not next to each other
    expected = doubled.clone()
    choice.rope(doubled, table[..., :4].contiguous(), table[..., 4:].contiguous())
    plain.rope(expected, table[..., :4], table[..., 4:], "forward")
    assert torch.equal(doubled, expected)
    with pytest.raises(RuntimeError, match="single memory location"):
        choice.rope(heads[:, :1].expand(1, 2, 3, 8), table, table)
    logits = draw.normal(9, 4).float().T  # a vocabulary that does not lie in rows
    targets, expected = torch.tensor([0, 1, 8, -1], device=DEVICE), logits.clone()
    assert torch.equal(choice.loss_tile(logits, targets), loss_tile(expected, targets))
    assert torch.equal(logits, expected)


@numbers
def test_autograd_hears_of_what_is_written_in_place() -> None:
    heads, table = (torch.randn(shape, device=DEVICE) for shape in ((1, 2, 3, 8), (1, 3, 8)))
    leaf = heads.clone().requires_grad_()
    for write in (
        lambda kept: choice.rope(kept, table, table),
        lambda kept: choice.loss_tile(kept.view(6, 8), torch.zeros(6, dtype=torch.long, device=DEVICE)),
        lambda kept: choice.gated_backward(kept, heads, heads),
    ):
        kept = leaf.exp()
        write(kept.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()


@numbers
@pytest.mark.skipif(not readiness.INTERPRETED, reason="memory that is never touched: the interpreter reads no more")
def test_rows_that_lie_more_than_two_billion_values_apart() -> None:
    apart = 2**31 + 64
    room = torch.empty(apart + 256, dtype=torch.float16)  # 4 GiB of addresses, of which a page or two are written
    x = torch.as_strided(room, (2, 96), (apart, 1))
    x.copy_(torch.randn(2, 96, generator=torch.Generator().manual_seed(0)))
    dense, weight = x.clone(), torch.ones(96)
    assert torch.equal(choice.gated(x, x), choice.gated(dense, dense))
    assert torch.equal(choice.rms_norm(x, weight, 1e-6)[0], choice.rms_norm(dense, weight, 1e-6)[0])
    scale = torch.ones(2, 1)
    found = choice.rms_norm_backward(x, x, weight, scale)
    assert torch.equal(found, choice.rms_norm_backward(dense, dense, weight, scale))
    for shape, strides in (
        ((2, 1, 1, 96), (apart, 96, 96, 1)),
        ((1, 2, 1, 96), (96, apart, 96, 1)),
        ((1, 1, 2, 96), (96, 96, apart, 1)),
    ):
        far, tables = torch.as_strided(room, shape, strides), torch.randn(2, 1, shape[2], 96)
        close = far.clone()
        choice.rope(far, *tables)
        choice.rope(close, *tables)
        assert torch.equal(far, close)
    logits = x.clone()
    targets = torch.tensor([3, 95])
    assert torch.equal(choice.loss_tile(x, targets), choice.loss_tile(logits, targets)) and torch.equal(x, logits)


# whether a kernel is used at all


@pytest.fixture
def fresh_readiness() -> Iterator[None]:
    readiness.why_not.cache_clear()
    yield
    readiness.why_not.cache_clear()


@numbers
@pytest.mark.usefixtures("fresh_readiness")
def test_a_kernel_that_fails_or_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    gate, up = torch.randn(2, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    for check, reason in (
        (fails, "it does not run here: RuntimeError Failed to find C compiler"),
        (lambda *_: [(gate, gate), (gate, gate + 1e-3)], "it differs from PyTorch's by"),
        (lambda *_: [(gate, gate * float("nan"))], "it differs from PyTorch's by nan"),
    ):
        monkeypatch.setitem(readiness.CHECKS, "gated", check)
        readiness.why_not.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert torch.equal(choice.gated(gate, up), plain.gated(gate, up, "silu"))
        (line,) = [record.getMessage() for record in caplog.records]
        assert reason in line and line.endswith("PyTorch computes it")


@numbers
@pytest.mark.parametrize("kernel", readiness.CHECKS)
def test_kernels_are_ready_and_leave_the_random_state(kernel: str) -> None:
    def state() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE.type == "cuda" else [])]

    before = state()
    readiness.CHECKS[kernel](DEVICE, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    assert readiness.why_not(kernel, DEVICE, torch.bfloat16) == ""
