"""CosineGate: what is skipped is not run, what is run is as before; CIR, its prediction, the oracle."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from short import image_folder
from tiny_cnn import BLOCKS, noisy
from torch import Tensor, nn

import acmize
from acmize import AcmizeError, Plan, Site, samples
from acmize.controls import by_name, static_width
from acmize.cost import count_macs
from acmize.damage import collect_damage
from acmize.gates import Gate, choosing, full_width, gates_of, set_dial, set_progress
from acmize.hosts import find_sites, make_plan
from acmize.hub import from_pretrained
from acmize.insert import convert_
from acmize.methods import cosine_gate
from acmize.methods.cosine_gate import ANNEAL, CosineGate, CosineGateConfig
from acmize.phases._loop import FitConfig
from acmize.phases.calibrate import Calibration
from acmize.phases.finetune import FinetuneConfig, finetune
from acmize.recipe import resolve
from acmize.recording import AdaptiveModule, record

CONFIG = CosineGateConfig(gate_hidden=4)


HOSTS = {  # blocks that can be skipped, blocks refused
    "cifar resnet": (7, 2), "resnet basic": (3, 4), "resnet bottleneck": (3, 4), "resnet se": (3, 4), "regnet": (2, 4),
    "regnet preactivation": (2, 4), "regnet silu": (2, 4), "convnext": (4, 0), "convnext conv_mlp": (4, 0),
}  # fmt: skip


def inputs(count: int = 4, seed: int = 0, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def adapted(dense: nn.Module, config: CosineGateConfig = CONFIG) -> tuple[Any, Plan]:
    plan = make_plan(dense, config, example=(inputs(1),))
    return convert_(copy.deepcopy(dense), plan).eval(), plan


def skip(gate: Gate, x: Tensor) -> Tensor:
    return torch.zeros((*x.shape[:-1], gate.groups), dtype=torch.long)


class Draw:
    """A `Choose`: each sample runs or skips by chance, the same in the same order of calls."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, gate: Gate, x: Tensor) -> Tensor:
        return torch.randint(0, 2, (*x.shape[:-1], gate.groups), generator=self.generator)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    made = noisy(timm.create_model("acmize_resnet20_cifar"))
    made.linear.weight.data.mul_(0.05)  # else its softmax is one class, and no block matters
    return made


# --- every host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_blocks_that_change_the_shape_are_refused(name: str) -> None:
    plan = make_plan(BLOCKS[name](), CONFIG, example=(inputs(1),))
    assert (len(plan.entries), len(plan.refused)) == HOSTS[name], plan.refused
    assert all("changes the shape" in r.reason for r in plan.refused)


def test_only_blocks_are_looked_for(resnet: nn.Module) -> None:
    found = find_sites(resnet, ("block",))
    assert {f.kind for f in found if isinstance(f, Site)} == {"block"}
    assert not any(isinstance(f, Site) for f in find_sites(resnet)), "ACM finds nothing in it"
    with pytest.raises(AcmizeError, match="converts no site of kind linear"):
        make_plan(resnet, CONFIG, sites=[Site.linear("linear")])


def test_a_block_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), Mine(), nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    x = inputs(3, size=8)
    plan = make_plan(dense, CONFIG, example=(x[:1],), target_modules=["1:block"])
    model: Any = convert_(copy.deepcopy(dense), plan)
    h = dense[0](x)
    with torch.no_grad(), choosing(model, skip):
        torch.testing.assert_close(model(x), dense[3](dense[2](h)))
    cir = model[1].run_with_cir(h)[1]
    torch.testing.assert_close(cir[:, 0], 1 - F.cosine_similarity(h.flatten(1), dense[1].conv(h).flatten(1)))


@pytest.mark.parametrize("gate", ["cosine", "plain", "damage"])
@torch.no_grad()
def test_the_quick_decision_is_the_gates(resnet: nn.Module, gate: Any) -> None:
    model, _ = adapted(resnet, CosineGateConfig(gate=gate, gate_hidden=4))
    for one in gates_of(model):
        one.level.normal_()  # pyright: ignore
    x = torch.rand(200, 64)
    mine: Any = model.layer3[1].gate
    dials = []
    for dial in (0.0, 0.3, 0.5, 0.55, 0.6, 1.0):
        set_dial(model, dial)
        quick = mine.margin(x)[:, 0] > 0
        assert torch.equal(quick, mine(x).choice[:, 0] > 0)
        dials.append(quick.float().mean().item())
    assert dials[0] == 1.0
    assert dials[-1] < 1.0
    mine.fc2.bias.add_(30.0)
    assert (mine.margin(x) > 0).all(), "the folded weights must follow the parameters"


# --- CIR, training --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cir_is_that_of_the_branch(resnet: Any) -> None:
    model, _ = adapted(resnet)
    x = torch.rand(4, 16, 32, 32)
    block, mine = resnet.layer1[1], model.layer1[1]
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    y, cir = mine.run_with_cir(x)
    torch.testing.assert_close(cir[:, 0], 1 - F.cosine_similarity(x.flatten(1), branch.flatten(1)))
    assert cir.std() > 0
    torch.testing.assert_close(y, F.relu(x + branch))


