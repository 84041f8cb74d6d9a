"""The Triton kernels against the masked reference: interpreted where there is no GPU, on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.decision import Decision
from acmize.errors import AcmizeError
from acmize.kernels import linear, order
from acmize.layers import Contract, Expand, LowRank

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROGRAMS = "acmize.kernels.programs"
# Neither a multiple of a tile (16 when interpreted): ends of tiles, tiles wholly beyond a width, whole tiles.
BOUNDS = {"even": (0, 12, 24, 36), "uneven": (0, 3, 32, 37), "one": (0, 20)}
KINDS = ("random", "empty", "all zero", "all equal", "all full", "one token", "mixed")
D, OUT = 21, 19


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Programs are interpreted or compiled once and for all when they are imported: so only here, and not after."""
    if DEVICE.type == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, PROGRAMS, raising=False)
        yield
        sys.modules.pop(PROGRAMS, None)


def choices(kind: str, num: int) -> Tensor:
    return {
        "random": torch.randint(0, num + 1, (37,)),
        "empty": torch.zeros(0, dtype=torch.long),
        "all zero": torch.zeros(18, dtype=torch.long),
        "all equal": torch.full((18,), max(1, num - 1)),
        "all full": torch.full((18,), num),
        "one token": torch.tensor([1]),
        "mixed": torch.tensor([num, 0] * 8 + [1] * 5),
    }[kind].to(DEVICE)


def normal(*sizes: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes).to(DEVICE, dtype).requires_grad_(grad)


def kept(choice: Tensor, num: int) -> Tensor:
    return torch.arange(num, device=choice.device) < choice[:, None]


def masked_expand(x: Tensor, w: Tensor, b: Tensor | None, choice: Tensor, bounds: tuple[int, ...], h: int) -> Tensor:
    return ops.mask_units(F.linear(x, w, b), kept(choice, len(bounds) - 1), bounds, h)


def masked_contract(h: Tensor, w: Tensor, table: Tensor, choice: Tensor, bounds: tuple[int, ...], n: int) -> Tensor:
    return F.linear(ops.mask_units(h, kept(choice, len(bounds) - 1), bounds, n), w) + table[choice]


def close(found: Tensor | None, expected: Tensor | None, tolerance: float = 2e-5) -> None:
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


cases = pytest.mark.parametrize(
    ("kind", "bounds", "heads"),
    [(kind, BOUNDS["uneven"], 1) for kind in KINDS]
    + [(kind, BOUNDS["uneven"], 3) for kind in ("empty", "all zero", "one token", "mixed")]
    + [("random", BOUNDS["even"], 3), ("random", BOUNDS["one"], 1)],
)


def test_order_is_the_sorted_one() -> None:
    choice = torch.tensor([1, 3, 0, 3, 1, 2], device=DEVICE)
    found = order.order_on_device(choice, (0, 3, 32, 37))
    assert found.index.tolist() == [1, 3, 5, 0, 4, 2]  # equal choices keep their order
    assert found.widths.tolist() == [37, 37, 32, 3, 3, 0]
    assert found.choice.tolist() == choice.tolist()
    assert found.units == 37
    counts = order.tokens_of_unit(found).tolist()
    expected = ops.sort_tokens(choice[:, None], 3)[0].counts
    assert [counts[lo:hi] for lo, hi in pairwise((0, 3, 32, 37))] == [[expected[0]] * 3, [3] * 29, [2] * 5]
    assert expected == [5, 3, 2]


@cases
def test_expand(kind: str, bounds: tuple[int, ...], heads: int) -> None:
    choice = choices(kind, len(bounds) - 1)
    x, w, b = normal(len(choice), D, grad=True), normal(heads * bounds[-1], D, grad=True), None
    if kind != "mixed":
        b = normal(heads * bounds[-1], grad=True)
    leaves = [t for t in (x, w, b) if t is not None]
    found = linear.expand(x, w, b, order.order_on_device(choice, bounds), heads)
    expected = masked_expand(x, w, b, choice, bounds, heads)
    close(found, expected)
    up = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True
    ):
        close(one, other)


