"""Insert planned adaptive modules: validate everything, then change everything."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from acmize import padding
from acmize.errors import AcmizeError
from acmize.fusion import fuse_
from acmize.layers import fast_products_
from acmize.methods.token_merging import install_merging, why_not
from acmize.plan import Plan
from acmize.recording import AdaptiveModule
from acmize.registry import method_for


def converted(dense: nn.Module, plan: Plan) -> nn.Module:
    """A converted copy of a model, as `convert_` makes it; what is replaced is never copied.

    Raises:
        AcmizeError: the model does not fit the plan.
    """
    shared: dict[int, Any] = {id(t): t for t in (*dense.parameters(), *dense.buffers())}
    model, own = convert_(copy.deepcopy(dense, dict(shared)), plan), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in shared:  # tied ones stay tied
                    tensors[name] = own.setdefault(id(tensor), copy.deepcopy(tensor))
    return model


def convert_(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the planned sites in place. Parameters of the new modules are fresh: see `init.init_` for the rest.

    Args:
        model: a dense model that the plan was made from, or one built alike.
        plan: from `make_plan` or a saved model.

    Returns:
        The same model.

    Raises:
        AcmizeError: the model does not fit the plan; it is unchanged then.
    """
    modules = dict(model.named_modules())
    method = method_for(plan.config)
    made: dict[str, nn.Module] = {}
    for target, entries in plan.by_gate().items():
        for path in (target, *entries[0].roles.values()):
            if path not in modules:
                raise AcmizeError(
                    f"{path}: in the plan but not in this {type(model).__name__}; use the model it was made for"
                )
        try:
            made |= method.build(modules, entries, plan.config, plan.macs_dense)
        except (RuntimeError, AttributeError, KeyError) as error:
            raise AcmizeError(f"{target}: this model's layer does not fit the plan ({error})") from None
    if plan.merging is not None and (reason := why_not(model)) is not None:
        raise AcmizeError(f"the plan merges tokens, but this model cannot: {reason}")
    reference = next(model.parameters())
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        # What is on the meta device was made there, perhaps in part (see `weights.unset`), and stays as it is.
        unset = any(parameter.is_meta for parameter in (reference, *module.parameters()))
        module.to(device=None if unset else reference.device, dtype=reference.dtype)
        module.train(model.training)
        setattr(model.get_submodule(parent), name, module)
    padding.install(model, AdaptiveModule)
    if plan.merging is not None:
        install_merging(model, plan.merging)
    fast_products_(model)
    fuse_(model)
    return model
