"""`acmize verify`: whether all execution paths of a saved model give the same answers on this machine.

Each check runs the model once on the plain path (`masked`, eager, one batch) and notes what every gate chose; the other
path then runs with those very choices, so that a difference is an error and not a near tie that fell the other way.
What its own gates would have chosen is compared as a check of its own. Tokens are merged in the last check alone, where
a near tie can change an answer: it looks at the median sample.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acmize import ops
from acmize.bench import dense_of
from acmize.bench_speech import real_inputs
from acmize.controls import random_choice
from acmize.cost import evaluating
from acmize.decision import Decision
from acmize.errors import AcmizeError
from acmize.gates import Choose, Gate, choosing, full_width, gates_of
from acmize.hosts import example_input
from acmize.hosts_speech import example_speech, is_speech
from acmize.hub import from_pretrained, save_pretrained
from acmize.inputs import Batch, Inputs, counted, forward, logits_of
from acmize.kernels.linear import is_available
from acmize.methods.token_merging import schedule_of, set_schedule
from acmize.recording import AdaptiveModule, record
from acmize.timing import check_device

log = logging.getLogger("acmize")

TOLERANCE = 2e-4  # of outputs, in standard deviations of the plain path's; sums in another order differ by 1e-5
TIES = 1e-3  # share of choices that may differ: near ties
REFERENCE = "masked"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    Attributes:
        check: the path that was run.
        what: on which choices or inputs.
        difference: largest absolute difference of outputs (or a share of choices, or a number of tensors); None if the
            path could not be run, or if an output is not a number.
        tolerance: what is allowed; None where a difference is told and not judged.
        ok: whether it is within the tolerance.
        note: why it could not be run, or is not judged.
    """

    check: str
    what: str
    difference: float | None
    tolerance: float | None
    ok: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The plain path's run that others are compared with.

    Attributes:
        what: how choices were made.
        outputs: (rows, C) logits that count.
        choices: of each gate, in the model's order, (S, T, G), -1 where padded; None for a gate that was not asked.
        gates: the gates chose by themselves.
    """

    what: str
    outputs: Tensor
    choices: tuple[Tensor | None, ...]
    gates: bool

    @property
    def tolerance(self) -> float:
        """Allowed difference of outputs."""
        return TOLERANCE * self.outputs.std(correction=0).item()


class Replay:
    """A `Choose` that repeats noted choices (S, T, G), and counts where the gate itself would have chosen otherwise.

    Padded tokens, noted as -1, run nothing and are not counted.
    """

    def __init__(self, choice: Tensor) -> None:
        self.choice = choice
        self.differ = choice.new_zeros(())

    def __call__(self, gate: Gate, x: Tensor) -> Tensor:
        """X (..., D) -> the noted choices (..., G)."""
        own = gate.energies(x)[..., gate.min_choice :].argmin(-1) + gate.min_choice
        choice = self.choice.view(own.shape)
        self.differ = ((own != choice) & (choice >= 0)).sum()
        return choice


@contextmanager
def replaying(model: nn.Module, choices: Sequence[Tensor | None]) -> Iterator[list[Replay]]:
    """Every gate repeats its noted choices inside the context."""
    gates = gates_of(model)
    before, made = [gate.choose for gate in gates], []
    for gate, choice in zip(gates, choices, strict=True):
        if choice is not None:
            gate.choose = Replay(choice)
            made.append(gate.choose)
    try:
        yield made
    finally:
        for gate, old in zip(gates, before, strict=True):
            gate.choose = old


# --- entry points ---------------------------------------------------------------------------------------------


def verify_saved(
    model: Any,
    data: Any = None,
    *,
    weights: str | Path | None = None,
    limit: int = 4,
    seed: int = 0,
    device: str = "cpu",
    compiler: str | None = "inductor",
) -> dict[str, Any]:
    """Check a loaded adaptive model; see `verify`.

    Args:
        model: from `from_pretrained`.
        data: images or recordings, anything `datasets.load_dataset` opens; without it the inputs are seeded noise.
        weights: safetensors file (folder, for transformers) of the dense model, for the check of full width.
        limit: samples.
        seed: of images, noise and random choices.
        device: "cpu" or "cuda".
        compiler: backend of `torch.compile`, or None to leave it out.
    """
    check_device(device)
    if limit < 2:
        raise AcmizeError(f"limit: found {limit}, expected at least 2, so that a sample has batch mates; raise --limit")
    if data is None:
        inputs = noise(model, limit, seed)
    else:
        inputs = real_inputs(model, data, limit=limit, seed=seed)
    dense = None if weights is None else dense_of(model, weights).to(device)
    told = verify(model.to(device), inputs.to(device), dense=dense, seed=seed, compiler=compiler)
    return {**told, "inputs": "noise" if data is None else "images" if isinstance(inputs, Tensor) else "recordings"}


def noise(model: nn.Module, samples: int, seed: int) -> Batch:
    """Standard normal inputs of the model's size; of speech, a few seconds, and for a decoder its start token."""
    generator = torch.Generator().manual_seed(seed)
    if not is_speech(model):
        return torch.randn(example_input(model, samples).shape, generator=generator)
    example = {k: t.expand(samples, *t.shape[1:]) for k, t in example_speech(model, frames=100).tensors.items()}
    floats = {k: torch.randn(t.shape, generator=generator) for k, t in example.items() if t.is_floating_point()}
    return Inputs({**example, **floats})


