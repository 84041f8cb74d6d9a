"""Where models can be made adaptive: what is converted, what is refused by name; nothing is skipped."""

from __future__ import annotations

import copy
import importlib
import json
from fnmatch import fnmatch
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, Mlp
from tiny import (
    CONFIG,
    HOSTS,
    SIZES,
    Mine,
    adapted,
    half_width,
    images,
    inputs_for,
    noisy,
    plan_of,
    vit,
)
from torch import nn

from acmize import AcmConfig, AcmizeError, Plan, Site
from acmize.adaptive import AcmMlp, AcmOut, AcmProjections
from acmize.gates import choosing, full_width
from acmize.hosts import find_sites, make_plan, parse_targets
from acmize.hosts._registry import HANDLERS
from acmize.init import collect_moments, init_
from acmize.insert import convert_
from acmize.layers import Dense
from acmize.ops import use_backend

# What each host must give: entries a block of each kind (a stage's for Swin and ConvNeXt), and reasons of refusal.
ALL = {"mlp": 2, "q": 2, "k": 2, "v": 2, "out": 2}
NO_QK = {"mlp": 2, "v": 2, "out": 2}
EXPECTED: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "vit": (ALL, ()),
    "vit without biases": (ALL, ()),
    "deit distilled": (ALL, ()),
    "deit3": (ALL, ()),
    "dinov2 with registers": (ALL, ()),
    "qk-norm": (NO_QK, ("a norm acts on q and k",)),
    "swiglu": (ALL, ()),
    "swiglu packed": (ALL, ()),
    "glu": (ALL, ()),
    "eva fused": (NO_QK, ("rotary positions",)),
    "eva fused with bias": ({"mlp": 2}, ("qkv",)),
    "eva unfused": (NO_QK, ("rotary positions",)),
    "eva rope attention": (NO_QK, ("rotary positions",)),
    "eva02": ({"v": 2, "out": 2}, ("between fc1 and fc2", "rotary positions")),
    "beit": ({"mlp": 2}, ("qkv.weight directly",)),
    "swin": ({"mlp": 3}, ("window attention",)),
    "convnext": ({"mlp": 4}, ()),
    "convnext conv_mlp": ({"mlp": 4}, ()),
}


def kinds(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for e in plan.entries:
        found[e.kind] = found.get(e.kind, 0) + 1
    return found


def unaccounted(model: nn.Module, plan: Plan) -> list[str]:
    """Linear layers that are neither in an entry's roles nor under a refusal."""
    named = {path for e in plan.entries for path in (e.target, *e.roles.values())}
    refused = [part.strip() for r in plan.refused for part in r.fqn.split(",")]
    # a refusal may name a module around the layer, or a part of it (blocks.0.attn.qkv.q)
    under = lambda path: any(path == r or path.startswith(r + ".") or r.startswith(path + ".") for r in refused)  # noqa: E731
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in named and not under(p)]


@pytest.mark.parametrize("name", HOSTS)
def test_every_linear_layer_is_converted_or_refused(name: str) -> None:
    dense = HOSTS[name]()
    plan = plan_of(dense)
    expected_kinds, reasons = EXPECTED[name]
    assert kinds(plan) == expected_kinds
    said = " | ".join(r.reason for r in plan.refused)
    assert all(reason in said for reason in reasons), said
    assert unaccounted(dense, plan) == []


@torch.no_grad()
def test_converted_modules_equal_their_reference() -> None:
    for name in ("vit", "swiglu", "convnext conv_mlp"):
        dense = HOSTS[name]()
        model, _ = adapted(dense)
        checked = []

        def check(module: Any, args: Any, output: torch.Tensor, checked: list[Any] = checked) -> None:
            first = getattr(module, "channels_first", False)
            x = args[0].permute(0, 2, 3, 1) if first else args[0]
            decision = module.link.read() if isinstance(module, AcmOut) and module.link else module.gate(x)
            y = module.forward_reference(x, decision)
            torch.testing.assert_close(output, y.permute(0, 3, 1, 2) if first else y, rtol=1e-4, atol=1e-4)
            checked.append(module)

        for module in model.modules():
            if isinstance(module, AcmMlp | AcmProjections | AcmOut):
                module.register_forward_hook(check)
        with choosing(
            model, lambda gate, x: (x.sum(-1, keepdim=True).abs() * 7).long() % 5 + torch.zeros(gate.groups).long()
        ):
            model(inputs_for(dense))
        assert checked


