"""Every option of a conversion in one frozen place: what the command line, a YAML file and Python all fill in."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from acmize.errors import AcmizeError
from acmize.phases._loop import FitConfig
from acmize.phases.finetune import FinetuneConfig
from acmize.registry import config_class, method_for, methods
from acmize.unreadable import LIMIT

MAX_BYTES = 1 << 16  # of a YAML file, which takes seconds to read where JSON takes milliseconds
PHASES = ("distill", "gates", "finetune")
LABELS = ("damage", "threshold", "none")


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """Phase 1. `epochs` over the training images, AdamW at `lr`, `tokens` of a batch for each site.

    With `by_site`, each of several processes learns some of the sites, in place of all of them from some samples.
    """

    epochs: int = 1
    lr: float = 1e-4
    tokens: int = 1024
    by_site: bool = False

    def __post_init__(self) -> None:
        _in_range(self, tokens=self.tokens >= 1)


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """Phase 2.

    Attributes:
        labels: "damage", the published "threshold" labels of ACM with improvement factor `tau`, or "none": nothing is
            fitted, and the gates stay at their start.
        rounds: times damages are collected: first at full width, then with the gates on at drawn `budgets`.
        images: unlabelled images used at most in a round.
        draws: classes drawn an image.
        keep_tokens: share of tokens kept for fitting, to bound memory.
        steps: optimiser steps a round.
        compensate: refit biases to the choices between the rounds (`compensate_`); no gain was measured (docs/log.md).
        lr: peak learning rate; None: 3e-3 for damage, 1e-2 as published for threshold labels.
    """

    labels: str = "damage"
    tau: float = 1.2
    rounds: int = 2
    images: int = 600
    draws: int = 2
    keep_tokens: float = 0.5
    steps: int = 400
    compensate: bool = False
    lr: float | None = None
    budgets: tuple[float, float] = (0.45, 0.9)

    def __post_init__(self) -> None:
        _in_range(
            self, tau=self.tau > 1, rounds=self.rounds >= 1, images=self.images >= 1, draws=self.draws >= 1,
            keep_tokens=0 < self.keep_tokens <= 1, steps=self.steps >= 1, lr=self.lr is None or self.lr > 0,
            budgets=0 < self.budgets[0] <= self.budgets[1] <= 1,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Phase 3: epochs, AdamW at `lr`, and the augmentation of timm.data.

    Gates are trained at `gate_lr` and `gate_decay` (weight decay) where given, else like the rest. `crop_scale`,
    `crop_pad` (in place of the scaled crop: pad by so many pixels, then crop at random, as is usual at 32x32),
    `randaugment` and `hflip` (probability; 0 where left and right differ, as with digits) serve phase 1 too. In speech,
    SpecAugment: `masks` stretches of time, each up to `mask_time` of the frames, and as many of channels, each up to
    `mask_channels` of them. With `interpolate`, how far to go from the weights before phase 3 is chosen on the held-out
    images. With `batch_norm`, BatchNorm is trained too, on the statistics of batches, in place of keeping those of the
    dense model. With `shard`, several processes divide weights, gradients and optimizer states (FSDP2).
    """

    epochs: int = 12
    lr: float = 1e-4
    weight_decay: float = 0.01
    gate_lr: float | None = None
    gate_decay: float | None = None
    warmup: float = 0.05
    ema_decay: float | None = None
    accumulate: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: str | None = None
    mask_time: float = 0.0
    mask_channels: float = 0.0
    masks: int = 2
    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_pad: int | None = None
    hflip: float = 0.5
    batch_norm: bool = False
    interpolate: bool = True
    shard: bool = False

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _in_range(
            self, mask_time=0 <= self.mask_time < 1, mask_channels=0 <= self.mask_channels < 1,
            masks=self.masks >= 1, mixup=self.mixup >= 0, cutmix=self.cutmix >= 0, hflip=0 <= self.hflip <= 1,
            crop_scale=0 < low <= high <= 1, crop_pad=self.crop_pad is None or self.crop_pad >= 0,
            weight_decay=self.weight_decay >= 0,
            gate_lr=self.gate_lr is None or self.gate_lr > 0,
            gate_decay=self.gate_decay is None or self.gate_decay >= 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole conversion.

    Attributes:
        budget: share of the dense MACs the model is left at.
        budgets: further budgets that are calibrated and evaluated.
        phases: which of distill, gates, finetune train; without "gates" or with none of them, gates are still fitted
            in closed form on collected statistics.
        method: name of a registered method: acm, or one for CNNs.
        config: its config, such as `AcmConfig`; None: the method's defaults. In options it may also stand under the
            method's own name (`acm: {num_learners: 4}`), which then names the method too.
        distill: options of phase 1.
        gates: options of phase 2.
        train: options of phase 3.
        losses: weights of phase 3.
        target_modules: globs or declarations, see `hosts.parse_targets`.
        exclude: globs of what stays dense.
        merge: tokens merged before each block: "budget" (as suits it), "auto" (so where it is sound), "none", or a
            number.
        fit_batch: leave sites dense whose learners do not pay on this device in batches of this size (measured), but
            for those that the budget needs beside merging; None: convert whatever can be.
        data: where the data came from.
        streaming: read images or recordings as they come (`streaming`), in place of loading the data first.
        limit: samples a split at most; of a stream of unknown length, those that an epoch takes.
        holdout: share of the training images kept for calibration.
        moments: images for the statistics of ordering and rotation.
        batch_size: of every phase.
        mixed_precision: "no", "bf16" or "fp16".
        seed: of everything drawn.
        max_corrupt: samples that cannot be read and are left out, at most; one more is an error.
        max_error: distillation error, relative to the variance, above which a site is left dense.
    """

    budget: float = 0.5
    budgets: tuple[float, ...] = (0.9, 0.75, 0.6, 0.5, 0.4)
    phases: tuple[str, ...] = PHASES
    method: str = "acm"
    config: Any = None
    distill: DistillOptions = field(default_factory=DistillOptions)
    gates: GateOptions = field(default_factory=GateOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    losses: FinetuneConfig = field(default_factory=FinetuneConfig)
    target_modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    merge: str | int = "auto"
    fit_batch: int | None = None
    data: str | None = None
    streaming: bool = False
    limit: int | None = None
    holdout: float = 0.15
    moments: int = 300
    batch_size: int = 32
    mixed_precision: str = "no"
    seed: int = 0
    max_corrupt: int = LIMIT
    max_error: float = 0.9

    def __post_init__(self) -> None:
        unknown = [p for p in self.phases if p not in PHASES]
        if unknown:
            raise AcmizeError(f"phases: found {unknown[0]!r}, expected none, all, or some of {', '.join(PHASES)}")
        expected = _config_class(self.method)
        config: Any = expected() if self.config is None else self.config
        object.__setattr__(self, "config", config)
        if type(config) is not expected:
            found = type(config).__name__
            raise AcmizeError(f"config: found {found}, expected {expected.__name__}, of method {self.method!r}")
        if self.gates.labels not in LABELS:
            raise AcmizeError(f"gate labels: found {self.gates.labels!r}, expected {' or '.join(LABELS)}")
        allowed = method_for(config).gates
        if self.gates.labels not in allowed[config.gate]:
            fit = " or ".join(repr(g) for g, labels in allowed.items() if self.gates.labels in labels) or "no gate"
            raise AcmizeError(
                f"gate labels {self.gates.labels!r} need gate={fit}, found {config.gate!r}; set both or neither"
            )
        _in_range(
            self, budget=0 < self.budget <= 1, budgets=all(0 < b <= 1 for b in self.budgets),
            limit=self.limit is None or self.limit >= 1, batch_size=self.batch_size >= 1, moments=self.moments >= 1,
            seed=self.seed >= 0, max_corrupt=self.max_corrupt >= 0,
            fit_batch=self.fit_batch is None or self.fit_batch >= 1,
        )  # fmt: skip
        for phase in (self.distill, self.train):  # what the loop would refuse an hour from now
            rest = {k: getattr(phase, k) for k in ("warmup", "ema_decay", "accumulate") if hasattr(phase, k)}
            self.loop(epochs=phase.epochs, lr=phase.lr, **rest)

    def loop(self, *, epochs: int, lr: float, **rest: Any) -> FitConfig:
        """Config of the training loop for a phase of this recipe."""
        return FitConfig(epochs=epochs, lr=lr, seed=self.seed, mixed_precision=self.mixed_precision, **rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Recipe:
        """A recipe from (part of) a dictionary such as a YAML file's; what is left out has its default.

        Raises:
            AcmizeError: an option that does not exist, or a value that does not fit.
        """
        return _build(cls, _one_config(d), "recipe")


def preset(name: str) -> dict[str, Any]:
    """Options of a preset, to be merged under one's own.

    "default" is this project's. "paper" is arXiv 2312.10193 without its released defects: 4 random learners, low-rank
    projections, classification gates on threshold labels, one budget a run, no teacher.
    """
    if name == "default":
        return {}
    if name == "paper":
        return {
            "acm": {"num_learners": 4, "gate": "classification", "projections": "lowrank", "init": "random"},
            "distill": {"epochs": 2, "lr": 1e-3},
            "gates": {"labels": "threshold", "rounds": 1},
            "train": {"lr": 1e-4, "interpolate": False},
            "losses": {"task": 1.0, "teacher": 0.0, "features": 0.0, "entropy": 0.05, "diversity": 0.05},
            "merge": "none",
            "one_budget": True,
        }
    raise AcmizeError(f"preset: found {name!r}, expected default or paper")


def resolve(*layers: dict[str, Any], preset_name: str = "default") -> Recipe:
    """Merge a preset and dictionaries of options, later ones first in rank, into a recipe."""
    merged: dict[str, Any] = {}
    given = [_one_config(layer) for layer in (preset(preset_name), *layers)]
    name = next((layer["method"] for layer in reversed(given) if "method" in layer), Recipe.method)
    if not isinstance(name, str):
        raise AcmizeError(f"method: found {str(name)[:80]!r}, expected one of {', '.join(methods())}")
    if given[0].get("method", name) != name:
        found = f"preset {preset_name}: is one of method {given[0]['method']}, found method {name}"
        raise AcmizeError(f"{found}; leave one of them out")
    for layer in ({**methods()[name][0].defaults} if name in methods() else {}, *given):
        _merge(merged, layer)
    if merged.pop("one_budget", False):
        budget = merged.setdefault("budget", Recipe.budget)
        merged.setdefault("losses", {}).setdefault("budgets", (budget, budget))
        merged.setdefault("budgets", (budget,))
    if isinstance(merged.get("phases"), str):
        merged["phases"] = named_phases(merged["phases"])
    gates, config = merged.setdefault("gates", {}), merged.setdefault("config", {})
    if not isinstance(gates, dict) or not isinstance(config, dict):
        raise AcmizeError("gates, config: expected options such as `acm: {num_learners: 4}`")
    _match(gates, config, name)
    return _reaching(Recipe.from_dict(merged), merged)


def _reaching(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """Ranges of budgets that were not given reach the smallest that is wanted: gates know what they have met."""
    low = min((recipe.budget, *recipe.budgets))
    if low >= FinetuneConfig.budgets[0]:
        return recipe
    wider = {
        part: replace(options, budgets=(low, options.budgets[1]))
        for part, options in (("gates", recipe.gates), ("losses", recipe.losses))
        if "budgets" not in given.get(part, {})
    }
    return replace(recipe, **wider)


def _match(gates: dict[str, Any], config: dict[str, Any], name: str) -> None:
    """One of the gate and its labels decides the other where it is not given."""
    if name not in methods():
        return  # refused by name a moment later
    method, cls = methods()[name]
    usual = next(f.default for f in dataclasses.fields(cls) if f.name == "gate")
    if "labels" in gates and "gate" not in config:
        fit = [gate for gate, labels in method.gates.items() if gates["labels"] in labels]
        if fit:
            config["gate"] = usual if usual in fit else fit[0]
    elif "labels" not in gates and config.get("gate", usual) in method.gates:
        gates["labels"] = method.gates[config.get("gate", usual)][0]


def _one_config(d: dict[str, Any]) -> dict[str, Any]:
    """Options with the config under "config", wherever it stood: there, or under a method's own name."""
    named = [key for key in d if str(key).replace("_", "-") in methods()]
    if not named:
        return d
    key = named[0]
    name = key.replace("_", "-")
    if len(named) > 1 or "config" in d or d.get("method", name) != name:
        told = [*named, *(k for k in ("config", "method") if k in d)]
        raise AcmizeError(f"recipe: found {', '.join(told)}, expected the config of one method")
    return {**{k: v for k, v in d.items() if k != key}, "method": name, "config": d[key]}


def _config_class(name: str) -> type:
    try:
        return config_class(name)
    except ValueError as error:
        raise AcmizeError(str(error)) from None


def named_phases(text: str) -> tuple[str, ...]:
    """The names of phases from "all", "none" or a comma list."""
    text = {"all": ",".join(PHASES), "none": ""}.get(text.strip(), text)
    return tuple(p.strip() for p in text.split(",") if p.strip())


def read_config(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        AcmizeError: the file is missing or not a mapping.
    """
    import yaml

    try:
        if Path(path).stat().st_size > MAX_BYTES or not Path(path).is_file():
            raise ValueError(f"no file of at most {MAX_BYTES} bytes")
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        _countable(found, [MAX_BYTES])
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise AcmizeError(f"--config {path}: cannot be read ({str(error).splitlines()[0][:300]})") from None
    if not isinstance(found, dict):
        raise AcmizeError(f"--config {path}: found {type(found).__name__}, expected options such as `budget: 0.5`")
    return found


def _countable(value: Any, left: list[int]) -> None:
    """Refuses YAML that some lines blow up to more values than memory has room for."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {MAX_BYTES} values")
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _countable(part, left)


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, dict):
            into[key] = dict(value)
        else:
            into[key] = value


