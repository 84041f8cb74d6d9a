"""An adaptive model as one ONNX file: inputs `x` and `budget` (), output `logits` or `hidden_states`.

What a program needs to feed it lies in the file's metadata (`metadata`): preprocessing, licence, range of budgets, and
what the model reached in evaluation at each.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from acmize.__about__ import __version__
from acmize.data import data_config
from acmize.export.trace import budget_range, trace
from acmize.hosts_speech import encoder_path, is_speech
from acmize.results import metric_of

OPSET = 20
INT8_BLOCK = 64  # weights of a column that share a scale; of 32 and 64, equal on held-out photographs
INT8_INPUTS = 4  # ONNX Runtime's accuracy level: inputs in 8 bits too
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter writes the module that a node comes from


def write_onnx(model: Any, path: Path, compute: bool = False) -> None:
    """Write an exportable model as one file."""
    _save(_converted(model, compute), path)


def write_int8(model: Any, path: Path, compute: bool = False, *, dynamic: bool = False) -> None:
    """Write an exportable model with the products of its layers in 8 bits; gates and the head stay in 32.

    Weights are rounded once: each `INT8_BLOCK` of a column with a scale of its own, and inputs when they come, each
    block of a token likewise. `dynamic`: a scale for each column, and one for all inputs of a product, whichever
    samples they are of, which is faster and coarser.
    """
    made, whole = _converted(model, compute), path.with_name(f"float-{path.name}")
    gates = gate_products(made)
    _save(made, whole)
    quantise(whole, path, gates, dynamic=dynamic)


def gate_products(made: Any) -> list[str]:
    """Names of the nodes of gates in an `onnx_ir.Model` that the exporter made."""
    return [node.name for node in made.graph if ".gate" in node.metadata_props.get(SCOPES, "") and node.name]


def quantise(whole: Path, path: Path, keep: list[str], *, dynamic: bool = False) -> None:
    """Write the ONNX file `whole` to `path` in 8 bits, but for the nodes to keep; files lie beside `path` meanwhile."""
    import onnx

    proto = _folded(whole, path.with_name(f"folded-{path.name}"))
    if dynamic:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        onnx.helper.set_model_props(proto, {**_props(proto), "onnx.quant.pre_process": "onnxruntime.quant"})
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=keep,
            extra_options={"EnableSubgraph": True},
        )
        return
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)  # a line a node
    by_block: Any = MatMulNBitsQuantizer(
        proto, bits=8, block_size=INT8_BLOCK, accuracy_level=INT8_INPUTS, nodes_to_exclude=keep
    )
    by_block.process()
    onnx.save(by_block.model.model, path)


def _folded(whole: Path, folded: Path) -> Any:
    """The model in `whole` with slices and transposes of weights stored: only a stored matrix is quantised."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3  # it warns of each constant that it leaves doubled
    onnxruntime.InferenceSession(whole, options, disabled_optimizers=["MatMulAddFusion"])  # which makes no MatMul
    proto = onnx.load(folded)
    for graph in _graphs(proto.graph):
        del graph.value_info[:]  # of folded values they are those before folding
    return proto


def _graphs(graph: Any) -> list[Any]:
    """A graph and those of the branches in it."""
    found = [graph]
    for one in found:  # grows on the way
        found += [a.g for node in one.node for a in node.attribute if a.HasField("g")]
    return found


def _props(proto: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def metadata(model: Any) -> dict[str, str]:
    """What an exported file says of itself; values that are not plain text are JSON.

    Returns:
        acmize: version. base_model: architecture. license, where it is known. part: path of what was exported, where
        that is not the whole. preprocessing: of images, input_size (C, H, W), and mean, std, interpolation, crop_pct,
        crop_mode where the model states them; of audio, what its feature extractor saves. budget_range: lowest and
        highest. results: rows of what was measured before the export, {"budget", "macs_ratio", "accuracy" or "wer"}.
    """
    rows = model.results.get("results", ())
    metric, _ = metric_of(model.results)
    results = [{key: row.get(key) for key in ("budget", "macs_ratio", metric)} for row in rows]
    told = {
        "acmize": __version__,
        "base_model": str(model.base["architecture"]),
        "license": model.base["pretrained_cfg"].get("license"),
        "part": (encoder_path(model) or None) if is_speech(model) else None,
        "preprocessing": json.dumps(_preprocessing(model)),
        "budget_range": json.dumps(budget_range(model)),
        "results": json.dumps(results),
    }
    return {key: value for key, value in told.items() if value is not None}


def _preprocessing(model: Any) -> dict[str, Any]:
    if is_speech(model):
        processor = getattr(model, "processor", None)
        return {} if processor is None else processor.features.to_dict()
    keep = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    if getattr(model, "pretrained_cfg", None):
        return {key: value for key, value in data_config(model).items() if key in keep}
    return {"input_size": model.plan.input_size}


def _converted(model: Any, compute: bool) -> Any:
    """The model as an `onnx_ir.Model`."""
    from acmize.export import onnx_merging, onnx_ops

    answer = "hidden_states" if is_speech(model) and encoder_path(model) else "logits"
    program = torch.onnx.export(
        trace(model, fused_attention=False, compute=compute),
        input_names=["x", "budget"],
        output_names=[answer, "macs_ratio"] if compute else [answer],
        opset_version=OPSET,
        custom_translation_table={**onnx_ops.TRANSLATIONS, **onnx_merging.TRANSLATIONS},
        optimize=False,  # ONNX Runtime folds and fuses when it loads; the exporter's own passes take minutes
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata(model))
    return program.model


def _save(made: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` without what the exporter notes at every node: stack traces, ten times the graph."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(made.graph):
        node.metadata_props.clear()
    onnx_ir.save(made, path)
