"""The ops from kernels compiled ahead of time, against the same kernels compiled by Triton now."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.helpers import BLOCK_TORCH, run_python

torch = pytest.importorskip("torch")
pytest.importorskip("cupy", reason="CuPy is not installed: it launches compiled kernels")
pytest.importorskip("triton", reason="Triton is not installed: it compiles the kernels")

from fuseengine import kernels  # noqa: E402
from fuseengine.errors import BackendUnavailableError  # noqa: E402
from fuseengine.kernels import _cubins, _triton, aot  # noqa: E402

SIZES = ((48, 64), (47, 61))
DTYPES = (torch.float32, torch.float16)
SCALES = (0.6, 0.8, 0.8, 0.6)
EXTENT = aot.Extent(sizes=SIZES, channels=(32,), queries=(4,))


def drawn(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator).to(dtype).cuda()


def attention(dtype, size):
    q, v = drawn(dtype, 1, 4, *size), drawn(dtype, 1, 32, *size)
    return kernels.criss_cross_attention(q, q.flip(-1), v)


def norm(dtype, size, memory_format=torch.contiguous_format):
    x = drawn(dtype, 2, 32, *size).to(memory_format=memory_format)
    weight, shift = drawn(dtype, 32), drawn(dtype, 1, 32)
    return kernels.group_norm_silu(x, weight, weight.flip(0), shift, groups=8)


def ddim(dtype, size):
    x = drawn(dtype, 2, 3, *size)
    return kernels.ddim_step(x, x.flip(-1), *SCALES)


def joint(dtype, size):
    x = drawn(dtype, 2, 3, *size)
    return kernels.joint_ddim_step(x, x.flip(-1), x[:, :1], x[:, 1:2], x[:, 2:], *SCALES, 0.3)


def compose(dtype, size):
    x = drawn(dtype, 2, 3, *size)
    return kernels.compose_priors(x, x.flip(-1), x.flip(1), x[:, :1], *SCALES)


def colour(dtype, size):
    return kernels.ycbcr_to_rgb(kernels.rgb_to_ycbcr(drawn(dtype, 2, 3, *size)))


def padded(dtype, size):
    return kernels.pad_reflect(drawn(dtype, 2, 3, *size), size[0] + 5, size[1] + 7)


def warped(dtype, size):
    homography = torch.tensor([[1.0, 0.1, -2.0], [0.05, 0.9, 1.5], [0.0, 0.001, 1.0]])
    return kernels.warp(drawn(dtype, 2, 1, *size), homography.cuda())


def filtered(dtype, size):
    spectrum = drawn(torch.float32, size[0], size[1] // 2 + 1)
    return kernels.wiener_filter(drawn(dtype, 2, 1, *size), spectrum)


def frames(dtype, size):
    visible = (255 * drawn(torch.float32, 1, *size, 3)).to(torch.uint8)
    planes = kernels.frame_in(visible, "luma", dtype=dtype)
    return kernels.frame_out(planes, visible)


CASES = {
    "attention": attention,
    "norm": norm,
    "norm, channels last": functools.partial(norm, memory_format=torch.channels_last),
    "ddim": ddim,
    "joint": joint,
    "compose": compose,
    "colour": colour,
    "pad": padded,
    "warp": warped,
    "filter": filtered,
    "frames": frames,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every op's machine code for this GPU."""
    capability = _triton._capability(torch.device("cuda", 0))
    tasks = [
        functools.partial(aot.compile_all, op, dtype, capability, extent=EXTENT)
        for op, dtype in itertools.product(aot.OPS, DTYPES)
    ]
    folder = tmp_path_factory.mktemp("cubins")
    aot.write(aot.in_processes(tasks), folder)
    return folder


