"""`acmize bench` for speech: real-time factors of an adaptive model beside its dense one, on recordings, in turns.

What is timed is the whole model, as it is used: one forward for CTC and classes, or greedy generation, of as many
tokens for every model as full width writes, since a model that errs may write more or fewer. Within the same call the
clock is read around the encoder: the whole encoder of a model with a decoder, the blocks of one without.

The front end is never made adaptive; the share of time and of MACs that is not the blocks' bounds what can be gained.

Shapes: L samples of audio.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmize.audio import Utterance, open_audio
from acmize.bench import dense_of, placed, real_images, same_products
from acmize.controls import workload
from acmize.cost import count_macs, evaluating, measure_work
from acmize.errors import AcmizeError
from acmize.gates import choosing, full_width
from acmize.hosts_speech import alone_only, blocks_path, example_speech, front_end, is_speech
from acmize.inputs import Batch, Inputs, forward
from acmize.padding import few_shapes
from acmize.phases.calibrate import realised
from acmize.site_times import timed
from acmize.speech import Listener
from acmize.timing import WARMUP, Call, Setting, draws, interleaved, percentiles, threads

log = logging.getLogger("acmize")


# --- recordings -----------------------------------------------------------------------------------------------


def real_recordings(model: Any, data: Any, *, limit: int, seed: int = 0) -> list[Utterance]:
    """Test recordings, else train recordings, at the model's rate; at most `limit`, at random.

    Raises:
        AcmizeError: none were given, or they cannot be opened.
    """
    if data is None:
        raise AcmizeError("data: found none, expected recordings like those it will hear, since gates decide from them")
    splits = open_audio(data, limit=limit, seed=seed)
    which = "test" if splits.test is not None else "train"
    return list(splits.audio(splits.split(which), which, Listener(model).processor.rate))


def real_inputs(model: Any, data: Any, *, limit: int, seed: int = 0) -> Batch:
    """A batch of real inputs: images (N, C, H, W), or padded recordings with their transcripts as decoder inputs.

    Recordings are cut to the shortest of them where a family's output depends on the padding of its batch.
    """
    if not is_speech(model):
        return real_images(model, data, limit=limit, seed=seed)
    found = real_recordings(model, data, limit=limit, seed=seed)
    if alone_only(model) is not None:
        shortest = min(len(u.wave) for u in found)
        found = [Utterance(u.wave[:shortest], u.text, u.key) for u in found]
    return Listener(model).inputs(found)


# --- timing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A batch to time: inputs in one or several parts, tokens to write for each of these, seconds of audio."""

    parts: list[Inputs]
    tokens: list[int]
    seconds: float


class Timed:
    """A model whose calls are timed from inside too.

    Args:
        model: dense or adaptive.
        encoder: path of its encoder.
    """

    def __init__(self, model: Any, encoder: str) -> None:
        self.model, self.encoder = model, encoder
        self.inside: list[float] = []  # seconds in the encoder, a call each

    def __call__(self, heard: Heard) -> None:
        """Run the whole model on a batch."""
        with timed(self.model, [self.encoder]) as spent:
            for inputs, tokens in zip(heard.parts, heard.tokens, strict=True):
                if tokens:
                    alone = inputs.without("decoder_input_ids")
                    fixed = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
                    self.model.generate(**alone.tensors, **fixed)
                else:
                    forward(self.model, inputs)
        self.inside.append(spent[self.encoder])


def bench_speech(
    model: Any,
    data: Any,
    *,
    weights: str | Path | None = None,
    budgets: Sequence[float] | None = None,
    batch_sizes: Sequence[int] = (1,),
    setting: Setting | None = None,
    limit: int = 32,
) -> dict[str, Any]:
    """Time a loaded adaptive speech model at each budget and batch size beside its dense one.

    Args:
        model: from `from_pretrained`.
        data: recordings, anything `open_audio` opens.
        weights: folder of the dense model; without it random weights, which are as fast.
        budgets: by default those it was saved with.
        batch_sizes: recordings in a call; families whose output depends on padding take them one after another.
        setting: device, dtype, threads, repeats, seed.
        limit: recordings read.

    Returns:
        {"device", "threads", "dtype", "work", "results", "fit": []}. `work`: dense gmacs_per_second of audio, of what
        the budget counts; front_share, of the plan's example. A result has model, batch_size, budget, macs_ratio,
        seconds (of audio in a batch), and for the whole model and under "encoder" for the encoder alone: latency_ms,
        dense_latency_ms (of the faster of eager and eager with the same products), dense_forms_ms (the median of each),
        speedup of the medians, rtf and dense_rtf (medians over seconds of audio); `bound`: the dense whole over what of
        it is not encoder, which no encoder can exceed.

    Raises:
        AcmizeError: no data, a budget out of reach, fewer recordings than a batch takes.
    """
    setting = setting or Setting()
    saved = [row["budget"] for row in model.results.get("results", [])]
    budgets = list(budgets or saved or [model.budget])
    for budget in budgets:
        model.plan.check_budget(budget)
    utterances = real_recordings(model, data, limit=limit, seed=setting.seed)
    wrong = [size for size in batch_sizes if not 1 <= size <= len(utterances)]
    if wrong:
        raise AcmizeError(
            f"batch_size: found {wrong[0]} for {len(utterances)} recordings, expected 1 to {len(utterances)}; make it "
            "smaller, or read more with --limit"
        )
    dense, rows = placed(dense_of(model, weights), setting), []
    listener, model = Listener(model), placed(model, setting)
    generator = setting.generator()
    with threads(setting.threads), evaluating(model, dense), torch.inference_mode():
        with choosing(listener.dense, full_width):
            for utterance in utterances if listener.generates else ():
                listener.said(utterance)
        for size in batch_sizes:
            order = draws(len(utterances), size, WARMUP + setting.repeats, generator)
            batches = [_heard(listener, [utterances[i] for i in index], setting) for index in order]
            rows += _bench_batch(model, dense, batches, budgets, size, setting)
        work = _work(model, dense, [_heard(listener, [u], setting) for u in utterances])
    return {**setting.described(), "work": work, "results": rows, "fit": []}