def test_the_gate_goes_from_the_true_to_the_predicted_cir(resnet: Any) -> None:
    model, _ = adapted(resnet)
    gate: Any = model.layer1[1].gate
    assert isinstance(gate, CosineGate)
    pooled, cir = torch.rand(5, 16), torch.rand(5, 1)
    predicted = gate.log_damage(pooled)
    gate.known_cir = cir
    seen = []
    for share in (0.0, ANNEAL / 2, ANNEAL, 1.0):
        set_progress(model, share)
        seen.append(gate.log_damage(pooled))
    assert not torch.allclose(seen[0], predicted)
    torch.testing.assert_close(seen[0], predicted + (cir - gate.predicted_cir(pooled))[..., None])  # scale 1 at first
    torch.testing.assert_close(seen[1], (seen[0] + predicted) / 2)
    torch.testing.assert_close(seen[2], predicted)
    torch.testing.assert_close(seen[3], predicted)


@torch.no_grad()
def test_the_oracle_reads_cir_and_saves_nothing(resnet: nn.Module) -> None:
    model, plan = adapted(resnet, CosineGateConfig(mode="oracle", gate_hidden=4))
    x = inputs(6)
    torch.testing.assert_close(model(x), resnet(x), rtol=0, atol=1e-4)
    with choosing(model, Draw(1)), record(model, len(x), keep_inputs=True) as seen:
        model(x)
    module, gate_input, _ = seen.seen[2]
    _, cir = module.run_with_cir(torch.rand(6, 16, 32, 32))  # pyright: ignore
    assert gate_input.shape == (6, 17)
    assert cir.shape == (6, 1)
    whole = sum(e.max_macs for e in plan.entries)
    assert bool((seen.chosen() < whole).all())
    torch.testing.assert_close(seen.executed(), torch.full((6,), float(whole)))
    with choosing(model, skip):
        assert count_macs(model, x[:1]) == plan.macs_dense, "everything is run"


