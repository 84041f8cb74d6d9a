"""`make_plan`: which sites a method converts, at what size and cost."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from acmize import hosts_speech
from acmize.cost import Work, count_macs, measure_work, tokens_at
from acmize.errors import AcmizeError
from acmize.hosts.sites import check_declared, parse_targets, sites_of, unfit, within
from acmize.inputs import Inputs
from acmize.methods.token_merging import Blocks, labels_frames, mergeable
from acmize.plan import Merging, Plan, PlanEntry, Refusal, Site, counted_entry
from acmize.registry import Refused, method_for

_BY_BUDGET = ("auto", "budget")  # merges follow the budget
_OUT = ("attn.proj", "o_proj", "out_proj")  # output projections of attention


# Merging frames costs little down to a budget of .6, so that gates save their own work alone until then (docs/log.md).
_FRAMES: dict[str, Any] = {
    "slope": 1.0, "start": 1.0, "first": (1.0, 0.0), "knees": (0.75, 0.5), "decay": 0.35, "bend": (0.6, 0.8),
}  # fmt: skip
_FRONT = 0.35  # of the work of convolutions over time is left out before any frames are merged (docs/log.md)


def example_input(model: nn.Module, batch_size: int = 1) -> torch.Tensor:
    """Zeros of the model's own input size, from its timm configuration.

    Raises:
        AcmizeError: the model names no input size.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = cfg.get("input_size")
    img = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and img is not None:
        size = (size[0], *img)
    if size is None:
        raise AcmizeError(
            f"{type(model).__name__} names no input size; pass example=(tensor,) to make_plan to count MACs"
        )
    reference = next(model.parameters())
    return torch.zeros(batch_size, *size, device=reference.device, dtype=reference.dtype)


