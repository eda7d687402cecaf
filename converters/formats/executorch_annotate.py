"""Which operators of an exported graph become int8, and which share a range.

XNNPACK's own quantizer with one range for convolution and ReLU6, a range of their own for
means, one range through whatever only moves numbers, and written-out normalization in
float: see ``executorch_quantize``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.formats.float_region import arithmetic_region
from converters.formats.observers import clipping
from converters.ranges import RangeMethod

__all__ = ["WEIGHT_FLOOR", "make_quantizer"]

WEIGHT_FLOOR = 2.0**-30
"""Smallest weight scale; only a channel without any weight meets it."""
_ACTIVATION_FLOOR = 2.0**-20


def make_quantizer(wanted: Callable[[Any], bool], ranges: RangeMethod) -> Any:
    """The quantizer; ``wanted`` says which nodes it may touch, ``ranges`` how values span."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as stock
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=clipping(MinMaxObserver, ranges).with_args(
            eps=_ACTIVATION_FLOOR
        ),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=WEIGHT_FLOOR),
    )
    config = QuantizationConfig(activation, activation, weight, None, False)

    class Quantizer(stock.XNNPACKQuantizer):
        def annotate(self, model: Any) -> Any:
            """Add the patterns that the stock quantizer lacks, then the stock ones."""
            _leave_statistics_float(model)
            _annotate_clamped(model, config, wanted)
            _annotate_means(model, config, wanted)
            super().annotate(model)
            _share_through_views(model)
            return model

    return Quantizer().set_global(config).set_filter_function(wanted)


def _annotate_clamped(model: Any, config: Any, wanted: Callable[[Any], bool]) -> None:
    """Mark (transposed) convolution or linear, then ReLU6 or another hardtanh, as one layer."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils as utils
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    aten = torch.ops.aten
    for clamp in model.graph.nodes:
        if clamp.target not in (aten.hardtanh.default, aten.hardtanh_.default):
            continue
        layer = clamp.args[0]
        transposed = utils._is_conv_transpose_node(layer)
        is_layer = transposed or utils._is_conv_node(layer) or layer.target == aten.linear.default
        if not is_layer or len(layer.users) != 1:
            continue
        if transposed and utils.get_groups_from_conv(layer) != 1:
            continue
        partition = [clamp, layer, layer.args[1]]
        if utils._is_annotated(partition) or not all(wanted(node) for node in partition):
            continue
        weight = utils.get_weight_qspec(config)
        if transposed:
            weight = utils.change_quantization_config(weight, ch_axis=1)
        inputs = {layer.args[0]: utils.get_input_act_qspec(config), layer.args[1]: weight}
        if len(layer.args) > 2 and isinstance(layer.args[2], torch.fx.Node):
            inputs[layer.args[2]] = utils.get_bias_qspec(config)
            partition.append(layer.args[2])
        layer.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=inputs, _annotated=True
        )
        clamp.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            output_qspec=utils.get_output_act_qspec(config), _annotated=True
        )
        utils._mark_nodes_as_annotated(partition)


def _share_through_views(model: Any) -> None:
    """Give what only moves numbers the range of its input; the stock list lacks some.

    XNNPACK reshapes int8 with one range alone: a file with two does not load.
    """
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils as utils
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    aten = torch.ops.aten
    moves = {
        aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dims,
        aten.transpose.int, aten.slice.Tensor, aten.contiguous.default, aten.clone.default,
        aten.dropout.default, aten.dropout_.default,
    }  # fmt: skip
    for node in model.graph.nodes:
        if node.target not in moves and not utils._is_share_obs_or_fq_op(node.target):
            continue
        before = node.args[0].meta.get(Q_ANNOTATION_KEY)
        if before is None or before.output_qspec is None or utils._is_annotated([node]):
            continue
        shared = SharedQuantizationSpec(node.args[0])
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map={node.args[0]: shared}, output_qspec=shared, _annotated=True
        )


def _leave_statistics_float(model: Any) -> None:
    """Mark the arithmetic around roots and divisions as done: see ``float_region``."""
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    aten = torch.ops.aten
    roots = {aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default}
    kinds = {
        *roots, aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor,
        aten.mul_.Tensor, aten.div.Tensor, aten.mean.dim, aten.sum.dim_IntList,
        aten.pow.Tensor_Scalar, aten.square.default, aten.view.default, aten.reshape.default,
        aten.unsqueeze.default, aten.expand.default, aten.var.correction,
    }  # fmt: skip
    nodes = list(model.graph.nodes)
    seeds = [
        node
        for node in nodes
        if node.target in roots
        or (node.target == aten.div.Tensor and getattr(node.args[1], "op", "") == "call_function")
    ]
    region = arithmetic_region(
        seeds,
        {node: node.all_input_nodes for node in nodes},
        {node: list(node.users) for node in nodes},
        {node for node in nodes if node.target in kinds},
    )
    for node in region:
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _annotate_means(model: Any, config: Any, wanted: Callable[[Any], bool]) -> None:
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils as utils
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for node in model.graph.nodes:
        if utils._is_annotated([node]) or not wanted(node):
            continue
        if node.target == torch.ops.aten.mean.dim and node.args[2:] == (True,):
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map={node.args[0]: utils.get_input_act_qspec(config)},
                output_qspec=utils.get_output_act_qspec(config),
                _annotated=True,
            )