def test_damage_is_the_squared_first_order_change(resnet: Any) -> None:
    """Against the gradient at the block's output, taken by hand."""
    model, _ = adapted(resnet)
    x, site = inputs(3), "layer3.2"
    seen: list[Tensor] = []

    def keep_output(_m: nn.Module, _a: Any, y: Tensor) -> Tensor:
        seen[:] = [y]
        y.retain_grad()
        return y

    mine = model.get_submodule(site)
    found = collect_damage(model, resnet, [x], choose=full_width, generator=torch.Generator().manual_seed(0), draws=1)
    rows = found[mine.gate]
    assert rows.x.shape == (3, 64), "one row a sample, none thrown away"
    drawn = torch.multinomial(resnet(x).softmax(-1), 1, replacement=True, generator=torch.Generator().manual_seed(0))
    handle = resnet.get_submodule(site).register_forward_hook(keep_output)
    taken: list[Tensor] = []
    pre = resnet.get_submodule(site).register_forward_pre_hook(lambda _m, args: taken.append(args[0].detach()))
    F.cross_entropy(resnet(x), drawn[:, 0], reduction="sum").backward()
    handle.remove()
    pre.remove()
    change = (seen[0].grad * (seen[0] - taken[0].relu())).flatten(1).sum(1).square()  # pyright: ignore
    assert change.max() > 0
    torch.testing.assert_close(rows.damage.flatten().sort()[0], change.detach().sort()[0], rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(
    ("gate", "batch_norm"), [("cosine", False), ("plain", False), ("damage", False), ("cosine", True)]
)
def test_training_moves_gates_and_statistics_where_asked(resnet: nn.Module, gate: Any, batch_norm: bool) -> None:
    model, plan = adapted(resnet, CosineGateConfig(gate=gate, gate_hidden=4))
    first: Any = model.layer1[0]
    with torch.no_grad():
        middle = first.gate.log_damage(model.act1(model.bn1(model.conv1(inputs(8)))).mean((2, 3))).median()
    price = (middle.exp() / first.gate.cost[0, -1]).item()  # at which some samples run a block and others skip it
    dial = next(d / 100 for d in range(101) if gates_of(model)[0].price_at(d / 100) > price)
    batches = [(inputs(8, seed), torch.arange(8) % 10) for seed in range(3)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = FinetuneConfig(features=0.0, entropy=0.0, diversity=0.0, budget=1.0, budgets=(0.7, 0.7))
    history = finetune(
        model, resnet, plan, Calibration(budgets=(0.7,), dials=(dial,)), lambda _: batches, steps_per_epoch=3,
        losses=losses, config=FitConfig(epochs=1, lr=1e-3, log_every=1), gates={"lr": 1e-2, "weight_decay": 0.0},
        batch_norm=batch_norm,
    )  # fmt: skip
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(".gate.fc1.weight" in k for k in changed)
    assert any(".block.conv1.weight" in k for k in changed)
    statistics = {k for k in before if "running" in k}
    assert changed & statistics == (statistics if batch_norm else set())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert ("cir" in history.last) == (gate == "cosine")
    assert not any(g.progress < 1 for g in gates_of(model))


# --- the whole way --------------------------------------------------------------------------------------------


def test_the_command_line(run_command: Any, tmp_path: Any) -> None:
    weights, config, data = tmp_path / "w.safetensors", tmp_path / "c.yaml", image_folder(tmp_path / "digits")
    save_file(noisy(timm.create_model("acmize_resnet20_cifar")).state_dict(), weights)
    config.write_text("gates: {rounds: 1, images: 16, draws: 1, steps: 20}\nholdout: 0.3\n")
    words = ["--weights", weights, "--method", "cosine-gate", "--set", "gate_hidden=4", "--set", "gate=plain"]
    words += ["--data", data, "--phases", "none", "--budget", 0.8, "--config", config, "-o", tmp_path / "out", "--json"]
    status, told = run_command("convert", "acmize_resnet20_cifar", *words)
    assert status in (0, 1), told.err  # 1: so few images that a budget is missed
    assert json.loads(told.out)["dense"]["macs"] == 40_551_040
    made = from_pretrained(tmp_path / "out")
    assert made.plan.config == CosineGateConfig(gate="plain", gate_hidden=4)
    status, told = run_command("plan", "acmize_resnet20_cifar", "--method", "cosine-gate")
    assert (status, "7 blocks" in told.out) == (0, True)
    status, told = run_command("plan", "acmize_resnet20_cifar", "--method", "cosine-gate", "--set", "mode")
    assert (status, "expected NAME=VALUE" in told.err) == (2, True)


def test_static_control_skips_whole_blocks(resnet: nn.Module) -> None:
    made, plan = adapted(resnet)
    choose = static_width(made, plan, 0.8)
    with torch.no_grad(), choosing(made, choose), record(made, 2) as seen:
        made(inputs(2))
    share = (float(seen.executed().mean()) + plan.macs_rest()) / plan.macs_dense
    assert 0.8 - max(e.macs for e in plan.entries) / plan.macs_dense <= share <= 0.8 + 1e-6
    modules = [m for m in made.modules() if isinstance(m, AdaptiveModule)]
    names = {name: 0 for m in modules for name in m.names}
    with torch.no_grad(), choosing(made, by_name(made, names)):
        assert count_macs(made, inputs(1)) == plan.macs_rest() < plan.macs_dense


def test_options_name_the_method() -> None:
    made = resolve({"cosine-gate": {"mode": "oracle"}})
    assert (made.method, made.config) == ("cosine-gate", CosineGateConfig(mode="oracle"))
    assert made.merge == "none"
    assert made.losses.entropy == 0, "the method's own defaults"
    assert resolve({"method": "cosine-gate", "losses": {"entropy": 0.1}}).losses.entropy == 0.1
    assert resolve({"method": "cosine-gate", "config": {"gate": "plain"}}).config.gate == "plain"
    assert acmize.Recipe.from_dict(made.to_dict()) == made
    assert resolve({"acm": {"num_learners": 3}}).method == "acm"


def test_a_preset_belongs_to_its_method() -> None:
    with pytest.raises(AcmizeError, match="preset paper: is one of method acm, found method cosine-gate"):
        resolve({"method": "cosine-gate"}, preset_name="paper")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nonsense"}, "method: found 'nonsense', expected one of: acm"),
        ({"method": "acm", "cosine-gate": {}}, "expected the config of one method"),
        ({"method": "cosine-gate", "config": {"mode": "x"}}, "mode: found 'x'"),
        ({"method": "cosine-gate", "config": {"num_learners": 3}}, "unknown option 'num_learners'"),
        ({"method": "cosine-gate", "gates": {"labels": "threshold"}}, "need gate=no gate, found 'cosine'"),
        ({"method": "cosine-gate", "config": {"gate": "damage"}, "gates": {"labels": "none"}}, "need gate='cosine'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AcmizeError, match=message):
        resolve(options)


@pytest.mark.parametrize("most", [4, 8, 32])
@torch.no_grad()
def test_however_many_run_and_however_they_are_cut(resnet: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CHUNK", (most + 3) * 4 * 64 * 8 * 8)
    model, _ = adapted(resnet)
    module: Any = model.layer3[1]
    x, sizes = torch.rand(32, 64, 8, 8), []
    ran, skipped = module.block(x), module.skipped(x)
    assert (ran - skipped).abs().amax((1, 2, 3)).min() > 1e-3
    module.block.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    for count in (0, 1, 2, 5, 29, 30, 31, 32):
        runs, before = torch.randperm(32) < count, x.clone()
        sizes.clear()
        found = cosine_gate._gathered(module, x, runs)
        torch.testing.assert_close(found, torch.where(runs[:, None, None, None], ran, skipped), rtol=1e-4, atol=1e-5)
        assert torch.equal(x, before), "the input belongs to somebody else"
        assert count <= sum(sizes) <= count + 3, "what runs in vain is less than four samples"
        assert max(sizes, default=0) <= most
