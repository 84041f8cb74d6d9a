"""What a report shows of a speech model on real recordings: choices of every site, and the compute of every frame.

Shapes: T frames, L samples of audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acmize.api import answers_of
from acmize.audio import open_audio
from acmize.evaluate_speech import SpeechReference, answers_speech, error_rates, normalise, same_words
from acmize.report.survey import levels_of
from acmize.speech import Listener, Spoken

SHOWN = 12  # recordings
POINTS = 400  # of an envelope, and of a row of frames: more cannot be seen


def survey_speech(
    model: Any, data: Any, budgets: Sequence[float], *, dense: Any = None, limit: int | None = None
) -> dict[str, Any]:
    """Run a speech model over test recordings at each budget; it is left at the last one.

    Args:
        model: adaptive, of speech.
        data: anything `datasets.load_dataset` opens.
        budgets: to run it at.
        dense: the dense model; without it the adaptive one at full width stands for it.
        limit: recordings at most.

    Returns:
        JSON values. "samples", "split", "dense_is"; "levels": for each budget macs_ratio, wer, agreement, histograms
        (one a plan entry), lost (recordings not written as the dense model wrote them); "recordings": seconds, wave
        (its envelope, one letter a point), text, dense, and for each budget guess, cost and frames (the mean share of
        the learners that each frame ran, one letter each).

    Raises:
        AcmizeError: data that cannot be opened.
    """
    splits = open_audio(data, limit=limit)
    which = "test" if splits.test is not None else "train"
    listener = Listener(model if dense is None else dense)
    rate = listener.processor.rate
    utterances = list(splits.audio(splits.split(which), which, rate))
    batches = Spoken(utterances, listener)
    known: SpeechReference = answers_of(model, dense, batches)
    recordings: list[dict[str, Any]] = [
        {
            "seconds": round(len(u.wave) / rate, 2),
            "wave": levels_of(envelope(u.wave)),
            "text": u.text or "",
            "dense": text,
            "guess": [],
            "cost": [],
            "frames": [],
        }
        for u, text in zip(utterances[:SHOWN], known.texts, strict=False)
    ]
    levels = []
    for budget in budgets:
        model.set_budget(budget)
        found = answers_speech(model, model.plan, batches, known)
        lost = [not same_words(a, b) for a, b in zip(found.texts, known.texts, strict=True)]
        told = [(r, t) for r, t in zip(known.references, found.texts, strict=True) if r is not None and normalise(r)]
        levels.append(
            {
                "budget": budget,
                "macs_ratio": (found.macs.sum() / found.whole.sum()).item(),
                "wer": error_rates(*zip(*told, strict=True))[0] if told else None,
                "agreement": 1 - sum(lost) / len(lost),
                "histograms": [found.choices[e.fqn].tolist() for e in model.plan.entries],
                "lost": sum(lost),
            }
        )
        cost = (found.macs / found.whole).tolist()
        for number, made in enumerate(recordings):
            made["guess"].append(found.texts[number])
            made["cost"].append(round(cost[number], 4))
            made["frames"].append(levels_of(fewer(found.shares[number])))
    return {
        "samples": len(utterances),
        "split": which,
        "dense_is": "base weights" if dense is not None else "full width",
        "levels": levels,
        "recordings": recordings,
    }


def envelope(wave_L: Tensor) -> Tensor:
    """The largest amplitude of each of `POINTS` stretches of a recording, the loudest one 1."""
    peaks = torch.nn.functional.adaptive_max_pool1d(wave_L.abs()[None].float(), min(POINTS, len(wave_L)))[0]
    return peaks / peaks.max().clamp_min(1e-9)


def fewer(shares_T: Tensor) -> Tensor:
    """Means over stretches of frames, `POINTS` of them at most."""
    return torch.nn.functional.adaptive_avg_pool1d(shares_T[None].float(), min(POINTS, len(shares_T)))[0]


__all__ = ["envelope", "fewer", "survey_speech"]
