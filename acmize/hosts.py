"""Where a model can be made adaptive. The only file that knows class names of timm and transformers.

Classes are matched exactly: a subclass may read a layer's `.weight` past its forward, as BEiT's attention does, so what
is not known is refused by name with the reason. A user's own module is converted by naming its sites.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from acmize import hosts_speech
from acmize.cost import Work, count_macs, measure_work, tokens_at
from acmize.errors import AcmizeError
from acmize.inputs import Inputs
from acmize.methods.token_merging import why_not
from acmize.padding import class_path
from acmize.plan import Merging, Plan, PlanEntry, Refusal, Site
from acmize.registry import Refused, method_for

Found = list[Site | Refusal]
Handler = Callable[[str, Any], Found]
LINEAR = ("mlp", "attention", "linear")
_HANDLERS: dict[type, dict[str, Handler]] = {}  # class -> kind of site -> what finds it


def _handles(*paths: str, kinds: tuple[str, ...] = LINEAR) -> Callable[[Handler], Handler]:
    """Register a handler for exact classes by their import path; paths that this version lacks are passed over.

    `kinds` are those of the sites it finds: only methods that convert one of them are shown the class.
    """

    def decorate(handler: Handler) -> Handler:
        for path in paths:
            module, _, name = path.rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), name, None)
            except ImportError:
                cls = None
            if cls is not None:
                _HANDLERS.setdefault(cls, {}).update(dict.fromkeys(kinds, handler))
        return handler

    return decorate


# --- timm -----------------------------------------------------------------------------------------------------


def _plain(module: Any) -> bool:
    return module is None or type(module) is nn.Identity


def _drop(module: Any, name: str) -> float:
    return float(getattr(getattr(module, name, None), "p", 0.0))


@_handles("timm.layers.Mlp", "timm.layers.ConvMlp")
def _mlp(fqn: str, module: Any) -> Found:
    if not _plain(getattr(module, "norm", None)):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    drop1 = _drop(module, "drop1") or _drop(module, "drop")
    first = isinstance(module.fc1, nn.Conv2d)
    options = {"channels_first": first, "drop1": drop1, "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@_handles("timm.layers.SwiGLU")
def _swiglu(fqn: str, module: Any) -> Found:
    if not _plain(module.norm):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1_x", "fc1_gate": f"{fqn}.fc1_g", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    options = {"gated": True, "drop1": _drop(module, "drop1"), "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@_handles("timm.layers.GluMlp")
def _glu(fqn: str, module: Any) -> Found:
    if not _plain(module.norm):
        return [Refusal(fqn=fqn, reason=f"a {type(module.norm).__name__} between fc1 and fc2 reads every hidden unit")]
    if isinstance(module.fc1, nn.Conv2d):
        return [Refusal(fqn=fqn, reason="gated MLP of convolutions")]
    roles = {"module": fqn, "fc1": f"{fqn}.fc1", "fc2": f"{fqn}.fc2", "act": f"{fqn}.act"}
    packed = "gate_last" if getattr(module, "gate_last", True) else "gate_first"
    options = {"gated": True, "packed": packed, "drop1": _drop(module, "drop1"), "drop2": _drop(module, "drop2")}
    return [Site(fqn=fqn, kind="mlp", roles=roles, options=options)]


@_handles("timm.layers.GlobalResponseNormMlp", "timm.layers.GatedMlp")
def _unsound_mlp(fqn: str, module: Any) -> Found:
    return [Refusal(fqn=fqn, reason=f"{type(module).__name__} mixes hidden units before its second layer")]


@_handles(
    "timm.models.vision_transformer.Attention",
    "timm.layers.Attention",
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.AttentionRope",
    "timm.models.eva.EvaAttention",
)
def _attention(fqn: str, module: Any) -> Found:
    rope = "Rope" in type(module).__name__ or "Eva" in type(module).__name__
    if getattr(module, "num_kv_groups", 1) > 1:
        return [Refusal(fqn=fqn, reason="grouped-query attention: heads share keys and values")]
    normed = not (_plain(getattr(module, "q_norm", None)) and _plain(getattr(module, "k_norm", None)))
    between = not _plain(getattr(module, "norm", None)) or getattr(module, "gate", None) is not None
    notes: Found = []
    if rope or normed:
        why = "rotary positions act" if rope else "a norm acts"
        notes.append(Refusal(fqn=f"{fqn}.q, {fqn}.k", reason=f"{why} on q and k before their product"))
    if between:
        notes.append(Refusal(fqn=f"{fqn}.v, {fqn}.proj", reason="a norm or gate lies between the values and proj"))
    if (rope or normed) and between:
        return notes
    options = {"heads": module.num_heads, "rotate_qk": not (rope or normed), "rotate_vo": not between}
    roles = {"out": f"{fqn}.proj"}
    if getattr(module, "qkv", None) is not None:
        if getattr(module, "q_bias", None) is not None:
            return [Refusal(fqn=fqn, reason="its forward reads qkv.weight directly, so qkv cannot be replaced")]
        roles["qkv"] = f"{fqn}.qkv"
    else:
        roles |= {part: f"{fqn}.{part}_proj" for part in "qkv"}
    return [*notes, Site(fqn=fqn, kind="attention", roles=roles, options=options)]


@_handles("timm.models.beit.Attention")
def _beit_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="its forward reads qkv.weight directly, so qkv cannot be replaced")]


@_handles("timm.models.swin_transformer.WindowAttention", "timm.models.swin_transformer_v2.WindowAttention")
def _window_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="window attention: only the MLPs of this family are converted")]


@_handles("torch.nn.MultiheadAttention")
def _torch_attention(fqn: str, _module: Any) -> Found:
    return [Refusal(fqn=fqn, reason="MultiheadAttention reads its weights past the forward of its layers")]


# --- residual blocks of CNNs ----------------------------------------------------------------------------------


@_handles("timm.models.resnet.BasicBlock", kinds=("block",))
def _basic_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path", "se", "bn2"), "act2", module.downsample)


@_handles("timm.models.resnet.Bottleneck", kinds=("block",))
def _bottleneck(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path", "se", "bn3"), "act3", module.downsample)


@_handles("timm.models.regnet.Bottleneck", kinds=("block",))
def _regnet_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), "act3", module.downsample)


@_handles("timm.models.regnet.PreBottleneck", kinds=("block",))
def _regnet_preactivation_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), "norm1", module.downsample)  # its shortcut begins behind norm1


@_handles("timm.models.convnext.ConvNeXtBlock", kinds=("block",))
def _convnext_block(fqn: str, module: Any) -> Found:
    return _block(fqn, module, ("drop_path",), None, module.shortcut)


def _block(fqn: str, module: Any, ends: tuple[str, ...], rest: str | None, shortcut: Any) -> Found:
    """A residual block: F(x) is the output of the last of `ends` that it has; a skipped input passes through `rest`."""
    if not _plain(shortcut):
        return [Refusal(fqn=fqn, reason="its shortcut changes the shape, so it cannot be skipped")]
    branch = next(name for name in ends if getattr(module, name, None) is not None)
    return [Site.block(fqn, branch=f"{fqn}.{branch}", rest=None if rest is None else f"{fqn}.{rest}")]


# --- chains of convolutions -----------------------------------------------------------------------------------


@_handles("timm.models.resnet.BasicBlock", kinds=("channels",))
def _basic_channels(fqn: str, module: Any) -> Found:
    return _chain(fqn, module, ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"))


@_handles("timm.models.resnet.Bottleneck", kinds=("channels",))
def _bottleneck_channels(fqn: str, module: Any) -> Found:
    names = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")
    return _chain(fqn, module, names)


@_handles("timm.models._efficientnet_blocks.InvertedResidual", kinds=("channels",))
def _inverted_channels(fqn: str, module: Any) -> Found:
    names = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl")
    return _chain(fqn, module, names, residual=module.has_skip)


@_handles("timm.models._efficientnet_blocks.EdgeResidual", kinds=("channels",))
def _edge_channels(fqn: str, module: Any) -> Found:
    return _chain(fqn, module, ("conv_exp", "bn1", "aa", "se", "conv_pwl"), residual=module.has_skip)


@_handles("timm.layers.Mlp", "timm.layers.ConvMlp", kinds=("channels",))
def _mlp_channels(fqn: str, module: Any) -> Found:
    names = ("fc1", "norm", "act", "drop", "fc2") if hasattr(module, "drop") else ("fc1", "act", "drop1", "norm", "fc2")
    return _chain(fqn, module, names)


@_handles("timm.models.fasternet.MLPBlock", kinds=("channels",))
def _fasternet_channels(fqn: str, module: Any) -> Found:
    return _chain(f"{fqn}.mlp", module.mlp, ("0", "1", "2", "3"))


@_handles("timm.models.vgg.VGG", "acmize.cifar_models.CifarVgg", kinds=("channels",))
def _vgg_channels(fqn: str, module: Any) -> Found:
    """One chain a stage; a stage of one convolution is joined to the next."""
    chains: list[list[str]] = [[]]
    for name, part in module.features.named_children():
        chains[-1].append(name)
        convs = sum(isinstance(getattr(module.features, n), nn.Conv2d) for n in chains[-1])
        if isinstance(part, nn.MaxPool2d) and convs > 1:
            chains.append([])
    prefix = f"{fqn}.features" if fqn else "features"
    found: Found = []
    for names in chains:
        convs = [i for i, n in enumerate(names) if isinstance(getattr(module.features, n), nn.Conv2d)]
        if convs:
            inner = names[: convs[-1] + 1]
            found += _chain(prefix, module.features, inner, residual=False, name=f"{prefix}.{names[0]}")
    return found


def _chain(fqn: str, module: Any, names: Sequence[str], *, residual: bool = True, name: str | None = None) -> Found:
    """A chain of the children of a module, in the order in which they are called; those it lacks are passed over.

    Args:
        fqn: of the module.
        module: that has the children.
        names: of the children.
        residual: whether the output is added to something.
        name: of the site, where it is not the module's.
    """
    layers: list[str] = []
    between: list[list[str]] = [[]]
    for child in names:
        part: Any = getattr(module, child, None)
        if _plain(part):
            continue
        if isinstance(part, _CUTTABLE):
            layers.append(f"{fqn}.{child}")
            between.append([])
        else:
            between[-1].append(f"{fqn}.{child}")
    return [Site.channels(name or fqn, layers, between[1:-1], residual=residual)]


_CUTTABLE = (nn.Conv2d, nn.Linear)


def _unfit_chain(site: Site, modules: dict[str, Any]) -> str | None:
    """Why the layers of a chain cannot run on leading slices of their channels, or None."""
    paths, between = list(site.roles.values()), site.options["between"]
    if len(paths) < 2 or len(between) != len(paths) - 1:
        return f"{len(paths)} layers with {len(between)} groups between them: expected two or more, and one fewer"
    for i, path in enumerate(paths):
        layer = modules[path]
        if type(layer) not in (nn.Conv2d, Conv2dSame, nn.Linear):
            return f"{path!r} is a {type(layer).__name__}, expected a plain convolution or linear layer"
        if reason := _uncut(layer, 0 < i < len(paths) - 1):
            return f"{path.rpartition('.')[2]}: {reason}"
        given = modules[paths[i - 1]].weight.shape[0]
        taken = layer.weight.shape[1] * (1 if isinstance(layer, nn.Linear) else layer.groups)
        if i and given != taken:
            return f"{path!r} takes {taken} channels, but {paths[i - 1]!r} gives {given}"
    for path in (p for group in between for p in group):
        if path not in modules:
            return f"{path!r} is not a module of this model"
        if not _channel_wise(modules[path]):
            name = path.rpartition(".")[2]
            return f"a {type(modules[path]).__name__} ({name}) stands among its convolutions and reads every channel"
    return None


def _uncut(layer: Any, inner: bool) -> str | None:
    """Why a layer cannot run on leading slices of its channels, or None; `inner` ones may be depthwise."""
    if isinstance(layer, nn.Linear):
        return None
    if layer.groups == 1:
        strange = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        return f"padding {layer.padding!r}, {layer.padding_mode}" if strange else None
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    return None if depthwise and inner else f"a convolution of {layer.groups} groups"


def _channel_wise(part: nn.Module) -> bool:
    """Whether a module acts on each channel by itself, so that it can run on some of them: tried out."""
    if type(part) in (nn.BatchNorm2d, BatchNormAct2d):
        return part.running_mean is not None
    if any(True for _ in part.parameters()) or any(True for _ in part.buffers()):
        return False
    x, training = torch.linspace(-3, 3, 4 * 36).view(1, 4, 6, 6), part.training
    try:
        return torch.equal(part.eval()(x.clone())[:, :2], part(x[:, :2].clone()))
    finally:
        part.train(training)


# --- partial convolutions -------------------------------------------------------------------------------------


@_handles("timm.models.fasternet.Partial_conv3", kinds=("partial",))
def _partial(fqn: str, module: Any) -> Found:
    return [Site.partial(fqn, f"{fqn}.partial_conv3", module.dim_conv3 + module.dim_untouched)]


# --- discovery ------------------------------------------------------------------------------------------------


# Layers that a method for these kinds accounts for one by one: in a site, or refused by name.
_COUNTED: dict[str, type[nn.Module]] = {"linear": nn.Linear, "channels": nn.Conv2d}


def find_sites(model: nn.Module, kinds: Sequence[str] = LINEAR) -> Found:
    """Every site of these kinds in known classes, and a refusal for every other layer that such a site is made of.

    Shapes are not looked at; nothing is changed.
    """
    found: Found = []
    inside: set[str] = set()
    for fqn, module in model.named_modules():
        known = _handlers(module)
        handler = next((known[kind] for kind in kinds if kind in known), None)
        if handler is not None and not any(fqn.startswith(p + ".") for p in inside):
            found += handler(fqn, module)
            inside.add(fqn)
    taken = {path for item in found if isinstance(item, Site) for path in item.roles.values()}
    return found + _rest(model, inside | taken, kinds)


def _handlers(module: nn.Module) -> dict[str, Handler]:
    """Kind of site -> what finds it, for a module's exact class."""
    speech = hosts_speech.HANDLERS.get(class_path(module))
    return _HANDLERS.get(type(module), {} if speech is None else dict.fromkeys(LINEAR, speech))


