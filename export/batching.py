"""A whole model for one picture becomes a model for any number of them.

Programs are captured for one picture, so the constants of their ONNX form say 1 where a batch
stands. Three things of a model change: the borders' first dimension gets a name; shapes that
Reshape is given keep their batch or let ONNX work it out (0 copies a dimension, -1 is what is
left); what does not depend on the inputs, such as starting noise, is repeated where it is
concatenated with what does. Elementwise operators, convolutions and products need nothing: they
broadcast. Whether that is right for a model is not argued but run, see :func:`check_batches`.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fuseengine.backends.onnxruntime import session_options
from fuseengine.errors import CompileError
from fuseengine.export.graph import infer, load_model

BATCH = "batch"
"""Name of the open dimension."""


def open_batch(model: bytes | onnx.ModelProto) -> onnx.ModelProto:
    """A model whose inputs and outputs have an open first dimension.

    Args:
        model: of one picture, each border's first dimension 1; heights and widths known
            (:func:`fuseengine.export.whole.whole_to_onnx` with a size).

    Returns:
        A copy. It may still be wrong: :func:`check_batches` says so.

    Raises:
        CompileError: a border's first dimension is not 1, or a shape cannot be opened.
    """
    made = load_model(model)
    graph = made.graph
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value != 1:
            raise CompileError(f"{value.name} has no first dimension of 1 that could be a batch")
    shapes = {
        name: info.shape
        for name, info in infer(made).items()
        if info.shape is not None and all(isinstance(n, int) for n in info.shape)
    }
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    constants = {tensor.name: tensor for tensor in graph.initializer}
    batched = {value.name for value in graph.input}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        depends = batched.intersection(node.input)
        if depends and node.op_type == "Reshape":
            _open_reshape(node, constants, shapes, graph)
        elif depends and node.op_type == "Concat" and len(depends) < len(set(node.input)):
            nodes += _repeat(node, batched, graph.input[0].name, graph)
        nodes.append(node)
        if depends:
            batched.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return made


def _open_reshape(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    shapes: dict[str, tuple[int | str | None, ...]],
    graph: onnx.GraphProto,
) -> None:
    """Let a Reshape's first dimension follow its input's."""
    if node.input[1] not in constants or node.input[0] not in shapes:
        return  # computed at run time from what it reshapes
    wanted = numpy_helper.to_array(constants[node.input[1]]).copy()
    if not len(wanted) or wanted[0] in (0, -1):
        return
    if wanted[0] == shapes[node.input[0]][0]:
        wanted[0] = 0
    elif -1 not in wanted:
        wanted[0] = -1
    else:
        raise CompileError(
            f"{node.name or node.output[0]} moves the batch into another dimension; it has no form "
            "for several pictures"
        )
    name = f"{node.output[0]}_shape"
    graph.initializer.append(numpy_helper.from_array(wanted, name))
    node.input[1] = name


def _repeat(
    node: onnx.NodeProto, batched: set[str], source: str, graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """Nodes that repeat a Concat's inputs which are the same for every picture."""
    nodes = []
    for index, name in enumerate(node.input):
        if name in batched:
            continue
        prefix = f"{node.output[0]}_{index}"
        ones = f"{prefix}_ones"
        graph.initializer.append(numpy_helper.from_array(np.ones(3, np.int64), ones))
        count, shape, repeated = f"{prefix}_count", f"{prefix}_to", f"{prefix}_repeated"
        nodes += [
            helper.make_node("Shape", [source], [count], name=count, start=0, end=1),
            helper.make_node("Concat", [count, ones], [shape], name=shape, axis=0),
            helper.make_node("Expand", [name, shape], [repeated], name=repeated),
        ]
        node.input[index] = repeated
    return nodes


def check_batches(
    model: onnx.ModelProto, inputs: dict[str, NDArray[np.generic]], tolerance: float
) -> None:
    """Compare a batch with its pictures one by one, in ONNX Runtime.

    Args:
        model: with an open batch.
        inputs: two pictures or more per input, not all equal.
        tolerance: largest absolute difference of an output.

    Raises:
        CompileError: the model does not take a batch, or gives other pictures.
    """
    import onnxruntime as ort

    options = session_options(1)  # two small runs
    options.log_severity_level = 4
    # Optimising the thousands of nodes of an unrolled sampler takes half a minute.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        together = session.run(None, inputs)
    except Exception as error:  # ONNX Runtime's own kinds
        raise CompileError(f"the model takes no batch: {str(error).splitlines()[0]}") from error
    count = len(next(iter(inputs.values())))
    for index in range(count):
        alone = session.run(None, {n: x[index : index + 1] for n, x in inputs.items()})
        for one, several in zip(alone, together, strict=True):
            given = several[index : index + 1].astype(np.float64)
            if given.shape != one.shape or np.abs(given - one).max() > tolerance:
                raise CompileError("in a batch the model gives other pictures than one by one")
