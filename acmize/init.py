"""Learners from the pretrained weights: the converted model equals the dense one exactly at full width.

    MLP          hidden units ordered greedily by explained output variance; what is left out is replaced by its mean,
                 folded into one bias for each learner.
    q and k      U S V^T = svd(Cq^1/2 Ck^1/2);  q' = S^1/2 U^T Cq^-1/2 q,  k' = S^1/2 V^T Ck^-1/2 (k - mean k)
    v and out    U S V^T = svd(O_h Cv^1/2);     v' = S V^T Cv^-1/2 (v - mean v),  O_h' = U,  out bias += O_h mean v
    paired       q and k under rotary positions: pairs of dimensions by falling E|q|^2 E|k|^2, nothing else is changed
    low rank     U S V^T = svd(W C^1/2); down = V^T C^-1/2 ... up = U S: exact at full rank

Softmax ignores a shift of all keys, and attention sums to one, so the means of k and v may be taken out. Second moments
come from one pass of the dense model over calibration photographs; everything is solved in float64.

Shapes: U units (of a head), H heads, D input width, O output width; C (U + 1, U + 1) augmented by a constant one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmize import parallel
from acmize.adaptive import AcmMlp, AcmOut, AcmProjections
from acmize.cost import evaluating
from acmize.errors import AcmizeError
from acmize.importance import covariance, order_units
from acmize.inputs import Batch, forward
from acmize.layers import Contract, LowRank
from acmize.padding import rows, watching
from acmize.plan import Plan, PlanEntry
from acmize.products import gemm
from acmize.registry import method_for
from acmize.windows import Geometry

Moments = dict[str, Tensor]
MOMENT_BYTES = 2 << 30  # of second moments held at a time
ATTENTION = ("rotated", "paired")  # forms of the projections of one attention, filled together
LOW_RANK = ("lowrank", "windows")


# --- statistics -----------------------------------------------------------------------------------------------


def collect_moments(dense: nn.Module, plan: Plan, batches: Iterable[Batch]) -> Moments:
    """Second moments of what is cut at each site, in one pass of the dense model.

    Args:
        dense: the dense model, unchanged.
        plan: where to look.
        batches: inputs, without labels.

    Returns:
        Path of a layer -> (H, U + 1, U + 1) float64 moments of [z; 1] over tokens: of the hidden units read by an MLP's
        fc2 (H = 1), of the outputs of each projection (a fused one gives H = 3 x heads), of a single layer's input, or
        of what `Method.moments` asks for.
    """
    wanted = _wanted(plan)
    if not wanted:
        return {}
    modules, handles = dict(dense.named_modules()), []
    moments = {path: _no_moments(modules[path], *how) for path, how in wanted.items()}

    def hook(path: str, side: str, heads: int) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            z = inputs[0] if side == "input" else output
            if isinstance(module, nn.Conv2d):
                z = z.permute(0, 2, 3, 1)
            elif isinstance(module, nn.Conv1d):
                z = Geometry.of(module).windows(z).flatten(-2)
            z = rows(z, padding(path))
            z = F.pad(z.reshape(-1, heads, z.shape[-1] // heads).float(), (0, 1), value=1.0).transpose(0, 1)
            new = gemm(z[0].T, z[0].T)[None] if heads == 1 else z.mT @ z
            moments[path] += new  # in float64

        return add

    for path, (side, heads) in wanted.items():
        handles.append(modules[path].register_forward_hook(hook(path, side, heads)))
    try:
        with evaluating(dense), watching(dense) as padding:
            for batch in parallel.spread(batches):
                forward(dense, batch)
    finally:
        for handle in handles:
            handle.remove()
    parallel.total_(moments.values())
    for path, moment in moments.items():
        if not moment.isfinite().all():
            raise AcmizeError(
                f"{path}: found activations that are not finite, expected numbers; check weights and data"
            )
    return moments


def _wanted(plan: Plan) -> dict[str, tuple[str, int]]:
    """Path of a layer -> which side of it moments are taken of, and in how many heads."""
    wanted: dict[str, tuple[str, int]] = {}
    for e in plan.entries:
        if e.form == "prefix":
            wanted[e.roles["fc2"]] = ("input", 1)
        elif e.form in LOW_RANK:
            wanted[e.target] = ("input", 1)
        elif e.form in ATTENTION:
            wanted |= _attention_outputs(e)
        else:
            wanted |= method_for(plan.config).moments(e)
    return wanted


def _attention_outputs(entry: PlanEntry) -> dict[str, tuple[str, int]]:
    if "qkv" in entry.roles:
        return {entry.roles["qkv"]: ("output", 3 * entry.heads)}
    return {entry.roles[k]: ("output", entry.heads) for k in "qkv"}


# --- installing -----------------------------------------------------------------------------------------------


def initialise_(
    model: nn.Module, dense: nn.Module, plan: Plan, batches: Callable[[], Iterable[Batch]], limit: int = MOMENT_BYTES
) -> None:
    """`init_` from the moments of some batches, as many sites at a time as bounded memory allows.

    Args:
        model: converted by `convert_`.
        dense: the model before conversion.
        plan: its plan.
        batches: gives the same inputs each time; the dense model runs over them once for each portion of the sites.
        limit: bytes of moments at a time; a site that needs more is on its own.
    """
    for portion in portions(dense, plan, limit):
        init_(model, dense, portion, collect_moments(dense, portion, batches()))


def portions(dense: nn.Module, plan: Plan, limit: int) -> list[Plan]:
    """The plan in parts whose moments take at most `limit` bytes each; what is filled together stays together."""
    together: dict[str, list[PlanEntry]] = {}
    for e in plan.entries:
        known = e.roles["out"] if e.form in ATTENTION else e.target if e.form in ("prefix", *LOW_RANK) else ""
        together.setdefault(known, []).append(e)
    parts: list[Plan] = []
    room = 0
    for entries in together.values():
        part = replace(plan, entries=tuple(entries))
        size = sum(_moment_bytes(dense.get_submodule(path), *how) for path, how in _wanted(part).items())
        if parts and size <= room:
            parts[-1] = replace(plan, entries=(*parts[-1].entries, *entries))
        else:
            parts.append(part)
            room = limit
        room -= size
    return parts


def _moment_bytes(layer: Any, side: str, heads: int) -> int:
    return 8 * heads * _moment_size(layer, side, heads) ** 2


def _moment_size(layer: Any, side: str, heads: int) -> int:
    size = len(layer.weight) if side == "output" else layer.weight.shape[1]
    if isinstance(layer, nn.Conv1d):
        size = layer.weight[0].numel()  # a window of the input
    return size // heads + 1


def _no_moments(layer: Any, side: str, heads: int) -> Tensor:
    size = _moment_size(layer, side, heads)
    return torch.zeros(heads, size, size, dtype=torch.double, device=layer.weight.device)


@torch.no_grad()
def init_(model: nn.Module, dense: nn.Module, plan: Plan, moments: Moments) -> None:
    """Fill the adaptive modules of `model` from the weights of `dense`, exact at full width.

    Forms that are not known here are filled by the plan's method (`Method.fill`).

    Args:
        model: converted by `convert_`.
        dense: the model before conversion.
        plan: its plan.
        moments: from `collect_moments`.

    Raises:
        AcmizeError: moments of a layer that is cut are missing.
    """
    if missing := sorted(_wanted(plan).keys() - moments.keys()):
        raise AcmizeError(
            f"moments: found none of {missing[0]} ({len(missing)} missing in all), expected those of every layer that "
            "is cut; take them from collect_moments with this plan"
        )
    modules, adaptive = dict(dense.named_modules()), dict(model.named_modules())
    attention: dict[str, list[PlanEntry]] = {}
    others = [e for e in plan.entries if e.form not in ("prefix", *LOW_RANK, *ATTENTION)]
    method_for(plan.config).fill(adaptive, modules, others, moments)
    for e in plan.entries:
        if e.form == "prefix":
            _init_mlp(adaptive, modules, e, moments[e.roles["fc2"]][0])
        elif e.form in LOW_RANK:
            _init_lowrank(adaptive[e.target], modules[e.target], e, moments[e.target][0])
        elif e.form in ATTENTION:
            attention.setdefault(e.roles["out"], []).append(e)
    for entries in attention.values():
        _init_attention(adaptive, modules, entries, moments)


def _init_mlp(adaptive: dict[str, Any], dense: dict[str, Any], e: PlanEntry, moments: Tensor) -> None:
    w1, b1 = _linear(dense[e.roles["fc1"]])
    w2, b2 = _linear(dense[e.roles["fc2"]])
    gate = None
    if e.options.get("packed"):
        (wa, wb), (ba, bb) = w1.chunk(2), b1.chunk(2)
        (w1, b1), gate = ((wa, ba), (wb, bb)) if e.options["packed"] == "gate_last" else ((wb, bb), (wa, ba))
    elif "fc1_gate" in e.roles:
        gate = _linear(dense[e.roles["fc1_gate"]])
    order = order_units(moments, w2)
    if "module" in e.roles:
        acm: AcmMlp = adaptive[e.target]
        fc1, fc2, fc1_gate = acm.fc1, acm.fc2, acm.fc1_gate
    else:
        fc1, fc2, fc1_gate = adaptive[e.roles["fc1"]].fc1, adaptive[e.roles["fc2"]].fc, None
    _copy(fc1, w1[order], b1[order])
    if gate is not None and fc1_gate is not None:
        _copy(fc1_gate, gate[0][order], gate[1][order])
    _fill_contract(fc2, w2[:, order], b2, (moments[-1, :-1] / moments[-1, -1])[order])


def _fill_contract(fc: Contract, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
    """Weights, and biases that put the mean of the units left out back in."""
    fc.weight.copy_(weight)
    pairs = zip(fc.bounds, fc.bounds[1:], strict=False)
    put_back = torch.stack([weight[:, a:b] @ mean[a:b] for a, b in pairs])
    fc.learner_bias.copy_(-put_back)
    fc.bias.copy_(bias + put_back.sum(0))


def _init_attention(
    adaptive: dict[str, Any], dense: dict[str, Any], entries: list[PlanEntry], moments: Moments
) -> None:
    e = entries[0]
    heads, roles = e.heads, e.roles
    if "qkv" in roles:
        weights, biases = (t.chunk(3) for t in _linear(dense[roles["qkv"]]))
        stats = moments[roles["qkv"]].chunk(3)
    else:
        weights, biases = zip(*(_linear(dense[roles[k]]) for k in "qkv"), strict=True)
        stats = [moments[roles[k]] for k in "qkv"]
    w = {k: x.unflatten(0, (heads, -1)).clone() for k, x in zip("qkv", weights, strict=True)}  # (H, U, D)
    b = {k: x.unflatten(0, (heads, -1)).clone() for k, x in zip("qkv", biases, strict=True)}
    out, out_bias = _linear(dense[roles["out"]])
    out = out.unflatten(1, (heads, -1)).clone()  # (O, H, U)
    slots = {k: _slot(adaptive, roles, k) for k in ("q", "k", "v", "out")}
    # A mean moves into a bias; a layer that stays dense and has none keeps its mean.
    shift_k = slots["k"].bias is not None
    shift_v = slots["v"].bias is not None and slots["out"].bias is not None
    for h in range(heads):
        cov, mean = zip(*(covariance(s[h]) for s in stats), strict=True)
        if e.options.get("rotate_qk", True):
            raw_q = stats[0][h][:-1, :-1] / stats[0][h][-1, -1]  # queries are not centred
            tq, tk = rotate_qk(raw_q, cov[1])
            w["q"][h], b["q"][h] = tq @ w["q"][h], tq @ b["q"][h]
            w["k"][h], b["k"][h] = tk @ w["k"][h], tk @ (b["k"][h] - mean[1] * shift_k)
        elif e.options.get("paired_qk"):
            order = order_pairs(*(s[h][:-1, :-1].diagonal() for s in stats[:2]))
            for k in "qk":
                if (places := getattr(slots[k], "order", None)) is not None:
                    places[h] = order
                    w[k][h], b[k][h] = w[k][h][order], b[k][h][order]
        if e.options.get("rotate_vo", True):
            tv, out_h = rotate_vo(out[:, h], cov[2])
            out_bias = out_bias + out[:, h] @ mean[2] * shift_v
            w["v"][h], b["v"][h] = tv @ w["v"][h], tv @ (b["v"][h] - mean[2] * shift_v)
            out[:, h] = out_h
    if slots["q"] is slots["k"]:  # no part of a fused layer is adaptive: it stays one, rotated for what follows
        _copy(slots["q"], torch.cat([w[k].flatten(0, 1) for k in "qkv"]), torch.cat([b[k].flatten() for k in "qkv"]))
    else:  # a dense sibling of a rotated projection is rotated too
        for k in "qkv":
            _copy(slots[k], w[k].flatten(0, 1), b[k].flatten())
    _copy(slots["out"], out.flatten(1), out_bias)


def _slot(adaptive: dict[str, Any], roles: dict[str, str], kind: str) -> nn.Linear:
    """The layer that takes the weights of a projection: inside an adaptive module, or one that stays dense."""
    module = adaptive[roles.get(kind) or roles["qkv"]]
    if isinstance(module, AcmProjections):
        return getattr(module, kind)
    return module.fc if isinstance(module, AcmOut) else module


def _init_lowrank(acm: Any, dense: Any, e: PlanEntry, moments: Tensor) -> None:
    weight, bias = _linear(dense)
    if e.fqn != e.target:
        part = "qkv".index(e.kind)
        weight, bias = weight.chunk(3)[part], bias.chunk(3)[part]
        for key in acm.parts:
            if not isinstance(getattr(acm, key), LowRank):
                other = "qkv".index(key)
                full, full_bias = _linear(dense)
                _copy(getattr(acm, key), full.chunk(3)[other], full_bias.chunk(3)[other])
    lowrank: LowRank = getattr(acm, e.kind)
    cov, mean = covariance(moments)
    half, inverse = roots(cov)
    u, s, vt = torch.linalg.svd(weight @ half, full_matrices=False)
    rank = e.bounds[-1]
    down = vt[:rank] @ inverse
    _copy(lowrank.fc1, down, -down @ mean)
    up = u[:, :rank] * s[:rank]
    _fill_contract(lowrank.fc2, up, bias + weight @ mean, torch.zeros(rank, dtype=up.dtype))


# --- linear algebra, float64 ----------------------------------------------------------------------------------


def rotate_qk(cq: Tensor, ck: Tensor) -> tuple[Tensor, Tensor]:
    """(U, U) moments of a head's queries and centred keys -> the maps of q and k; tq^T tk is the identity."""
    (q2, qi), (k2, ki) = roots(cq), roots(ck)
    u, s, vt = torch.linalg.svd(q2 @ k2)
    root = s.clamp_min(s[0] * 1e-10).sqrt()[:, None]
    return root * (u.T @ qi), root * (vt @ ki)