def _rest(model: nn.Module, inside: set[str], kinds: Sequence[str]) -> list[Refusal]:
    """A refusal for every counted layer that is not one of these modules, nor within one."""
    refused = []
    counted = tuple(cls for kind, cls in _COUNTED.items() if kind in kinds)
    for fqn, module in model.named_modules():
        if isinstance(module, counted) and not any(_within(fqn, path) for path in inside):
            parent = type(model.get_submodule(fqn.rpartition(".")[0])).__name__
            what = "a linear layer" if isinstance(module, nn.Linear) else "a convolution"
            reason = f"{what} of {parent}, which is not known; name it with --target-modules to convert it"
            refused.append(Refusal(fqn=fqn, reason=reason))
    return refused


def _within(fqn: str, path: str) -> bool:
    return fqn == path or fqn.startswith(f"{path}.")


_CALL = re.compile(r"^(?P<path>[^:]+):(?P<kind>mlp|attention|linear|block)(?:\((?P<args>[^)]*)\))?$")


def parse_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[Site]]:
    """Split `--target-modules` into globs over known sites and declared sites of a user's module.

    A declared site is `PATH:mlp(fc1,fc2)`, `PATH:attention(q,k,v,out,heads=H)`, `PATH:linear` or `PATH:block`, where
    PATH is a glob over module paths and the names are the children's. `PATH:block(branch=NAME,rest=NAME)` names the
    child that gives F(x) and the one that a skipped input passes through (see `Site.block`). Anything else is a glob
    that selects among known sites.

    Raises:
        AcmizeError: a declaration that matches nothing or misses an argument.
    """
    globs, sites = [], []
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        match = _CALL.match(target)
        if match is None:
            globs.append(target)
            continue
        paths = fnmatch.filter(names, match["path"])
        args = [a.strip() for a in (match["args"] or "").split(",") if a.strip()]
        words = [a for a in args if "=" not in a]
        options = dict(a.split("=", 1) for a in args if "=" in a)
        made = [_declared(path, match["kind"], words, options, set(names), target) for path in paths]
        sites += [site for site in made if site is not None]
        if not any(made):
            raise AcmizeError(f"--target-modules {target}: no module of this model matches; see its named_modules()")
    return globs, sites


