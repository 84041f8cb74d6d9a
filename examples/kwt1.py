"""A transformer that no library knows made adaptive: KWT-1, a keyword spotter written as a plain torch module."""

import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import acmize
from acmize.gates import choosing, full_width
from acmize.init import collect_moments, init_


class Block(nn.Module):
    """Post-norm block with one attention head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class Kwt1(nn.Module):
    """(B, 98 frames, 40 MFCC) -> (B, 12 keywords)."""

    def __init__(self, dim: int = 64, depth: int = 12) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(40, dim), nn.Linear(dim, 12)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 99, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """The class token goes first and is read by the head."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.blocks(x + self.pos_embed)[:, 0])


torch.manual_seed(0)
dense, sounds = Kwt1().eval(), torch.randn(32, 98, 40)  # noise in place of MFCC: only the arithmetic is shown here
if (weights := Path(os.environ.get("ACMIZE_ASSETS", ""), "models/kwt1/model.safetensors")).exists():
    dense.load_state_dict(load_file(weights))
config = acmize.AcmConfig(num_learners=4, gate_hidden=8)
sites = ["blocks.*:attention(q,k,v,out,heads=1)", "blocks.*:mlp(fc1,fc2)"]
plan = acmize.make_plan(dense, config, example=(sounds[:1],), target_modules=sites)
model = acmize.convert_(copy.deepcopy(dense), plan)
init_(model, dense, plan, collect_moments(dense, plan, [sounds]))
with torch.no_grad(), choosing(model, full_width):
    torch.testing.assert_close(model(sounds), dense(sounds), rtol=0, atol=1e-3)
with torch.no_grad(), choosing(model, lambda gate, x: full_width(gate, x) // 2):
    assert (model(sounds) - dense(sounds)).abs().max() > 0.1
print(f"{len(plan.entries)} sites in {plan.macs_dense / 1e6:.1f} MMACs; floor and full width:", plan.budget_range)
