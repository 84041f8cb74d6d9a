"""Gates: how a token's compute is chosen, with one price for every site.

A gate reads the input of its module and gives each of its G groups (a projection, an MLP) an energy for each of its
N + 1 choices; the choice of least energy runs. Two kinds:

    DamageGate          energy(k) = damage(k) + price * cost(k): damage is the predicted squared change of the model's
                        loss when only k learners run, cost the share of the dense model's MACs. (METHODS of this
                        project; docs/methods.md.)
    ClassificationGate  energy(k) = -log softmax(logits)(k) + price * cost(k) / cost(N): the published gate
                        (arXiv 2312.10193, sect. 3.2) at price 0.

In training the choice is straight-through: learner n is multiplied by `keep[n]`, hard forward, soft backward.

Shapes: ... any leading axes (batch, tokens), D input width, G groups, N learners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops
from acmize.decision import Decision, hard_keep
from acmize.kept import Kept
from acmize.products import gemm

Choose = Callable[["Gate", Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """Sizes of a gate.

    Attributes:
        dim: input width D.
        hidden: width of its hidden layers.
        learner_macs: (G, N) MACs a token of each learner of each group.
        gate_macs: (G,) each group's share of the gate's own MACs a token.
        macs_total: MACs a sample of the whole dense model, the unit of cost.
        min_choice: least number of learners that may run.
    """

    dim: int
    hidden: int
    learner_macs: tuple[tuple[int, ...], ...]
    gate_macs: tuple[int, ...]
    macs_total: int
    min_choice: int = 0


class Gate(nn.Module):
    """Base of all gates: from energies to a decision."""

    dial_range: tuple[float, float]
    learner_macs: Tensor
    cost: Tensor
    price: Tensor
    dial: Tensor

    def __init__(self, spec: GateSpec) -> None:
        super().__init__()
        macs = torch.tensor(spec.learner_macs, dtype=torch.float32)
        self.groups, self.num_learners = macs.shape
        self.min_choice, self.gate_macs = spec.min_choice, spec.gate_macs
        cost = F.pad(macs.cumsum(-1), (1, 0)) / spec.macs_total
        self.register_buffer("learner_macs", macs, persistent=False)
        self.register_buffer("cost", cost, persistent=False)  # (G, N + 1), share of the dense model's MACs a token
        self.register_buffer("price", torch.zeros(()))
        self.register_buffer("dial", torch.zeros(()))
        self.temperature = 0.1
        self.progress = 1.0  # share of a training that is done; gates that anneal something read it
        self.choose: Choose | None = None  # overrides the energies: full width, static, random
        self.probe = False  # make `keep` a leaf whose gradient is wanted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves are followed, changes of dtype are not: half precision cannot hold the smallest prices and costs."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def energies(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., G, N + 1): the choice of least energy is taken."""
        raise TypeError(f"{type(self).__name__} has no energies")

    def price_at(self, dial: Any) -> Any:
        """The price at a position of the dial, a number or a tensor: 0 (most compute) to 1 (least)."""
        raise TypeError(f"{type(self).__name__} has no dial")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Decision:
        """X (..., D) -> decision with choice (..., G), 0 where `valid` (...) is False."""
        if self.choose is not None:
            choice = self.choose(self, x)
        else:
            energy = self.energies(x)
            if self.min_choice:
                energy = energy[..., self.min_choice :]
            if self.training:
                decision = self._straight_through(energy)
                return decision if valid is None else decision.without_padding(valid)
            choice = energy.argmin(-1) + self.min_choice
        if valid is not None:
            choice = choice * valid[..., None]
        if self.probe:
            return Decision(choice, hard_keep(choice, self.num_learners).float().requires_grad_(), valid=valid)
        return Decision(choice, valid=valid)

    def pick(self, x: Tensor) -> int:
        """The choice for one sample x (1, D) of a gate with one group, in eval mode."""
        return int(self(x).choice)

    def narrow_(self, choice: int) -> None:
        """Forget the learners beyond `choice` for good; subclasses narrow what predicts them."""
        self.num_learners = choice
        self.learner_macs, self.cost = self.learner_macs[:, :choice], self.cost[:, : choice + 1]

    def soft_scores(self, energy: Tensor) -> Tensor:
        """Energies in units of the temperature, for the soft distribution over choices."""
        return -energy / self.temperature

    def _straight_through(self, energy: Tensor) -> Decision:
        p = self.soft_scores(energy).softmax(-1)
        choice = self._sample(energy)
        soft = p.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # P(choice >= n + 1)
        if self.min_choice:
            soft = F.pad(soft, (self.min_choice, 0), value=1.0)
        hard = hard_keep(choice, self.num_learners).to(soft.dtype)
        return Decision(choice, hard + (soft - soft.detach()))

    def _sample(self, energy: Tensor) -> Tensor:
        return energy.argmin(-1) + self.min_choice


