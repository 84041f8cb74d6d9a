"""Gates: how a token's compute is chosen, with one price for every site, and how choices are recorded.

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
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import ops, parallel
from acmize.errors import AcmizeError
from acmize.kept import Kept
from acmize.padding import Padding

Choose = Callable[["Gate", Tensor], Tensor]


@dataclass(frozen=True)
class Decision:
    """What a gate decided: `choice` (..., G) learners to run; `keep` (..., G, N), 1 where a learner runs.

    `keep` is None in plain inference; where it is set it carries the gradient. The decision of one group has `order`:
    learners -> its tokens in the order of their choice. `valid` (...) is False for padded tokens, which run none; None:
    all are real.
    """

    choice: Tensor
    keep: Tensor | None = None
    order: Callable[[int], ops.Order] | None = field(default=None, repr=False, compare=False)
    _orders: list[ops.Order] = field(default_factory=list, repr=False, compare=False)
    valid: Tensor | None = field(default=None, kw_only=True)

    def group(self, g: int) -> Decision:
        """The decision of one group: choice (...), keep (..., N)."""
        keep = None if self.keep is None else self.keep[..., g, :]
        return Decision(self.choice[..., g], keep, partial(self._order, g), valid=self.valid)

    def _order(self, g: int, num_learners: int) -> ops.Order:
        """All groups are sorted at once, when the first is asked for."""
        if not self._orders:
            self._orders.extend(ops.sort_tokens(self.choice.flatten(0, -2), num_learners))
        return self._orders[g]

    def without_padding(self, valid: Tensor) -> Decision:
        """The decision with no learner where `valid` (...) is False."""
        keep = None if self.keep is None else self.keep * valid[..., None, None]
        return Decision(self.choice * valid[..., None], keep, valid=valid)

    def keep_or_hard(self, num_learners: int, dtype: torch.dtype) -> Tensor:
        """`keep`, or the hard 0/1 mask of `choice`."""
        if self.keep is not None:
            return self.keep.to(dtype)
        return hard_keep(self.choice, num_learners).to(dtype)


def hard_keep(choice: Tensor, num_learners: int) -> Tensor:
    """(...) choices -> (..., N) bool, True for the learners that run."""
    return torch.arange(num_learners, device=choice.device) < choice.unsqueeze(-1)


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
            return ops.gemm(x.flatten(0, -2), self.fc1.weight, bias, self.act).unflatten(0, x.shape[:-1])
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


# --- recording ------------------------------------------------------------------------------------------------


class AdaptiveModule(nn.Module):
    """Base of what methods insert: a gate, a name for each of its groups, and a place for a recorder.

    Subclasses call `decide(x)` once a forward and implement `forward_reference(x, decision)`.

    Attributes:
        per_sample: one decision a sample, from a pooled input (B, D), in place of one a token.
        skips: what is not chosen is not run; False where everything runs whatever is chosen, and nothing is saved.
    """

    gate: Gate
    per_sample = False
    skips = True

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names  # entries of the plan, one a group
        self.recorder: Recorder | None = None
        self.padding: Padding | None = None  # set where the host says which tokens are real

    def __setattr__(self, name: str, value: Any) -> None:
        inside = self.__dict__.get("_modules", {}).get(name)
        if inside is not None and isinstance(value, nn.Module) and value is not inside and inside in value.modules():
            raise AcmizeError(
                f"{self.names or type(self).__name__}: found {type(value).__name__} around its layer {name}, which is "
                "not called but cut; wrap layers that stay dense, or merge the adapter before the conversion"
            )
        super().__setattr__(name, value)

    def decide(self, x: Tensor) -> Decision:
        """Ask the gate about x (..., D), tokens (or samples alone) on the leading axes, and tell the recorder."""
        valid = None if self.padding is None else self.padding.read(x)
        decision = self.gate(x) if valid is None else self.gate(x, valid)
        if self.recorder is not None:
            self.recorder.add(self, x, decision)
        return decision

    def split_output(self, y: Tensor) -> list[Tensor]:
        """The module's output (M, O) -> the share of each group of the gate."""
        return [y]

    def macs(self, decision: Decision) -> Tensor:
        """Executed MACs (..., G) of a decision, the gate not included."""
        table = F.pad(self.gate.learner_macs.cumsum(-1), (1, 0))
        return table.gather(1, decision.choice.flatten(0, -2).T).T.unflatten(0, decision.choice.shape[:-1])