def make_plan(
    model: nn.Module,
    config: Any,
    *,
    example: tuple[Any, ...] | None = None,
    sites: Iterable[Site] = (),
    target_modules: Sequence[str] = (),
    exclude: Sequence[str] = (),
    merge: str | int = "none",
) -> Plan:
    """What would be converted, at what size and cost, and what not and why. The model is not changed.

    Args:
        model: the pretrained model.
        config: config of a registered method, such as `AcmConfig`.
        example: inputs for one sample, to count MACs; made from the timm configuration when None. For a speech model,
            one `Inputs` of a typical length (`Speech.example`), which schedules of merging are made for.
        sites: declared sites of a module of one's own, in place of discovery.
        target_modules: globs over sites, or declarations (see `parse_targets`).
        exclude: globs over entries, sites and their modules that stay dense; where that leaves none, and tokens may be
            merged, the plan merges tokens alone.
        merge: merge tokens too: "none", "budget" (as many as suit the budget), "auto" ("budget" where it is sound), or
            pairs before each block at every budget.

    Raises:
        AcmizeError: nothing to convert, or a pattern that matches nothing.
    """
    globs, declared = parse_targets(model, target_modules)
    declared += list(sites)
    modules = dict(model.named_modules())
    check_declared(model, modules, declared)
    method = method_for(config)
    found = sites_of(model, declared, bool(globs), method.kinds)
    speech = hosts_speech.is_speech(model) and (example is None or isinstance(example[0], Inputs))
    inputs = example or ((hosts_speech.example_speech(model),) if speech else (example_input(model),))
    work = measure_work(model, *inputs)
    drafts: list[tuple[dict[str, Any], Site]] = []
    refused: list[Refusal] = []
    used: set[str] = set()

    def wanted(fqn: str, target: str, site: Site) -> bool:
        names = (fqn, target, site.fqn)
        chosen = (
            not globs
            or site in declared
            or any(fnmatch.fnmatchcase(n, g) and (used.add(g) or True) for g in globs for n in names)
        )
        if chosen and not globs and (reason := site.options.get("only_if_asked")):
            layers = fqn if "module" in site.roles else ", ".join(site.roles.values())
            refused.append(Refusal(fqn=layers, reason=reason))
            return False
        dropped = [g for g in exclude for n in names if fnmatch.fnmatchcase(n, g)]
        used.update(dropped)
        if chosen and dropped:
            refused.append(Refusal(fqn=fqn, reason=f"excluded by --exclude {dropped[0]}"))
        elif not chosen:
            refused.append(Refusal(fqn=fqn, reason="not among --target-modules"))
        return chosen and not dropped

    for item in found:
        if isinstance(item, Refusal):
            refused.append(item)
            continue
        if reason := unfit(item, modules):
            refused.append(Refusal(fqn=item.fqn, reason=reason))
            continue
        try:
            keep = lambda fqn, target, site=item: wanted(fqn, target, site)  # noqa: E731
            if item.kind not in method.kinds:
                raise Refused(f"method {method.name} converts no site of kind {item.kind}")
            drafts += [(d, item) for d in method.plan(item, modules, config, keep, work)]
        except Refused as error:
            refused.append(Refusal(fqn=item.fqn, reason=str(error)))
    unused = [g for g in (*globs, *exclude) if g not in used]
    if unused:
        raise AcmizeError(f"pattern {unused[0]!r} matches no site; `acmize plan` lists them")
    blocks = mergeable(model)
    if merge == "auto" and labels_frames(model):
        blocks = "token merging: each frame has a label of its own; --merge budget merges them all the same"
    excluded = any(r.reason.startswith("excluded") for r in refused)
    alone = not drafts and excluded and merge in _BY_BUDGET and not isinstance(blocks, str)
    if not drafts and not alone:
        told = [r for r in refused if "--num-learners" in r.reason] or refused
        why = f" ({told[0].fqn}: {told[0].reason})" if told else ""
        raise AcmizeError(f"nothing to convert in this {type(model).__name__}{why}")
    entries = _complete(model, modules, drafts, inputs, work)
    scope = _scope(model, entries) if speech else ""
    macs = _macs_of(model, scope, inputs)
    merges = merge not in ("none", 0)
    lengths = _length_macs(model, scope, _counted(model, entries, blocks, merges)) if speech else None
    merging = None
    if merges:
        if isinstance(blocks, Blocks):
            merging = _merging(model, blocks, entries, macs, merge, inputs, lengths)
        elif merge == "auto":
            refused.append(Refusal(fqn="blocks", reason=blocks))
        else:
            raise AcmizeError(f"--merge {merge}: {blocks}; leave it out")
    return Plan(
        config=config,
        macs_dense=macs,
        entries=entries,
        refused=tuple(refused),
        input_size=_size(inputs[0]),
        merging=merging,
        scope=scope,
        length_macs=lengths,
    )


def _size(first: Any) -> tuple[int, ...]:
    tensor = next(iter(first.tensors.values())) if isinstance(first, Inputs) else first
    return tuple(tensor.shape[1:]) if isinstance(tensor, torch.Tensor) else ()


def _scope(model: Any, entries: tuple[PlanEntry, ...]) -> str:
    """The encoder where everything adaptive lies in one, else the whole model."""
    path = hosts_speech.encoder_path(model)
    return path if all(within(e.target, path) for e in entries) else ""


def _macs_of(model: nn.Module, scope: str, inputs: tuple[Any, ...]) -> int:
    if not scope:
        return count_macs(model, *inputs)
    return count_macs(model.get_submodule(scope), inputs[0].without(*hosts_speech.DECODER_INPUTS))


def _counted(model: nn.Module, entries: tuple[PlanEntry, ...], blocks: Blocks | str, merges: bool) -> str:
    """A layer that sees as many frames as `Plan.account` takes for the length of a recording."""
    if isinstance(blocks, Blocks) and (merges or not counted_entry(entries).own_frames):
        return _out_layer(model, blocks)
    first = counted_entry(entries)
    return first.roles["fc1"] if first.kind == "mlp" else first.target


def _out_layer(model: nn.Module, blocks: Blocks) -> str:
    """Path of the output projection of the first block's attention."""
    named = model.get_submodule(f"{blocks.path}.0").named_modules()
    return next(f"{blocks.path}.0.{name}" for name, m in named if isinstance(m, nn.Linear) and name.endswith(_OUT))


