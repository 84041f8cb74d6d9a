"""Fused convolutions: the same answers in fewer calls, and the plain ones wherever they could differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from tiny_cnn import BLOCKS, CHAINS, PARTIAL, images, noisy
from torch import Tensor, nn

from acmize import convs, fusion, ops, products, samples
from acmize.bench import same_products
from acmize.chain_runs import FusedRuns
from acmize.cost import count_macs
from acmize.fusion import Fused, fuse_
from acmize.gates import choosing, full_width, gates_of, set_dial
from acmize.hosts import make_plan
from acmize.insert import convert_
from acmize.kept import Kept
from acmize.methods.cosine_gate import CosineGateConfig
from acmize.methods.lag import LagConfig
from acmize.recording import record

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="PyTorch has no oneDNN here")
HOSTS = {**BLOCKS, **CHAINS, **PARTIAL}
WITHOUT = {"convnext", "convnext conv_mlp", "vgg without norms"}  # no BatchNorm: left as they are


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs of every fused convolution."""
    seen: list[Tensor] = []
    whole = convs.FusedConv.__call__

    def call(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        seen.append(x)
        return whole(self, x, residual)

    monkeypatch.setattr(convs.FusedConv, "__call__", call)
    return seen


@pytest.fixture(scope="module")
def resnet() -> Any:
    return noisy(timm.create_model("acmize_resnet20_cifar"))


def fused(dense: nn.Module) -> Any:
    return fuse_(copy.deepcopy(dense))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1.0, b.std().item()))


# --- the same answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_every_host_answers_as_before(name: str, calls: list[Tensor]) -> None:
    dense = HOSTS[name]()
    model, x = fused(dense), images(5)
    expected = dense(x)
    assert isinstance(model, type(dense))
    assert list(model.state_dict()) == list(dense.state_dict())
    close(model(x), expected)
    assert (name in WITHOUT) == (not calls)
    close(torch.cat([model(one) for one in x.split(1)]), expected)
    close(model(images(5, size=48)), dense(images(5, size=48)))
    with ops.use_backend("masked"):
        assert torch.equal(model(x), expected), "the plain forward, to the last bit"


@torch.no_grad()
def test_norms_sums_and_activations_are_taken_in(resnet: Any, calls: list[Tensor]) -> None:
    model = fused(resnet)
    model(images(1))
    assert len(calls) == 19
    assert isinstance(model, Fused)
    program = model._fused.kept._value.__self__.code
    assert "batch_norm" not in program
    assert program.count("acmize_fusion_step_") == 19 + 2 + 1, "convolutions, shortcuts that pad, the classifier"


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(), None])
@pytest.mark.parametrize("residual", [None, (3, 8, 5, 5), (3, 8, 1, 1)])
@torch.no_grad()
def test_a_convolution_with_its_tail(act: Any, residual: Any) -> None:
    torch.manual_seed(0)
    conv: Any = Conv2dSame(6, 8, 3, stride=2)
    x = torch.randn(3, 6, 9, 9)
    norm: Any = noisy(nn.Sequential(nn.BatchNorm2d(8)))[0]
    extra = None if residual is None else torch.randn(residual)
    tail = convs.Tail(norm, act)
    weight, bias = convs.folded(conv.weight, conv.bias, *convs.scale_and_shift(norm))
    geometry = convs.Geometry.of(conv)
    assert geometry is not None
    for size in (9, 8):  # padded alike on both sides, and not
        y = conv(x[:, :, :size, :size])
        expected = tail.plain(y, None if extra is None else extra[..., : y.shape[2], : y.shape[3]])
        mine = None if extra is None else extra[..., : y.shape[2], : y.shape[3]]
        found = convs.FusedConv(weight, bias, geometry, act)(x[:, :, :size, :size], mine)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    by_hand = norm(conv(x)) + (0 if extra is None else extra)
    torch.testing.assert_close(tail.plain(conv(x), extra), by_hand if act is None else act(by_hand))


# --- what is not sound is not done ----------------------------------------------------------------------------