_NESTED: dict[str, type] = {
    "distill": DistillOptions,
    "gates": GateOptions,
    "train": TrainOptions,
    "losses": FinetuneConfig,
}


def _build(cls: type, d: dict[str, Any], where: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(d) - known))
    if unknown:
        raise AcmizeError(f"{where}: unknown option {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
    values, hints = {}, typing.get_type_hints(cls)
    for key, value in d.items():
        if cls is Recipe and key in _NESTED and isinstance(value, dict):
            value = _build(_NESTED[key], value, key)
        elif cls is Recipe and key == "config" and isinstance(value, dict):
            value = _build(_config_class(d.get("method", Recipe.method)), value, key)
        values[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[key], hints[key]):
            wanted = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else None
            raise AcmizeError(f"{where}: {key}: found {value!r}, expected {wanted or hints[key]}")
    try:
        return cls(**values)
    except AcmizeError:
        raise
    except (TypeError, ValueError) as error:
        raise AcmizeError(f"{where}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can stand where `hint` is declared; whole numbers may stand for floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return isinstance(value, str)  # which one is checked by the class itself, with a better message
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(each) and all(_fits(v, a) for v, a in zip(value, each, strict=True))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _in_range(options: Any, **fine: bool) -> None:
    for name, is_fine in fine.items():
        if not is_fine:
            found = getattr(options, name)
            raise ValueError(f"{name}: found {found!r}, which is out of range; see {type(options).__name__}")