# --- fused qkv ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_that_are_not_rotated_are_split_bit_exactly() -> None:
    dense: Any = HOSTS["qk-norm"]()
    model, _ = adapted(dense)
    fused: Any = model.get_submodule("blocks.0.attn.qkv")
    assert torch.equal(torch.cat([fused.q.weight, fused.k.weight]), dense.blocks[0].attn.qkv.weight[:64])
    assert torch.equal(torch.cat([fused.q.bias, fused.k.bias]), dense.blocks[0].attn.qkv.bias[:64])
    assert not torch.equal(fused.v.weight, dense.blocks[0].attn.qkv.weight[64:])


@torch.no_grad()
def test_parts_excluded_from_low_rank_are_split_bit_exactly() -> None:
    dense: Any = vit()
    model, _ = adapted(dense, AcmConfig(num_learners=4, gate_hidden=2, projections="lowrank"), exclude=["*.qkv.k"])
    fused: Any = model.get_submodule("blocks.1.attn.qkv")
    assert type(fused.k) is Dense
    assert torch.equal(fused.k.weight, dense.blocks[1].attn.qkv.weight[32:64])


@pytest.mark.parametrize(
    "exclude",
    [["*.q"], ["*.k"], ["*.v"], ["*.proj"], ["*.qkv"], ["*.q", "*.k", "*.v"], ["*.q", "*.proj"], ["*.v", "*.proj"]],
    ids=" ".join,
)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@torch.no_grad()
def test_excluded_siblings_stay_exact(exclude: list[str], biases: bool) -> None:
    """What stays dense beside a rotated projection is rotated with it."""
    dense = vit(qkv_bias=biases, proj_bias=biases)
    model, plan = adapted(dense, exclude=exclude)
    assert not any(fnmatch(e.fqn, g) for e in plan.entries for g in exclude)
    x = images(seed=2)
    with choosing(model, full_width):
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-4)
    with choosing(model, half_width):
        assert (model(x) - dense(x)).abs().max() > 1e-2


@pytest.mark.parametrize("config", [{"projections": "lowrank"}, {"projections": "none"}], ids=str)
@torch.no_grad()
def test_other_projections_are_exact_at_full_width(config: dict[str, Any]) -> None:
    dense = vit()
    model, plan = adapted(dense, AcmConfig(num_learners=4, gate_hidden=2, **config))
    assert {e.form for e in plan.entries} == (
        {"prefix", "lowrank"} if config["projections"] == "lowrank" else {"prefix"}
    )
    with choosing(model, full_width):
        torch.testing.assert_close(model(images()), dense(images()), rtol=0, atol=1e-4)


# --- a user's own module --------------------------------------------------------------------------------------


def mine_sites() -> list[Site]:
    sites = []
    for i in range(2):
        p = f"blocks.{i}"
        a = f"{p}.attn"
        sites.append(Site.attention(q=f"{a}.q", k=f"{a}.k", v=f"{a}.v", out=f"{a}.out", heads=2))
        sites.append(Site.mlp(f"{p}.fc1", f"{p}.fc2"))
    return sites


TARGETS = ["blocks.*.attn:attention(q, k, v, out, heads=2)", "blocks.*:mlp(fc1, fc2)"]


