"""``fuseengine doctor``: what it says on machines of all kinds, and that it imports no PyTorch."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import fuseengine.doctor
from fuseengine.backends import BACKENDS
from fuseengine.cli import main
from fuseengine.cli.doctor import describe
from fuseengine.doctor import JETSON_INDEX, diagnose
from fuseengine.machine import Cpu, Gpu, Jetson, Machine

from ..helpers import BLOCK_TORCH, run_python

ARM = Cpu("Cortex-A78AE", "aarch64", 12, 12, ("neon",))
X86 = Cpu("a processor", "x86_64", 8, 8, ("avx2",))
MODES = {0: "MAXN", 1: "MODE_15W", 2: "MODE_30W", 3: "MODE_50W"}


def orin(jetpack="6.2", mode="MAXN", **fields):
    jetson = Jetson("NVIDIA Jetson AGX Orin", "36.4.3", jetpack, mode, MODES, "orin")
    made = {"system": "Linux 5.15", "cpu": ARM, "memory_bytes": 64 << 30, "jetson": jetson}
    return Machine(**{**made, "gpus": (Gpu("Orin"),), **fields})


def server(**fields):
    gpu = Gpu("NVIDIA L4", "8.9", fields.pop("driver", "580.65"), 24 << 30)
    return Machine("Linux 6", X86, 1 << 36, (gpu,), **fields)


def look(machine, packages=None, requires=()):
    """Diagnose with these distributions and no others installed."""
    packages = packages or {}
    return diagnose(machine, lambda n: packages.get(n, ""), requires=lambda name: list(requires))


def warnings(diagnosis):
    return {f.text: f.remedy for f in diagnosis.findings if f.level == "warning"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestFindings:
    def test_agx_orin_as_it_comes(self):
        ((text, remedy),) = warnings(look(orin(mode="MODE_30W"))).items()
        assert text.startswith("power mode MODE_30W: 24% of MAXN's arithmetic rate")
        assert remedy == "sudo nvpmodel -m 0 && sudo jetson_clocks"
        assert warnings(look(orin())) == {}

    def test_a_mode_without_a_file(self):
        ((text, _),) = warnings(look(orin(mode="MODE_MINE"))).items()
        assert "slower than MAXN" in text

    @pytest.mark.parametrize(
        ("version", "requires", "wrong"),
        [
            ("2.8.0", ["filelock"], False),
            ("2.8.0", ["filelock", "nvidia-cublas-cu12==12"], True),
            ("2.15.0", ["filelock"], True),
        ],
    )
    def test_torch_of_pypi_on_jetpack_6(self, version, requires, wrong):
        found = warnings(look(orin(), {"torch": version}, requires))
        assert bool(found) == wrong
        if wrong:
            ((text, remedy),) = found.items()
            assert "it cannot use the GPU of JetPack 6" in text
            assert remedy == f"pip install --index-url {JETSON_INDEX} torch==2.8.0"

    def test_torch_elsewhere(self):
        assert warnings(look(server(), {"torch": "2.15.0"}, ["nvidia-cublas"])) == {}
        assert warnings(look(orin("7.2"), {"torch": "2.13.0"}, ["nvidia-cublas"])) == {}

    @pytest.mark.parametrize(
        ("machine", "version", "text"),
        [
            (server(), "10.14.1", "broken in 10.14"),
            (server(), "10.16.2", None),
            (server(), "11.4.1", None),
            (orin(), "10.3.0", None),
            (orin(), "11.4.1", "does not run on JetPack 6.2"),
            (orin("7.2"), "10.16.2", None),
            (orin("7.2"), "11.4.1", "from 11.4.1 and JetPack 7.2.2 on"),
            (orin("7.2.2"), "11.3.0", "from 11.4.1 and JetPack 7.2.2 on"),
            (orin("7.2.2"), "11.4.1", None),
        ],
    )
    def test_tensorrt(self, machine, version, text):
        found = list(warnings(look(machine, {"tensorrt": version})))
        assert [text in f for f in found] == ([] if text is None else [True])

    def test_tensorrt_of_the_system(self):
        found = look(orin(tensorrt_library="10.3.0"))
        (note,) = (f for f in found.findings if "not visible to this Python" in f.text)
        assert note.level == "note" and "--system-site-packages" in note.remedy
        assert not any(
            "not visible" in f.text for f in look(orin(), {"tensorrt": "10.3.0"}).findings
        )

    def test_onnxruntime_too_old_for_tensorrt_11(self):
        found = look(server(), {"tensorrt": "11.4.1", "onnxruntime": "1.26.0"})
        assert any("ONNX Runtime 1.26.0 cannot use TensorRT" in f.text for f in found.findings)

    @pytest.mark.parametrize(
        ("machine", "package", "wrong"),
        [
            (orin(), "cupy-cuda13x", True),
            (orin(), "cupy-cuda12x", False),
            (orin("7.2"), "cupy-cuda13x", False),
            (server(driver="550.54"), "cupy-cuda13x", True),
            (server(), "cupy-cuda13x", False),
        ],
    )
    def test_cupy_for_another_cuda(self, machine, package, wrong):
        found = warnings(look(machine, {package: "13.6.0"}))
        assert bool(found) == wrong
        if wrong:
            assert f"pip uninstall {package} && pip install cupy-cuda12x" in found.values()

    def test_both_onnxruntimes(self):
        both = {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}
        assert "overwrite each other" in next(iter(warnings(look(server(), both))))

    def test_processors(self):
        few = Machine("Linux", Cpu("p", "x86_64", 8, 2, ("avx2",)), 1 << 33)
        assert any("2 of 8 logical cores" in f.text for f in look(few).findings)
        old = Machine("Linux", Cpu("p", "x86_64", 2, 2, ("neon",)), 1 << 33)
        assert any("no AVX2" in text for text in warnings(look(old)))

    def test_a_cache_that_cannot_be_written(self, cache, monkeypatch):
        monkeypatch.setattr(fuseengine.doctor.os, "access", lambda *a: False)
        assert any("cannot be written" in text for text in warnings(look(server())))

    @pytest.mark.parametrize("trouble", ["closed_folders", "no_home"])
    def test_a_home_that_is_closed_or_missing(self, request, trouble):
        request.getfixturevalue(trouble)
        assert any("cannot be written" in text for text in warnings(look(server())))

    def test_warnings_come_first(self):
        found = look(orin(mode="MODE_30W", tensorrt_library="10.3.0")).findings
        assert [f.level for f in found] == ["warning", "note"]


class TestAdvice:
    def test_bare_orin(self):
        install = look(orin()).install
        assert install["the GPU without PyTorch"] == "pip install cupy-cuda12x"
        assert "python3-libnvinfer" in install["TensorRT"]
        assert JETSON_INDEX in install["compiling and training on the device"]

    def test_jetpack_7(self):
        install = look(orin("7.2")).install
        assert install["the GPU without PyTorch"] == "pip install cupy-cuda13x"
        assert install["compiling and training"] == "pip install 'fuseengine[compile]'"

    def test_server(self):
        install = look(server(), {"torch": "2.15", "onnx": "1.18", "openvino": "2026"}).install
        assert install == {
            "the GPU without PyTorch": "pip install cupy-cuda13x",
            "TensorRT": "pip install 'fuseengine[tensorrt]'",
        }

    def test_nothing_is_missing(self):
        everything = {"torch": "2", "onnx": "1", "openvino": "2026"}
        assert look(Machine("Linux", X86, 1 << 33), everything).install == {}


class TestBackends:
    def test_the_cpu_alone(self):
        states = look(Machine("Linux", X86, 1 << 33)).backends
        assert {state.device for state in states} == {"cpu"}
        assert [state.backend for state in states] == list(BACKENDS)
        assert all(state.precisions or state.reason for state in states)

    def test_torch_on_a_gpu_is_not_asked(self):
        states = look(server(), {"torch": "2.15.0"}).backends
        (state,) = (s for s in states if (s.backend, s.device) == ("torch", "cuda"))
        assert "fp16" in state.precisions and "--deep asks it" in state.reason

    def test_a_broken_library_is_a_reason(self, monkeypatch):
        def broken(device):
            raise OSError("libgomp.so.1: cannot open shared object file")

        monkeypatch.setattr(BACKENDS["onnxruntime"], "unavailable", broken)
        states = look(Machine("Linux", X86, 1 << 33)).backends
        (state,) = (s for s in states if s.backend == "onnxruntime")
        assert state.precisions == () and "OSError: libgomp" in state.reason


class TestDeep:
    def test_asks_and_reports_what_is_broken(self, monkeypatch):
        working = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
        monkeypatch.setitem(sys.modules, "onnxruntime", working)
        monkeypatch.setitem(sys.modules, "torch", None)
        found = diagnose(
            Machine("Linux", X86, 1 << 33),
            lambda name: {"torch": "2.15", "onnxruntime": "1.31"}.get(name, ""),
            deep=True,
        )
        assert found.deep["onnxruntime"] == "providers CPUExecutionProvider"
        assert found.deep["torch"].startswith("cannot be used: ModuleNotFoundError")

    def test_torch(self):
        torch = pytest.importorskip("torch")
        said = fuseengine.doctor._ask_torch(torch)
        assert "CUDA" in said


def test_text():
    text = describe(look(orin(mode="MODE_30W", cuda="12.6.11"), {"onnxruntime": "1.23.0"}))
    assert "NVIDIA Jetson AGX Orin, JetPack 6.2 (Jetson Linux 36.4.3), power mode MODE_30W" in text
    assert "\n  CUDA 12.6.11\n" in text and "installed: onnxruntime 1.23.0\n" in text
    assert "\n    do: sudo nvpmodel -m 0 && sudo jetson_clocks\n" in text
    assert "the GPU without PyTorch: pip install cupy-cuda12x" in text


def test_command(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("machine:\n") and "native module: " in text and "cache: " in text


def test_json(capsys, cache):
    entry = cache / "0123"
    entry.mkdir(parents=True)
    (entry / "index.json").write_bytes(bytes(1000))
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["machine"]["cpu"]["cores"] >= 1
    assert (data["cache"]["entries"], data["cache"]["bytes"]) == (1, 1000)
    assert {"backend", "device", "precisions", "reason"} == set(data["backends"][0])


def test_imports_no_torch():
    script = "from fuseengine.cli import main; assert main(['doctor', '--json']) == 0"
    assert json.loads(run_python(BLOCK_TORCH + script))["packages"]["fuseengine"] is not None
