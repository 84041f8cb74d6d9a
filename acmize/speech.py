"""The audio of a conversion as batches for a speech model, and what the dense model says about it.

A speech-to-text model is judged, and its gates are taught, through its decoder on the dense model's own transcript,
which is generated once an utterance; a CTC or classification model directly by its outputs. No transcripts are needed.

A family whose dense output depends on the padding of its batch (`hosts_speech.alone_only`) is fed one utterance at a
time.

Shapes: B samples, L samples of audio, T frames, U tokens of a transcript.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acmize.audio import AudioSet, Utterance, buckets, open_audio
from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.hf_models import processor_of
from acmize.hosts_speech import alone_only, has_fixed_length
from acmize.inputs import Inputs
from acmize.recipe import Recipe
from acmize.splits import split_holdout

TOKENS_A_SECOND = 6.5  # what Moonshine allows: more is a decoder caught in a loop


class Listener:
    """Makes inputs of utterances, and text of outputs, for one dense model and whatever is converted from it.

    Args:
        dense: the dense model; its transcripts are kept, so each utterance is generated once.
    """

    def __init__(self, dense: Any) -> None:
        self.dense, self.processor = dense, processor_of(dense)
        self.generates = bool(dense.config.is_encoder_decoder)
        self._said: dict[tuple[str, int], Tensor] = {}

    def inputs(self, utterances: Sequence[Utterance]) -> Inputs:
        """A padded batch; with the dense model's transcripts as decoder inputs where it has a decoder."""
        name = self.dense.main_input_name
        waves = [u.wave.numpy() for u in utterances]
        fixed = {} if has_fixed_length(self.dense) else {"padding": True}
        made = self.processor.features(
            waves, sampling_rate=self.processor.rate, return_tensors="pt", return_attention_mask=True, **fixed
        )
        device = next(self.dense.parameters()).device
        tensors = {name: made[name].to(device)}
        if not fixed:
            return self._heard(tensors, None, utterances)
        mask = made["attention_mask"].to(device)
        if len(utterances) > 1:
            tensors["attention_mask"] = mask
        return self._heard(tensors, mask, utterances)

    def _heard(self, tensors: dict[str, Tensor], mask: Tensor | None, utterances: Sequence[Utterance]) -> Inputs:
        if self.generates:
            said = [self._transcribed(tensors, mask, i, u) for i, u in enumerate(utterances)]
            pad = self.dense.config.pad_token_id or self.dense.config.eos_token_id or 0
            start = said[0].new_tensor([self.dense.config.decoder_start_token_id])
            fed = [torch.cat([start, ids[:-1]]) for ids in said]
            counts = nn.utils.rnn.pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in said], True, False)
            return Inputs({**tensors, "decoder_input_ids": nn.utils.rnn.pad_sequence(fed, True, pad)}, counts)
        if mask is None or len(utterances) == 1 or not hasattr(self.dense, "lm_head"):
            return Inputs(tensors)
        lengths = self.dense._get_feat_extract_output_lengths(mask.sum(-1)).long()
        return Inputs(tensors, torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None])

    def said(self, utterance: Utterance) -> Tensor:
        """(U,) token ids of the dense model's transcript, the end token last."""
        if utterance.key not in self._said:
            self.inputs([utterance])
        return self._said[utterance.key]

    def _transcribed(self, tensors: dict[str, Tensor], mask: Tensor | None, i: int, utterance: Utterance) -> Tensor:
        if utterance.key not in self._said:
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
        ids, end = ids[1:] if int(ids[0]) == model.config.decoder_start_token_id else ids, model.config.eos_token_id
        return ids if end is None or (len(ids) and int(ids[-1]) == end) else torch.cat([ids, ids.new_tensor([end])])

    def text(self, ids: Tensor) -> str:
        """The words of token ids; of a CTC model, of its best label a frame, repeats and blanks taken out."""
        tokenizer = self.processor.tokenizer
        if tokenizer is None:
            raise AcmizeError(f"{type(self.dense).__name__}: found no tokenizer beside it; transcripts need one")
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class Speech:
    """The data of a conversion, as `images.Images` has it: to fit on, held out for calibration, test."""

    def __init__(self, data: Any, model: Any, recipe: Recipe) -> None:
        splits = open_audio(data, limit=recipe.limit, seed=recipe.seed)
        self.name, self.listener = splits.name, Listener(model)
        if splits.train is None:
            raise AcmizeError(f"data {splits.name}: found no train split, expected one to fit on; add train/")
        fit, held = split_holdout(splits.train, recipe.holdout, recipe.seed)
        rate = self.listener.processor.rate
        self.fit, self.held = splits.audio(fit, "train", rate), splits.audio(held, "held out", rate)
        self.test = None if splits.test is None else splits.audio(splits.test, "test", rate)
        self.augmented = self.fit
        self.batch_size = 1 if alone_only(model) else recipe.batch_size

    def batches(self, which: AudioSet, limit: int | None = None, size: int | None = None) -> Iterator[Inputs]:
        """Inputs of a set in a fixed shuffled order, without transcripts."""
        seen = 0
        for indices in buckets(which.seconds(), min(size or self.batch_size, self.batch_size), seed=0):
            if limit is not None and seen >= limit:
                return
            yield self.listener.inputs([which[i] for i in indices])
            seen += len(indices)

    def labelled(self, which: AudioSet) -> Spoken:
        """(inputs, utterances) batches in stored order; only for the test split is anything written by a decoder."""
        return Spoken(which, self.listener, self.batch_size, writes=which is self.test or self.test is None)

    def epochs(self, which: AudioSet, seed: int) -> tuple[Callable[[int], Any], int]:
        """Epoch -> shuffled (inputs, None) batches, and how many there are."""
        seconds = which.seconds()

        def of(epoch: int) -> Any:
            drawn = buckets(seconds, self.batch_size, seed=seed, epoch=epoch)
            return ((self.listener.inputs([which[i] for i in indices]), None) for indices in drawn)

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
