"""Phase 3: the whole model end to end, gates taught by the task through straight-through choices.

    loss = a_k task + a_t KL(dense || adaptive) + a_f ||features - dense features||^2 + a_b L_b + a_e L_e + a_d L_d

A budget is drawn for every step and its price set before the forward, so that one checkpoint serves every budget; L_b
holds the realised compute at the drawn budget. What the task's loss is comes with the data (`Task`). (arXiv 2312.10193,
sect. 3.3 trains one model a budget, no teacher.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.gates import gates_of, set_progress
from acmize.inputs import Batch, Inputs, counted, forward, logits_of
from acmize.losses import budget_loss, diversity_loss, entropy_loss, task_loss, teacher_loss
from acmize.phases._loop import FitConfig, History, fit
from acmize.phases._shard import sharded
from acmize.phases.calibrate import Calibration, set_budget
from acmize.plan import Plan
from acmize.recording import Recorder, record

# Where timm's DropPath, and what transformers drops by functions, keep their rates.
_RATES = ("drop_prob", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout")
Task = Callable[[Tensor, Batch, Any], Tensor]  # logits as the model gives them, inputs, labels -> a term


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Weights of the losses and the range of budgets.

    Attributes:
        task: weight of the loss with labels or transcripts; 0 or none of them: the teacher alone.
        teacher: weight of the KL to the dense model's logits.
        features: weight of the squared distance to the dense model's final features, relative to their variance.
        budget: a_b; entropy: a_e; diversity: a_d (0.1, 0.05, 0.05 in the paper's text and code).
        budgets: range from which a step's budget is drawn; two equal ends train one budget, as published.
        temperature: of the KL's two distributions. A teacher that knows its training images by heart has but one class
            to name at 1; what else they look like is in its logits (Hinton et al., arXiv:1503.02531).
    """

    task: float = 0.25
    teacher: float = 1.0
    features: float = 0.5
    budget: float = 0.1
    entropy: float = 0.05
    diversity: float = 0.05
    budgets: tuple[float, float] = (0.4, 0.95)
    label_smoothing: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("task", "teacher", "features", "budget", "entropy", "diversity"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a weight of at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number above 0")
        low, high = self.budgets
        if not 0 < low <= high <= 1:
            raise ValueError(f"budgets: found {self.budgets}, expected 0 < low <= high <= 1")


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    calibration: Calibration,
    batches: Callable[[int], Iterable[Any]],
    *,
    steps_per_epoch: int,
    losses: FinetuneConfig,
    config: FitConfig,
    task: Task | None = None,
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]] | None = None,
    gates: dict[str, float] | None = None,
    batch_norm: bool = False,
    shard: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    watch: Callable[[int, dict[str, float]], None] | None = None,
) -> History:
    """Train learners and gates together.

    Args:
        model: converted, gates fitted.
        teacher: the dense model, frozen.
        plan: its plan.
        calibration: budget -> dial of the gates as they come in.
        batches: epoch -> batches of (inputs, labels); what labels are is the task's.
        steps_per_epoch: batches an epoch.
        losses: weights and budgets.
        config: of the loop.
        task: loss of the labels; None: cross-entropy of classes, -1 unknown.
        mix: mixup or cutmix: (inputs, labels, step) -> (inputs, soft labels).
        gates: `lr` or `weight_decay` of the parameters of gates, where they differ from the rest.
        batch_norm: train BatchNorm too, on the statistics of batches; see `undisturbed`.
        shard: divide weights, gradients and optimizer states among the processes; there are no checkpoints inside then.
        checkpoint: folder for checkpoints.
        resume: go on from the checkpoint there.
        watch: sees every logged step.
    """
    if shard and parallel.processes() > 1:
        with sharded(model) as twin:
            return finetune(
                twin, teacher, plan, calibration, batches, steps_per_epoch=steps_per_epoch, losses=losses,
                config=config, task=task, mix=mix, gates=gates, batch_norm=batch_norm, watch=watch,
            )  # fmt: skip
    model.train()
    teacher.eval()
    low, high = (max(budget, plan.budget_range[0]) for budget in losses.budgets)
    batches_in_all = max(1, steps_per_epoch * config.epochs)
    task = task or of_classes(losses.label_smoothing)

    def loss(rows: parallel.Rows, step: int) -> dict[str, Tensor]:
        with rows.counted() as (inputs, labels):
            return of_rows(inputs, labels, step)

    def of_rows(inputs: Batch, labels: Any, step: int) -> dict[str, Tensor]:
        labels = None if labels is None else parallel.gather(labels)
        if mix is not None:
            inputs, labels = _mixed(mix, inputs, labels, step)
        budget = drawn_budget((low, high), config.seed, step)
        set_budget(model, plan, calibration, budget)
        set_progress(model, step / batches_in_all)
        with torch.no_grad():
            teacher_features, teacher_logits = features_and_logits(teacher, inputs)
        with record(model, len(inputs), keep_inputs=losses.entropy > 0) as seen:
            features, logits = features_and_logits(model, inputs)
        features, teacher_features = (
            None if each is None else parallel.gather(each) for each in (_read(features), _read(teacher_features))
        )
        logits, teacher_logits = parallel.gather(logits), parallel.gather(teacher_logits)
        inputs = _answered(inputs)
        answers = counted(logits, inputs), counted(teacher_logits, inputs)
        terms = {"teacher": teacher_loss(*answers, losses.temperature)}
        terms["task"] = task(logits, inputs, labels)
        terms["features"] = _relative(features, teacher_features)
        spent, dense = plan.account(seen.differentiable(), seen.tokens, plan.schedule(budget))
        compute = parallel.gather((spent / dense).float())  # of doubles, where a process has padded samples
        terms["budget"] = budget_loss(compute, budget)
        terms["diversity"] = diversity_loss(compute)
        terms["entropy"] = entropy_loss(_soft_choices(seen)) if losses.entropy and seen.seen else logits.new_zeros(())
        total = sum(getattr(losses, name) * term for name, term in terms.items())
        for name, own in seen.losses.items():  # what modules of the method learn beside, weighted by themselves
            terms[name] = torch.stack(own).sum()
            total = total + terms[name]
        return {"loss": total, **terms, "compute": compute.mean().detach(), "asked": torch.tensor(budget)}  # pyright: ignore

    try:
        with undisturbed(model, batch_norm):
            return fit(
                name="finetune", model=model, loss=loss, batches=lambda epoch: parallel.in_step(batches(epoch)),
                steps_per_epoch=steps_per_epoch, config=config, params=_groups(model, gates or {}),
                checkpoint=checkpoint, resume=resume, watch=watch,
            )  # fmt: skip
    finally:
        set_progress(model, 1.0)
        model.eval()