def _declared(
    path: str, kind: str, words: list[str], options: dict[str, str], names: set[str], target: str
) -> Site | None:
    children = [f"{path}.{word}" for word in words]
    if any(child not in names for child in children):
        return None  # a glob such as blocks.* also matches blocks.0.norm
    if kind == "linear":
        return Site.linear(path)
    if kind == "block":
        inner = {role: f"{path}.{name}" for role, name in options.items()}
        if words or not set(inner) <= {"branch", "rest"}:
            raise AcmizeError(f"--target-modules {target}: expected PATH:block or PATH:block(branch=NAME,rest=NAME)")
        return Site.block(path, **inner) if set(inner.values()) <= names else None
    need = {"mlp": 2, "attention": 4}[kind]
    if len(children) != need or (kind == "attention" and not options.get("heads", "").isdigit()):
        form = {"mlp": "PATH:mlp(fc1,fc2)", "attention": "PATH:attention(q,k,v,out,heads=H)"}[kind]
        raise AcmizeError(f"--target-modules {target}: expected {form}")
    if kind == "mlp":
        return Site.mlp(*children)
    q, k, v, out = children
    flags = {name: options.get(name, "true").lower() != "false" for name in ("rotate_qk", "rotate_vo")}
    return Site.attention(q=q, k=k, v=v, out=out, heads=int(options["heads"]), **flags)