@pytest.mark.parametrize("how", ["sites", "strings"])
@torch.no_grad()
def test_a_module_of_ones_own(how: str) -> None:
    dense = Mine().eval()
    named: dict[str, Any] = {"sites": mine_sites()} if how == "sites" else {"target_modules": TARGETS}
    model, plan = adapted(dense, **named)
    assert kinds(plan) == ALL
    assert unaccounted(dense, plan) == []
    assert {r.fqn for r in plan.refused} == {"embed", "head"}
    x = inputs_for(dense, 4, seed=2)
    with choosing(model, half_width):
        assert (model(x) - dense(x)).abs().max() > 1e-3
    for backend in ("masked", "sorted"):
        with choosing(model, full_width), use_backend(backend):
            torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_activation_with_f0_not_zero_between_split_layers() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(nn.functional.softplus(self.fc1(x)))

    dense, x = Soft().eval(), torch.randn(20, 16)
    plan = make_plan(dense, CONFIG, example=(x[:1],), sites=[Site.mlp("fc1", "fc2")])
    model = convert_(copy.deepcopy(dense), plan)
    init_(model, dense, plan, collect_moments(dense, plan, [x]))
    for choose in (full_width, half_width):
        with choosing(model, choose):
            with use_backend("masked"):
                masked = model(x)
            torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)
    with choosing(model, full_width):
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_single_linear_layers() -> None:
    dense = Mine().eval()
    model, plan = adapted(dense, target_modules=["blocks.*.attn.out:linear"])
    assert [(e.fqn, e.kind, e.form) for e in plan.entries] == [
        ("blocks.0.attn.out", "linear", "lowrank"),
        ("blocks.1.attn.out", "linear", "lowrank"),
    ]
    assert unaccounted(dense, plan) == []
    with choosing(model, full_width):
        torch.testing.assert_close(model(inputs_for(dense)), dense(inputs_for(dense)), rtol=0, atol=1e-4)


def test_a_declaration_adds_to_known_sites_chosen_by_globs() -> None:
    dense = vit()
    plan = plan_of(dense, target_modules=["blocks.*.mlp", "blocks.0.attn.proj:linear"])
    assert {e.fqn for e in plan.entries} == {"blocks.0.mlp", "blocks.1.mlp", "blocks.0.attn.proj"}
    assert unaccounted(dense, plan) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("blocks.*:mlp(fc1)", "expected PATH:mlp"),
        ("blocks.*:mlp(fc1, fc3)", "no module of this model matches"),
        ("blocks.*.attn:attention(q,k,v,out)", "heads=H"),
        ("blocks.*.attn:attention(q,k,v,out,heads=two)", "heads=H"),
        ("nothing.*:linear", "no module of this model matches"),
        ("blocks.*.norm1:linear", "LayerNorm"),
        ("blocks.*.attn:attention(q,k,v,out,heads=5)", "heads"),
    ],
)
def test_wrong_declarations(target: str, message: str) -> None:
    with pytest.raises(AcmizeError, match=message):
        plan_of(Mine().eval(), target_modules=[target])


def test_wrong_sites() -> None:
    with pytest.raises(AcmizeError, match=r"fc1='blocks\.0\.up' is not a module"):
        plan_of(Mine().eval(), sites=[Site.mlp("blocks.0.up", "blocks.0.fc2")])
    with pytest.raises(AcmizeError, match="declared twice"):
        plan_of(Mine().eval(), sites=[Site.mlp("blocks.0.fc1", "blocks.0.fc2")] * 2)
    with pytest.raises(AcmizeError, match=r"fc2.*takes 32.*fc1.*gives 128"):
        plan_of(Mine().eval(), sites=[Site.mlp("blocks.0.fc1", "blocks.0.attn.out")])


def test_parse_targets_leaves_globs() -> None:
    globs, sites = parse_targets(Mine(), ["blocks.*.mlp", "blocks.0:mlp(fc1,fc2)"])
    assert globs == ["blocks.*.mlp"]
    assert sites == [Site.mlp("blocks.0.fc1", "blocks.0.fc2")]
    _, sites = parse_targets(Mine(), ["blocks.0.attn:attention(q,k,v,out,heads=2,rotate_qk=false)"])
    assert sites[0].options == {"heads": 2, "rotate_qk": False, "rotate_vo": True}


# --- refusals -------------------------------------------------------------------------------------------------