@pytest.fixture
def only(monkeypatch):
    """Takes code from a store, and lets nothing else compile."""

    def only(store):
        _cubins.use(store)
        monkeypatch.setenv(_triton.NO_JIT, "1")
        monkeypatch.setattr(_triton, "_built", {})

    monkeypatch.setattr(_cubins, "_active", None)
    monkeypatch.delenv(_triton.NO_JIT, raising=False)
    return only


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_triton_s(folder, only, name, dtype, size):
    expected = CASES[name](dtype, size)
    only(folder)
    assert torch.equal(CASES[name](dtype, size), expected)


@pytest.mark.parametrize("name", ["attention", "ddim", "norm"])
def test_ptx(tmp_path, only, name):
    """As on a GPU that the store has no machine code for."""
    expected = CASES[name](torch.float16, SIZES[0])
    ops = {"attention": "criss_cross_attention", "ddim": "ddim_step", "norm": "group_norm_silu"}
    aot.write(aot.compile_all(ops[name], torch.float16, 80, form="ptx", extent=EXTENT), tmp_path)
    only(tmp_path)
    assert _triton.device_capability(torch.device("cuda", 0)) == 80
    found = CASES[name](torch.float16, SIZES[0])
    # Other instructions for the same arithmetic: a rounding or two of numbers up to 4.
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-3)


def test_on_a_stream_and_in_a_graph(folder, only):
    expected = attention(torch.float16, SIZES[0])
    only(folder)
    q, v = drawn(torch.float16, 1, 4, *SIZES[0]), drawn(torch.float16, 1, 32, *SIZES[0])
    late = torch.full_like(v, float("nan"))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)  # on another stream the kernels would come before the copy
        late.copy_(v)
        found = kernels.criss_cross_attention(q, q.flip(-1), late)
    other.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.criss_cross_attention(q, q.flip(-1), v)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, expected)


def test_what_is_not_there_is_refused(folder, only):
    only(folder)
    q = drawn(torch.float16, 1, 64, *SIZES[0])
    with pytest.raises(BackendUnavailableError, match="criss_cross_line.*nearest.*BLOCK_Q 16"):
        kernels.criss_cross_attention(q, q, q)


def test_without_triton(folder):
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from fuseengine import kernels\n"
        "x = torch.linspace(0, 1, 4096, device='cuda')\n"
        "found = kernels.ddim_step(x, x.flip(0), 0.6, 0.8, 0.8, 0.6).double()\n"
        "exact = kernels.ddim_step_reference(x.double(), x.double().flip(0), 0.6, 0.8, 0.8, 0.6)\n"
        "print(float((found - exact).abs().max()))"
    )
    names = {_cubins.CUBINS: str(folder), _triton.NO_JIT: "1"}
    assert float(run_python(script, **names)) < 1e-6


def test_without_torch(folder):
    """The run side's way: CuPy arrays, nothing of PyTorch."""
    script = BLOCK_TORCH + (
        "import cupy, numpy as np\n"
        "from fuseengine.runtime.cubins import Store, pointer, variant_of\n"
        f"store = Store.load({str(folder)!r})\n"
        "kernel = next(e for e in store.entries if e.assumes and\n"
        "              (e.op, e.label, e.dtype) == ('ddim_step', 'plain', 'float32'))\n"
        "a, b = np.linspace(0, 1, 4096, dtype=np.float32), np.ones(4096, np.float32)\n"
        "x, eps, out = cupy.asarray(a), cupy.asarray(b), cupy.empty(4096, np.float32)\n"
        "arguments = {'x': pointer(x), 'eps': pointer(eps), 'out': pointer(out), 'count': 4096,\n"
        "             'scale_x': 0.5, 'scale_eps': 0.25, 'sigma': 0.0}\n"
        "wanted = variant_of(kernel.kernel, arguments, kernel.constants, ('count',),\n"
        "                    kernel.options)\n"
        "assert store.get(wanted, int(cupy.cuda.Device().compute_capability)) is kernel\n"
        "store.launch(kernel, (-(-4096 // kernel.constants['BLOCK']),), arguments.values())\n"
        "print(abs(out.get() - (0.5 * a + 0.25)).max())"
    )
    assert float(run_python(script)) < 1e-6
