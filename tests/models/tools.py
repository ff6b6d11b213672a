"""What the tests of several models share: parity with golden files, cost in operations."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import load_fill

# The reference run is float32, so it is itself this far from the truth; ours may add as much again
# in another order of summation. 20 is the project's limit, 1 to 2 is what is seen.
GAPS = 20
# Where the recorded gap is 0, or below float32's resolution of the numbers.
FLOOR = 4 * np.finfo(np.float32).eps


def assert_close(seen, expected, gaps, *, fallback=None):
    """Every expected array was seen and lies within GAPS of its recorded gap.

    ``fallback`` is the gap of names without one, relative to the array's size where that is
    above 1.
    """
    assert set(seen) == set(expected)
    for name, array in expected.items():
        got = seen[name].double().numpy()
        assert got.shape == array.shape, name
        gap = gaps[name] if name in gaps else fallback * max(1.0, float(np.abs(array).max()))
        difference = np.abs(got - array.astype(np.float64)).max()
        assert difference <= max(GAPS * gap, FLOOR), name


def golden_weights(arrays, config, shapes):
    """Official tensors per network: stored in the golden file, or filled from their names.

    ``shapes`` maps the network's name in the file to its official names and shapes.
    """
    weights = {}
    for network, entries in shapes.items():
        if config["fill"]["stored"]:
            start = f"w:{network}/"
            weights[network] = {
                n[len(start) :]: a for n, a in arrays.items() if n.startswith(start)
            }
        else:
            (group,) = (g for g in config["fill"]["groups"] if g.endswith(f"/{network}"))
            weights[network] = load_fill().fill(entries.items(), group, config["fill"]["seed"])
    return weights


def official_shapes(model, part):
    """Official name -> shape of one of a model's files."""
    own = model.state_dict()
    return {
        name: entry.shape(own[mine].shape)
        for mine, entry in model.official_parts()[part].items()
        for name in entry.names
    }


@contextlib.contextmanager
def recorded(hooks):
    """Forward hooks while the context lasts: pairs of a module and f(inputs, output)."""

    def hook(keep):
        def call(module, inputs, output):
            keep(inputs, output)  # what a hook returns would replace the output

        return call

    handles = [module.register_forward_hook(hook(keep)) for module, keep in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def operations(model, *inputs):
    """Operations (two per multiply-add) of one forward on the meta device: (all, convolutions).

    Criss-cross attention is an op of the project, which PyTorch's counter does not know.
    """
    import fuseengine.models.dmfuse as dmfuse

    known, extra = dmfuse.criss_cross_attention, []

    def counted(q, k, v):
        n, channels, height, width = q.shape
        path = height + width - 1
        extra.append(2 * n * height * width * path * (channels + v.shape[1]))
        return known(q, k, v)

    dmfuse.criss_cross_attention = counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        dmfuse.criss_cross_attention = known
    by_op = counter.get_flop_counts()["Global"]
    convolutions = by_op.get(torch.ops.aten.convolution, 0)
    return counter.get_total_flops() + sum(extra), convolutions


class _Outer(fx.Tracer):
    """Enters everything but the stages, as capture does; parameters stay tensors."""

    def __init__(self, stages):
        super().__init__()
        self.stages = stages

    def is_leaf_module(self, m, module_qualified_name):
        return module_qualified_name in self.stages

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val


def outer_graph(model):
    """The traced sampling loop as a module of (a, b), and what stands in it outside the stages.

    Functions and methods are given by name, stages by how often each is called.
    """
    graph = _Outer(model.stages).trace(model, concrete_args={"noise": None})
    for node in graph.nodes:
        if node.target is fx._symbolic_trace._assert_is_none:
            given = node.args[0]
            graph.erase_node(node)
            graph.erase_node(given)
            break
    names, calls = set(), {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
        elif node.op in ("call_function", "call_method"):
            names.add(getattr(node.target, "__name__", node.target))
    return fx.GraphModule(model, graph), names, calls
