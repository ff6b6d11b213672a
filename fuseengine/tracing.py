"""Capture: from a model's forward to a program.

The outer forward, the sampling loop, is traced with ``torch.fx``: stages are leaves, ops are calls,
timesteps and coefficients are Python numbers by then. Shapes come from running the trace at two
small sizes, which makes them symbolic in the picture's height and width.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import fuseengine.kernels as kernels
from fuseengine.description import check_resumed
from fuseengine.errors import CaptureError, SettingError
from fuseengine.models.pictures import stretch
from fuseengine.models.sampling import standard_normal, stream_seed
from fuseengine.passes import run_passes
from fuseengine.program import Node, Program, Shape, Value, symbolic
from fuseengine.runtime.ops import FRAMED, PIXELWISE

_PROBE_BLOCKS = ((2, 3), (3, 5))
"""Two sizes that differ in H, W, H / W and H * W. The unit is the model's multiple, repeated up to
``_PROBE_UNIT``. Small: they are really computed, because the meta device costs more (it imports
all of torch._dynamo)."""

_PROBE_UNIT = 16


_KEPT = ("placeholder", "output")
"""Kinds of fx nodes that stay although nobody uses their result."""


def capture(model: nn.Module, *, optimise: bool = True, resume: int = 0) -> Program:
    """Capture a model as a program.

    Args:
        model: a :class:`~fuseengine.models.base.FusionModel`, or any module with
            ``forward(a, b) -> fused``. Without stages it becomes one stage.
        optimise: whether to run the passes of :mod:`fuseengine.passes`.
        resume: capture ``model.resume(a, b, previous, steps=resume)`` in place of the forward.

    Returns:
        The program, for any size that is a multiple of ``program.multiple``.

    Raises:
        CaptureError: the forward does something outside stages that a program cannot say.
        SettingError: the model cannot resume, or not in so many steps.
    """
    stages = tuple(getattr(model, "stages", ()))
    _check(model)
    training, attributes = model.training, set(vars(model))
    threads = torch.get_num_threads()
    # Tiny pictures: several threads would only wait for each other, on a busy machine for seconds.
    torch.set_num_threads(1)
    model.eval()
    try:
        program = _Recorder(model, stages, resume).record()
        if optimise:
            program = run_passes(program, model)
    finally:
        torch.set_num_threads(threads)
        model.train(training)
        for name in set(vars(model)) - attributes:  # tensors that forward makes, left by fx
            delattr(model, name)
    return program


def capture_resumed(model: nn.Module, program: Program, steps: int = 0) -> Program:
    """Capture what fuses a video's next frame, from what the frame before became.

    Args:
        model: a :class:`~fuseengine.models.base.FusionModel`.
        program: the model's own, whose stages it shares.
        steps: of its sampling; 0: what the model says is enough.

    Returns:
        A program of three inputs whose values are named apart from the other program's.

    Raises:
        CaptureError: what it does cannot be said, or it uses other stages.
        SettingError: the model cannot resume, or not in so many steps.
    """
    if not hasattr(model, "resume"):
        raise SettingError(
            f"temporal='warm': {type(model).__name__} has no resume(a, b, previous, *, steps); "
            "expected a FusionModel that has"
        )
    enough = int(getattr(model, "resumed_steps", 0))
    resumed = capture(model, resume=steps or enough or 1).renamed("resumed.")
    check_resumed(program, resumed)
    return resumed


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError as error:
        raise CaptureError(f"forward of {name}: {error}; expected (a, b) -> fused") from error
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise CaptureError(
            f"{name} has parameters in {', '.join(map(str, other))}; expected float32: call "
            ".float() on it (lower precisions are chosen when it is compiled)"
        )


class _StageTracer(fx.Tracer):
    """Traces the outer forward; stages stay whole, everything else is entered."""

    def __init__(self, stages: tuple[str, ...], method: str) -> None:
        super().__init__()
        self.stages, self.traced_func_name = stages, method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.stages

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Parameters stay real tensors: a schedule computed from learned alphas becomes numbers.
        return attr_val


class _Recorder:
    """Turns a traced graph into nodes, values and constants."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...], resume: int = 0) -> None:
        self.model, self.stages = model, stages
        self.pictures = 3 if resume else 2
        self.method, self.settings = ("resume", {"steps": resume}) if resume else ("forward", {})
        self.planes = 3 if getattr(model, "channels", "luma") == "rgb" else 1
        self.multiple = int(getattr(model, "multiple", 1))
        unit = self.multiple * -(-_PROBE_UNIT // self.multiple)
        first, second = ((unit * h, unit * w) for h, w in _PROBE_BLOCKS)
        self.sizes = first, second
        self.values: dict[str, Value] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[Node] = []
        self.names: dict[fx.Node, Any] = {}
        self.forms: dict[str, list[list[Shape]]] = {}

    def record(self) -> Program:
        graph = self._trace()
        shapes = self._shapes(graph)
        output = ""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._value(node, node.name, shapes)
            elif node.op == "get_attr":
                name = str(node.target).replace(".", "_")
                if name in self.constants:
                    self.names[node] = name
                else:
                    self._constant(node, name, _attribute(self.model, str(node.target)))
            elif node.op == "call_module":
                self._stage(node, shapes)
            elif node.op == "output":
                result = node.args[0]
                made = self.names.get(result) if isinstance(result, fx.Node) else None
                if not isinstance(made, str):
                    raise CaptureError(f"forward returns {result}; expected one tensor, fused")
                output = made
            else:
                self._operation(node, shapes)
        inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
        program = Program(
            model=getattr(self.model, "name", "") or type(self.model).__name__,
            channels=getattr(self.model, "channels", "luma"),
            multiple=self.multiple,
            inputs=tuple(inputs),
            output=output,
            values=self.values,
            constants=self.constants,
            nodes=tuple(self.nodes),
            padding=getattr(self.model, "padding", "reflect"),
        )
        program.check()
        _check_framed(program)
        return program

    def _trace(self) -> fx.Graph:
        if not self.stages:
            graph = fx.Graph()
            a, b = graph.placeholder("a"), graph.placeholder("b")
            graph.output(graph.create_node("call_module", "", (a, b), name="fused"))
            return graph
        # What forward takes besides the pair (noise to hand in) stays at its default.
        parameters = inspect.signature(getattr(self.model, self.method)).parameters.values()
        extra = [p for p in list(parameters)[self.pictures :] if p.default is not p.empty]
        defaults = {p.name: p.default for p in extra} | self.settings
        try:
            graph = _StageTracer(self.stages, self.method).trace(self.model, defaults)
            _drop_inputs(graph, len(defaults))
            # Calls have no effect but their result; fx itself is not sure of that for stages.
            graph.eliminate_dead_code(is_impure_node=lambda node: node.op in _KEPT)
            return graph
        except (fx.proxy.TraceError, TypeError) as error:
            raise CaptureError(
                f"the forward of {type(self.model).__name__} cannot be traced: {error}. "
                "Data-dependent control flow belongs into a stage; or leave `stages` empty to "
                "lower the model whole"
            ) from error

    def _shapes(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Symbolic shape (or list of shapes) per node, from runs at two sizes."""
        device = next((t.device for t in self.model.parameters()), torch.device("cpu"))
        runs = []
        for height, width in self.sizes:
            shape = (1, self.planes, height, width)
            pair = [torch.zeros(shape, device=device) for _ in range(self.pictures)]
            with torch.no_grad():
                if self.stages:
                    interpreter = _ShapeInterpreter(fx.GraphModule(self.model, graph))
                    interpreter.run(*pair)
                    runs.append(interpreter.seen)
                else:
                    fused = self.model(*pair)
                    if not isinstance(fused, Tensor):
                        raise CaptureError(
                            f"forward returns a {type(fused).__name__}; expected one tensor"
                        )
                    runs.append(dict(zip(graph.nodes, [*pair, fused], strict=False)))

        def join(one: Any, two: Any) -> Any:
            if isinstance(one, (tuple, list)):
                return [join(x, y) for x, y in zip(one, two, strict=True)]
            if not isinstance(one, Tensor):
                return None
            return symbolic(one.shape, two.shape, self.sizes)

        return {
            node: join(runs[0][node], runs[1][node])
            for node in runs[0]
            if node.op not in ("output", "get_attr")
        }

    def _value(self, node: fx.Node, name: str, shapes: dict[fx.Node, Any]) -> str:
        self.values[name] = Value(name, shapes[node])
        self.names[node] = name
        return name

    def _constant(self, node: fx.Node | None, name: str, tensor: Tensor) -> str:
        array = tensor.detach().float().cpu().numpy()
        while name in self.values:
            name += "_"
        self.constants[name] = np.array(array, order="C")
        self.values[name] = Value(name, tuple(array.shape))
        if node is not None:
            self.names[node] = name
        return name

    def _stage(self, node: fx.Node, shapes: dict[fx.Node, Any]) -> None:
        if node.kwargs:
            raise CaptureError(f"stage {node.target!r} is called with keywords; use positions")
        inputs = []
        for argument in node.args:
            if isinstance(argument, fx.Node):
                inputs.append(self.names[argument])
            elif _is_number(argument):
                inputs.append(
                    self._constant(None, f"{node.name}_number", torch.tensor(float(argument)))
                )
            else:
                raise CaptureError(f"stage {node.target!r} is given {argument!r}; expected tensors")
        if isinstance(shapes[node], list):
            outputs = [f"{node.name}_{i}" for i in range(len(shapes[node]))]
            for name, shape in zip(outputs, shapes[node], strict=True):
                self.values[name] = Value(name, shape)
            self.names[node] = outputs
        else:
            outputs = [self._value(node, node.name, shapes)]
        attrs = self._form(str(node.target), [self.values[name].shape for name in inputs])
        self.nodes.append(Node("stage", str(node.target), tuple(inputs), tuple(outputs), attrs))

    def _form(self, stage: str, shapes: list[Shape]) -> dict[str, Any]:
        """Which of the shapes that the stage is called with these are; nothing for the first."""
        forms = self.forms.setdefault(stage, [])
        if shapes not in forms:
            forms.append(shapes)
        form = forms.index(shapes)
        return {"form": form} if form else {}

    def _operation(self, node: fx.Node, shapes: dict[fx.Node, Any]) -> None:
        if node.target is operator.getitem and isinstance(self.names.get(node.args[0]), list):
            self.names[node] = self.names[node.args[0]][node.args[1]]
            return
        key = node.target if node.op == "call_function" else str(node.target)
        rule = _RULES.get(key)
        if rule is None:
            name = getattr(key, "__name__", key)
            raise CaptureError(
                f"{name} stands outside the stages and no op of a program does it; put it into a "
                f"stage, or use one of: {', '.join(sorted({r.__name__ for r in _RULES.values()}))}"
            )
        try:
            op, inputs, attrs = rule(node)
        except (IndexError, ValueError) as error:
            raise CaptureError(
                f"{node.format_node()}: arguments in a form that capture does not know; give "
                "tensors by position"
            ) from error
        for argument in inputs:
            if not isinstance(self.names.get(argument), str):
                raise CaptureError(f"{op} of {argument}, which is no tensor of the program")
        self._value(node, node.name, shapes)
        self.nodes.append(Node("op", op, tuple(self.names[i] for i in inputs), (node.name,), attrs))


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and keeps what every node gave.

    Shapes are all that counts, so a stage that was called with such shapes is not run again.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}
        self.known: dict[Any, Any] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        shapes = tuple(x.shape if isinstance(x, Tensor) else x for x in args)
        if (target, shapes) not in self.known:
            self.known[target, shapes] = super().call_module(target, args, kwargs)
        return self.known[target, shapes]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = result
        return result


def _check_framed(program: Program) -> None:
    """What an op on the frame's own part made means nothing outside it: no network may read it."""
    partial: set[str] = set()
    for node in program.nodes:
        found = partial.intersection(node.inputs)
        if found and node.target not in PIXELWISE:
            raise CaptureError(
                f"{node.target or 'the model'} reads what {', '.join(sorted(FRAMED))} made; put "
                "both into one stage, or use it on the fused picture only"
            )
        if found or (node.kind == "op" and node.target in FRAMED):
            partial.update(node.made())


def _drop_inputs(graph: fx.Graph, count: int) -> None:
    """Remove the last placeholders, which nothing but fx's own assertions reads."""

    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    if count:
        for node in [n for n in graph.nodes if n.op == "placeholder"][-count:]:
            erase(node)


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- rules: fx node -> op name, tensor arguments, attributes -----------------------------------

Rule = Callable[[fx.Node], tuple[str, list[fx.Node], dict[str, Any]]]


def _binary(op: str) -> Rule:
    def rule(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
        if node.kwargs:  # alpha=, out=
            raise CaptureError(f"{op} with {', '.join(node.kwargs)}; write it out as mul and {op}")
        x, y = node.args
        if _is_number(x):
            return op, [y], {"scalar": float(x), "scalar_first": True}
        if _is_number(y):
            return op, [x], {"scalar": float(y)}
        return op, [x, y], {}

    rule.__name__ = op
    return rule


def _concat(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return "concat", list(node.args[0]), {"axis": axis}


def _slice(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    bounds = []
    for item in index:
        if not isinstance(item, slice) or item.step not in (None, 1):
            raise CaptureError(f"index {index}; expected plain slices with numbers")
        for bound in (item.start, item.stop):
            if bound is not None and not isinstance(bound, int):
                raise CaptureError(f"index {index}; expected plain slices with numbers")
        bounds.append([item.start, item.stop])
    return "slice", [node.args[0]], {"bounds": bounds}


def _clamp(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    names = ("min", "max")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if any(not (value is None or _is_number(value)) for value in given.values()):
        raise CaptureError(f"clamp to {given}; expected numbers")
    return "clamp", [node.args[0]], {name: given.get(name) for name in names}


_SCALES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")


def _ddim_step(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    x, eps, *numbers = node.args
    attrs = dict(zip(_SCALES, numbers[:4], strict=True))
    if len(numbers) == 4:
        return "ddim_step", [x, eps], attrs
    noise, eta = numbers[4:]
    return "ddim_step", [x, eps, noise], {**attrs, "eta": eta}


def _compose_priors(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    attrs = dict(zip(_SCALES, node.args[4:], strict=True))
    return "compose_priors", list(node.args[:4]), {**attrs, **node.kwargs}


def _criss_cross_attention(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    q, k, v = node.args
    return "criss_cross_attention", [q, k, v], {}


def _stretch(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    return "stretch", [node.args[0]], {"per": node.kwargs["per"]}


def _standard_normal(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    return "standard_normal", [], {"seed": stream_seed(node.kwargs["seed"], node.args[1])}


def _full_like(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    _, value = node.args
    if not _is_number(value):
        raise CaptureError(f"full_like with {value}; expected a number")
    return "full", [], {"value": float(value)}


def _joint_ddim_step(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    attrs = dict(zip((*_SCALES, "lam"), node.args[5:], strict=True))
    return "joint_ddim_step", list(node.args[:5]), {**attrs, **node.kwargs}


def _block(op: str) -> Rule:
    def rule(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
        return op, [node.args[0]], {"scale": node.args[1]}

    rule.__name__ = op
    return rule


def _circular_convolution(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    return "circular_convolution", list(node.args), {}


def _wiener_deconvolution(node: fx.Node) -> tuple[str, list[fx.Node], dict[str, Any]]:
    return "wiener_deconvolution", list(node.args[:2]), {"regularisation": node.args[2]}


_RULES: dict[Any, Rule] = {
    operator.add: _binary("add"),
    torch.add: _binary("add"),
    operator.sub: _binary("sub"),
    torch.sub: _binary("sub"),
    operator.mul: _binary("mul"),
    torch.mul: _binary("mul"),
    operator.truediv: _binary("div"),
    torch.cat: _concat,
    torch.concat: _concat,
    operator.getitem: _slice,
    "clamp": _clamp,
    torch.clamp: _clamp,
    stretch: _stretch,
    standard_normal: _standard_normal,
    torch.full_like: _full_like,
    kernels.compose_priors: _compose_priors,
    kernels.criss_cross_attention: _criss_cross_attention,
    kernels.ddim_step: _ddim_step,
    kernels.joint_ddim_step: _joint_ddim_step,
    kernels.block_mean: _block("block_mean"),
    kernels.block_repeat: _block("block_repeat"),
    kernels.circular_convolution: _circular_convolution,
    kernels.wiener_deconvolution: _wiener_deconvolution,
}