class DamageGate(Gate):
    """Predicts log damage and weighs it against the price of MACs.

    The damage of a choice depends on how much the rest of the model is cut, so the first layer also sees the position
    of the dial (`level`).
    """

    dial_range = (1e-7, 1e4)
    steep_from, steepness = 0.95, 300.0  # e^15 more at the end: log damage is at most 10, a share of MACs may be 1e-4
    act = staticmethod(F.gelu)

    def __init__(self, spec: GateSpec) -> None:
        super().__init__(spec)
        self.fc1 = nn.Linear(spec.dim, spec.hidden)
        self.fc2 = nn.Linear(spec.hidden, self.groups * self.num_learners)
        self.level = nn.Parameter(torch.zeros(spec.hidden))
        self._parts: Kept[tuple[Any, ...]] = Kept()

    def log_damage(self, x: Tensor, dial: Tensor | None = None) -> Tensor:
        """X (..., D) -> (..., G, N): log damage of running 0..N-1 learners (running all does none).

        `dial` (..., 1) is the position of the dial for each token; the gate's own by default.
        """
        eta = self.fc2(self.hidden(x, dial)).unflatten(-1, (self.groups, self.num_learners))
        return eta.float().clamp(-25.0, 10.0)

    def hidden(self, x: Tensor, dial: Tensor | None = None) -> Tensor:
        """X (..., D) -> (..., hidden), with the dial as in `log_damage`."""
        bias = self.fc1.bias + self.level * (self.dial if dial is None else dial)
        if dial is None and ops.pick_backend(x) == "sorted" and not torch.compiler.is_compiling():
            return gemm(x.flatten(0, -2), self.fc1.weight, bias, self.act).unflatten(0, x.shape[:-1])
        return self.act(F.linear(x, self.fc1.weight) + bias)

    def energies(self, x: Tensor) -> Tensor:
        """Damage plus price times cost; more learners never count as more damage."""
        log_damage = self.log_damage(x)
        if self.num_learners > 1:
            log_damage = largest_from_here(log_damage)
        return F.pad(log_damage.exp(), (0, 1)) + self.price * self.cost

    def soft_scores(self, energy: Tensor) -> Tensor:
        """In units of the price of the whole site, so that one temperature suits every site and budget."""
        unit = (self.price * self.cost[:, -1:]).clamp_min(1e-20)  # a price of 0 would divide by it
        return -(energy / unit) / self.temperature

    def pick(self, x: Tensor) -> int:
        """`energies` and its least in three operators: for one sample the others cost more than what they decide."""
        w1, b1, w2, b2, costs = self._parts.get(self.modules, self._folded)
        log_damage = F.linear(self.act(F.linear(x, w1, b1)), w2, b2).tolist()[0]
        worst, best, least = -25.0, self.num_learners, costs[-1]
        for k in range(self.num_learners - 1, self.min_choice - 1, -1):
            worst = max(worst, min(log_damage[k], 10.0))
            energy = math.exp(worst) + costs[k]
            if energy <= least:
                best, least = k, energy
        return best

    def _folded(self) -> tuple[Any, ...]:
        """First layer with the dial in its bias, last layer, the price of each choice."""
        bias = self.fc1.bias + self.level * self.dial
        return self.fc1.weight, bias, self.fc2.weight, self.fc2.bias, (self.price * self.cost[0]).tolist()

    def narrow_(self, choice: int) -> None:
        """Choices beyond `choice` are gone; running that many counts as no damage from now on."""
        self.fc2 = leading_outputs(self.fc2, self.groups, choice)
        super().narrow_(choice)

    def price_at(self, dial: Any) -> Any:
        """Logarithmic: damage spans many orders of magnitude; at its end the dial outbids any damage."""
        low, high = map(math.log, self.dial_range)
        if isinstance(dial, Tensor):
            return (low + dial * (high - low) + (dial - self.steep_from).clamp_min(0) * self.steepness).exp()
        return math.exp(low + dial * (high - low) + max(0.0, dial - self.steep_from) * self.steepness)