def verify(
    model: Any,
    inputs: Batch,
    *,
    dense: nn.Module | None = None,
    seed: int = 0,
    compiler: str | None = "inductor",
) -> dict[str, Any]:
    """Compare all execution paths of a model on some inputs; the model is left as it was.

    Args:
        model: adaptive, see `hub.Adaptive`, at the budget at which its own gates are to be checked.
        inputs: two samples or more, on the model's device: (S, C, H, W), or keyword inputs.
        dense: the model it was made from, for the check of full width.
        seed: of random choices.
        compiler: backend of `torch.compile`, or None to leave it out.

    Returns:
        {"ok", "device", "samples", "checks"}; a check has the fields of `Check`.
    """
    schedule = schedule_of(model)
    set_schedule(model, ())
    try:
        with evaluating(model), _full_precision(inputs.device):
            checks = _checks(model, inputs, dense, seed, compiler)
            set_schedule(model, schedule)
            if schedule:
                checks += _merged(model, inputs)
    finally:
        set_schedule(model, schedule)
    told = {"ok": all(c.ok for c in checks), "device": inputs.device.type, "samples": len(inputs)}
    return {**told, "checks": [asdict(c) for c in checks]}


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No convolution in TF32 on a GPU, which would round by 1e-3, and not alike at every batch size."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext():
        yield


def _checks(model: Any, inputs: Batch, dense: nn.Module | None, seed: int, compiler: str | None) -> list[Check]:
    runs = {what: plain(model, inputs, what, choose) for what, choose in kinds(model, seed).items()}
    some = [runs["random"], runs["gates"]]
    found: list[Check] = []
    for backend in backends(inputs.device):
        if backend != REFERENCE:
            for run in runs.values():
                found += compared(backend, run, lambda run=run, b=backend: _again(model, inputs, run, b))
        for run in some:
            found += compared(f"{backend}, alone", run, lambda run=run, b=backend: _one_by_one(model, inputs, run, b))
        if backend != REFERENCE:
            found += _few_tokens(model, inputs, backend)
    default = f"default ({ops.pick_backend(next(model.parameters()))})"
    for run in some:
        found += compared(default, run, lambda run=run: _again(model, inputs, run, None))
    found += _reloaded(model, inputs, runs["gates"])
    if compiler is not None:
        log.info("compiling, which can take minutes; --no-compile leaves it out")
        fast = torch.compile(model, backend=compiler, dynamic=False)
        for run in some:
            found += compared(f"compiled ({compiler})", run, lambda run=run: _again(model, inputs, run, None, fast))
    if dense is not None:
        found.append(_full_width(model, dense, inputs, runs["full"]))
    return found


def backends(device: torch.device) -> list[str]:
    """The backends of `ops` that can run on a device, the plain one first."""
    return [b for b in ops.BACKENDS if b != "triton" or is_available(device)]


