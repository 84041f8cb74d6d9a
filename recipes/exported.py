"""Exported files and smaller numbers: do they answer as PyTorch does, what do they cost in accuracy, and in time?

Command:   python recipes/exported.py --model out --output runs/exported
           python recipes/exported.py --model out --output runs/exported_held --split held     to choose settings on
           python recipes/exported.py --model out --output runs/exported --time --threads 2    on a quiet machine
           python recipes/exported.py --model moonshine_out --data recordings --formats onnx   speech, also --time
           python recipes/exported.py --smoke                 the digits model, under a minute
Shows:     for each form and budget: accuracy, the share of the dense MACs that it really took (an output of the file),
           and, against the same model in PyTorch (float32, eager): agreement, KL, largest difference of an output, its
           median over samples. Forms: those of `acmize export`, each a file with the budget as an input, and
             bf16           the model itself, `.bfloat16()`
             torchao-int8   8-bit weights by torchao in the layers that stay dense (what is cut keeps float32)
             torchao-int8-dynamic   inputs of these layers in 8 bits as well
           With --time: median milliseconds of batches of 1 and 8 (recordings: one by one, each of its own length), all
           forms in turns on the same inputs, beside the dense model (of a speech-to-text model, its encoder; with
           random weights, which are as fast) in PyTorch and in ONNX Runtime. torchao is not among the requirements
           (0.18.0 was used).
Data:      imagenet_mini of ACMIZE_ASSETS: the 600 test photographs, or the 135 held out of train; or --data.
Seed:      0.
Hardware:  one core of a shared x86-64 machine (AVX-512 VNNI), no GPU.
Time:      20 minutes for four forms and two budgets on 600 photographs, on one core beside other work.
Versions:  in results.json.

Result:    docs/export.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import torch
from torch import Tensor, nn

from acmize.audio import open_audio
from acmize.bench import dense_of
from acmize.cost import evaluating
from acmize.evaluate import top1
from acmize.export import FORMATS, export
from acmize.export.formats import SUFFIXES
from acmize.export.trace import output_of, part_of
from acmize.hosts_speech import has_fixed_length, is_speech
from acmize.hub import from_pretrained
from acmize.layers import Dense
from acmize.methods.token_merging import schedule_of
from acmize.recipe import resolve
from acmize.recording import record
from acmize.speech import Listener
from acmize.timing import WARMUP, Call, draws, interleaved, percentiles, threads

BUDGETS = (0.75, 0.5)
INSIDE = ("bf16", "torchao-int8", "torchao-int8-dynamic")  # forms of the model itself
SIZES = (1, 8)
Answer = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # inputs, budget -> outputs, shares of the dense MACs


class Whole(nn.Module):
    """A dense model as a function of a tensor; of a speech-to-text model, its encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.part = part_of(model)

    def forward(self, x: Tensor) -> Tensor:
        """Its logits, or hidden states."""
        return output_of(self.part(x))