def order_pairs(q2: Tensor, k2: Tensor) -> Tensor:
    """(U,) squares of a head's queries and keys -> its dimensions, neighbouring pairs by falling energy product."""
    energy = q2.unflatten(0, (-1, 2)).sum(1) * k2.unflatten(0, (-1, 2)).sum(1)
    pairs = energy.argsort(descending=True, stable=True)
    return (2 * pairs[:, None] + torch.arange(2, device=pairs.device)).flatten()


def rotate_vo(out: Tensor, cv: Tensor) -> tuple[Tensor, Tensor]:
    """(O, U) output block and (U, U) covariance of a head's values -> the map of v and the new output block."""
    v2, vi = roots(cv)
    u, s, vt = torch.linalg.svd(out @ v2, full_matrices=False)
    return s[:, None] * (vt @ vi), u


def roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a symmetric positive matrix; directions without energy are lifted: exact inverses."""
    w, v = torch.linalg.eigh(c)
    w = w.clamp_min(w[-1].clamp_min(1e-30) * 1e-7)
    return (v * w.sqrt()) @ v.T, (v / w.sqrt()) @ v.T


def _linear(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight (O, D) and bias (O,) of a linear layer, 1x1 convolution, or convolution over windows (K * C), float64."""
    weight = layer.weight.detach().double()
    weight = (weight.mT if isinstance(layer, nn.Conv1d) else weight).flatten(1)
    bias = layer.bias.detach().double() if layer.bias is not None else weight.new_zeros(len(weight))
    return weight, bias


def _copy(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    else:
        assert not bias.any(), "a layer without a bias cannot take one: the saved model could not be rebuilt"