# --- the plan -------------------------------------------------------------------------------------------------


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
        example: inputs for one sample, to count MACs; made from the timm configuration when None.
        sites: declared sites of a module of one's own, in place of discovery.
        target_modules: globs over sites, or declarations (see `parse_targets`).
        exclude: globs over entries, sites and their modules that stay dense; where that leaves none, and tokens may be
            merged, the plan merges tokens alone.
        merge: merge tokens too: "none", "auto" (as many as suit the budget, where it is sound), or pairs before each
            block at every budget.

    Raises:
        AcmizeError: nothing to convert, or a pattern that matches nothing.
    """
    globs, declared = parse_targets(model, target_modules)
    declared += list(sites)
    modules = dict(model.named_modules())
    _check_declared(model, modules, declared)
    method = method_for(config)
    found = _found(model, declared, bool(globs), method.kinds)
    speech = example is None and hosts_speech.is_speech(model)
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
        if reason := _unfit(item, modules):
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
    alone = (
        not drafts and any(r.reason.startswith("excluded") for r in refused) and merge == "auto" and not why_not(model)
    )
    if not drafts and not alone:
        told = [r for r in refused if "--num-learners" in r.reason] or refused
        why = f" ({told[0].fqn}: {told[0].reason})" if told else ""
        raise AcmizeError(f"nothing to convert in this {type(model).__name__}{why}")
    entries = _complete(model, modules, drafts, inputs, work)
    scope = _scope(model, entries) if speech else ""
    macs = _macs_of(model, scope, inputs)
    merging = None
    if merge not in ("none", 0):
        reason = why_not(model)
        if reason is None:
            merging = _merging(model, entries, macs, merge, inputs)
        elif merge == "auto":
            refused.append(Refusal(fqn="blocks", reason=reason))
        else:
            raise AcmizeError(f"--merge {merge}: {reason}; leave it out")
    return Plan(
        config=config,
        macs_dense=macs,
        entries=entries,
        refused=tuple(refused),
        input_size=_size(inputs[0]),
        merging=merging,
        scope=scope,
        length_macs=_length_macs(model, scope, entries[0]) if speech else None,
    )


def _size(first: Any) -> tuple[int, ...]:
    tensor = next(iter(first.tensors.values())) if isinstance(first, Inputs) else first
    return tuple(tensor.shape[1:]) if isinstance(tensor, torch.Tensor) else ()


def _scope(model: Any, entries: tuple[PlanEntry, ...]) -> str:
    """The encoder where everything adaptive lies in one, else the whole model."""
    path = hosts_speech.encoder_path(model)
    return path if all(_within(e.target, path) for e in entries) else ""


def _macs_of(model: nn.Module, scope: str, inputs: tuple[Any, ...]) -> int:
    if not scope:
        return count_macs(model, *inputs)
    return count_macs(model.get_submodule(scope), inputs[0].without(*hosts_speech.DECODER_INPUTS))


def _length_macs(model: Any, scope: str, entry: PlanEntry) -> tuple[float, float, float] | None:
    """MACs of the scope as a + b T + c T^2 for T tokens, through three counted lengths; None for a fixed length."""
    if hosts_speech.has_fixed_length(model) or (model.config.is_encoder_decoder and not scope):
        return None
    layer = entry.roles["fc1"] if entry.kind == "mlp" else entry.target
    tokens, macs = [], []
    for frames in (200, 500, 1250):
        inputs = (hosts_speech.example_speech(model, frames),)
        tokens.append(tokens_at(model, [layer], *inputs)[layer])
        macs.append(_macs_of(model, scope, inputs))
    powers = torch.tensor(tokens, dtype=torch.float64)[:, None] ** torch.arange(3)
    a, b, c = torch.linalg.solve(powers, torch.tensor(macs, dtype=torch.float64)).tolist()
    return a, b, c


def _found(model: nn.Module, declared: list[Site], known_too: bool, kinds: Sequence[str]) -> Found:
    """Declared sites, and known ones beside them where globs ask for some; else the rest is refused."""
    if not declared:
        return find_sites(model, kinds)
    taken = {path for site in declared for path in site.roles.values()}
    if not known_too:
        return [*declared, *_rest(model, taken, kinds)]
    rest: Found = []
    for item in find_sites(model, kinds):
        paths = {*item.roles.values()} if isinstance(item, Site) else {item.fqn}
        hit = sorted(path for path in paths if any(_within(path, t) or _within(t, path) for t in taken))
        if not hit:
            rest.append(item)
        elif isinstance(item, Site):
            reason = f"{hit[0]} is declared by --target-modules"
            rest += [
                Refusal(fqn=p, reason=reason) for p in sorted(paths - taken) if type(model.get_submodule(p)) in _PLAIN
            ]
    return [*declared, *rest]


_PLAIN = (nn.Linear, nn.Conv2d)


def _check_declared(model: nn.Module, modules: dict[str, Any], declared: list[Site]) -> None:
    """Raise for a declared site that cannot be one: the user wrote it and can mend it."""
    seen: dict[str, Site] = {}
    for site in declared:
        for role, fqn in site.roles.items():
            if fqn not in modules:
                raise AcmizeError(f"site {site.fqn}: {role}={fqn!r} is not a module of this model; see named_modules()")
            if fqn in seen:
                raise AcmizeError(f"site {site.fqn}: {role}={fqn!r} is declared twice; each layer has one site")
        if reason := _unfit(site, modules):
            raise AcmizeError(f"site {site.fqn}: {reason}")
        seen |= dict.fromkeys(site.roles.values(), site)


def _unfit(site: Site, modules: dict[str, Any]) -> str | None:
    """Why the layers of a site do not fit together, or None."""
    sizes: dict[str, tuple[int, int]] = {}
    if site.kind == "channels":
        return _unfit_chain(site, modules)
    if site.kind not in LINEAR:
        return None  # its method looks at it
    for role, fqn in site.roles.items():
        layer = modules[fqn]
        if role == "act":
            if any(p.numel() > 1 for p in layer.parameters()):
                return f"its activation {type(layer).__name__} has a parameter for each unit"
        elif role != "module" or site.kind == "linear":
            pointwise = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
            if type(layer) is not nn.Linear and not (pointwise and site.options.get("channels_first")):
                return f"{role}={fqn!r} is a {type(layer).__name__}, expected nn.Linear"
            sizes[role] = (layer.weight.shape[0], layer.weight.shape[1])
    if site.kind == "mlp":
        units = sizes["fc1"][0] // (2 if site.options.get("packed") else 1)
        if sizes["fc2"][1] != units:
            return (
                f"fc2={site.roles['fc2']!r} takes {sizes['fc2'][1]} units, but fc1={site.roles['fc1']!r} gives {units}"
            )
    elif site.kind == "attention":
        heads, width = site.options["heads"], sizes["out"][1]
        given = {"qkv": sizes["qkv"][0] / 3} if "qkv" in sizes else {k: sizes[k][0] for k in "qkv"}
        if heads < 1 or width % heads or any(size != width for size in given.values()):
            return (
                f"heads={heads}, widths {given}: expected {width} each, as out takes, and a whole number for each head"
            )
    return None


def _merging(
    model: Any, entries: tuple[PlanEntry, ...], macs: int, merge: str | int, inputs: tuple[Any, ...]
) -> Merging:
    if isinstance(merge, str) and merge != "auto":
        raise AcmizeError(f"merge: found {merge!r}, expected auto, none, or a number of pairs")
    if isinstance(merge, int) and merge < 0:
        raise AcmizeError(f"merge: found {merge}, expected a number of pairs of at least 0")
    linear = [sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear)) for block in model.blocks]
    sites = [sum(e.macs // e.tokens for e in entries if e.fqn.startswith(f"blocks.{i}.")) for i in range(len(linear))]
    out = "blocks.0.attn.proj"
    return Merging(
        tokens=tokens_at(model, [out], *inputs)[out],
        prefix=int(getattr(model, "num_prefix_tokens", 1)),
        blocks=len(model.blocks),
        dim=int(model.embed_dim),
        attention_dim=model.get_submodule(out).in_features,
        macs=macs,
        linear_macs=tuple(linear),
        dense_macs=tuple(all_ - site for all_, site in zip(linear, sites, strict=True)),
        fixed=None if merge == "auto" else int(merge),
        **({} if entries else {"slope": 1.0, "start": 1.0}),  # nothing else can save the rest
    )


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
