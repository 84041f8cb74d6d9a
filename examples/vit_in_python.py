"""A timm ViT made adaptive step by step, and a look at what its gates choose."""

import copy

import timm
import torch

import acmize
from acmize.damage import collect_damage
from acmize.gates import full_width, set_dial
from acmize.init import collect_moments, init_
from acmize.phases.pretrain_gates import fit_damage_gates

torch.manual_seed(0)
dense = timm.create_model("test_vit", num_classes=10).eval()  # pretrained=True for weights that mean something
photographs = torch.randn(32, 3, 160, 160)  # yours, with the model's own preprocessing; no labels

plan = acmize.make_plan(dense, acmize.AcmConfig(num_learners=4, gate_hidden=8))
print(f"{len(plan.entries)} sites, budgets {plan.budget_range[0]:.2f} to {plan.budget_range[1]:.2f}")
print(*(f"stays dense: {r.fqn}, {r.reason}" for r in plan.refused), sep="\n")

model = acmize.convert_(copy.deepcopy(dense), plan)
init_(model, dense, plan, collect_moments(dense, plan, [photographs]))
draw = torch.Generator().manual_seed(0)
fit_damage_gates(collect_damage(model, dense, [photographs], choose=full_width, generator=draw), steps=50)

for dial in (0.0, 0.4, 0.5, 0.6, 1.0):  # acmize.convert also finds the dial of each budget
    set_dial(model, dial)
    with torch.no_grad(), acmize.record(model, samples=len(photographs)) as seen:
        model(photographs)
    share = (plan.macs_rest() + seen.executed().mean().item()) / plan.macs_dense
    print(f"dial {dial}: {share:.2f} of the dense work; tokens of blocks.0.mlp by learners run:", end=" ")
    print(seen.choices["blocks.0.mlp"].tolist())