class ClassificationGate(Gate):
    """The published gate: D -> hidden -> hidden -> choices, Gumbel-softmax in training, argmax in inference."""

    dial_range = (-30.0, 30.0)

    def __init__(self, spec: GateSpec) -> None:
        super().__init__(spec)
        self.fc1 = nn.Linear(spec.dim, spec.hidden)
        self.fc2 = nn.Linear(spec.hidden, spec.hidden)
        self.fc3 = nn.Linear(spec.hidden, self.groups * (self.num_learners + 1))
        self.temperature = 0.8

    def logits(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., G, N + 1) gate logits, one for each choice."""
        h = F.gelu(self.fc2(F.gelu(self.fc1(x))))
        return self.fc3(h).unflatten(-1, (self.groups, self.num_learners + 1)).float()

    def energies(self, x: Tensor) -> Tensor:
        """Negative log probability plus the price of the share of the site's own work."""
        return -self.logits(x).log_softmax(-1) + self.price * self.cost / self.cost[:, -1:]

    def price_at(self, dial: Any) -> Any:
        """Linear and signed: 0.5 is the gate as trained."""
        low, high = self.dial_range
        return low + dial * (high - low)

    def _straight_through(self, energy: Tensor) -> Decision:
        noise = -torch.empty_like(energy).exponential_().log()
        return super()._straight_through(energy - noise)


def largest_from_here(x: Tensor) -> Tensor:
    """X (..., N) -> the largest of x[n], ..., x[N - 1] at each place n."""
    if not torch.compiler.is_exporting():
        return x.flip(-1).cummax(-1)[0].flip(-1)
    rows = F.pad(x.flatten(0, -2)[:, None], (0, x.shape[-1] - 1), value=-math.inf)  # ONNX knows no cummax
    return F.max_pool1d(rows, x.shape[-1], stride=1).reshape(x.shape)


def leading_outputs(layer: nn.Linear, groups: int, count: int) -> nn.Linear:
    """A layer with the leading `count` outputs of each of its groups."""
    cut = nn.Linear(layer.in_features, groups * count, device=layer.weight.device, dtype=layer.weight.dtype)
    for name in ("weight", "bias"):
        rows = getattr(layer, name).detach().unflatten(0, (groups, -1))[:, :count]
        setattr(cut, name, nn.Parameter(rows.flatten(0, 1).clone()))
    return cut


# --- one price for the model ----------------------------------------------------------------------------------


def gates_of(model: nn.Module) -> list[Gate]:
    """All gates of a model, in order."""
    return [m for m in model.modules() if isinstance(m, Gate)]


def set_dial(model: nn.Module, dial: float) -> None:
    """Set every gate's price to the one at this position of the dial, 0 (most compute) to 1 (least)."""
    for gate in gates_of(model):
        gate.price.fill_(gate.price_at(dial))
        gate.dial.fill_(dial)


def set_progress(model: nn.Module, share: float) -> None:
    """Tell every gate how much of a training is done, 0 to 1."""
    for gate in gates_of(model):
        gate.progress = share


def full_width(gate: Gate, x: Tensor) -> Tensor:
    """A `Choose`: every token runs every learner."""
    return torch.full((*x.shape[:-1], gate.groups), gate.num_learners, device=x.device)


@contextmanager
def choosing(model: nn.Module, choose: Choose | None, probe: bool = False) -> Iterator[None]:
    """Replace every gate's decision inside the context (None: keep it), and probe `keep` for its gradient."""
    gates = gates_of(model)
    before = [(g.choose, g.probe) for g in gates]
    for gate in gates:
        gate.choose, gate.probe = choose or gate.choose, probe
    try:
        yield
    finally:
        for gate, (old, probed) in zip(gates, before, strict=True):
            gate.choose, gate.probe = old, probed
