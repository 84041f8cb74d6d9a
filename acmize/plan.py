"""The plan: pure data about what is replaced, at what size, what it costs and what was refused.

A plan is made from a model without changing it (`hosts.make_plan`), prints as a table and round-trips through JSON, so
that a saved model can be rebuilt without data, network or base weights.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from acmize.errors import AcmizeError
from acmize.registry import config_class, method_for

SCHEMA = 1
LARGEST = 1 << 53  # MACs, and any other number of a plan: what a float still counts one by one


@dataclass(frozen=True, kw_only=True)
class Site:
    """A replaceable place.

    Attributes:
        fqn: its dotted path, the name used in plans.
        kind: "mlp", "attention" or "linear"; of CNNs "block" (a residual block), "channels" (a chain of layers) or
            "partial" (a partial convolution).
        roles: role -> dotted path: an MLP has fc1, fc2 and, where it is one module with a known activation, module
            and act; attention has qkv (fused) or q, k, v, and out; a block has module, the module whose output is
            added to the shortcut (branch), and, where the shortcut passes through one, that module (rest).
        options: heads, rotate_qk, rotate_vo (attention); gated, channels_first, drop1, drop2 (mlp); between, residual
            (channels); channels (partial).
    """

    fqn: str
    kind: str
    roles: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def mlp(cls, fc1: str, fc2: str) -> Site:
        """An MLP of two linear layers named by their paths, with any element-wise f(0) = 0 activation between."""
        return cls(fqn=fc1, kind="mlp", roles={"fc1": fc1, "fc2": fc2})

    @classmethod
    def attention(
        cls, *, q: str, k: str, v: str, out: str, heads: int, rotate_qk: bool = True, rotate_vo: bool = True
    ) -> Site:
        """Self-attention of four linear layers named by their paths.

        `rotate_qk` must be False where anything acts on q or k before their product (rotary positions, norms);
        `rotate_vo` where anything lies between the attention-weighted values and `out`.
        """
        roles = {"q": q, "k": k, "v": v, "out": out}
        options = {"heads": heads, "rotate_qk": rotate_qk, "rotate_vo": rotate_vo}
        return cls(fqn=out, kind="attention", roles=roles, options=options)

    @classmethod
    def linear(cls, fqn: str) -> Site:
        """A single linear layer, converted in the low-rank form."""
        return cls(fqn=fqn, kind="linear", roles={"module": fqn})

    @classmethod
    def block(cls, fqn: str, *, branch: str | None = None, rest: str | None = None) -> Site:
        """A residual block, y = rest(x + F(x)), named by its path; `rest` is the identity where it is None.

        Args:
            fqn: of the block.
            branch: of the module inside whose output is F(x), where it has one.
            rest: of the module inside through which a skipped input still passes, such as the last activation.
        """
        named = {"module": fqn, "branch": branch, "rest": rest}
        return cls(fqn=fqn, kind="block", roles={role: path for role, path in named.items() if path is not None})

    @classmethod
    def channels(
        cls, fqn: str, layers: Sequence[str], between: Sequence[Sequence[str]], *, residual: bool = True
    ) -> Site:
        """A chain of convolutions (or linear layers), called one after the other with nothing else between them.

        Args:
            fqn: its name.
            layers: paths of two or more, in order.
            between: paths of the norms, activations and poolings behind each of them but the last.
            residual: whether the output is added to something, so that no inner channel at all need run.
        """
        roles = {f"layer{i}": path for i, path in enumerate(layers)}
        return cls(
            fqn=fqn,
            kind="channels",
            roles=roles,
            options={"between": [list(b) for b in between], "residual": residual},
        )

    @classmethod
    def partial(cls, fqn: str, conv: str, channels: int) -> Site:
        """A partial convolution: `conv` on the leading channels of `channels`, the identity on the rest."""
        return cls(fqn=fqn, kind="partial", roles={"module": fqn, "conv": conv}, options={"channels": channels})


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One adaptive site.

    Attributes:
        fqn: unique name; for a part of a fused layer the layer's path and the part ("blocks.0.attn.qkv.q").
        target: path of the module that is replaced.
        gate_at: path of the module whose gate decides; entries that share a gate name the same one.
        kind: "mlp", "q", "k", "v", "out", "linear" or "conv"; another method's are its own.
        form: "prefix", "rotated", "paired" (under rotary positions), "lowrank" or "windows" (low rank, a frame of a
            convolution over time at a time); another method's are its own.
        bounds: cumulative widths (0, ..., units), one more than there are learners.
        heads: heads cut alike.
        learner_macs: MACs a token of each learner.
        gate_macs: MACs a token of this entry's share of its gate.
        min_choice: least number of learners a token runs.
        tokens: tokens a sample at the model's own input size; 1 where a sample has one decision.
        macs: MACs a sample of the dense site.
        roles: paths of the layers it was made of.
        options: of its site.
    """

    fqn: str
    target: str
    gate_at: str
    kind: str
    form: str
    bounds: tuple[int, ...]
    heads: int
    learner_macs: tuple[int, ...]
    gate_macs: int
    min_choice: int
    tokens: int
    macs: int
    roles: dict[str, str]
    options: dict[str, Any]

    @property
    def num_learners(self) -> int:
        """N."""
        return len(self.learner_macs)

    @property
    def own_frames(self) -> bool:
        """Whether its tokens are frames of its own, in front of the blocks, which no merging makes fewer."""
        return self.form == "windows"

    @property
    def max_macs(self) -> int:
        """MACs a sample with every learner, gate included."""
        return self.tokens * (sum(self.learner_macs) + self.gate_macs)

    @property
    def min_macs(self) -> int:
        """MACs a sample with the fewest learners, gate included."""
        return self.tokens * (sum(self.learner_macs[: self.min_choice]) + self.gate_macs)