def _length_macs(model: Any, scope: str, layer: str) -> tuple[float, float, float] | None:
    """MACs of the scope as a + b T + c T^2 for T tokens, through three counted lengths; None for a fixed length."""
    if hosts_speech.has_fixed_length(model) or (model.config.is_encoder_decoder and not scope):
        return None
    tokens, macs = [], []
    for frames in (200, 500, 1250):
        inputs = (hosts_speech.example_speech(model, frames),)
        tokens.append(tokens_at(model, [layer], *inputs)[layer])
        macs.append(_macs_of(model, scope, inputs))
    powers = torch.tensor(tokens, dtype=torch.float64)[:, None] ** torch.arange(3)
    a, b, c = torch.linalg.solve(powers, torch.tensor(macs, dtype=torch.float64)).tolist()
    return a, b, c


def _merging(
    model: nn.Module,
    where: Blocks,
    entries: tuple[PlanEntry, ...],
    macs: int,
    merge: str | int,
    inputs: Any,
    lengths: tuple[float, float, float] | None,
) -> Merging:
    if isinstance(merge, str) and merge not in _BY_BUDGET:
        raise AcmizeError(f"merge: found {merge!r}, expected auto, budget, none, or a number of pairs")
    if isinstance(merge, int) and merge < 0:
        raise AcmizeError(f"merge: found {merge}, expected a number of pairs of at least 0")
    blocks: list[nn.Module] = list(model.get_submodule(where.path).children())
    linear = [sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear)) for block in blocks]
    sites = [
        sum(e.macs // e.tokens for e in entries if e.fqn.startswith(f"{where.path}.{i}.")) for i in range(len(blocks))
    ]
    out = _out_layer(model, where)
    layer: Any = model.get_submodule(out)
    merging = Merging(
        tokens=tokens_at(model, [out], *inputs)[out],
        prefix=where.prefix,
        blocks=len(blocks),
        dim=layer.out_features,
        attention_dim=layer.in_features,
        macs=macs,
        linear_macs=tuple(linear),
        dense_macs=tuple(all_ - site for all_, site in zip(linear, sites, strict=True)),
        fixed=None if merge in _BY_BUDGET else int(merge),
        path=where.path,
        neighbours=where.neighbours,
        **(_FRAMES if where.neighbours else {}),
        lengths=lengths or Merging.lengths,
    )
    if entries:
        front = sum(e.macs for e in entries if e.own_frames) / macs
        return replace(merging, start=merging.start - _FRONT * front)
    return replace(merging, slope=1.0, start=1.0, bend=(0.0, 1.0))  # nothing else saves the rest


def _complete(
    model: nn.Module,
    modules: dict[str, nn.Module],
    drafts: list[tuple[dict[str, Any], Site]],
    inputs: tuple[Any, ...],
    work: Work,
) -> tuple[PlanEntry, ...]:
    """Add tokens and dense MACs to drafted entries that lack them."""
    for draft, _ in drafts:
        if draft["target"] not in work.inputs:
            raise AcmizeError(f"{draft['fqn']}: did not run on the example input; exclude it with --exclude")
    counted = [d for d, _ in drafts if "tokens" not in d]
    linears = {d["fqn"]: d["roles"]["fc1"] if d["kind"] == "mlp" else d["target"] for d in counted}
    tokens = tokens_at(model, sorted(set(linears.values())), *inputs)
    entries = []
    for draft, site in drafts:
        if "tokens" in draft:
            entries.append(PlanEntry(**draft))
            continue
        rows = tokens[linears[draft["fqn"]]]
        entries.append(PlanEntry(**draft, tokens=rows, macs=rows * _dense_macs(modules, draft, site)))
    return tuple(entries)


def _dense_macs(modules: dict[str, Any], draft: dict[str, Any], site: Site) -> int:
    if draft["kind"] == "mlp":
        layers = [modules[site.roles[r]] for r in ("fc1", "fc1_gate", "fc2") if r in site.roles]
        return sum(layer.weight.numel() for layer in layers)
    share = 3 if draft["fqn"] != draft["target"] else 1
    return modules[draft["target"]].weight.numel() // share