class InTorch:
    """The model itself; of a speech-to-text model, its encoder."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.part, self.dtype = model, part_of(model), dtype

    def __call__(self, x: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        """Outputs and shares, as an `Answer`."""
        self.model.set_budget(budget)
        with evaluating(self.model), record(self.part, len(x)) as seen:
            out = output_of(self.part(x.to(self.dtype)))
        macs, whole = self.model.plan.account(seen.executed().double(), seen.tokens, schedule_of(self.model))
        return out.float(), macs / whole

    def at(self, budget: float) -> Callable[[Tensor], object]:
        """A copy that stays at a budget and counts nothing, to be timed."""
        copied = InTorch(copy.deepcopy(self.model).eval(), self.dtype)
        copied.model.set_budget(budget)
        return lambda x: copied.part(x.to(copied.dtype))


def in_onnx(path: Path, count: int) -> Answer:
    """A file in ONNX Runtime on so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = count, 3
    session = onnxruntime.InferenceSession(path, options)

    def answer(x: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        found = session.run(None, {"x": x.numpy(), "budget": np.array(budget, np.float32)})
        return torch.from_numpy(found[0]), torch.from_numpy(found[-1])

    return answer


def in_program(path: Path, format: str) -> Answer:
    """A program of `torch.export`, or a compiled package."""
    load = torch._inductor.aoti_load_package if format == "aoti" else lambda p: torch.export.load(p).module()
    run: Any = load(str(path))

    def answer(x: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return run(x, torch.tensor(budget))

    return answer


def smaller(model: Any, form: str) -> Answer:
    """The model in fewer bits."""
    made = copy.deepcopy(model)
    if form == "bf16":
        return InTorch(made.bfloat16(), torch.bfloat16)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if form.endswith("dynamic") else Int8WeightOnlyConfig()
    head = made.get_classifier()
    quantize_(made, config, filter_fn=lambda m, _: type(m) in (Dense, nn.Linear) and m is not head)
    return InTorch(made)


def form_of(model: Any, form: str, folder: Path, count: int) -> tuple[Answer, common.Row]:
    """A form of the model, its file written where there is none, and what is known of that."""
    if form in INSIDE:
        return smaller(model, form), {}
    path, start = folder / f"{form}{SUFFIXES[form]}", time.perf_counter()
    if not path.exists():
        export(model, path, form, compute=True)
    told = {"megabytes": path.stat().st_size / 1e6, "seconds_to_write": time.perf_counter() - start}
    return in_onnx(path, count) if form.startswith("onnx") else in_program(path, form), told


def answers(answer: Answer, batches: list[Tensor], budget: float) -> tuple[list[Tensor], Tensor]:
    """Outputs and shares of every batch."""
    found = [answer(x, budget) for x in batches]
    return [out for out, _ in found], torch.cat([share.double() for _, share in found])


def row_of(mine: Any, reference: Any, labels: Tensor | None) -> common.Row:
    """What a form answered, beside the model in PyTorch."""
    (found, spent), (expected, taken) = mine, reference
    gaps = torch.cat([(a - b).flatten(1).abs().amax(1) for a, b in zip(found, expected, strict=True)])
    row = {
        "samples": len(gaps),
        "macs_ratio": spent.mean().item(),
        "macs_ratio_torch": taken.mean().item(),
        "largest": gaps.max().item(),
        "median": gaps.median().item(),
    }
    if labels is None:
        return row
    out, teacher = torch.cat(found), torch.cat(expected)
    p, q = teacher.log_softmax(-1), out.log_softmax(-1)
    return {
        **row,
        "accuracy": top1(out, labels),
        "accuracy_torch": top1(teacher, labels),
        "agreement": (out.argmax(-1) == teacher.argmax(-1)).double().mean().item(),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
    }


def drawn(batches: list[Tensor], size: int, args: Any) -> Iterator[Tensor]:
    """Inputs for each round of timing: so many samples at random."""
    samples = [one for x in batches for one in x.split(1)][:256]
    order = torch.Generator().manual_seed(args.seed)
    for index in draws(len(samples), min(size, len(samples)), WARMUP + args.repeats, order):
        yield torch.cat([samples[i] for i in index])


def times(
    calls: dict[str, Callable[[Tensor], object]], batches: list[Tensor], sizes: tuple[int, ...], args: Any
) -> dict[str, dict[int, dict[str, float]]]:
    """Form -> batch size -> percentiles in milliseconds, all forms in turns."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in calls}
    turns = {name: Call(call) for name, call in calls.items()}
    for size in sizes:
        for name, seconds in interleaved(turns, drawn(batches, size, args)).items():
            found[name][size] = percentiles(seconds)
    return found


def dense_onnx(dense: nn.Module, x: Tensor, free: int | None, path: Path, count: int) -> Callable[[Tensor], object]:
    """The dense model in ONNX Runtime, for inputs that differ from x along one axis."""
    import onnxruntime

    shapes = {} if free is None else {free: torch.export.Dim.DYNAMIC}
    with evaluating(dense):
        program = torch.onnx.export(dense, (x,), input_names=["x"], dynamic_shapes=(shapes,), verbose=False)
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    session = onnxruntime.InferenceSession(path, options)
    return lambda x: session.run(None, {"x": x.numpy()})


def inputs_of(args: Any, model: Any) -> tuple[list[Tensor], Tensor | None, Any]:
    """Batches of real inputs, their labels (of images), and the dense model."""
    if is_speech(model):
        listener = Listener(model)
        splits = open_audio(args.data, limit=args.limit)
        which = "test" if splits.test is not None else "train"
        processor, name = listener.processor, model.main_input_name
        heard = splits.audio(splits.split(which), which, processor.rate)
        rate = {"sampling_rate": processor.rate, "return_tensors": "pt"}
        return [processor.features(u.wave.numpy(), **rate)[name] for u in heard], None, dense_of(model)
    dense = common.deit_tiny(args)
    options = {"seed": args.seed, **(common.SMOKE if args.smoke else {"batch_size": 30})}
    options |= {} if args.limit is None else {"limit": args.limit}
    bench = common.Bench(dense, args.data or common.photographs(args.smoke), resolve(options))
    pairs = list(bench.test if args.split == "test" else bench.images.labelled(bench.images.held))
    return [x for x, _ in pairs], torch.cat([y for _, y in pairs]), dense


def main() -> None:
    """Write what is missing, compare, time, print the table."""
    parser = common.parser(__doc__ or "", __file__, BUDGETS)
    parser.add_argument("--model", type=Path, help="folder of a converted model")
    parser.add_argument("--data", help="of another model than DeiT-Tiny")
    parser.add_argument("--formats", nargs="+", default=["onnx", "onnx-int8"], choices=(*FORMATS, *INSIDE))
    parser.add_argument("--split", default="test", choices=("test", "held"))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    options = {**common.start(args, __file__), "phases": (), "budgets": tuple(args.budgets)}
    if args.smoke:
        args.formats, args.time, args.repeats = ["onnx-int8", "torch-export", "bf16"], True, 2
        folder, digits = args.output / "models" / "digits", common.photographs(True)
        made = common.converted(folder, common.deit_tiny(args), digits, resolve(options))
    else:
        made = from_pretrained(args.model)
    rows, (batches, labels, dense) = common.Rows(args, __file__), inputs_of(args, made)
    with threads(args.threads):
        known = {budget: answers(InTorch(made), batches, budget) for budget in args.budgets}
        forms = {form: form_of(made, form, args.output, args.threads) for form in args.formats}

        def row(answer: Answer, told: common.Row, b: float) -> common.Row:
            return {"budget": b, **told, **row_of(answers(answer, batches, b), known[b], labels)}

        for form, (answer, told) in forms.items():
            for b in args.budgets:
                rows.measure(f"{form} @ {b:g}", lambda a=answer, t=told, b=b: row(a, t, b))
        if args.time:
            whole, sizes, free = Whole(dense).eval(), SIZES, 0
            if is_speech(made):
                sizes, free = SIZES[:1], None if has_fixed_length(made) else 1
            calls: dict[str, Callable[[Tensor], object]] = {"dense, PyTorch": whole}
            calls["dense, onnx"] = dense_onnx(whole, batches[0], free, args.output / "dense.onnx", args.threads)
            everything = {"PyTorch": InTorch(made), **{form: answer for form, (answer, _) in forms.items()}}
            for form, answer in everything.items():
                for b in args.budgets:
                    timed = answer.at(b) if isinstance(answer, InTorch) else lambda x, a=answer, b=b: a(x, b)
                    calls[f"{form} @ {b:g}"] = timed
            with torch.inference_mode():
                spent = rows.measure("times", lambda: {"milliseconds": times(calls, batches, sizes, args)})
            for name, timed in spent["milliseconds"].items():
                print(f"{name}: " + ", ".join(f"batch {s}: {p['p50']:.2f} ms" for s, p in timed.items()))
            rows.found["rows"].pop("times")
    rows.show(
        {
            "form": lambda key, _: key.split(" @ ")[0],
            "budget": lambda _, r: f"{r['budget']:g}",
            "MACs": lambda _, r: f"{r['macs_ratio']:.3f} ({r['macs_ratio_torch']:.3f})",
            "top-1 %": lambda _, r: common.percent(r.get("accuracy")),
            "in PyTorch": lambda _, r: common.percent(r.get("accuracy_torch")),
            "agreement %": lambda _, r: common.percent(r.get("agreement")),
            "KL": lambda _, r: f"{r['kl']:.4f}" if "kl" in r else "-",
            "largest difference": lambda _, r: f"{r['largest']:.1e}",
            "median": lambda _, r: f"{r['median']:.1e}",
            "MB": lambda _, r: f"{r['megabytes']:.1f}" if "megabytes" in r else "-",
        }
    )


if __name__ == "__main__":
    main()