def counted_entry(entries: Sequence[PlanEntry]) -> PlanEntry:
    """The entry whose tokens are the length of a recording: the first on the frames of the blocks, if there is one."""
    return next((e for e in entries if not e.own_frames), entries[0])


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A place that stays dense, and why."""

    fqn: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Merging:
    """How many tokens are merged at which budget (see `methods.token_merging`), and what that saves beside the sites.

    Merging alone would save `slope * (start - budget)` of the dense MACs; the gates save the rest. It begins before
    block `first[0]` (of twelve) down to a budget of `knees[0]`, and moves to the front until `first[1]` at `knees[1]`:
    early merges save the most and cost the most (docs/log.md). Of the blocks from there, earlier ones merge more
    (weight 1.25 L - i in block i of L). With `fixed`, so many pairs before each block but the first, at any budget.
    Frames of speech (`neighbours`) are merged for the same share of a recording's work (`at`), the first block not
    spared: before each block by the same share of what is left, or, as the budget falls from one knee to the other, by
    one that falls by up to `decay` from block to block, since too few frames for the last blocks are worse than fewer
    for the first. Below a budget of `bend[0]` merging saves only the share `bend[1]` of what is still to be saved.

    Attributes:
        tokens: tokens a sample at the model's own input size.
        prefix: of these, never merged.
        blocks: number of blocks, L.
        dim: width of the residual stream.
        attention_dim: summed width of the heads.
        macs: MACs a sample of the whole dense model.
        linear_macs: for each block, MACs a token of all its linear layers.
        dense_macs: for each block, MACs a token of linear layers that stayed dense.
        every: merge before each block (1), each second one, ...: fewer merges take less time and lose a little more.
        fixed: pairs before each block at every budget, in place of the rule.
        path: of what holds the blocks.
        neighbours: tokens are frames, merged with their neighbours alone; the search for pairs is next to free.
        lengths: of frames, `Plan.length_macs`.
    """

    tokens: int
    prefix: int
    blocks: int
    dim: int
    attention_dim: int
    macs: int
    linear_macs: tuple[int, ...]
    dense_macs: tuple[int, ...]
    slope: float = 0.9
    start: float = 0.95
    first: tuple[float, float] = (3.0, 1.0)
    knees: tuple[float, float] = (0.65, 0.45)
    every: int = 1
    fixed: int | None = None
    decay: float = 0.0
    bend: tuple[float, float] = (0.0, 1.0)
    path: str = "blocks"
    neighbours: bool = False
    lengths: tuple[float, float, float] = (0.0, 1.0, 0.0)

    def block_of(self, fqn: str) -> int | None:
        """Which block a module lies in; None outside them."""
        inside = fqn.removeprefix(f"{self.path}.")
        return None if inside == fqn else int(inside.split(".")[0])

    def at(self, tokens: int, schedule: tuple[int, ...]) -> tuple[Merging, tuple[int, ...]]:
        """This merging for a recording of so many tokens, and the schedule that saves the same share of it.

        A longer recording has more to save in its attention: merging as much of it would save a larger share.
        """
        other = replace(self, tokens=tokens)
        return other, schedule if tokens == self.tokens else _stretched(self, other, tuple(schedule))

    def _cost(self) -> float:
        """Dense MACs of a recording; up to a factor, where lengths cost in proportion."""
        a, b, c = self.lengths
        return a + b * self.tokens + c * self.tokens**2

    def schedule(self, budget: float) -> tuple[int, ...]:
        """Pairs to merge before each block at a budget; never more than half of what is left to merge."""
        if self.fixed is not None:
            return self._possible([0] + [self.fixed] * (self.blocks - 1))

        def saved(total: int) -> int:
            return self._saved(self._spread(total, budget), self.linear_macs)

        budget = round(budget, 3)  # so that a table of a thousand rows is the whole rule (`export`)
        low, part = self.bend
        wanted = self.macs * self.slope * (self.start - max(budget, low) + part * max(low - budget, 0.0))
        most = 500 if self.neighbours else self.tokens
        return self._spread(bisect_left(range(most), wanted, key=saved), budget)

    def _spread(self, total: int, budget: float) -> tuple[int, ...]:
        """About `total` pairs over the blocks; of frames, about `total` thousandths of what is left before each."""
        (late, early), (high, low) = self.first, self.knees
        share = min(max((high - budget) / (high - low), 0.0), 1.0)
        begin = (late + share * (early - late)) * self.blocks / 12
        weights = [0.0] * self.blocks
        for i in range(0 if self.neighbours else 1, self.blocks, self.every):
            weights[i] = min(max((i - begin) / self.every + 1, 0.0), 1.0)
        if self.neighbours:
            falls = (w * (1 - share * self.decay) ** i for i, w in enumerate(weights))
            left = accumulate(((1 - total / 1000) ** w for w in falls), lambda a, b: a * b)
            reached = [round(self.tokens * (1 - part)) for part in left]
        else:
            weights = [(1.25 * self.blocks - i) * w for i, w in enumerate(weights)]
            reached = [round(total * part / (sum(weights) or 1.0)) for part in accumulate(weights)]
        return self._possible([b - a for a, b in pairwise([0, *reached])])

    def _possible(self, wanted: list[int]) -> tuple[int, ...]:
        out, left = [], self.tokens - self.prefix
        for r in wanted:
            out.append(min(r, left // 2))
            left -= out[-1]
        return tuple(out)

    def counts(self, schedule: Sequence[Any]) -> list[Any]:
        """Tokens in each block."""
        return list(accumulate(schedule, lambda left, r: left - r, initial=self.tokens))[1:]

    def saved(self, schedule: Sequence[Any]) -> Any:
        """MACs a sample that merging takes off what is not an adaptive site: attention products, dense layers.

        The search for pairs is taken off again. Of tensors () a tensor (), where a program is exported that computes
        the schedule.
        """
        return self._saved(schedule, self.dense_macs)

    def _saved(self, schedule: Sequence[Any], token_macs: tuple[int, ...]) -> Any:
        total: Any = 0
        before = self.tokens
        for r, count, macs in zip(schedule, self.counts(schedule), token_macs, strict=True):
            total = total + 2 * self.attention_dim * (self.tokens**2 - count**2) + macs * (self.tokens - count)
            if not self.neighbours:
                free = before - self.prefix
                total = total - (r > 0) * ((free + 1) // 2 * (free // 2) * self.dim)
            before = count
        return total


@lru_cache(maxsize=4096)
def _stretched(near: Merging, far: Merging, schedule: tuple[int, ...]) -> tuple[int, ...]:
    """A schedule of `near` for the length of `far`."""

    def pairs(thousandths: int) -> tuple[int, ...]:
        share = thousandths / 1000 * far.tokens / near.tokens
        return far._possible([round(r * share) for r in schedule])

    wanted = near._saved(schedule, near.linear_macs) / near._cost() * far._cost()
    most = 2000
    found = bisect_left(range(most), wanted, key=lambda k: far._saved(pairs(k), far.linear_macs))
    return pairs(min(found, most))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes where, at what size. See the module's docstring.

    Attributes:
        config: the method's config.
        macs_dense: MACs of the whole dense model for one sample (attention products, embedding and head included).
        macs_attention: MACs of the attention products alone, which stay in full.
        entries: adaptive sites.
        refused: places left dense, with the reason.
        input_size: of one sample.
        merging: tokens merged before the blocks, or None.
        scope: path of the part whose MACs the budget counts (the encoder of a speech-to-text model); "" for the whole.
        length_macs: where samples have unequal lengths, (a, b, c): the scope costs a + b T + c T^2 MACs for T tokens.
    """

    config: Any
    macs_dense: int
    entries: tuple[PlanEntry, ...]
    refused: tuple[Refusal, ...] = ()
    input_size: tuple[int, ...] = ()
    merging: Merging | None = None
    scope: str = ""
    length_macs: tuple[float, float, float] | None = None
    schema: int = SCHEMA

    def account(self, executed: Any, tokens: Mapping[str, Any], schedule: tuple[int, ...] = ()) -> tuple[Any, Any]:
        """MACs of each sample: of the whole, given those of its sites, and of the dense model.

        Args:
            executed: (samples,) MACs of the adaptive sites and their gates.
            tokens: entry -> tokens a sample, as a `Recorder` has them; "" -> tokens before any were merged.
            schedule: of merging.
        """
        zero = executed.detach() * 0
        if self.length_macs is None:
            return executed + self.macs_rest(schedule), zero + self.macs_dense
        constant, linear, square = self.length_macs
        length = zero + (tokens[""] if "" in tokens else tokens[counted_entry(self.entries).fqn])
        dense = constant + linear * length + square * length**2
        rest = dense - length * sum(e.macs // e.tokens for e in self.entries if not e.own_frames)
        rest = rest - sum(tokens[e.fqn] * (e.macs // e.tokens) for e in self.entries if e.own_frames)
        if self.merging is not None and any(schedule):
            rest = rest - zero.new_tensor([self._saved_at(round(n), schedule) for n in length.tolist()])
        return executed + rest, dense

    def _saved_at(self, tokens: int, schedule: tuple[int, ...]) -> int:
        assert self.merging is not None
        merging, here = self.merging.at(tokens, schedule)
        return merging.saved(here)

    def macs_rest(self, schedule: tuple[int, ...] = ()) -> int:
        """MACs a sample outside the adaptive sites and their gates, with this merging schedule."""
        rest = self.macs_dense - sum(e.macs for e in self.entries)
        return rest if self.merging is None or not schedule else rest - self.merging.saved(schedule)

    def schedule(self, budget: float) -> tuple[int, ...]:
        """Pairs merged before each block at a budget; empty without merging."""
        return () if self.merging is None else self.merging.schedule(budget)

    @property
    def exact(self) -> bool:
        """Whether full width equals the dense model before any training."""
        return getattr(self.config, "init", "pretrained") != "random"

    @property
    def budget_range(self) -> tuple[float, float]:
        """Smallest and largest share of the dense MACs that can be reached."""
        high = self.macs_rest() + sum(e.max_macs for e in self.entries)
        return self._floor(), high / self.macs_dense

    def _floor(self) -> float:
        """The smallest budget whose merging schedule, at the fewest learners, costs no more than it."""
        budget = (self.macs_rest() + sum(e.min_macs for e in self.entries)) / self.macs_dense
        while self.merging is not None and budget > 0.01 and self._least(budget - 0.005) <= budget - 0.005:
            budget -= 0.005
        return budget

    def _least(self, budget: float) -> float:
        schedule = self.schedule(budget)
        assert self.merging is not None
        share = sum(self.merging.counts(schedule)) / (self.merging.tokens * self.merging.blocks)
        sites = sum(e.min_macs * (1 if e.own_frames else share) for e in self.entries)
        return (self.macs_rest(schedule) + sites) / self.macs_dense

    def check_budget(self, budget: float) -> None:
        """Raise unless the budget can be reached.

        Raises:
            AcmizeError: outside (0, 1], or below what every token at its fewest learners would cost.
        """
        floor = self.budget_range[0]
        if not 0 < budget <= 1:
            raise AcmizeError(f"budget: found {budget}, expected a share of the dense MACs above 0 and at most 1")
        if budget < floor:
            raise AcmizeError(
                f"budget: found {budget}, but this plan cannot go below {floor:.3f}; "
                f"ask for {floor + 0.005:.2f} or more, or convert more sites"
            )

    def by_gate(self) -> dict[str, list[PlanEntry]]:
        """Entries grouped by the gate that decides for them."""
        groups: dict[str, list[PlanEntry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.gate_at, []).append(entry)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same plan back."""
        d = dataclasses.asdict(self)
        d["method"] = method_for(self.config).name
        for entry, e in zip(d["entries"], self.entries, strict=True):
            entry["num_learners"] = e.num_learners
        return d

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            AcmizeError: another schema, or fields that are missing, unknown or of a wrong type.
        """
        if not isinstance(d, dict) or type(d.get("schema")) is not int or d["schema"] != SCHEMA:
            found = d.get("schema") if isinstance(d, dict) else type(d).__name__
            raise AcmizeError(f"plan: found schema {found!r}, expected {SCHEMA}; convert again with this version")
        try:
            entries = tuple(_entry(e) for e in d["entries"])
            refused = tuple(Refusal(**r) for r in d["refused"])
            config = config_class(d["method"])(**d["config"])
            size = tuple(d["input_size"])
            _whole("plan", input_size=size)
            _whole("plan", least=1, macs_dense=d["macs_dense"])
            merging = None if d["merging"] is None else _merging(d["merging"])
            lengths = d.get("length_macs")
            return cls(
                config=config,
                macs_dense=d["macs_dense"],
                entries=entries,
                refused=refused,
                input_size=size,
                merging=merging,
                scope=str(d.get("scope", "")),
                length_macs=None if lengths is None else _three(lengths),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise AcmizeError(f"plan: damaged or tampered ({error}); restore the file or convert again") from None


def _three(values: Any) -> tuple[float, float, float]:
    a, b, c = map(float, values)
    return a, b, c


def _merging(d: dict[str, Any]) -> Merging:
    lists = {
        name: tuple(d[name]) for name in ("linear_macs", "dense_macs", "first", "knees", "bend", "lengths") if name in d
    }
    merging = Merging(**{**d, **lists})
    counts = {name: getattr(merging, name) for name in ("prefix", "dim", "attention_dim", "macs")}
    _whole(
        "merging", **counts, fixed=merging.fixed or 0, linear_macs=merging.linear_macs, dense_macs=merging.dense_macs
    )
    _whole("merging", least=1, tokens=merging.tokens, blocks=merging.blocks, every=merging.every)
    each, (high, low) = (merging.linear_macs, merging.dense_macs), _two(merging.knees)
    shares = (*_two(merging.first), *_two(merging.bend), float(merging.slope), float(merging.start))
    if (
        any(len(macs) != merging.blocks for macs in each)
        or not merging.prefix < merging.tokens <= 1_000_000
        or not low < high
        or not all(-100 <= share <= 100 for share in shares)
        or not 0 <= float(merging.decay) <= 1
        or not isinstance(merging.path, str)
        or not isinstance(merging.neighbours, bool)
        or not all(0 <= part <= 1e18 for part in _three(merging.lengths))
    ):
        raise ValueError(f"merging: {merging.blocks} blocks of {merging.tokens} tokens do not fit")
    return merging


def _two(values: Any) -> tuple[float, float]:
    a, b = map(float, values)
    return a, b


def _entry(d: dict[str, Any]) -> PlanEntry:
    d = {k: v for k, v in d.items() if k != "num_learners"}
    d["bounds"], d["learner_macs"] = tuple(d["bounds"]), tuple(d["learner_macs"])
    entry = PlanEntry(**d)
    texts = (entry.fqn, entry.target, entry.gate_at, entry.kind, entry.form, *entry.roles, *entry.roles.values())
    if not all(isinstance(text, str) for text in texts) or not isinstance(entry.options, dict):
        raise TypeError(f"{entry.fqn}: names must be text, options an object")
    _whole(entry.fqn, bounds=entry.bounds, learner_macs=entry.learner_macs, gate_macs=entry.gate_macs, macs=entry.macs)
    _whole(entry.fqn, least=1, heads=entry.heads, tokens=entry.tokens)
    _whole(entry.fqn, min_choice=entry.min_choice, max_macs=entry.max_macs)
    ok = len(entry.bounds) == len(entry.learner_macs) + 1 and list(entry.bounds) == sorted(set(entry.bounds))
    if not ok or entry.bounds[0] != 0 or entry.bounds[-1] > 1_000_000 or entry.min_choice > entry.num_learners:
        found = f"{len(entry.bounds)} widths up to {entry.bounds[-1] if entry.bounds else 0}"
        raise ValueError(f"{entry.fqn}: {found} do not fit {len(entry.learner_macs)} learners")
    return entry


def _whole(where: str, *, least: int = 0, **values: Any) -> None:
    """Refuses what is not a whole number (or a tuple of them) from `least` to `LARGEST`."""
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is not int or not least <= number <= LARGEST:
                raise ValueError(f"{where}: {name}: found {str(number)[:40]}, expected {least} to {LARGEST}")
