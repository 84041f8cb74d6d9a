"""The audio of a conversion as batches for a speech model, and what the dense model says about it.

A speech-to-text model is judged, and its gates are taught, through its decoder on the dense model's own transcript,
which is generated once an utterance; a CTC or classification model directly by its outputs. No transcripts are needed;
those of the training data are learnt from where `losses.task` is above 0.

A family whose dense output depends on the padding of its batch (`hosts_speech.alone_only`) is fed one utterance at a
time.

Shapes: B samples, L samples of audio, T frames, U tokens of a transcript.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from acmize.audio import AudioSet, JoinedAudio, Utterance, buckets, open_audio
from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.hf_models import processor_of
from acmize.hosts_speech import alone_only, example_speech, frames_of, has_fixed_length
from acmize.inputs import Inputs
from acmize.recipe import Recipe
from acmize.speech_training import training, transcript_task
from acmize.splits import split_holdout
from acmize.streaming import StreamedAudio, open_audio_stream
from acmize.unreadable import Unreadable

TOKENS_A_SECOND = 6.5  # what Moonshine allows: more is a decoder caught in a loop
CALIBRATED = 64  # recordings that calibration needs
SAID = 1 << 17  # transcripts kept at most; the oldest are generated again


class Listener:
    """Makes inputs of utterances, and text of outputs, for one dense model and whatever is converted from it.

    Args:
        dense: the dense model; its transcripts are kept, so each utterance is generated once.
    """

    def __init__(self, dense: Any) -> None:
        self.dense, self.processor = dense, processor_of(dense)
        self.generates = bool(dense.config.is_encoder_decoder)
        self._said: dict[tuple[str, int], Tensor] = {}

    def inputs(self, utterances: Sequence[Utterance], said: Sequence[Tensor | None] = ()) -> Inputs:
        """A padded batch, with decoder inputs where there is a decoder.

        Args:
            utterances: of the batch.
            said: token ids that its decoder is fed, the dense model's own transcript where None.
        """
        name = self.dense.main_input_name
        waves = [u.wave.numpy() for u in utterances]
        fixed = {} if has_fixed_length(self.dense) else {"padding": True}
        made = self.processor.features(
            waves, sampling_rate=self.processor.rate, return_tensors="pt", return_attention_mask=True, **fixed
        )
        device = next(self.dense.parameters()).device
        tensors = {name: made[name].to(device)}
        if not fixed:
            return self._heard(tensors, None, utterances, said)
        mask = made["attention_mask"].to(device)
        if len(utterances) > 1:
            tensors["attention_mask"] = mask
        return self._heard(tensors, mask, utterances, said)

    def _heard(
        self,
        tensors: dict[str, Tensor],
        mask: Tensor | None,
        utterances: Sequence[Utterance],
        given: Sequence[Tensor | None],
    ) -> Inputs:
        if self.generates:
            told = zip_longest(utterances, given)
            said = [self._transcribed(tensors, mask, i, u) if ids is None else ids for i, (u, ids) in enumerate(told)]
            pad = self.dense.config.pad_token_id or self.dense.config.eos_token_id or 0
            start = said[0].new_tensor([self.dense.config.decoder_start_token_id])
            fed = [torch.cat([start, ids[:-1]]) for ids in said]
            counts = nn.utils.rnn.pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in said], True, False)
            return Inputs({**tensors, "decoder_input_ids": nn.utils.rnn.pad_sequence(fed, True, pad)}, counts)
        if mask is None or len(utterances) == 1 or not hasattr(self.dense, "lm_head"):
            return Inputs(tensors)
        lengths = self.dense._get_feat_extract_output_lengths(mask.sum(-1)).long()
        return Inputs(tensors, torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None])

    def taught(self, utterances: Sequence[Utterance]) -> tuple[Inputs, Tensor | None]:
        """A batch whose decoder is fed the transcripts, where there are any, and the labels to learn.

        Returns:
            Inputs, and labels (B, U), -1 behind the last one and where there is no transcript; None without any.
        """
        device = next(self.dense.parameters()).device
        targets = [None if (ids := self.target(u)) is None else ids.to(device) for u in utterances]
        inputs = self.inputs(utterances, targets)
        known = [ids for ids in targets if ids is not None]
        if not known:
            return inputs, None
        fed = inputs.tensors.get("decoder_input_ids")
        width = max(len(ids) for ids in known) if fed is None else fed.shape[1]
        labels = torch.full((len(utterances), width), -1, device=device)
        for row, ids in zip(labels, targets, strict=True):
            if ids is not None:
                row[: len(ids)] = ids
        return inputs, labels

    def target(self, utterance: Utterance) -> Tensor | None:
        """(U,) token ids of an utterance's transcript, in the case its tokenizer knows; None without one.

        Raises:
            AcmizeError: the tokenizer knows none of it.
        """
        tokenizer, text = self.processor.tokenizer, utterance.text
        if not text or tokenizer is None:
            return None
        unknown = tokenizer.unk_token_id
        spelled = (tokenizer(variant).input_ids for variant in (text, text.upper(), text.lower()))
        best = [i for i in min(spelled, key=lambda ids: ids.count(unknown)) if i != unknown]
        if not best:
            raise AcmizeError(
                f"transcript {text!r}: found no token of it in {type(tokenizer).__name__}, expected a tokenizer that "
                "encodes this language; set losses.task to 0 to learn from the teacher alone"
            )
        ids = torch.tensor(best)
        return self._framed(ids) if self.generates else ids

    def said(self, utterance: Utterance) -> Tensor:
        """(U,) token ids of the dense model's transcript, the end token last."""
        if utterance.key not in self._said:
            self.inputs([utterance])
        return self._said[utterance.key]

    def _transcribed(self, tensors: dict[str, Tensor], mask: Tensor | None, i: int, utterance: Utterance) -> Tensor:
        if utterance.key not in self._said:
            if len(self._said) >= SAID:
                self._said.pop(next(iter(self._said)))
            name = self.dense.main_input_name
            length = tensors[name].shape[-1] if mask is None else int(mask[i].sum())
            alone = Inputs({name: tensors[name][i : i + 1, ..., :length]})
            seconds = len(utterance.wave) / self.processor.rate
            self._said[utterance.key] = self.generate(self.dense, alone, seconds)
        return self._said[utterance.key]

    def generate(self, model: Any, alone: Inputs, seconds: float, **given: Any) -> Tensor:
        """(U,) token ids by greedy decoding of one utterance, without the start token, with the end token."""
        limit = int(TOKENS_A_SECOND * seconds) + 8
        with evaluating(model):
            ids = model.generate(**alone.tensors, max_new_tokens=limit, do_sample=False, num_beams=1, **given)[0]
        return self._framed(ids)

    def _framed(self, ids: Tensor) -> Tensor:
        """Token ids without the start token, with the end token."""
        config = self.dense.config
        ids, end = ids[1:] if int(ids[0]) == config.decoder_start_token_id else ids, config.eos_token_id
        return ids if end is None or (len(ids) and int(ids[-1]) == end) else torch.cat([ids, ids.new_tensor([end])])

    def text(self, ids: Tensor) -> str:
        """The words of token ids; of a CTC model, of its best label a frame, repeats and blanks taken out."""
        tokenizer = self.processor.tokenizer
        if tokenizer is None:
            raise AcmizeError(f"{type(self.dense).__name__}: found no tokenizer beside it; transcripts need one")
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class Speech:
    """The data of a conversion, as `images.Images` has it: to fit on, held out for calibration, test.

    Attributes:
        example: inputs of the mean length, for a plan.
        task: loss of the transcripts in phase 3.
        calibration: what budgets are calibrated on: the held-out recordings, all where they are few.
        unreadable: recordings that were left out, since they could not be read.
    """

    def __init__(self, data: Any, model: Any, recipe: Recipe) -> None:
        if recipe.streaming:
            splits, head = open_audio_stream(data, recipe)
            fit, held = head.fit, head.held
        else:
            splits, head = open_audio(data, limit=recipe.limit, seed=recipe.seed), None
            if splits.train is None:
                raise AcmizeError(f"data {splits.name}: found no train split, expected one to fit on; add train/")
            fit, held = split_holdout(splits.train, recipe.holdout, recipe.seed)
        self.name, self.listener = splits.name, Listener(model)
        rate = self.listener.processor.rate
        self.unreadable = Unreadable(recipe.max_corrupt)
        self.fit = splits.audio(fit, "train", rate, self.unreadable)
        self.held = splits.audio(held, "held out", rate, self.unreadable)
        enough = len(self.held) >= CALIBRATED  # the mean compute of a few recordings is far from that of many
        self.calibration = self.held if enough else JoinedAudio(self.held, self.fit)
        self.test = None if splits.test is None else splits.audio(splits.test, "test", rate, self.unreadable)
        self.augmented = self.fit if head is None else StreamedAudio(head.rows, self.fit, self._taught)
        lengths = [seconds for seconds in self.fit.seconds() if seconds > 0]
        if not lengths:
            raise AcmizeError(f"data {splits.name}: found no recording that can be read, expected some; mend the data")
        self.example = (example_speech(model, frames_of(model, fmean(lengths) * rate)),)
        self.alone = alone_only(model) is not None
        self.batch_size = 1 if self.alone else recipe.batch_size
        self.task = transcript_task(model, recipe.losses.label_smoothing)
        self._train, self._learns = recipe.train, recipe.losses.task > 0

    @property
    def has_labels(self) -> bool:
        """Whether any recording to train on has a transcript."""
        return self.augmented.has_transcripts

    def training(self, model: Any) -> AbstractContextManager[None]:
        """Open while phase 3 trains a model: its front end is frozen, frames are masked."""
        return training(model, self._train)

    def batches(
        self, which: AudioSet | JoinedAudio, limit: int | None = None, size: int | None = None
    ) -> Iterator[Inputs]:
        """Inputs of a set in a fixed shuffled order, without transcripts."""
        seen = 0
        size = 1 if self.alone else min(size or self.batch_size, len(which))
        for indices in buckets(which.seconds(), size, seed=0):
            if limit is not None and seen >= limit:
                return
            yield self.listener.inputs(which.some(indices))
            seen += len(indices)

    def labelled(self, which: AudioSet) -> Spoken:
        """(inputs, utterances) batches in stored order; only for the test split is anything written by a decoder."""
        whole = getattr(which, "dataset", which)  # of what may be one process's share
        return Spoken(which, self.listener, self.batch_size, writes=whole is self.test or self.test is None)

    def _taught(self, utterances: list[Utterance]) -> tuple[Inputs, Tensor | None]:
        """Inputs and labels; no labels where none are learnt from."""
        return self.listener.taught(utterances) if self._learns else (self.listener.inputs(utterances), None)

    def epochs(self, which: AudioSet | StreamedAudio, seed: int) -> tuple[Callable[[int], Any], int]:
        """Epoch -> shuffled (inputs, labels) batches, and how many there are."""
        if isinstance(which, StreamedAudio):
            return partial(which.batches, self.batch_size, seed=seed), -(-len(which) // self.batch_size)
        seconds = which.seconds()

        def of(epoch: int) -> Any:
            drawn = buckets(seconds, self.batch_size, seed=seed, epoch=epoch)
            return (self._taught(which.some(indices)) for indices in drawn)

        return of, len(buckets(seconds, self.batch_size))


class Spoken:
    """(inputs, utterances) batches of a set in stored order, which can be gone through again and again.

    Args:
        data: set of utterances.
        listener: makes inputs of them.
        size: utterances in a batch.
        writes: whether a decoder shall write its own transcripts; without, only likelihoods are measured.
    """

    def __init__(self, data: Iterable[Utterance], listener: Listener, size: int = 1, writes: bool = True) -> None:
        self._data, self.listener, self._size, self.writes = data, listener, size, writes

    def __iter__(self) -> Iterator[tuple[Inputs, list[Utterance]]]:
        some: list[Utterance] = []
        for utterance in self._data:
            some.append(utterance)
            if len(some) == self._size:
                yield self.listener.inputs(some), some
                some = []
        if some:
            yield self.listener.inputs(some), some