def kinds(model: nn.Module, seed: int) -> dict[str, Choose | None]:
    """What is chosen in the plain runs; None: by the gates."""
    even = {}
    for module in model.modules():
        if isinstance(module, AdaptiveModule) and module.names:
            weights = torch.ones(module.gate.num_learners + 1)
            weights[: module.gate.min_choice] = 0
            even |= dict.fromkeys(module.names, weights)
    return {
        "random": random_choice(model, even, torch.Generator().manual_seed(seed)),
        "least": lambda gate, x: _same(gate, x, gate.min_choice),
        "middle": lambda gate, x: _same(gate, x, max(gate.min_choice, gate.num_learners // 2)),
        "full": full_width,
        "gates": None,
    }


def _same(gate: Gate, x: Tensor, choice: int) -> Tensor:
    return torch.full((*x.shape[:-1], gate.groups), choice, device=x.device)


def plain(model: nn.Module, inputs: Batch, what: str, choose: Choose | None) -> Plain:
    """Run the plain path and note the choices."""
    with ops.use_backend(REFERENCE), choosing(model, choose), record(model, len(inputs), keep_inputs=True) as seen:
        outputs = _rows(forward(model, inputs), inputs)
    noted = {module.gate: _noted(decision) for module, _, decision in seen.seen}
    found = (noted.get(gate) for gate in gates_of(model))
    choices = (None if c is None else c.reshape(len(inputs), -1, c.shape[-1]) for c in found)
    return Plain(what=what, outputs=outputs, choices=tuple(choices), gates=choose is None)


def _noted(decision: Decision) -> Tensor:
    """Choices (..., G), -1 where padded."""
    valid = decision.valid
    return decision.choice if valid is None else decision.choice.masked_fill(~valid[..., None], -1)


def _rows(output: Any, inputs: Batch) -> Tensor:
    """The outputs that count, (rows, C): a sample each, or a real frame, or a token."""
    return counted(logits_of(output), inputs).float()


# --- paths: each gives outputs and the share of choices that its gates would have made otherwise ---------------

Ran = tuple[Tensor, float]


def _again(model: nn.Module, inputs: Batch, run: Plain, backend: str | None, called: Any = None) -> Ran:
    """The whole batch on a backend (None: the default one), or by another callable."""
    called = model if called is None else called
    with replaying(model, run.choices) as replays, nullcontext() if backend is None else ops.use_backend(backend):
        outputs = forward(called, inputs)
    total = sum(int((r.choice >= 0).sum()) for r in replays)
    return _rows(outputs, inputs), sum(int(r.differ) for r in replays) / max(total, 1)


def _one_by_one(model: nn.Module, inputs: Batch, run: Plain, backend: str) -> Ran:
    """Each sample as a batch of one."""
    outputs, differ = [], []
    for i in range(len(inputs)):
        mine = tuple(None if c is None else c[i : i + 1] for c in run.choices)
        part = Plain(what=run.what, outputs=run.outputs[i : i + 1], choices=mine, gates=run.gates)
        y, share = _again(model, inputs[i : i + 1], part, backend)
        outputs.append(y)
        differ.append(share)
    return torch.cat(outputs), sum(differ) / len(differ)


# --- checks ---------------------------------------------------------------------------------------------------


def compared(check: str, run: Plain, path: Callable[[], Ran]) -> list[Check]:
    """Outputs of a path beside the plain run's, and where the gates chose, how far they would choose alike."""
    try:
        outputs, share = path()
    except Exception as error:  # any kind: that a path does not run is what is to be found out
        return [_failed(check, run.what, run.tolerance, error)]
    found = [judged(check, run.what, (outputs - run.outputs).abs().max().item(), run.tolerance)]
    if run.gates:
        found.append(judged(check, "share of choices", share, TIES))
    return found


def judged(check: str, what: str, difference: float, tolerance: float | None, note: str = "") -> Check:
    """A check from its difference; what is not a number is wrong."""
    finite = math.isfinite(difference)
    ok = finite and (tolerance is None or difference <= tolerance)
    note = note if finite else "the outputs are not all numbers"
    return Check(
        check=check, what=what, difference=difference if finite else None, tolerance=tolerance, ok=ok, note=note
    )


def _failed(check: str, what: str, tolerance: float | None, error: Exception) -> Check:
    first = (str(error).strip().splitlines() or [""])[0]
    note = f"{type(error).__name__}: {first}"
    return Check(check=check, what=what, difference=None, tolerance=tolerance, ok=False, note=note)


def _few_tokens(model: nn.Module, inputs: Batch, backend: str) -> list[Check]:
    """Every adaptive module on a single token, and on none, with each of three choices."""
    asked = _inputs_of(model, inputs)
    if not asked:
        return []  # tokens are merged, and nothing else
    chosen = [choose for what, choose in kinds(model, 0).items() if what in ("least", "middle", "full")]
    found = []
    for what, count in (("one token", 1), ("no token", 0)):
        few = [(module, module.few(x, count)) for module, x in asked]
        try:
            worst = max(_worst(model, few, choose, backend) for choose in chosen)
        except Exception as error:  # any kind, as in `compared`
            found.append(_failed(backend, what, None, error))
            continue
        found.append(judged(backend, what, worst, TOLERANCE, "in standard deviations of each output"))
    return found


def _inputs_of(model: nn.Module, inputs: Batch) -> list[tuple[AdaptiveModule, Tensor]]:
    """The adaptive modules, in the order in which they are called, and what they are given."""
    asked: list[tuple[AdaptiveModule, Tensor]] = []
    modules = [m for m in model.modules() if isinstance(m, AdaptiveModule)]

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        asked.append((module, args[0]))

    handles = [m.register_forward_pre_hook(note) for m in modules]
    try:
        with ops.use_backend(REFERENCE):
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return asked


def _worst(
    model: nn.Module, few: Sequence[tuple[AdaptiveModule, Tensor]], choose: Choose | None, backend: str
) -> float:
    """Largest difference of any module; all are called in order, since some read what another one decided."""
    with choosing(model, choose):
        with ops.use_backend(REFERENCE):
            expected = [module(x) for module, x in few]
        with ops.use_backend(backend):
            found = [module(x) for module, x in few]
    return max(_difference(y, e) for y, e in zip(found, expected, strict=True))


def _difference(y: Tensor, expected: Tensor) -> float:
    """Largest difference in standard deviations of what is expected."""
    if y.shape != expected.shape:
        raise ValueError(f"found shape {tuple(y.shape)}, expected {tuple(expected.shape)}")
    if torch.equal(y, expected):
        return 0.0  # nothing, or all alike
    spread = expected.std(correction=0).item()
    return (y - expected).abs().max().item() / spread if spread else math.inf


def _reloaded(model: Any, inputs: Batch, run: Plain) -> list[Check]:
    """The model saved and loaded again: its tensors bit by bit, and its answers."""
    if model.base.get("library") not in ("timm", "transformers"):
        return []  # loading needs the user's own module
    check = "saved and loaded"
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            again = from_pretrained(save_pretrained(model, Path(folder) / "model")).to(inputs.device)
    except Exception as error:  # any kind, as in `compared`
        return [_failed(check, run.what, run.tolerance, error)]
    set_schedule(again, ())
    other = _other_tensors(model.state_dict(), again.state_dict())
    found = [judged(check, "tensors that differ", other, 0.0)]
    with evaluating(again):
        return found + compared(check, run, lambda: _again(again, inputs, run, REFERENCE))


def _other_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> int:
    same = sum(k in theirs and torch.equal(v, theirs[k]) for k, v in mine.items())
    return len(mine.keys() | theirs.keys()) - same


def _full_width(model: Any, dense: nn.Module, inputs: Batch, run: Plain) -> Check:
    """Full width beside the dense model, which it equals as long as no weight was trained."""
    phases = set(model.recipe.get("phases", ()))
    trained = sorted(phases & {"distill", "finetune"})
    note = f"trained ({', '.join(trained)})" if trained else ""
    if not model.plan.exact:
        note = "learners from random weights"
    with evaluating(dense):
        outputs = _rows(forward(dense, inputs), inputs)
    difference = (outputs - run.outputs).abs().max().item()
    return judged("dense", "full", difference, None if note else run.tolerance, note and f"not judged: {note}")


def _merged(model: Any, inputs: Batch) -> list[Check]:
    """Backends with tokens merged, each choosing by itself: the median sample's difference."""
    run = plain(model, inputs, "merged tokens, median", None)
    found = []
    for backend in backends(inputs.device):
        if backend == REFERENCE:
            continue
        try:
            with ops.use_backend(backend):
                outputs = _rows(forward(model, inputs), inputs)
        except Exception as error:  # any kind, as in `compared`
            found.append(_failed(backend, run.what, run.tolerance, error))
            continue
        difference = (outputs - run.outputs).abs().amax(-1).median().item()
        found.append(judged(backend, run.what, difference, run.tolerance))
    return found


__all__ = ["Check", "noise", "verify", "verify_saved"]
