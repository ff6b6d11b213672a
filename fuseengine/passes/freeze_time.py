"""Freeze time: stages that depend on constants alone become constants.

Saves the timestep embedding, its MLP and each block's projection of it, in every step of every
frame. Exact: the same network is run once, in float64, on the same numbers.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from fuseengine.program import Node, Program, Value


def freeze_time(program: Program, model: nn.Module) -> Program:
    """Evaluate every stage call whose inputs are constants."""
    constants = dict(program.constants)
    values = dict(program.values)
    nodes: list[Node] = []
    wide: dict[str, nn.Module] = {}
    for node in program.nodes:
        if node.kind != "stage" or not all(name in constants for name in node.inputs):
            nodes.append(node)
            continue
        if node.target not in wide:
            stage = model.get_submodule(node.target)
            wide[node.target] = copy.deepcopy(stage).double().cpu().eval()
        given = [torch.from_numpy(constants[name]).double() for name in node.inputs]
        # A stage takes a number (a timestep) as it was called: a 0-d constant.
        arguments = [float(t) if t.ndim == 0 else t for t in given]
        with torch.no_grad():
            result = wide[node.target](*arguments)
        results = result if isinstance(result, (tuple, list)) else (result,)
        for name, tensor in zip(node.outputs, results, strict=True):
            if name is not None:
                constants[name] = np.array(tensor.float().numpy(), order="C")
                values[name] = Value(name, tuple(tensor.shape))
    return program.with_nodes(nodes, constants=constants, values=values)
