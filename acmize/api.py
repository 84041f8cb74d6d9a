"""The whole way from a pretrained model to an adaptive one, in the order of docs/concepts.md.

    plan -> insert -> learners from the weights -> [distill] -> gates -> [finetune] -> calibrate -> evaluate

Every stage leaves its weights in the work folder, so that a conversion that was killed goes on where it stopped and
ends with the same numbers; each stage draws from generators of its own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize import parallel
from acmize.audio import open_audio
from acmize.batches import mixup
from acmize.checkpoint import read_json, save_tensors, write_json
from acmize.compensate import compensate_
from acmize.damage import collect_damage
from acmize.diagnose import Finding, check_gates, check_sites
from acmize.environment import environment, peak_bytes, release_memory
from acmize.errors import AcmizeError
from acmize.evaluate import evaluate, mean_error, reference
from acmize.gates import choosing, full_width, set_dial
from acmize.hf_models import processor_of
from acmize.hosts import make_plan
from acmize.hosts_speech import is_speech
from acmize.hub import base_of, make_adaptive, save_pretrained
from acmize.images import Batches, Images, images_to_test
from acmize.init import initialise_
from acmize.insert import converted
from acmize.methods.token_merging import set_schedule
from acmize.models import load_model
from acmize.phases._loop import History
from acmize.phases.calibrate import Calibration, calibrate, set_budget
from acmize.phases.distill import distill, distillable
from acmize.phases.finetune import drawn_budget, finetune
from acmize.phases.interpolate import interpolate_
from acmize.phases.pretrain_gates import collect_errors, fit_classification_gates, fit_damage_gates
from acmize.plan import Plan, Refusal
from acmize.recipe import Recipe, resolve
from acmize.site_times import SiteTime, site_times
from acmize.speech import Listener, Speech, Spoken
from acmize.weights import Weights

log = logging.getLogger("acmize")


# --- the pipeline ---------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    *,
    data: Any,
    budget: float | None = None,
    recipe: Recipe | None = None,
    base: dict[str, Any] | None = None,
    plan: Plan | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    output: str | Path | None = None,
    **options: Any,
) -> Any:
    """Make a pretrained model adaptive.

    Args:
        model: a dense model; left as it is.
        data: anything `datasets.load_dataset` opens: a folder of images, a Hub data set, a `DatasetDict`. Labels are
            optional.
        budget: share of the dense MACs the model is left at; `model.set_budget` changes it later.
        recipe: every option; or give some of them as keywords (`phases=()`, `seed=1`, `acm={"num_learners": 4}`,
            `method="cosine-gate"`).
        base: how to build the dense model again, from `base_of(model, kwargs)`.
        plan: from `make_plan`, for sites of a module of one's own.
        work: folder for checkpoints; kept on failure, removed on success.
        resume: go on from the checkpoints in `work`.
        output: folder to save the result in, before `work` is removed.
        options: fields of a `Recipe`, in place of `recipe`.

    Returns:
        A converted copy with `set_budget`, `save_pretrained`, `push_to_hub`, and its measured `results`.

    Raises:
        AcmizeError: anything the caller can mend.
    """
    if recipe is None:
        recipe = resolve(options)
    elif options:
        raise TypeError(f"give a recipe or options, not both: found {sorted(options)}")
    parallel.join(next(model.parameters()).device)
    if budget is not None:
        recipe = Recipe(**{**{f: getattr(recipe, f) for f in recipe.__dataclass_fields__}, "budget": budget})
    speech = Speech(data, model, recipe) if is_speech(model) else None
    if plan is None:
        plan = make_plan(
            model, recipe.config, example=speech and speech.example, target_modules=recipe.target_modules,
            exclude=recipe.exclude, merge=recipe.merge,
        )  # fmt: skip
    plan.check_budget(recipe.budget)
    samples = speech or Images(data, model, recipe)
    made = _Conversion(model, plan, recipe, samples, work, resume).run(base)
    if is_speech(model):
        made.processor = processor_of(model)
    if parallel.is_main():
        if output is not None:
            save_pretrained(made, output)
        if work is not None:
            shutil.rmtree(work)
    parallel.wait()
    return made


class _Conversion:
    """One conversion under way: the stages in order, each resumable."""

    def __init__(
        self,
        dense: nn.Module,
        plan: Plan,
        recipe: Recipe,
        images: Images | Speech,
        work: str | Path | None,
        resume: bool,
    ) -> None:
        self.dense, self.plan, self.recipe = dense.eval(), plan, recipe
        self.images: Any = images  # of either kind: what differs is inside
        self.model = converted(dense, plan).eval()
        self.work = None if work is None else Path(work)
        self.left_dense: dict[str, str] = {}  # entry -> why, beyond the plan that was made first
        self.findings: list[Finding] = []
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}  # largest resident memory so far, GB
        self.measured: dict[str, Any] = {}  # by stages, beside the weights
        self.calibration: Calibration | None = None
        # Where gradients reach every choice of every token, memory is that of the activations, many times over.
        self.small_batch = min(
            20 if plan.macs_dense < 8e9 else max(1, round(1.4e11 / plan.macs_dense)), recipe.batch_size
        )
        self._check_labels()
        few = min(len(self.images.fit), len(self.images.held))
        if few < parallel.processes():
            found = f"{few} samples to fit on or held out, for {parallel.processes()} processes"
            raise AcmizeError(f"data {self.images.name}: found {found}, expected one each; give more, or start fewer")
        if self.work is not None:
            if parallel.is_main():
                if not resume and self.work.exists():
                    shutil.rmtree(self.work)
                self.work.mkdir(parents=True, exist_ok=True)
            parallel.wait()
            self._same_recipe()
            parallel.wait()

    def _same_recipe(self) -> None:
        path = self.work / "recipe.json"  # pyright: ignore[reportOptionalOperand]
        mine = {
            "recipe": self.recipe.to_dict(), "plan": self.plan.to_dict(), "weights": _fingerprint(self.dense),
            "images": [len(self.images.fit), len(self.images.held)],
        }  # fmt: skip
        if path.exists():
            stored, mine = _plain(read_json(path)), _plain(mine)
            other = [k for k in mine if not isinstance(stored, dict) or stored.get(k) != mine[k]]
            if other:
                raise AcmizeError(
                    f"{path}: the unfinished conversion there had other {' and '.join(other)} (options, model, data); "
                    "give the same ones, or leave --resume out to start anew"
                )
            return
        if parallel.is_main():
            write_json(path, mine)

    def _check_labels(self) -> None:
        """What finetune would only find out after the other phases."""
        losses = self.recipe.losses
        if "finetune" not in self.recipe.phases or losses.task == 0 or losses.teacher > 0 or losses.features > 0:
            return
        if not self.images.has_labels:
            raise AcmizeError(
                f"data {self.images.name}: found no labels, but finetune without a teacher needs them; give labels, "
                "set losses.teacher above 0, or leave finetune out of --phases"
            )

    def run(self, base: dict[str, Any] | None) -> Any:
        """All stages; see the module's docstring."""
        phases = self.recipe.phases
        if self.recipe.fit_batch is not None:
            self._fit_device(self.recipe.fit_batch)
        self._stage("init", self._init)
        if "distill" in phases:
            self._stage("distill", self._distill)
        self._stage("gates", self._gates)
        if "finetune" in phases:
            self.calibration = self._calibrate(_down_to(self.recipe.losses.budgets[0], 0.9, 0.6, 0.4), 0.02)
            self._stage("finetune", self._finetune)
        budgets = sorted({*self.recipe.budgets, self.recipe.budget}, reverse=True)
        budgets = [b for b in budgets if b >= self.plan.budget_range[0]]
        ends = (1.0, round(self.plan.budget_range[0] + 0.01, 3))  # so that set_budget reaches every budget there is
        self.calibration = self._calibrate(budgets) + self._calibrate(ends, 0.02)
        results = self._evaluate(budgets)
        made = make_adaptive(
            self.model, self.plan, self.calibration, base or base_of(self.dense), results, self._described()
        )
        made.set_budget(self.recipe.budget)
        return made.eval()

    def _fit_device(self, size: int) -> None:
        """Leave sites dense whose learners do not pay on this device; a resumed conversion keeps the plan it had.

        Where merging cannot reach the budget alone, those that lose the least time are kept all the same.
        """
        kept = None if self.work is None else self.work / "device.json"
        if kept is not None and kept.exists():
            names, size = (read_json(kept)[key] for key in ("names", "size"))
        else:
            inputs = max(self.images.batches(self.images.fit, size, size=size), key=len)
            size = len(inputs)  # fewer where there are no more, or where samples go one by one
            times = parallel.from_main(site_times(self.dense, self.plan, inputs, self.recipe.seed))
            for t in times:
                told = f"{t.dense_ms:.2f} ms dense, {t.adaptive_ms:.2f} ms at half of the learners"
                log.info(
                    "%d entries like %s: %s; %s", len(t.names), t.names[0], told, "kept" if t.pays else "left dense"
                )
            names = self._not_paying(times, size)
            if kept is not None and parallel.is_main():
                write_json(kept, {"names": names, "size": size})
        self._replan(names, f"does not pay on this device in batches of {size}")
        self.plan.check_budget(self.recipe.budget)

    def _not_paying(self, times: list[SiteTime], size: int) -> list[str]:
        """Entries to leave dense, by the times of their places."""
        losing = sorted((t for t in times if not t.pays), key=lambda t: t.adaptive_ms / t.dense_ms)
        merges = self.plan.merging is not None and self.plan.merging.fixed is None
        if not merges and len(losing) == len(times):
            raise AcmizeError(
                f"fit_batch: no site pays on this device in batches of {size}; try a larger batch, "
                "merge tokens (--merge budget), or leave it out"
            )
        while merges and losing and self._plan_without(_names(losing)).budget_range[0] > self.recipe.budget:
            least, *losing = losing
            log.info("%d entries like %s: needed to reach %g", len(least.names), least.names[0], self.recipe.budget)
        if len(losing) == len(times):
            log.info("no site pays in batches of %d: tokens are merged, and nothing else", size)
        return _names(losing)

    def _stage(self, name: str, run: Callable[[], None]) -> None:
        """Run a stage, or load what it left behind."""
        import time

        done = None if self.work is None else self.work / f"{name}.safetensors"
        told = None if done is None else done.with_suffix(".json")
        if done is not None and told is not None and done.exists():
            try:
                return self._restore(name, done, told)
            except AcmizeError as error:  # every stage comes to the same end again
                log.warning("%s: %s; running it again", name, error)
        start = time.perf_counter()
        torch.manual_seed(self.recipe.seed)
        before = len(self.findings)
        run()
        self.seconds[name], self.peaks[name] = time.perf_counter() - start, peak_bytes() / 1e9
        release_memory()
        if done is not None and told is not None and parallel.is_main():
            found = [f.to_dict() for f in self.findings[before:]]
            write_json(told, {"seconds": self.seconds[name], "findings": found, "measured": self.measured})
            save_tensors(done, self.model.state_dict())
        parallel.wait()
        log.info("%s: %.0f s, memory up to %.2f GB", name, self.seconds[name], self.peaks[name])

    def _restore(self, name: str, done: Path, told: Path) -> None:
        """What a stage left behind.

        Raises:
            AcmizeError: one of its files is damaged; nothing has been changed.
        """
        tensors, kept = Weights.open(done).tensors(), read_json(told)
        if name == "distill" and (done.parent / "dense.json").exists():
            self._replan(**read_json(done.parent / "dense.json"))
        self.model.load_state_dict(tensors)
        self.findings += [Finding(**f) for f in kept["findings"]]
        self.seconds[name] = kept["seconds"]
        self.measured |= kept["measured"]
        log.info("%s: resumed", name)

    def _note(self, history: History) -> None:
        """Steps of a phase that were skipped, and times its rate was lowered, for the results."""
        if history.faults.skipped:
            self.measured[f"{history.name}_faults"] = history.faults.to_dict()

    def _checkpoint(self) -> dict[str, Any]:
        return {"checkpoint": self.work, "resume": self.work is not None}

    def _init(self) -> None:
        if not self.plan.exact or not self.plan.entries:
            return

        def batches() -> Iterator[Any]:
            return self.images.batches(self.images.fit, self.recipe.moments)

        initialise_(self.model, self.dense, self.plan, batches)

    def _source(self) -> nn.Module:
        """What local inputs and targets come from: the dense model, or its equal in the rotated basis."""
        return copy.deepcopy(self.model) if self.plan.exact else self.dense

    def _distill(self) -> None:
        options = self.recipe.distill
        if not distillable(self.model):
            log.info("distill: nothing to learn locally: every module of this method keeps the dense weights")
            return
        batches, steps = self.images.epochs(self.images.augmented, self.recipe.seed)
        history = distill(
            self.model, self._source(), batches, steps_per_epoch=steps, tokens=options.tokens,
            config=self.recipe.loop(epochs=options.epochs, lr=options.lr), by_site=options.by_site,
            **self._checkpoint(),
        )  # fmt: skip
        self._note(history)
        failed = check_sites(history.last, self.recipe.max_error)
        self.findings += failed
        if failed and 2 * len(failed) <= len(distillable(self.model)):  # when most fail, the training is at fault
            self._keep_dense([finding.site for finding in failed])

    def _keep_dense(self, sites: list[str]) -> None:
        """Plan again without the sites that could not be distilled; what the others have learned is kept."""
        reason = f"distillation error above {self.recipe.max_error}"
        names = [e.fqn for e in self.plan.entries if e.target in sites]
        learned = {k: v for k, v in self.model.state_dict().items() if ".gate." not in k}
        self._replan(names, reason)
        self._init()
        own = self.model.state_dict()
        kept = {k: v for k, v in learned.items() if k in own and v.shape == own[k].shape}
        self.model.load_state_dict({**own, **kept})
        if self.work is not None and parallel.is_main():
            write_json(self.work / "dense.json", {"names": names, "reason": reason})

    def _replan(self, names: list[str], reason: str) -> None:
        """Leave more entries dense: a new plan, and a new conversion of the dense model."""
        self.left_dense |= dict.fromkeys(names, reason)
        plan, left = self._plan_without(self.left_dense), self.left_dense
        kept = [r for r in plan.refused if r.fqn not in left]
        self.plan = replace(plan, refused=(*kept, *(Refusal(fqn=name, reason=why) for name, why in left.items())))
        self.model = converted(self.dense, self.plan).eval()

    def _plan_without(self, names: Iterable[str]) -> Plan:
        recipe = self.recipe
        plan = make_plan(
            self.dense, recipe.config, example=self.images.example, target_modules=recipe.target_modules,
            exclude=(*recipe.exclude, *names), merge=recipe.merge,
        )  # fmt: skip
        if recipe.fit_batch is None or plan.merging is None:
            return plan
        return replace(plan, merging=replace(plan.merging, every=2))  # a merge takes time as well

    def _gates(self) -> None:
        options, seed = self.recipe.gates, self.recipe.seed
        generator = torch.Generator().manual_seed(seed)
        if options.labels == "none" or not self.plan.entries:
            return
        if options.labels == "threshold":
            batches = self.images.batches(self.images.fit, options.images)
            data = collect_errors(self.model, self._source(), batches, generator=generator)
            fit_classification_gates(
                data, tau=options.tau, steps=options.steps, lr=options.lr or 1e-2, seed=seed, **self._checkpoint()
            )
            return
        for number in range(options.rounds):
            calibration = self._calibrate(_down_to(options.budgets[0], 0.9, 0.7, 0.5), 0.03) if number else None
            if calibration is not None and options.compensate:
                self._compensate(calibration)
            batches = self.images.batches(self.images.fit, options.images, size=self.small_batch)
            batches = self._at_drawn_budgets(batches, calibration)
            data = collect_damage(
                self.model, self.dense, batches, choose=None if number else full_width, generator=generator,
                draws=options.draws, keep_tokens=options.keep_tokens, bf16=self.recipe.mixed_precision == "bf16",
                keep_bf16=self.plan.macs_dense > 1e11,
            )  # fmt: skip
            fit_damage_gates(
                data, steps=options.steps, lr=options.lr or 3e-3, seed=seed + number, fresh=number == 0,
                name=f"gates-{number + 1}", **self._checkpoint(),
            )  # fmt: skip
            del data  # gigabytes, for a large model: gone before the next round collects as much
            release_memory()

    def _compensate(self, calibration: Calibration) -> None:
        batches = self.images.batches(self.images.fit, self.recipe.moments, size=self.small_batch)
        compensate_(self.model, self._at_drawn_budgets(batches, calibration))

    def _at_drawn_budgets(self, batches: Iterator[Tensor], calibration: Calibration | None) -> Iterator[Tensor]:
        """Set a budget drawn for each batch before it is run: what is merged, and the dial once it is calibrated."""
        low, high = self.recipe.gates.budgets
        low = max(low, self.plan.budget_range[0])
        for step, batch in enumerate(batches):
            budget = drawn_budget((low, max(low, high)), self.recipe.seed, step)
            set_schedule(self.model, self.plan.schedule(budget))
            set_dial(self.model, 0.0 if calibration is None else calibration.dial(budget))
            yield batch

    def _finetune(self) -> None:
        train, losses = self.recipe.train, self.recipe.losses
        batches, steps = self.images.epochs(self.images.augmented, self.recipe.seed + 1)
        mix: Any = None
        if train.mixup > 0 or train.cutmix > 0:
            classes = int(self.dense.num_classes)  # pyright: ignore[reportArgumentType]
            mix = mixup(classes, mixup_alpha=train.mixup, cutmix_alpha=train.cutmix, seed=self.recipe.seed)
        loop = self.recipe.loop(
            epochs=train.epochs, lr=train.lr, weight_decay=train.weight_decay, warmup=train.warmup,
            ema_decay=train.ema_decay, accumulate=train.accumulate,
        )  # fmt: skip
        gates = {"lr": train.gate_lr, "weight_decay": train.gate_decay}
        assert self.calibration is not None
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with self.images.training(self.model):
            history = finetune(
                self.model, self.dense, self.plan, self.calibration, batches, steps_per_epoch=steps, losses=losses,
                config=loop, task=self.images.task, mix=mix, gates={k: v for k, v in gates.items() if v is not None},
                shard=train.shard, **self._checkpoint(),
            )  # fmt: skip
        self._note(history)
        self.measured["finetune_loss"] = [round(terms["loss"], 4) for terms in history.logs]
        if train.interpolate:
            scores = interpolate_(self.model, before, self._held_out_error())
            self.measured["interpolated"] = {f"{share:g}": value for share, value in scores.items()}

    def _held_out_error(self) -> Callable[[], float]:
        """Mean error (KL, where no label was trained on) on the held-out images of the model as it then stands.

        At the largest, the middle and the smallest of the budgets that are wanted.
        """
        held = self._labelled(self.images.held)
        dense = reference(self.dense, held)
        wanted = sorted({self.recipe.budget, *self.recipe.budgets}, reverse=True)
        wanted = [wanted[i] for i in sorted({0, len(wanted) // 2, len(wanted) - 1})]

        def error() -> float:
            calibration = self._calibrate(wanted, 0.02)
            found = evaluate(self.model, self.plan, calibration, held, dense, calibration.budgets)
            return mean_error(found["results"], by_labels=self.recipe.losses.task > 0)

        return error

    def _calibrate(self, budgets: Iterable[float], tolerance: float = 0.0025) -> Calibration:
        count = 64 if tolerance > 0.01 else 200
        if all(e.tokens == 1 for e in self.plan.entries):  # a decision a sample: its mean needs more of them
            count *= 10
        which = self.images.held if tolerance > 0.01 else self.images.calibration
        batches = list(self.images.batches(which, count))
        floor = self.plan.budget_range[0]
        reachable = [b for b in budgets if b >= floor] or [floor + 0.01]
        return calibrate(self.model, self.plan, batches, reachable, tolerance=tolerance)

    def _labelled(self, which: Any) -> Any:
        """Labelled batches of this process's share of a set."""
        return self.images.labelled(parallel.subset(which))

    def _evaluate(self, budgets: Sequence[float]) -> dict[str, Any]:
        assert self.calibration is not None
        which = self.images.test if self.images.test is not None else self.images.held
        batches = self._labelled(which)
        dense = reference(self.dense, batches)
        results = evaluate(self.model, self.plan, self.calibration, batches, dense, budgets)
        set_budget(self.model, self.plan, self.calibration, self.recipe.budget)
        held = list(self.images.batches(self.images.held, 64))
        self.findings += check_gates(self.model, self.plan, held, results)
        results["split"] = "test" if self.images.test is not None else "held out of train"
        results["findings"] = [f.to_dict() for f in self.findings]
        results["left_out"] = sorted(self.images.unreadable.found.values())
        results["environment"] = environment(next(self.model.parameters()).device)
        return results

    def _described(self) -> dict[str, Any]:
        told = {"data": self.recipe.data or self.images.name, "seconds": self.seconds, "peak_gb": self.peaks}
        return {**self.recipe.to_dict(), **told, **self.measured}


def _names(times: list[SiteTime]) -> list[str]:
    return [name for t in times for name in t.names]


def _down_to(low: float, *budgets: float) -> tuple[float, ...]:
    """Budgets to calibrate before a range of them is drawn from: these, and its end where they stop short of it."""
    return budgets if low > min(budgets) - 0.06 else (*budgets, low)


def evaluate_saved(
    model: Any,
    data: Any,
    budgets: Sequence[float] | None = None,
    *,
    weights: str | Path | None = None,
    dense: nn.Module | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Evaluate a loaded adaptive model on the test split of `data` (its train split where there is none).

    Args:
        model: from `from_pretrained`.
        data: anything `datasets.load_dataset` opens.
        budgets: to evaluate; by default those it was saved with.
        weights: safetensors file (folder, for transformers) of the dense model; without it the converted model at full
            width stands for it.
        dense: the dense model itself, in place of its weights.
        limit: samples at most.
        seed: of the choice of those.
        batch_size: images in a batch.
    """
    if dense is None:
        dense = dense_from(model, weights)
    parallel.join(next(model.parameters()).device)
    if is_speech(model):
        return _evaluate_saved_speech(model, data, budgets, dense, limit)
    images, which, _ = images_to_test(data, model, limit=limit, seed=seed)
    batches = Batches(parallel.subset(images), batch_size, next(model.parameters()).device)
    answers = answers_of(model, dense, batches)
    saved = [row["budget"] for row in model.results.get("results", [])]
    results = evaluate(model, model.plan, model.calibration, batches, answers, budgets or saved or (0.5,))
    return {**results, "split": which, "dense_is": "base weights" if dense is not None else "full width"}


def dense_from(model: Any, weights: str | Path | None) -> nn.Module | None:
    """The dense model of an adaptive one from a safetensors file (a folder, for transformers); None without one."""
    if weights is None:
        return None
    if model.base["library"] == "transformers":
        return load_model(str(weights))
    return load_model(model.base["architecture"], weights, **model.base["kwargs"])


def answers_of(model: Any, dense: nn.Module | None, batches: Batches | Spoken) -> Any:
    """The dense model's answers, or those of the adaptive one at full width in its place."""
    if dense is not None:
        return reference(dense, batches)
    set_schedule(model, ())
    with choosing(model, full_width):
        return reference(model, batches)


def _evaluate_saved_speech(
    model: Any, data: Any, budgets: Sequence[float] | None, dense: Any, limit: int | None
) -> dict[str, Any]:
    splits = open_audio(data, limit=limit)
    which = "test" if splits.test is not None else "train"
    teacher = model if dense is None else dense
    listener = Listener(teacher)
    batches = Spoken(parallel.subset(splits.audio(splits.split(which), which, listener.processor.rate)), listener)
    answers = answers_of(model, dense, batches)
    saved = [row["budget"] for row in model.results.get("results", [])]
    results = evaluate(model, model.plan, model.calibration, batches, answers, budgets or saved or (0.5,))
    return {**results, "split": which, "dense_is": "full width" if dense is None else "base weights"}


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights, to tell a resumed run that its model is another one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Tuples as lists, for comparison with what JSON gives back."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


__all__ = ["Images", "convert", "evaluate_saved"]