def test_subclasses_are_not_matched() -> None:
    class Odd(Attention):
        pass

    class OddMlp(Mlp):
        pass

    dense: Any = vit()
    dense.blocks[0].attn = Odd(32, 2)
    dense.blocks[1].mlp = OddMlp(32, 128)
    plan = plan_of(dense)
    assert not any(e.fqn.startswith(("blocks.0.attn", "blocks.1.mlp")) for e in plan.entries)
    why = {r.fqn: r.reason for r in plan.refused}
    assert "linear layer of Odd" in why["blocks.0.attn.qkv"]
    assert "linear layer of OddMlp" in why["blocks.1.mlp.fc1"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda: Mlp(32, 128, norm_layer=nn.LayerNorm), "LayerNorm between fc1 and fc2"),
        (lambda: timm.layers.GlobalResponseNormMlp(32, 128), "mixes hidden units"),
        (lambda: timm.layers.GatedMlp(32, 128), "mixes hidden units"),
        (lambda: timm.layers.GluMlp(32, 128, norm_layer=nn.LayerNorm), "between fc1 and fc2"),
        (lambda: nn.MultiheadAttention(32, 2), "MultiheadAttention"),
    ],
)
def test_unsound_parts_are_refused(part: Any, reason: str) -> None:
    model = nn.Sequential(part())
    assert reason in " ".join(f.reason for f in find_sites(model) if not isinstance(f, Site))
    assert not any(isinstance(f, Site) for f in find_sites(model))


def test_scale_norm_keeps_values_dense() -> None:
    model = nn.Sequential(Attention(32, 2, scale_norm=True, norm_layer=nn.LayerNorm))
    site = next(f for f in find_sites(model) if isinstance(f, Site))
    assert (site.options["rotate_qk"], site.options["rotate_vo"]) == (True, False)
    dense = nn.Sequential(noisy(model)).eval()
    plan = make_plan(dense, CONFIG, example=(torch.randn(1, 5, 32),))
    assert {e.kind for e in plan.entries} == {"q", "k"}


def test_nothing_to_convert() -> None:
    with pytest.raises(AcmizeError, match="nothing to convert in this Sequential"):
        make_plan(nn.Sequential(nn.Linear(4, 4)), CONFIG, example=(torch.zeros(1, 4),))


def test_a_layer_read_past_its_forward_is_refused() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.fc.weight, self.fc.bias)

    with pytest.raises(AcmizeError, match="fc: did not run"):
        make_plan(Past(), CONFIG, example=(torch.zeros(1, 64),), target_modules=["fc:linear"])


# --- timm's own versions --------------------------------------------------------------------------------------

MUST = (
    "timm.layers.Mlp",
    "timm.layers.ConvMlp",
    "timm.layers.GluMlp",
    "timm.layers.SwiGLU",
    "timm.layers.GlobalResponseNormMlp",
    "timm.models.vision_transformer.Attention",
    "timm.layers.AttentionRope",
    "timm.models.eva.EvaAttention",
    "timm.models.beit.Attention",
    "timm.models.swin_transformer.WindowAttention",
)


@pytest.mark.parametrize("path", MUST)
def test_canary_of_timm(path: str) -> None:
    """Fails where a version of timm renames a class that must be known: lowest 1.0.22, newest seen 1.0.31."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name, None)
    assert cls in HANDLERS, f"timm {timm.__version__}: hosts.py finds no {path}"


@pytest.mark.parametrize(
    ("name", "entries"),
    [("test_vit", 5 * 6), ("test_vit2", 5 * 8), ("test_vit3", None), ("test_convnext", None), ("test_convnext2", None)],
)
def test_canary_of_timm_models(name: str, entries: int | None) -> None:
    model = timm.create_model(name).eval()
    plan = make_plan(model, AcmConfig(num_learners=4, gate_hidden=4))
    assert entries is None or len(plan.entries) == entries
    assert unaccounted(model, plan) == []
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_sizes_are_those_of_the_model() -> None:
    assert plan_of(vit()).entries[0].tokens == 1 + (SIZES["img_size"] // SIZES["patch_size"]) ** 2