@dataclass
class Recorder:
    """Collects decisions while a `record()` context is open; padded tokens are not counted.

    Attributes:
        samples: samples in the batch: leading axes are folded to it, so that windows belong to their image.
        keep_inputs: also keep the gates' inputs and decisions (for fitting and heat maps).
        macs: entry -> list of (samples,) MACs of the site as chosen, a tensor a forward.
        ran: the same as executed: all of it where a module skips nothing.
        expected: entry -> list of (samples,) MACs through `keep`, differentiable.
        most: entry -> MACs a sample if every learner ran; (samples,) where samples have unequal lengths.
        gates: entry -> MACs a sample of its share of the gate, likewise.
        tokens: entry -> tokens a sample, likewise; "" -> tokens before any were merged, where they are frames.
        choices: entry -> histogram (N + 1,) of choices.
        per_token: entry -> (samples, tokens) choices of the last forward, -1 where padded.
        seen: module -> (input, decision), when `keep_inputs`.
        losses: name -> terms, weighted already, that modules add to the loss of phase 3.
    """

    samples: int
    keep_inputs: bool = False
    macs: dict[str, list[Tensor]] = field(default_factory=dict)
    ran: dict[str, list[Tensor]] = field(default_factory=dict)
    expected: dict[str, list[Tensor]] = field(default_factory=dict)
    most: dict[str, float | Tensor] = field(default_factory=dict)
    gates: dict[str, float | Tensor] = field(default_factory=dict)
    tokens: dict[str, float | Tensor] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)
    seen: list[tuple[AdaptiveModule, Tensor, Decision]] = field(default_factory=list)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_loss(self, name: str, term: Tensor) -> None:
        """Called by adaptive modules that learn something beside the task."""
        self.losses.setdefault(name, []).append(term)

    def add(self, module: AdaptiveModule, x: Tensor, decision: Decision) -> None:
        """Called by the adaptive modules."""
        gate = module.gate
        if self.keep_inputs:
            self.seen.append((module, x, decision))
        macs = module.macs(decision).detach()
        valid = decision.valid
        tokens: float | Tensor = decision.choice[..., 0].numel() / self.samples
        if valid is not None:
            tokens = valid.reshape(self.samples, -1).sum(1).double()
        for g, name in enumerate(module.names):
            one = decision.group(g)
            self.tokens[name] = tokens
            self.gates[name] = gate.gate_macs[g] * tokens
            self.most[name] = float(gate.learner_macs[g].sum()) * tokens
            chosen = macs[..., g].reshape(self.samples, -1).sum(1)
            self.macs.setdefault(name, []).append(chosen)
            ran = chosen if module.skips else torch.zeros_like(chosen) + self.most[name]
            self.ran.setdefault(name, []).append(ran)
            real = one.choice if valid is None else one.choice[valid]
            histogram = torch.bincount(real.reshape(-1), minlength=gate.num_learners + 1)
            self.choices[name] = self.choices.get(name, 0) + histogram
            shown = one.choice if valid is None else one.choice.masked_fill(~valid, -1)
            self.per_token[name] = shown.reshape(self.samples, -1)
            if one.keep is not None:
                soft = (one.keep * gate.learner_macs[g]).sum(-1)
                self.expected.setdefault(name, []).append(soft.reshape(self.samples, -1).sum(1))

    def executed(self) -> Tensor:
        """(samples,) executed MACs of all adaptive sites in the last forward, their gates included."""
        return self._total(self.ran)

    def chosen(self) -> Tensor:
        """(samples,) the same as chosen: what would be executed if every module skipped."""
        return self._total(self.macs)

    def _total(self, parts: dict[str, list[Tensor]]) -> Tensor:
        if not parts:  # a plan that merges tokens and replaces nothing
            return torch.zeros(self.samples)
        return torch.stack([last[-1] for last in parts.values()]).sum(0) + sum(self.gates.values())

    def differentiable(self) -> Tensor:
        """(samples,) the same through `keep`: hard value, soft gradient."""
        return self._total(self.expected)


@dataclass
class SiteTally:
    """What sites did over the batches of a set, each recorded by itself.

    Attributes:
        load: entry -> shares of its learners that were chosen, weighted by their MACs, a tensor a batch.
        choices: entry -> histogram (N + 1,) of choices.
    """

    load: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Recorder) -> None:
        """One batch, as it was recorded."""
        for name, parts in seen.macs.items():
            self.load.setdefault(name, []).append((parts[-1] / seen.most[name]).double().cpu())
            self.choices[name] = self.choices.get(name, 0) + seen.choices[name].cpu()

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """`load`, (samples,) an entry, and `choices`, of all processes."""
        return {
            "load": {name: parallel.gather(torch.cat(parts)) for name, parts in self.load.items()},
            "choices": {name: parallel.total(counts) for name, counts in self.choices.items()},
        }


@contextmanager
def record(model: nn.Module, samples: int, keep_inputs: bool = False) -> Iterator[Recorder]:
    """Record what every module with a place for a recorder decides while the context is open.

    Raises:
        AcmizeError: there are no samples, so none to take a mean of.
    """
    if samples < 1:
        raise AcmizeError(f"batch: found {samples} samples, expected at least one; leave empty batches out")
    recorder = Recorder(samples, keep_inputs)
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "recorder")]
    for module in modules:
        module.recorder = recorder
    try:
        yield recorder
    finally:
        for module in modules:
            module.recorder = None