def _heard(listener: Listener, utterances: list[Utterance], setting: Setting) -> Heard:
    apart = [[u] for u in utterances] if listener.generates or alone_only(listener.dense) else [utterances]
    parts = [listener.inputs(some) for some in apart]
    return Heard(
        parts=[Inputs({k: setting.place(t) for k, t in p.tensors.items()}, p.counts) for p in parts],
        tokens=[len(listener.said(some[0])) if listener.generates else 0 for some in apart],
        seconds=sum(len(u.wave) for u in utterances) / listener.processor.rate,
    )


def _bench_batch(
    model: Any, dense: nn.Module, batches: list[Heard], budgets: Sequence[float], size: int, setting: Setting
) -> list[dict[str, Any]]:
    """The rows of one batch size: all budgets and both dense forms take turns."""
    path = blocks_path(dense)
    forms = {"eager": dense, "eager, same products": same_products(dense)}
    if len({heard.seconds for heard in batches}) > 1:  # where all are alike, rounded numbers of rows would slow it down
        few_shapes(forms["eager, same products"])
    runs = {name: Timed(form, path) for name, form in forms.items()}
    calls = {name: Call(run) for name, run in runs.items()}
    for budget in budgets:
        runs[f"{budget}"] = Timed(model, path)
        calls[f"{budget}"] = Call(runs[f"{budget}"], lambda budget=budget: model.set_budget(budget))
    log.info("batch of %d: %d rounds of %d calls", size, len(batches), len(calls))
    whole = interleaved(calls, batches, warmup=WARMUP, device=setting.device)
    encoder = {name: run.inside[1::2][WARMUP:] for name, run in runs.items()}  # the others came before, untimed
    counted = batches[WARMUP:]
    audio, rows = statistics.fmean(heard.seconds for heard in counted), []
    beyond = {name: statistics.median(_less(whole[name], encoder[name])) for name in forms}
    for budget in budgets:
        model.set_budget(budget)
        parts = [inputs for heard in counted for inputs in heard.parts]
        made, form = _compared(whole, f"{budget}", list(forms), audio)
        inner, _ = _compared(encoder, f"{budget}", list(forms), audio)
        row = {"model": model.base["architecture"], "batch_size": size, "budget": budget, "seconds": audio}
        ratio = realised(model, model.plan, parts).mean().item()
        bound = made["dense_latency_ms"]["p50"] / (1e3 * beyond[form])
        rows.append({**row, "macs_ratio": ratio, **made, "bound": bound, "encoder": inner})
    return rows


def _less(whole: list[float], part: list[float]) -> list[float]:
    return [a - b for a, b in zip(whole, part, strict=True)]


def _compared(
    seconds: Mapping[str, list[float]], name: str, forms: list[str], audio: float
) -> tuple[dict[str, Any], str]:
    """Milliseconds, speedup and real-time factors of a model beside the faster dense form, and which one that is."""
    times = {key: percentiles(seconds[key]) for key in (name, *forms)}
    form = min(forms, key=lambda key: times[key]["p50"])
    mine, dense = times[name], times[form]
    told = {
        "latency_ms": mine,
        "dense_latency_ms": {**dense, "form": form},
        "dense_forms_ms": {key: times[key]["p50"] for key in forms},
        "speedup": dense["p50"] / mine["p50"],
    }
    return {**told, "rtf": mine["p50"] / (1e3 * audio), "dense_rtf": dense["p50"] / (1e3 * audio)}, form


def _work(model: Any, dense: nn.Module, batches: list[Heard]) -> dict[str, float]:
    """Dense MACs a second of audio of what the budget counts, and the front end's share of them."""
    plan, parts = model.plan, [inputs for heard in batches for inputs in heard.parts]
    counted, example = dense.get_submodule(plan.scope), example_speech(dense).without("decoder_input_ids")
    macs = measure_work(counted, example).macs
    prefix = f"{plan.scope}." if plan.scope else ""
    front = sum(macs[path.removeprefix(prefix)] for path in front_end(dense).modules)
    spent = workload(model, plan, parts).dense * sum(map(len, parts))
    audio = sum(heard.seconds for heard in batches)
    return {"gmacs_per_second": spent / audio / 1e9, "front_share": front / count_macs(counted, example)}


__all__ = ["bench_speech", "real_inputs", "real_recordings"]
