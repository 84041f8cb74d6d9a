"""Word error rate against executed MACs of a speech model, at a list of budgets.

Words are compared lower-cased, hyphens as spaces, without punctuation, white space run together (`normalise`): jiwer's
WER and CER over all utterances. Without transcripts, what is left is the agreement with the dense model's own.

Shapes: B samples, T frames, U tokens, C classes.
"""

from __future__ import annotations

import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.audio import Utterance
from acmize.cost import evaluating
from acmize.gates import Choose, choosing
from acmize.inputs import Inputs, counted, forward
from acmize.merge_pairs import held_together
from acmize.methods.token_merging import schedule_of, tracing
from acmize.plan import Plan
from acmize.recording import Recorder, SiteTally, record
from acmize.speech import Listener, Spoken

SILENT_DB = -30.0  # of a frame's energy, below the loud frames of its utterance
_STRIP = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-cased, hyphens as spaces, other ASCII punctuation stripped, white space run together."""
    return " ".join(text.lower().replace("-", " ").translate(_STRIP).split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, float]:
    """WER and CER of normalised texts, over all utterances together."""
    import jiwer

    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    wanted, found = [r for r, _ in pairs], [h for _, h in pairs]
    return float(jiwer.wer(wanted, found)), float(jiwer.cer(wanted, found))


@dataclass(frozen=True, kw_only=True)
class SpeechReference:
    """The dense model's answers, computed once.

    Attributes:
        references: transcripts of the data, or None where an utterance has none.
        texts: the dense model's transcripts; empty strings where it writes no text.
        scores: (utterances,) mean log-likelihood of its own tokens (of its distribution, for a CTC model).
        answers: for a model without a decoder, its log-probabilities of each of this process's utterances, (T, C).
        seconds: that it took.
    """

    references: list[str | None]
    texts: list[str]
    scores: Tensor
    answers: list[Tensor]
    seconds: float

    @property
    def rates(self) -> tuple[float, float] | None:
        """WER and CER of the dense model, or None without transcripts."""
        return _rates(self.references, self.texts)

    @property
    def described(self) -> dict[str, float | None]:
        """What stands for the dense model in the results."""
        wer, cer = self.rates or (None, None)
        return {"wer": wer, "cer": cer, "accuracy": None if wer is None else 1 - wer}

    def __len__(self) -> int:
        return len(self.texts)


def reference_speech(dense: nn.Module, batches: Spoken) -> SpeechReference:
    """Run the dense model over the utterances."""
    start = time.perf_counter()
    references: list[str | None] = []
    texts: list[str] = []
    scores: list[Tensor] = []
    answers: list[Tensor] = []
    listener = batches.listener
    with evaluating(dense):
        for inputs, utterances in batches:
            for u, logp in zip(utterances, _each(forward(dense, inputs).logits, inputs), strict=True):
                references.append(u.text)
                scores.append(_score(listener, u, logp, logp))
                if listener.generates:
                    texts.append(listener.text(listener.said(u)))
                else:
                    answers.append(logp.half())
                    texts.append(_spelled(listener, logp))
    return SpeechReference(
        references=parallel.gather_objects(references), texts=parallel.gather_objects(texts),
        scores=parallel.gather(torch.stack(scores)), answers=answers, seconds=time.perf_counter() - start,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpeechAnswers:
    """What a model wrote and what each utterance cost, with its gates as they stood; N utterances, T frames of each.

    Attributes:
        macs: (N,) executed.
        chosen: (N,) the same, had every module skipped what it did not choose.
        whole: (N,) of the dense model.
        texts: transcripts; empty where none were to be written.
        scores: (N,) as of `SpeechReference`.
        shares: (T,) of each utterance: mean share of the learners that each frame ran.
        silent: (T,) of each utterance: frames in which an energy detector hears nothing.
        load: entry -> (N,) share of its learners that were chosen, weighted by their MACs.
        choices: entry -> histogram (learners + 1,) of choices.
        seconds: that it took.
    """

    macs: Tensor
    chosen: Tensor
    whole: Tensor
    texts: list[str]
    scores: Tensor
    shares: list[Tensor]
    silent: list[Tensor]
    load: dict[str, Tensor]
    choices: dict[str, Tensor]
    seconds: float


def answers_speech(
    model: Any, plan: Plan, batches: Spoken, dense: SpeechReference, choose: Choose | None = None
) -> SpeechAnswers:
    """Run a converted model over the utterances; arguments as of `evaluate_speech_at`."""
    start, texts, scores, macs, whole, chosen = time.perf_counter(), [], [], [], [], []
    shares: list[Tensor] = []
    silent: list[Tensor] = []
    listener, schedule, sites = batches.listener, schedule_of(model), SiteTally()
    with evaluating(model), choosing(model, choose):
        for inputs, utterances in batches:
            with record(model, len(inputs)) as seen, tracing(model) as trace:
                output = forward(model, inputs)
            spent, dense_macs = plan.account(seen.executed().double().cpu(), seen.tokens, schedule)
            macs.append(spent)
            whole.append(dense_macs)
            chosen.append(plan.account(seen.chosen().double().cpu(), seen.tokens, schedule)[0])
            sites.add(seen)
            for i, (u, logp) in enumerate(zip(utterances, _each(output.logits, inputs), strict=True)):
                shares.append(mean_choices(seen, plan, i, trace))
                silent.append(silent_frames(u.wave, len(shares[-1])))
                answer = logp if listener.generates else dense.answers[len(scores)].to(logp)
                scores.append(_score(listener, u, logp, answer))
                if not listener.generates:
                    texts.append(_spelled(listener, logp))
                elif batches.writes:
                    texts.append(_written(listener, model, u, inputs, output, i))
    frames = parallel.gather_objects([len(share) for share in shares])
    return SpeechAnswers(
        macs=parallel.gather(torch.cat(macs)),
        chosen=parallel.gather(torch.cat(chosen)),
        whole=parallel.gather(torch.cat(whole)),
        texts=parallel.gather_objects(texts),
        scores=parallel.gather(torch.stack(scores)),
        shares=list(parallel.gather(torch.cat(shares)).split(frames)),
        silent=list(parallel.gather(torch.cat(silent).byte()).bool().split(frames)),
        **sites.gathered(),
        seconds=time.perf_counter() - start,
    )


def evaluate_speech_at(
    model: Any, plan: Plan, batches: Spoken, dense: SpeechReference, choose: Choose | None = None
) -> dict[str, Any]:
    """Error rates and executed work of the model as its gates stand (or as `choose` forces them).

    Args:
        model: the converted model.
        plan: its plan.
        batches: as `reference_speech` saw them.
        dense: from `reference_speech`.
        choose: in place of the gates.

    Returns:
        wer and cer (None without transcripts), accuracy = 1 - wer, agreement (share of utterances written as the dense
        model wrote them), kl (by how much the dense model's own tokens, or distributions, lost in mean log-likelihood),
        macs_ratio, macs_ratio_std (spread of the samples' own shares), chosen_ratio (as `evaluate_at` has it),
        choice_silent and choice_speech (mean share of the learners that a silent frame and one of speech run), seconds,
        sites.
    """
    found = answers_speech(model, plan, batches, dense, choose)
    texts, macs, most = found.texts, found.macs, found.whole
    rates = _rates(dense.references, texts) if texts else None
    same = [same_words(a, b) for a, b in zip(texts, dense.texts, strict=True)] if texts else []
    shares, silent = torch.cat(found.shares), torch.cat(found.silent)
    return {
        "macs_ratio": (macs.mean() / most.mean()).item(),
        "macs_ratio_std": (macs / most).std(correction=0).item(),
        "chosen_ratio": (found.chosen.mean() / most.mean()).item(),
        "macs": macs.mean().item(),
        "wer": None if rates is None else rates[0],
        "cer": None if rates is None else rates[1],
        "accuracy": None if rates is None else 1 - rates[0],
        "agreement": sum(same) / len(same) if same else None,
        "kl": (dense.scores - found.scores).mean().item(),
        "choice_silent": _mean(shares[silent]),
        "choice_speech": _mean(shares[~silent]),
        "seconds": found.seconds,
        "sites": {name: part.mean().item() for name, part in found.load.items()},
    }


def same_words(a: str, b: str) -> bool:
    """Whether two texts are the same, normalised."""
    return normalise(a) == normalise(b)


def silent_frames(wave: Tensor, frames: int) -> Tensor:
    """(frames,) True where an energy detector hears nothing: `SILENT_DB` below the utterance's 95th percentile.

    Args:
        wave: (L,) samples, cut into as many windows as there are frames.
        frames: T.
    """
    edges = torch.linspace(0, len(wave), frames + 1).long()
    total = F.pad(wave.double().square().cumsum(0), (1, 0))
    energy = (total[edges[1:]] - total[edges[:-1]]) / (edges[1:] - edges[:-1]).clamp_min(1)
    level = 10 * energy.clamp_min(1e-12).log10()
    return level < level.quantile(0.95) + SILENT_DB


def mean_choices(seen: Recorder, plan: Plan, sample: int, trace: Sequence[Tensor] = ()) -> Tensor:
    """(T,) mean share of the learners that each frame of a sample ran, over its sites.

    Merged frames share what their token ran; where nothing but merging is adaptive, the share of a token each has. Of a
    convolution with more frames the mean over those that fall into one is taken.
    `trace` is what `tracing` gave for the same forward.
    """
    frames = int(torch.as_tensor(seen.tokens[""]).expand(seen.samples)[sample]) if trace else None
    holders = [holder[sample, :frames] for holder in trace]
    if not plan.entries:
        return torch.stack([1 / held_together(holder) for holder in holders]).mean(0).cpu()
    shares: list[Tensor] = []
    for e in sorted(plan.entries, key=lambda e: e.own_frames):
        choice = seen.per_token[e.fqn][sample]
        share = choice[choice >= 0] / e.num_learners
        block = plan.merging.block_of(e.fqn) if plan.merging is not None and holders else None
        if block is not None:
            share = share[holders[block]] / held_together(holders[block])
        if shares and e.own_frames:
            share = F.adaptive_avg_pool1d(share[None], len(shares[0]))[0]
        if not shares or len(share) == len(shares[0]):
            shares.append(share)
    return torch.stack(shares).mean(0).cpu()


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _each(logits: Tensor, inputs: Inputs) -> list[Tensor]:
    """Log-probabilities of each utterance, (rows, C), padding left out."""
    if logits.dim() == 2:
        logits = logits[:, None]
    out = []
    for i, one in enumerate(logits):
        counts = None if inputs.counts is None else inputs.counts[i : i + 1]
        out.append(counted(one[None], Inputs({}, counts)).float().log_softmax(-1).cpu())
    return out


def _score(listener: Listener, utterance: Utterance, logp: Tensor, dense: Tensor) -> Tensor:
    """Mean log-likelihood of the dense model's tokens, or of its distribution where it writes none."""
    if listener.generates:
        return logp.gather(1, listener.said(utterance).cpu()[:, None]).mean()
    return (dense.exp() * logp).sum(-1).mean()


def _spelled(listener: Listener, logp: Tensor) -> str:
    """Greedy text of a model without a decoder: CTC labels; "" for a classifier."""
    if listener.processor.tokenizer is None:
        return str(int(logp.argmax(-1)[0]))
    return listener.text(logp.argmax(-1))


def _written(listener: Listener, model: Any, utterance: Utterance, inputs: Inputs, output: Any, i: int) -> str:
    """What the model itself writes, from the encoder's output of this pass."""
    from transformers.modeling_outputs import BaseModelOutput

    states = output.encoder_last_hidden_state[i : i + 1]
    seconds = len(utterance.wave) / listener.processor.rate
    encoded = BaseModelOutput(last_hidden_state=states)
    encoded.attention_mask = None  # Moonshine reads it; batches of speech-to-text models have no padding
    return listener.text(listener.generate(model, Inputs({"encoder_outputs": encoded}), seconds))  # pyright: ignore


def _rates(references: Sequence[str | None], texts: Sequence[str]) -> tuple[float, float] | None:
    known = [(r, t) for r, t in zip(references, texts, strict=True) if r is not None and normalise(r)]
    return error_rates([r for r, _ in known], [t for _, t in known]) if known else None