def of_classes(smoothing: float = 0.0) -> Task:
    """Cross-entropy of every output that counts with its label: a class each, -1 unknown, or a distribution."""
    return lambda logits, inputs, labels: task_loss(counted(logits, inputs), labels, smoothing)


@contextmanager
def undisturbed(model: nn.Module, batch_norm: bool = False) -> Iterator[None]:
    """Inside, a model in train mode draws nothing but its gates' choices: no dropout, and BatchNorm as in eval mode.

    Statistics of a batch in which some samples skip a layer would be those of a model that never runs. And a teacher
    without noise teaches a model with dropout to make up for the noise: a small wav2vec2 whose KL to it was .01 had .7
    under a dropout of .1, and was worse at every budget for having been taught so.

    With `batch_norm` BatchNorm is trained like the rest: many epochs at budgets near each other can pay for it. What it
    keeps for later is a mean over about 100 steps. Statistics are those of all samples of this process, also of those
    that are to skip the layer: in training nothing is skipped.
    """
    modules = list(model.modules())
    batch_norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    inside = [(m, "p", 0.0) for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
    inside += [(m, n, 0.0) for m in modules for n in _RATES if isinstance(vars(m).get(n), float)]
    inside += [(m, "momentum", 0.01) for m in batch_norms]
    before = [getattr(m, name) for m, name, _ in inside]
    try:
        for module in batch_norms:
            module.train(batch_norm and module.training)
        for module, name, rate in inside:  # not eval mode: attention reads the rate of its dropout
            setattr(module, name, rate)
        yield
    finally:
        for (module, name, _), rate in zip(inside, before, strict=True):
            setattr(module, name, rate)


def _groups(model: nn.Module, gates: dict[str, float]) -> list[Any] | None:
    """Parameter groups for the optimizer: those of gates apart, where they are trained otherwise."""
    if not gates:
        return None
    apart = {id(p) for gate in gates_of(model) for p in gate.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in apart]
    return [*([{"params": rest}] if rest else []), {"params": [p for p in trained if id(p) in apart], **gates}]


def drawn_budget(budgets: tuple[float, float], seed: int, step: int) -> float:
    """The budget of a step: the golden-ratio sequence, which covers the range evenly however few the steps."""
    low, high = budgets
    return low + (high - low) * math.modf((step + 1 + seed) * 0.6180339887498949)[0]


def features_and_logits(model: nn.Module, inputs: Batch) -> tuple[Tensor | None, Tensor]:
    """Final features, where the model separates them (timm; a speech encoder's frames), and logits."""
    if isinstance(inputs, Inputs):
        output = forward(model, inputs)
        features = getattr(output, "encoder_last_hidden_state", None)
        return None if features is None else features.flatten(0, 1), output.logits
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        features = model.forward_features(inputs)  # pyright: ignore[reportCallIssue]
        return features, model.forward_head(features)  # pyright: ignore[reportCallIssue]
    return None, logits_of(model(inputs))


def _mixed(mix: Any, inputs: Any, labels: Tensor, step: int) -> tuple[Any, Tensor | None]:
    """This process's rows of the mixed batch, and all labels: samples are mixed with those of other processes."""
    ((before, _),) = parallel.offsets([len(inputs)], inputs.device)
    mixed, labels_of_all = mix(parallel.gather(inputs), labels, step)
    return mixed[before : before + len(inputs)], labels_of_all


def _answered(inputs: Batch) -> Batch:
    """What the losses read of a batch, of all processes: which of its outputs count."""
    if not isinstance(inputs, Inputs):
        return inputs
    return Inputs({}, None if inputs.counts is None else parallel.gather(inputs.counts))


def _read(features: Tensor | None) -> Tensor | None:
    """What the head reads: the first token (merged tokens have no counterpart), or everything."""
    return features[:, 0] if features is not None and features.dim() == 3 else features


def _relative(features: Tensor | None, target: Tensor | None) -> Tensor:
    """Distance of the features, relative to their variance."""
    if features is None or target is None:
        return torch.zeros(())
    return (features - target).square().mean() / target.var().clamp_min(1e-12)


def _soft_choices(seen: Recorder) -> list[Tensor]:
    """(B, 1, K) choice probabilities of each site, mean over tokens: of `keep`, hard forward and soft backward."""
    out = []
    for _, _, decision in seen.seen:
        if decision.keep is None:
            continue
        for keep in decision.keep.unbind(-2):
            p = F.pad(keep, (1, 0), value=1.0) - F.pad(keep, (0, 1))
            if (valid := decision.valid) is not None:  # the mean over tokens is then one over real tokens
                p = p * (valid / valid.float().mean(-1, keepdim=True))[..., None]
            out.append(parallel.gather(p.reshape(seen.samples, -1, p.shape[-1]).mean(1, keepdim=True)))
    return out


__all__ = [
    "FinetuneConfig", "Task", "drawn_budget", "features_and_logits", "finetune", "of_classes", "undisturbed",
]  # fmt: skip