class Odd(nn.Module):
    """What a tracer must see: a `forward` of one's own over two convolutions with norms."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _both_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def _written_before_it_runs(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    y = m.conv2(h)
    h.mul_(2.0)
    return m.norm2(y) + h


def _shortcut_from_behind(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.conv(x)))
    shortcut = h * 2
    shortcut += m.norm2(m.conv2(h))
    return shortcut + h


def _shortcut_is_written_to(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.conv(x)))
    same = h
    h += m.norm2(m.conv2(h.clone()))
    return same + h


def _viewed(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.norm(m.conv(x)))
    return y.view(len(y), -1)


def _called_twice(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.conv(x)))
    return m.norm2(m.conv2(m.norm2(m.conv2(h))))


def _a_list(m: Any, x: Tensor) -> list[Tensor]:
    h = m.act(m.norm(m.conv(x)))
    return [h, m.norm2(m.conv2(h))]


def _broadcast(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.conv(x)))
    return m.act(m.norm2(m.conv2(h)) + h.mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "run",
    [_both_read, _written_before_it_runs, _shortcut_from_behind, _shortcut_is_written_to, _viewed, _called_twice,
     _a_list, _broadcast],
)  # fmt: skip
@torch.no_grad()
def test_odd_models(run: Any) -> None:
    torch.manual_seed(0)
    dense = noisy(Odd(run))
    expected, found = dense(images(9, size=8)), fused(dense)(images(9, size=8))
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@torch.no_grad()
def test_what_cannot_be_traced_is_left_and_its_children_are_fused(calls: list[Tensor]) -> None:
    class Free(Odd):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.norm(self.conv(x)))
            return h if h.sum() > 1e9 else self.inner(h)  # pyright: ignore

    torch.manual_seed(0)
    dense: Any = Free(_viewed)
    dense.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    dense = noisy(dense)
    model = fused(dense)
    assert not isinstance(model, Fused)
    assert isinstance(model.inner, Fused)
    close(model(images(2)), dense(images(2)))
    assert len(calls) == 1


def test_the_plain_forward_runs_where_a_fused_one_could_differ(resnet: Any, calls: list[Tensor]) -> None:
    model, x = fused(resnet), images(2)
    model(x).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not calls
        model(x)
        assert len(calls) == 19
        calls.clear()
        model.train()
        model(x)
        model.eval()
        model.bn1.train()
        model(x)
        model.bn1.eval()
        seen: list[str] = []
        handle = model.layer1[0].bn1.register_forward_hook(lambda *_: seen.append("hook"))
        model(x)
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.double()(x.double())
        model.float()
        assert not calls
        assert seen == ["hook"]
        model(x)
        assert len(calls) == 19


@torch.no_grad()
def test_changes_are_followed(resnet: Any) -> None:
    model, x = fused(resnet), images(2)
    other = noisy(timm.create_model("acmize_resnet20_cifar"))
    seen = [model(x)]
    for change in (
        lambda m: m.conv1.weight.mul_(1.5),
        lambda m: m.bn1.running_mean.add_(1.0),
        lambda m: setattr(m.layer1[0].conv2, "weight", nn.Parameter(m.layer1[0].conv2.weight + 0.1)),
        lambda m: setattr(m.layer1[1], "act1", nn.SiLU()),
        lambda m: setattr(m, "linear", nn.Linear(64, 10)),
        lambda m: setattr(m, "layer2", nn.Sequential(*m.layer2[:2])),
        lambda m: setattr(m, "layer3", other.layer3),
        lambda m: m.load_state_dict(other.state_dict(), strict=False),
    ):
        change(model)
        found = model(x)
        with ops.use_backend("masked"):
            close(found, model(x))
        assert not torch.allclose(found, seen[-1])
        seen.append(found)
    again = copy.deepcopy(model)
    again.conv1.weight.mul_(3.0)
    close(model(x), seen[-1])
    assert not torch.allclose(again(x), seen[-1])


def test_kept_follows_its_sources() -> None:
    layer, made = nn.Linear(2, 2), []
    kept: Kept[int] = Kept()

    def get() -> int:
        return kept.get(lambda: [layer], lambda: made.append(1) or len(made))

    assert (get(), get()) == (1, 1)
    with torch.no_grad():
        layer.weight.add_(1)
    assert (get(), get()) == (2, 2)
    layer.bias = None  # pyright: ignore[reportAttributeAccessIssue]
    assert (get(), get()) == (3, 3)
    layer.double()
    assert (get(), get()) == (4, 4)
    assert copy.deepcopy(kept)._state is None


# --- batches --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_more_samples_at_once_than_caches_hold(
    resnet: Any, calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "CHUNK", 8 * 16 * 32 * 32 * 4)
    model, x = same_products(resnet), images(21)
    close(model(x), resnet(x))
    assert {len(c) for c in calls} == {1, 5, 8}, "one to measure, then eight at once"
    plan = make_plan(resnet, CosineGateConfig(gate_hidden=4), example=(images(1),))
    adaptive: Any = convert_(copy.deepcopy(resnet), plan)
    with record(adaptive, len(x)) as seen:
        adaptive(x)
    assert seen.executed().shape == (21,), "who records sees the whole batch"
    alone = [adaptive(one) for one in x.split(1)]
    close(adaptive(x), torch.cat(alone))


@torch.no_grad()
def test_work_is_counted_as_before(resnet: Any, calls: list[Tensor]) -> None:
    assert count_macs(fused(resnet), images(1)) == count_macs(resnet, images(1)) == 40_551_040
    assert not calls, "who counts by module sees every module"
    plan = make_plan(resnet, LAG, example=(images(1),))
    model = convert_(copy.deepcopy(resnet), plan)
    with choosing(model, full_width):
        assert count_macs(model, images(1)) == 40_551_040
    assert len(calls) == 18


# --- LAG ------------------------------------------------------------------------------------------------------

LAG = LagConfig(num_learners=4, gate_hidden=2)
CONVS = [name for name in CHAINS if "convnext" not in name]


def adaptive(name: str) -> Any:
    dense = CHAINS[name]()
    return convert_(dense, make_plan(dense, LAG, example=(images(1),))).eval()


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("way", ["apart", "together"])
@torch.no_grad()
def test_both_ways_to_run_a_batch(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, ran = adaptive(name), images(13), []
    monkeypatch.setattr("acmize.chain_runs.GROUP_MACS", 0 if way == "apart" else 10**12)
    monkeypatch.setattr("acmize.chain_runs.MOVE_MACS", 0)
    monkeypatch.setattr("acmize.chain_runs.LANES", 1)
    whole = FusedRuns.together
    monkeypatch.setattr(FusedRuns, "together", lambda *args: ran.append(1) or whole(*args))
    chosen = torch.arange(13) % 5
    for gate in gates_of(model):
        gate.choose = lambda g, _x: chosen.clamp_min(g.min_choice)[:, None]
    found = model(x)
    with ops.use_backend("masked"):
        close(found, model(x))
    assert found.std(0).max() > 0
    assert bool(ran) == (way == "together" and name != "resnet bottleneck"), "its middle layer has biases of its own"
    for gate in gates_of(model):
        gate.choose = lambda g, x: torch.full((len(x), 1), g.min_choice)
    found = model(x[:1])
    with ops.use_backend("masked"):
        close(found, model(x[:1]))


@torch.no_grad()
def test_the_quick_choice_is_the_gates() -> None:
    model = adaptive("resnet basic")
    (gate, *_), chosen = gates_of(model), set()
    x = torch.randn(40, gate.fc1.in_features)  # pyright: ignore
    gate.fc2.bias.copy_(torch.tensor([3.0, 1.0, -1.0, -3.0]))  # pyright: ignore
    for least in (0, 1):
        gate.min_choice = least
        for dial in (0.0, *(d / 100 for d in range(30, 80, 2)), 1.0):
            set_dial(model, dial)
            for row, choice in zip(x.split(1), gate(x).choice[:, 0].tolist(), strict=True):
                assert gate.pick(row) == choice
                chosen.add(choice)
    assert chosen == {0, 1, 2, 3, 4}


@torch.no_grad()
def test_who_chooses_is_asked_for_one_sample_too() -> None:
    model, x = adaptive("resnet basic"), images(1)
    with choosing(model, full_width):
        full = model(x)
    with choosing(model, lambda g, x: torch.full((len(x), 1), g.min_choice)):
        assert not torch.allclose(model(x), full)
    assert fusion.fuse_(model) is model, "fused twice is fused once"
