"""What a conversion costs on 1, 8 and 64 GPUs, computed: multiply-adds, memory and traffic of each phase.

Command:   python recipes/scale_model.py --output runs/scale
           python recipes/scale_model.py --smoke            the check alone, on the packaged digits model
Shows:     for each model, phase and number of processes: MACs and memory of one process, and the bytes that it sends
           in the whole phase. The plan is made on the meta device: no weights, no products.
           The check converts a small model on the CPU, counts the MACs that each stage really does
           (`FlopCounterMode`) and prints them beside the computed ones.
Data:      none; the check has the packaged digits.
Seed:      0.
Hardware:  any CPU; the tables are computed, the check is measured.
Time:      a minute.

Result:    docs/scale.md. Assumptions: `Setting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _common as common
from torch.utils.flop_counter import FlopCounterMode

from acmize.api import convert
from acmize.conversion import LARGE, Conversion, small_batch
from acmize.cost import _uncounted
from acmize.hosts import make_plan
from acmize.init import MOMENT_BYTES, _moment_bytes, _wanted, portions
from acmize.models import architecture, load_model
from acmize.plan import Plan, PlanEntry
from acmize.quickstart_model import digits_dataset
from acmize.recipe import Recipe, resolve

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "xls-r-1b")
PROCESSES = (1, 8, 64)
FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A conversion to be costed.

    Attributes:
        recipe: its options.
        images: samples to fit on.
        processes: how many share the work.
        shard: phase 3 with FSDP2.
        by_site: phase 1 with sites divided.
    """

    recipe: Recipe
    images: int
    processes: int = 1
    shard: bool = False
    by_site: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one process in a phase: multiply-adds, bytes held at most, bytes sent."""

    macs: float
    memory: float
    traffic: float


class Model:
    """What the costs are computed from: sizes of a model and its plan.

    Args:
        dense: the dense model; on the meta device it does.
        plan: its plan.
    """

    def __init__(self, dense: Any, plan: Plan) -> None:
        self.plan, self.weights = plan, FLOAT * sum(p.numel() for p in dense.parameters())
        self.moments = sum(_moment_bytes(dense.get_submodule(p), *how) for p, how in _wanted(plan).items())
        self.passes = len(portions(dense, plan, MOMENT_BYTES))
        layers = {path: dense.get_submodule(path) for path in _wanted(plan)}
        # H x (U + 1)^2 products a token, in heads of U units
        self.moment_macs = sum(
            self._tokens(path) * _moment_bytes(layers[path], *how) // 8 for path, how in _wanted(plan).items()
        )
        self.widest = max((e.bounds[-1] for e in plan.entries if e.form == "prefix"), default=0)
        gated = plan.by_gate().values()
        self.gates = [(entries[0].tokens, self._width(dense, entries[0]), entries) for entries in gated]
        self.local = [e for e in plan.entries if e.kind in ("mlp", "out")]  # what phase 1 trains
        self.local_weights = FLOAT * sum(sum(e.learner_macs) for e in self.local)
        self.captured = FLOAT * sum(sum(self._ends(dense, e)) for e in self.local)  # bytes a token, inputs and outputs

    def _tokens(self, path: str) -> int:
        return next(e.tokens for e in self.plan.entries if path in (e.target, *e.roles.values()))

    @staticmethod
    def _width(dense: Any, entry: PlanEntry) -> int:
        roles = entry.roles
        return dense.get_submodule(roles.get("fc1") or roles.get("qkv") or entry.target).weight[:1].numel()

    @staticmethod
    def _ends(dense: Any, entry: PlanEntry) -> tuple[int, int]:
        first = dense.get_submodule(entry.roles.get("fc1") or entry.roles["out"])
        last = dense.get_submodule(entry.roles.get("fc2") or entry.roles["out"])
        return first.weight[:1].numel(), len(last.weight)

    # --- phases -----------------------------------------------------------------------------------------------

    def init(self, s: Setting) -> Cost:
        """Statistics by passes of the dense model; each process then solves everything."""
        count = min(s.recipe.moments, s.images)
        solves = sum(1.5 * e.bounds[-1] ** 3 for e in self.plan.entries if e.form == "prefix")
        whole = math.ceil(math.ceil(count / s.recipe.batch_size) / s.processes) * s.recipe.batch_size
        work = min(count, whole) * (self.passes * self.plan.macs_dense + self.moment_macs) + solves
        memory = 2 * self.weights + min(self.moments, MOMENT_BYTES) + 5 * 8 * self.widest**2
        return Cost(macs=work, memory=memory, traffic=_reduced(self.moments, s.processes))

    def gate_rounds(self, s: Setting) -> Cost:
        """Damages: the teacher, one forward, a backward without weights for each draw; then the fit."""
        options, full = s.recipe.gates, self.plan.macs_dense
        count = min(options.images, s.images)
        seen = options.rounds * count * (2 + options.draws) * full
        weights = sum(sum(e.gate_macs for e in entries) for _, _, entries in self.gates)
        kept = {tokens: min(1024, round(count * tokens * options.keep_tokens)) for tokens, _, _ in self.gates}
        a_step = sum(kept[tokens] * sum(e.gate_macs for e in entries) for tokens, _, entries in self.gates)
        fitted = options.rounds * options.steps * a_step * 3
        held = FLOAT / 2 if full > LARGE else FLOAT  # inputs in bfloat16
        rows = sum(
            count * tokens * options.keep_tokens * (held * width + FLOAT * (1 + sum(e.num_learners for e in entries)))
            for tokens, width, entries in self.gates
        )
        batches, owners = -(-count // small_batch(self.plan, s.recipe)), min(s.processes, len(self.gates))
        turns = -(-batches // s.processes)
        sent = rows / s.processes * (s.processes - 1) / s.processes  # to the owners of their gates
        traffic = options.rounds * (sent + options.steps * _reduced(FLOAT * weights, s.processes))
        memory = 2 * self.weights + rows / owners + self.activations(s)
        return Cost(macs=seen * turns / batches + fitted / owners, memory=memory, traffic=traffic)

    def activations(self, s: Setting) -> float:
        """Bytes that a backward of `small_batch` samples to every choice keeps."""
        units = sum(e.tokens * e.heads * e.bounds[-1] for e in self.plan.entries)
        return small_batch(self.plan, s.recipe) * FLOAT * 4 * units

    def distill(self, s: Setting) -> Cost:
        """The frozen source once an image; learners forward and backward, and once as they started."""
        options = s.recipe.distill
        steps = options.epochs * max(1, s.images // s.recipe.batch_size)
        kept = {e.fqn: min(options.tokens, s.recipe.batch_size * e.tokens) for e in self.local}
        learners = sum(kept[e.fqn] * sum(e.learner_macs) for e in self.local)
        source = steps * s.recipe.batch_size * self.plan.macs_dense
        work = (source + steps * 4 * learners) / s.processes
        picked = steps * options.tokens * self.captured
        state = 3 * self.local_weights  # gradients and two moments
        batch = -(-s.recipe.batch_size // s.processes)
        tokens = max((e.tokens for e in self.local), default=0)
        memory = 3 * self.weights + batch * tokens * self.captured + state / (s.processes if s.by_site else 1)
        sent = picked * (s.processes - 1) / s.processes**2 + self.local_weights * (s.processes > 1)
        return Cost(
            macs=work, memory=memory, traffic=sent if s.by_site else steps * _reduced(self.local_weights, s.processes)
        )

    def finetune(self, s: Setting) -> Cost:
        """The teacher once, the model forward and backward to weights and activations."""
        steps = s.recipe.train.epochs * max(1, s.images // s.recipe.batch_size)
        batch = -(-s.recipe.batch_size // s.processes)
        units = sum(e.tokens * e.heads * e.bounds[-1] for e in self.plan.entries)
        trained = 4 * self.weights / (s.processes if s.shard else 1)
        traffic = steps * _reduced(self.weights, s.processes) * (1.5 if s.shard else 1)
        return Cost(
            macs=steps * s.recipe.batch_size * 4 * self.plan.macs_dense / s.processes,
            memory=2 * self.weights + trained + batch * FLOAT * 4 * units,  # the dense model, and where it started
            traffic=traffic,
        )

    def phases(self) -> dict[str, Callable[[Setting], Cost]]:
        """The stages under the names that `convert` gives them."""
        return {"init": self.init, "distill": self.distill, "gates": self.gate_rounds, "finetune": self.finetune}


def built(name: str) -> Any:
    """A model of this name without weights; XLS-R-1B (arXiv 2111.09296, table 1) from its sizes."""
    if name != "xls-r-1b":
        return architecture(name)
    import transformers as tf

    config = tf.Wav2Vec2Config(
        hidden_size=1280, num_hidden_layers=48, num_attention_heads=16, intermediate_size=5120, conv_bias=True,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    return tf.Wav2Vec2ForCTC(config).eval()


def _reduced(size: float, processes: int) -> float:
    """Bytes that each process sends when `size` bytes are summed over all (ring all-reduce)."""
    return 2 * size * (processes - 1) / processes


def counted(model: Any, data: Any, recipe: Recipe) -> dict[str, int]:
    """MACs of every stage of a conversion, as `FlopCounterMode` sees them."""
    found: dict[str, int] = {}
    plain = Conversion.stage

    def stage(self: Any, name: str, run: Callable[[Conversion], None]) -> None:
        with FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
            plain(self, name, run)
        found[name] = counter.get_total_flops() // 2

    Conversion.stage = stage
    try:
        convert(model, data=data, recipe=recipe)
    finally:
        Conversion.stage = plain
    return found


def main() -> None:
    """Print the tables and the check."""
    parser = common.parser(__doc__ or "", __file__)
    parser.add_argument("--images", type=int, default=50_000, help="samples to fit on, of the tables")
    args = parser.parse_args()
    options = common.start(args, __file__)
    rows = common.Rows(args, __file__)

    def check() -> common.Row:
        small = {**options, "limit": 160, "merge": "none", "gates": {"images": 60, "steps": 40, "rounds": 1}}
        recipe = resolve(small, {"train": {"epochs": 1, "interpolate": False, "hflip": 0.0}, "batch_size": 16})
        dense = load_model("acmize_vit_digits")
        model = Model(dense, make_plan(dense, recipe.config, merge=recipe.merge))
        measured = counted(dense, digits_dataset(), recipe)
        setting = Setting(recipe=recipe, images=round(160 * (1 - recipe.holdout)))
        computed = {name: cost(setting).macs for name, cost in model.phases().items()}
        return {"measured": measured, "computed": computed}

    found = rows.measure("check", check)
    for name, macs in found["measured"].items():
        ratio = found["computed"][name] / max(macs, 1)
        print(
            f"check, {name}: computed {found['computed'][name] / 1e9:.3f} GMACs, counted {macs / 1e9:.3f}: {ratio:.2f}"
        )
    if args.smoke:
        return

    def table(name: str) -> common.Row:
        dense = built(name).to("meta")
        model = Model(dense, make_plan(dense, resolve({}).config))
        costs: common.Row = {}
        for processes in PROCESSES:
            recipe = resolve({"batch_size": max(32, processes), "train": {"epochs": 12}})
            setting = Setting(recipe=recipe, images=args.images, processes=processes, by_site=processes > 1)
            for phase, cost in model.phases().items():
                costs[f"{phase} on {processes}"] = vars(cost(setting))
        return {"gmacs": model.plan.macs_dense / 1e9, "weights_gb": model.weights / 1e9, "costs": costs}

    for name in MODELS:
        row = rows.measure(name, lambda name=name: table(name))
        print(f"\n{name}: {row['gmacs']:.1f} GMACs a sample, {row['weights_gb']:.2f} GB of float32 weights\n")
        print("| phase, GPUs | TMACs a process | memory, GB | sent, GB |\n|---|---|---|---|")
        for phase, cost in row["costs"].items():
            print(
                f"| {phase} | {cost['macs'] / 1e12:,.0f} | {cost['memory'] / 1e9:.1f} | {cost['traffic'] / 1e9:.1f} |"
            )


if __name__ == "__main__":
    main()