@cases
def test_contract(kind: str, bounds: tuple[int, ...], heads: int) -> None:
    choice = choices(kind, len(bounds) - 1)
    h, w = normal(len(choice), heads * bounds[-1], grad=True), normal(OUT, heads * bounds[-1], grad=True)
    table, residual = normal(len(bounds), OUT, grad=True), normal(len(choice), OUT, grad=True)
    leaves = [h, w, table, residual]
    found = linear.contract(h, w, table, order.order_on_device(choice, bounds), heads, residual)
    expected = masked_contract(h, w, table, choice, bounds, heads) + residual
    close(found, expected)
    up = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True
    ):
        close(one, other)


@torch.no_grad()
def test_another_choice_is_another_output() -> None:
    bounds, one, other = BOUNDS["uneven"], torch.full((5,), 2, device=DEVICE), torch.full((5,), 3, device=DEVICE)
    x, w, h, v, table = normal(5, D), normal(37, D), normal(5, 37), normal(OUT, 37), torch.zeros(4, OUT, device=DEVICE)
    orders = [order.order_on_device(choice, bounds) for choice in (one, other)]
    a, b = (linear.expand(x, w, None, o) for o in orders)
    assert (a - b).abs().max() > 0.1
    a, b = (linear.contract(h, v, table, o) for o in orders)
    assert (a - b).abs().max() > 0.1
    close(a, linear.contract(h, v, None, orders[0]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
def test_mlp(activation: str, gated: bool) -> None:
    bounds, act = BOUNDS["uneven"], linear.ACTIVATIONS[activation]
    choice = choices("mixed", 3)
    x, table, down = normal(21, D, grad=True), normal(4, D, grad=True), normal(D, 37, grad=True)
    ups = [(normal(37, D, grad=True), normal(37, grad=True)) for _ in range(1 + gated)]
    if gated:
        ups[1] = (ups[1][0], None)
    hidden = [masked_expand(x, w, b, choice, bounds, 1) for w, b in ups]
    inner = act(hidden[0]) * hidden[1] if gated else act(hidden[0])
    expected = masked_contract(inner, down, table, choice, bounds, 1) + x
    cut = order.order_on_device(choice, bounds)
    with torch.no_grad():
        close(linear.mlp(x, ups, activation, down, table, cut, x), expected, 2e-4)
        if not gated:  # an activation fused into the expansion alone
            close(linear.expand(x, *ups[0], cut, activation=activation), act(hidden[0]))
    if activation == "none":
        return
    found = linear.mlp(x, ups, activation, down, table, cut, residual=x)
    close(found, expected, 2e-4)
    leaves = [x, table, down, *(t for pair in ups for t in pair if t is not None)]
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        close(one, other, 1e-3)


@torch.no_grad()
def test_units_beyond_a_width_are_never_read() -> None:
    bounds, choice = BOUNDS["uneven"], choices("random", 3)
    beyond = ops.mask_units(torch.ones(37, 37, device=DEVICE), kept(choice, 3), bounds, 1) == 0
    h, w, table = normal(37, 37), normal(OUT, 37), normal(4, OUT)
    cut = order.order_on_device(choice, bounds)
    close(linear.contract(h.masked_fill(beyond, torch.nan), w, table, cut), linear.contract(h, w, table, cut))
    assert beyond.any()
    assert linear.contract(torch.full_like(h, torch.nan), w, table, cut).isnan().any()  # what is read does count
    for grad in linear._weight_grad(h.masked_fill(beyond, torch.nan), normal(37, D), cut, 1, False, want_sum=True):
        assert grad is not None
        assert not grad.isnan().any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts products in the interpreter")
def test_work_follows_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    done, product = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: (done.append(1), product(*args))[1])
    bounds, heads = (0, 16, 32, 48, 64), 2
    work = {}
    for k in (0, 1, 3):
        cut = order.order_on_device(torch.full((32,), k), bounds)
        x, w, v = normal(32, 16, grad=True), normal(128, 16, grad=True), normal(16, 128, grad=True)
        done.clear()
        h = linear.expand(x, w, None, cut, heads)
        forward = [len(done)]
        y = linear.contract(h, v, normal(5, 16), cut, heads)
        forward.append(len(done) - forward[0])
        done.clear()
        y.sum().backward()
        work[k] = (*forward, len(done))
    # 2 tiles of 16 tokens, 2 heads, k tiles of 16 units; two gradients for each of two layers
    assert work == {k: (4 * k, 4 * k, 16 * k) for k in (0, 1, 3)}


@torch.no_grad()
def test_a_token_does_not_depend_on_its_mates() -> None:
    bounds, choice = BOUNDS["uneven"], choices("random", 3)
    x, w, b, v, table = normal(37, D), normal(37, D), normal(37), normal(OUT, 37), normal(4, OUT)
    together = linear.mlp(x, [(w, b)], "gelu", v, table, order.order_on_device(choice, bounds))
    for i in range(0, 37, 9):
        one = order.order_on_device(choice[i : i + 1], bounds)
        close(linear.mlp(x[i : i + 1], [(w, b)], "gelu", v, table, one)[0], together[i], 1e-4)


def test_a_long_sum_over_tokens_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, choice = BOUNDS["uneven"], torch.randint(0, 4, (50,), device=DEVICE)
    monkeypatch.setattr(linear, "_SPLIT_TOKENS", 16)  # three parts, of which the last reach past narrow units' tokens
    h, z = normal(50, 2 * 37), normal(50, D)
    found, sums = linear._weight_grad(h, z, order.order_on_device(choice, bounds), 2, False, want_sum=True)
    cut = ops.mask_units(h, kept(choice, 3), bounds, 2)
    close(found, cut.T @ z, 1e-4)
    close(sums, cut.sum(0), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    bounds, choice, heads = BOUNDS["uneven"], choices("mixed", 3), 2
    tensors = [normal(21, D), normal(74, D) / 5, normal(74), normal(OUT, 74) / 10, normal(4, OUT)]
    found_leaves = [t.to(dtype).requires_grad_() for t in tensors]
    exact_leaves = [t.detach().float().requires_grad_() for t in found_leaves]  # the same numbers, summed exactly
    cut = order.order_on_device(choice, bounds)
    x, w, b, v, table = found_leaves
    found = linear.contract(linear.expand(x, w, b, cut, heads), v, table, cut, heads)
    x, w, b, v, table = exact_leaves
    expected = masked_contract(masked_expand(x, w, b, choice, bounds, heads), v, table, choice, bounds, heads)
    assert found.dtype == dtype
    tolerance = 5e-3 if dtype == torch.float16 else 4e-2
    close(found.float(), expected, tolerance)
    up = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, found_leaves, up.to(dtype)),
        torch.autograd.grad(expected, exact_leaves, up.to(dtype).float()),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == dtype
        assert (one.float() - other).norm() < tolerance * other.norm()


@pytest.mark.skipif(not torch.amp.is_autocast_available(DEVICE.type), reason="no autocast here")
def test_autocast_casts() -> None:
    choice, bounds = choices("mixed", 3), BOUNDS["uneven"]
    x, w = normal(21, D), normal(37, D, grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = linear.expand(x, w, None, order.order_on_device(choice, bounds))
    assert out.dtype == torch.bfloat16
    close(out.float(), masked_expand(x, w, None, choice, bounds, 1), 5e-2)
    out.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_rows_of_any_stride() -> None:
    choice, bounds = choices("random", 3), BOUNDS["uneven"]
    cut = order.order_on_device(choice, bounds)
    x, wide, w = normal(D, 37).T, normal(37, 2 * D), normal(D, 37).T
    close(linear.expand(x, w, None, cut), masked_expand(x, w, None, choice, bounds, 1))
    close(linear.expand(wide[:, D:], w, None, cut), masked_expand(wide[:, D:], w, None, choice, bounds, 1))


def test_what_does_not_belong_together_is_refused() -> None:
    cut, other = (order.order_on_device(torch.ones(n, dtype=torch.long, device=DEVICE), (0, 4, 8)) for n in (3, 5))
    x, w = normal(3, D), normal(8, D)
    with pytest.raises(AcmizeError, match=r"weight: found \(8, 21\), expected \(16, 21\)"):
        linear.expand(x, w, None, cut, heads=2)
    with pytest.raises(AcmizeError, match="tokens: found 3, expected 5"):
        linear.expand(x, w, None, other)
    with pytest.raises(AcmizeError, match="activation: found 'relu'"):
        linear.expand(x, w, None, cut, activation="relu")
    with pytest.raises(AcmizeError, match=r"found torch\.float64"):
        linear.expand(x.double(), w, None, cut)
    with pytest.raises(AcmizeError, match=r"residual: found \(5, 19\), expected \(3, 19\)"):
        linear.contract(normal(3, 8), normal(OUT, 8), None, cut, residual=normal(5, OUT))


def test_without_gpu_or_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.is_available(DEVICE)
    assert linear.is_available(torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not linear.is_available(torch.device("cpu"))
    with pytest.raises(AcmizeError, match="found on cpu, expected a CUDA device"):
        linear.expand(
            torch.zeros(1, D), torch.zeros(8, D), None, order.order_on_device(torch.ones(1).long(), (0, 4, 8))
        )


COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("programs", sys.argv[1])
programs = importlib.util.module_from_spec(spec)
sys.modules["programs"] = programs
spec.loader.exec_module(programs)
ints = dict.fromkeys(("index", "widths", "choice", "counts"), "*i32")
sums = {"unit_sum": "*fp32"}
halves = dict.fromkeys(("x", "w", "b", "gate_w", "gate_b", "h", "z", "table", "residual", "out"), "*bf16")
tile = {"BM": 32, "BN": 32, "BK": 32, "PRECISION": "ieee"}
for name, constants in (
    ("expand", dict(D=40, U=72, HEADS=3, HAS_BIAS=True, GATED=True, ACT="gelu", ZERO_TAIL=False, w_col=1)),
    ("contract", dict(O=40, U=72, HEADS=3, HAS_TABLE=True, HAS_RESIDUAL=True, w_row=1)),
    ("weight", dict(WIDE=40, U=72, HEADS=3, HAS_SUM=True)),
):
    program = getattr(programs, f"{name}_program").fn
    constants = constants | tile
    kinds = ints | sums | halves | dict.fromkeys(constants, "constexpr")
    if name == "weight":
        kinds["out"] = "*fp32"
    signature = {arg: kinds.get(arg, "i32") for arg in program.arg_names}
    text = triton.compile(ASTSource(program, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(name, "atom" in text or "red.global" in text, "mma" in text)
"""


def test_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does; the compiler needs no GPU."""
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    source = Path(linear.__file__).with_name("programs.py")
    done = subprocess.run([sys.executable, script, source], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [f"{name} False True" for name in ("expand", "contract", "weight")]


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Tanh()], ids=["gelu", "silu", "tanh"])
def test_mlp_of_the_package_takes_the_kernels(act: nn.Module) -> None:
    bounds, x, choice = BOUNDS["uneven"], normal(2, 5, D), torch.randint(0, 4, (2, 5)).to(DEVICE)
    ups = [(normal(37, D), normal(37)), (normal(37, D), None)]
    down, table = normal(OUT, 37), normal(4, OUT)
    with torch.no_grad():
        hidden = act(F.linear(x, *ups[0])) * F.linear(x, *ups[1])
        expected = masked_contract(hidden.flatten(0, 1), down, table, choice.flatten(), bounds, 1)
        with ops.use_backend("triton"):
            found = ops.mlp(x, ups, act, down, table, choice, bounds)
            other = ops.mlp(x, ups, act, down, table, 3 - choice, bounds)
    assert (found - other).abs().max() > 1e-2
    assert PROGRAMS in sys.modules
    close(found.flatten(0, 1), expected)


def test_layers_of_the_package_take_the_kernels() -> None:
    bounds, choice = (0, 2, 4, 6), torch.randint(0, 4, (2, 5)).to(DEVICE)
    expand, contract = Expand(D, 18, True, bounds, 3).to(DEVICE), Contract(18, OUT, bounds, 3).to(DEVICE)
    low = LowRank(D, OUT, bounds).to(DEVICE)
    x, h = normal(2, 5, D), normal(2, 5, 18)
    for layer, inputs in ((expand, x), (contract, h), (low, x)):
        with torch.no_grad():
            with ops.use_backend("masked"):
                expected, other = (layer(inputs, Decision(c)) for c in (choice, 3 - choice))
            with ops.use_backend("triton"):
                found = layer(inputs, Decision(choice))
        assert (expected - other).abs().max() > 1e-2
        close(found, expected)
