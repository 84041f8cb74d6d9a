"""A conversion under way: its model and plan as they stand, what its stages found, and what of it is on disk.

Every stage leaves its weights in the work folder, so that a conversion that was killed goes on where it stopped and
ends with the same numbers; each stage draws from generators of its own. The stages themselves are in `stages.py`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmize import parallel
from acmize.checkpoint import read_json, remove_dir, save_tensors, write_json
from acmize.diagnose import Finding
from acmize.environment import peak_bytes, release_memory
from acmize.errors import AcmizeError
from acmize.hosts import make_plan
from acmize.images import Images
from acmize.insert import converted
from acmize.phases._loop import History
from acmize.phases.calibrate import Calibration, calibrate
from acmize.plan import Plan, Refusal
from acmize.recipe import Recipe
from acmize.speech import Speech
from acmize.weights import Weights

log = logging.getLogger("acmize")
LARGE = 1e11  # MACs a sample from which on the inputs of gates are held in bfloat16


def planned(
    dense: nn.Module, recipe: Recipe, example: tuple[Any, ...] | None = None, without: Iterable[str] = ()
) -> Plan:
    """The plan of a recipe for a model.

    Args:
        dense: the model before conversion.
        recipe: what is converted, and how.
        example: inputs of one sample, where the model does not say their size.
        without: entries that stay dense, beyond those that the recipe excludes.
    """
    return make_plan(
        dense, recipe.config, example=example, target_modules=recipe.target_modules,
        exclude=(*recipe.exclude, *without), merge=recipe.merge,
    )  # fmt: skip


def small_batch(plan: Plan, recipe: Recipe) -> int:
    """Samples at once where gradients reach every choice of every token; fewer of a larger model."""
    return min(20 if plan.macs_dense < 8e9 else max(1, round(1.4e11 / plan.macs_dense)), recipe.batch_size)


class Conversion:
    """One conversion under way.

    Args:
        dense: the model before conversion.
        plan: what is converted.
        recipe: every option.
        images: the data, or recordings.
        work: folder for checkpoints; None: nothing is kept.
        resume: go on from what is there.
        given: the plan is not that of the recipe, and stays as it is.

    Attributes:
        model: the converted model, as the stages left it.
        left_dense: entry -> why, beyond the plan that was made first.
        findings: known ways to fail that stages met.
        seconds: of each stage.
        peaks: largest resident memory up to the end of each stage, GB.
        measured: by stages, beside the weights.
        calibration: of the budgets calibrated last.
        small_batch: samples at once where gradients reach every choice of every token: memory is that of the
            activations, many times over.

    Raises:
        AcmizeError: the data lack what a stage would need, or another conversion left the folder unfinished.
    """

    def __init__(
        self,
        dense: nn.Module,
        plan: Plan,
        recipe: Recipe,
        images: Images | Speech,
        work: str | Path | None,
        resume: bool,
        *,
        given: bool,
    ) -> None:
        self.dense, self.plan, self.recipe, self.given = dense.eval(), plan, recipe, given
        self.images: Any = images  # of either kind: what differs is inside
        self.model = converted(dense, plan).eval()
        self.work = None if work is None else Path(work)
        self.left_dense: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self.measured: dict[str, Any] = {}
        self.calibration: Calibration | None = None
        self.small_batch = small_batch(plan, recipe)
        self._check_labels()
        few = min(len(self.images.fit), len(self.images.held))
        if few < parallel.processes():
            found = f"{few} samples to fit on or held out, for {parallel.processes()} processes"
            raise AcmizeError(f"data {self.images.name}: found {found}, expected one each; give more, or start fewer")
        if self.work is not None:
            if parallel.is_main():
                if not resume and self.work.exists():
                    remove_dir(self.work)
                self.work.mkdir(parents=True, exist_ok=True)
            parallel.wait()
            self._same_recipe(self.work / "recipe.json")
            parallel.wait()

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

    def _same_recipe(self, path: Path) -> None:
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

    # --- stages that can be resumed ---------------------------------------------------------------------------

    def stage(self, name: str, run: Callable[[Conversion], None]) -> None:
        """Run a stage, or load what it left behind."""
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
        run(self)
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
            self.replan(**read_json(done.parent / "dense.json"))
        self.model.load_state_dict(tensors)
        self.findings += [Finding(**f) for f in kept["findings"]]
        self.seconds[name] = kept["seconds"]
        self.measured |= kept["measured"]
        log.info("%s: resumed", name)

    def checkpoint(self) -> dict[str, Any]:
        """Options of a phase that writes checkpoints of its own."""
        return {"checkpoint": self.work, "resume": self.work is not None}

    def note(self, history: History) -> None:
        """Steps of a phase that were skipped, and times its rate was lowered, for the results."""
        if history.faults.skipped:
            self.measured[f"{history.name}_faults"] = history.faults.to_dict()

    # --- the plan as it stands --------------------------------------------------------------------------------

    def replan(self, names: list[str], reason: str) -> None:
        """Leave more entries dense: a new plan, and a new conversion of the dense model."""
        self.left_dense |= dict.fromkeys(names, reason)
        plan, left = self.plan_without(self.left_dense), self.left_dense
        kept = [r for r in plan.refused if r.fqn not in left]
        self.plan = replace(plan, refused=(*kept, *(Refusal(fqn=name, reason=why) for name, why in left.items())))
        self.model = converted(self.dense, self.plan).eval()

    def plan_without(self, names: Iterable[str]) -> Plan:
        """The plan that leaves these entries dense."""
        plan = planned(self.dense, self.recipe, self.images.example, names)
        if self.recipe.fit_batch is None or plan.merging is None:
            return plan
        return replace(plan, merging=replace(plan.merging, every=2))  # a merge takes time as well

    # --- what several stages need -----------------------------------------------------------------------------

    def source(self) -> nn.Module:
        """What local inputs and targets come from: the dense model, or its equal in the rotated basis."""
        return copy.deepcopy(self.model) if self.plan.exact else self.dense

    def labelled(self, which: Any) -> Any:
        """Labelled batches of this process's share of a set."""
        return self.images.labelled(parallel.subset(which))

    def calibrated(self, budgets: Iterable[float], tolerance: float = 0.0025) -> Calibration:
        """A calibration of those of the budgets that can be reached.

        Args:
            budgets: shares of the dense MACs.
            tolerance: of them; above .01, fewer samples and the held-out ones are used.
        """
        count = 64 if tolerance > 0.01 else 200
        if all(e.tokens == 1 for e in self.plan.entries):  # a decision a sample: its mean needs more of them
            count *= 10
        which = self.images.held if tolerance > 0.01 else self.images.calibration
        batches = list(self.images.batches(which, count))
        floor = self.plan.budget_range[0]
        reachable = [b for b in budgets if b >= floor] or [floor + 0.01]
        return calibrate(self.model, self.plan, batches, reachable, tolerance=tolerance)


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


__all__ = ["LARGE", "Conversion", "planned", "small_batch"]
