"""Stores of compiled kernels: which code a launch needs, the folder, its damage, the launch itself.

The kernels here are bytes that nobody runs, and CuPy is a recorder: what it is asked to do is
checked. Real code is in test_aot.py, real launches in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types

import numpy as np
import pytest

from fuseengine.errors import BackendUnavailableError, KernelStoreError
from fuseengine.runtime import cubins
from fuseengine.runtime.cubins import Entry, Pointer, Store, variant_of
from tests.helpers import BLOCK_TORCH, run_python

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
ARGUMENTS = {"x": Pointer(1 << 20, "*fp16"), "count": 640, "channels": 3, "scale": 0.5}


def variant(arguments=ARGUMENTS, constants=None, multiples=("count",), **choice):
    given = {"BLOCK": 1024, "noise": None} if constants is None else constants
    return variant_of("step", arguments, given, multiples, OPTIONS, **choice)


def entry(code=b"code", *, capability=87, form="cubin", shared_bytes=0, **variants):
    wanted = variant(**variants)
    sha256 = hashlib.sha256(code).hexdigest()
    return Entry(
        op="ddim_step",
        label="plain",
        dtype="float16",
        capability=capability,
        form=form,
        file=f"step.{capability}.{sha256[:12]}.{form}",
        sha256=sha256,
        kernel=wanted.kernel,
        entry="step",
        parameters=wanted.parameters,
        hidden=2,
        constants=dict(wanted.constants),
        assumes=dict(wanted.assumes),
        options=dict(wanted.options),
        threads=128,
        shared_bytes=shared_bytes,
        grid_rule="(ceil(count / BLOCK),)",
        triton_version="3.9.0",
    )


@pytest.fixture
def folder(tmp_path):
    """A store: both variants for 87, and PTX of the one for any size."""
    kernels = [
        (entry(b"aligned"), b"aligned"),
        (entry(b"any", aligned=False), b"any"),
        (entry(b"ptx", aligned=False, capability=80, form="ptx"), b"ptx"),
    ]
    cubins.write(tmp_path / "store", kernels)
    return tmp_path / "store"


class TestVariant:
    def test_aligned(self):
        found = variant()
        assert found.parameters == (
            ("x", "*fp16"), ("count", "i32"), ("channels", "i32"), ("scale", "fp32"),
        )  # fmt: skip
        assert dict(found.constants) == {"BLOCK": 1024, "noise": None}
        assert dict(found.assumes) == {"x": 16, "count": 8}

    @pytest.mark.parametrize(
        "changed",
        [{"count": 639}, {"count": 644}, {"x": Pointer((1 << 20) + 8, "*fp16")}],
        ids=["odd", "a multiple of 4", "address"],
    )
    def test_any(self, changed):
        found = variant({**ARGUMENTS, **changed})
        assert found.assumes == ()
        assert found == variant(aligned=False)

    @pytest.mark.parametrize(
        "changed",
        [{"count": 8}, {"count": 0}, {"channels": 1}, {"channels": 16}, {"scale": 1.0}],
    )
    def test_no_value_but_alignment_makes_another_variant(self, changed):
        """Triton's own launcher compiles anew for 1 and for multiples of 16."""
        assert variant({**ARGUMENTS, **changed}) == variant()

    def test_one_is_no_multiple(self):
        assert variant({**ARGUMENTS, "count": 1}) == variant(aligned=False)

    def test_without_multiples_there_is_one_variant(self):
        assert variant(multiples=()) == variant(multiples=(), aligned=True)
        assert variant(multiples=()).assumes == ()

    @pytest.mark.parametrize(
        ("value", "kind"), [(2**31 - 1, "i32"), (2**31, "i64"), (-(2**31), "i32"), (2**40, "i64")]
    )
    def test_integers(self, value, kind):
        found = variant({**ARGUMENTS, "channels": value})
        assert dict(found.parameters)["channels"] == kind
        assert found.wide == (["channels"] if kind == "i64" else [])

    def test_arrays(self):
        interface = {"data": (4096, False), "typestr": "<f2"}
        array = types.SimpleNamespace(__cuda_array_interface__=interface)
        assert cubins.pointer(array) == Pointer(4096, "*fp16")
        interface["typestr"] = "<c8"
        with pytest.raises(BackendUnavailableError, match="array of <c8; expected one of <f4"):
            cubins.pointer(array)


class TestFolder:
    def test_round_trip(self, folder):
        store = Store.load(folder)
        assert [e.form for e in store.entries] == ["cubin", "cubin", "ptx"]
        assert store.entries[0] == entry(b"aligned")
        assert store.entries[0].variant == variant()
        assert (folder / store.entries[0].file).read_bytes() == b"aligned"
        assert store.capabilities == [87]

    def test_lookup(self, folder):
        store = Store.load(folder)
        assert store.get(variant(), 87) is store.entries[0]
        assert store.get(variant(aligned=False), 87) is store.entries[1]
        assert store.get(variant(constants={"BLOCK": 512, "noise": None}), 87) is None

    @pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
    def test_another_gpu_runs_the_ptx(self, folder, capability):
        store = Store.load(folder)
        assert store.target(capability) == 80
        assert store.get(variant(aligned=False), capability) is store.entries[2]
        assert store.get(variant(), capability) is None

    def test_an_older_gpu_runs_nothing(self, folder):
        expected = (
            "not run on compute capability 75: they are sm_87 and PTX for compute_80; compile"
        )
        with pytest.raises(BackendUnavailableError, match=expected):
            Store.load(folder).target(75)

    def test_without_ptx(self, tmp_path):
        cubins.write(tmp_path, [(entry(), b"code")])
        with pytest.raises(BackendUnavailableError, match="aot --capability 90 --out"):
            Store.load(tmp_path).get(variant(), 90)

    def test_writing_again_replaces(self, folder):
        cubins.write(folder, [(entry(b"new"), b"new")])
        assert [e.sha256 for e in Store.load(folder).entries] == [entry(b"new").sha256]
        names = sorted(path.name for path in folder.iterdir())
        assert names == [cubins.MANIFEST, entry(b"new").file]

    @pytest.mark.parametrize("files", [0, 1])
    def test_a_writer_that_stops_leaves_the_old_store(self, folder, monkeypatch, files):
        plain, left = cubins._replace, [files]

        def stop_after(path, content):
            if not left[0]:
                raise OSError("disk full")
            left[0] -= 1
            plain(path, content)

        monkeypatch.setattr(cubins, "_replace", stop_after)
        with pytest.raises(OSError, match="disk full"):
            cubins.write(folder, [(entry(b"new"), b"new")])
        assert Store.load(folder).get(variant(), 87).sha256 == entry(b"aligned").sha256

    def test_a_file_that_cannot_be_renamed_is_not_left_behind(self, tmp_path):
        (tmp_path / entry().file).mkdir(parents=True)
        with pytest.raises(OSError):
            cubins.write(tmp_path, [(entry(), b"code")])
        assert [path.name for path in tmp_path.iterdir()] == [entry().file]

    def test_needs_no_torch(self, folder):
        script = BLOCK_TORCH + (
            "sys.modules['triton'] = None\n"
            "from fuseengine.runtime.cubins import Store\n"
            f"print(Store.load({str(folder)!r}).capabilities)"
        )
        assert run_python(script).strip() == "[87]"


class TestDamage:
    def test_nothing_there(self, tmp_path):
        expected = "kernels.json cannot be read .No such file.*expected a folder written by python"
        with pytest.raises(KernelStoreError, match=expected):
            Store.load(tmp_path)

    @pytest.mark.parametrize("cut", [1, 100, -3])
    def test_cut_off_manifest(self, folder, cut):
        path = folder / cubins.MANIFEST
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(KernelStoreError, match=r"kernels.json is damaged \(.*write the folder"):
            Store.load(folder)

    def test_changed_manifest(self, folder):
        path = folder / cubins.MANIFEST
        path.write_text(path.read_text().replace('"threads": 128', '"threads": 256', 1))
        with pytest.raises(KernelStoreError, match=r"is damaged \(its hash differs\)"):
            Store.load(folder)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 1, "kernels": []}', "3"])
    def test_another_schema(self, folder, content):
        (folder / cubins.MANIFEST).write_text(content)
        with pytest.raises(KernelStoreError, match=r"has schema (1|None); expected 2: write"):
            Store.load(folder)

    def test_changed_code(self, folder):
        (folder / entry(b"any", aligned=False).file).write_bytes(b"evil")
        with pytest.raises(KernelStoreError, match=r"cubin is damaged: sha256 \w+..., expected"):
            Store.load(folder)

    def test_missing_code(self, folder):
        (folder / entry(b"any", aligned=False).file).unlink()
        with pytest.raises(KernelStoreError, match=r"cubin cannot be read \(No such file"):
            Store.load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file": "../step.cubin"}, "file = '../step.cubin'; expected a plain file name"),
            ({"file": ".."}, "file = '..'; expected a plain file name"),
            ({"file": ""}, "file = ''; expected a plain file name"),
            ({"form": "sass"}, "form = 'sass'; expected 'cubin' or 'ptx'"),
            ({"threads": "128"}, "threads = '128'; expected int"),
            ({"threads": True}, "threads = True; expected int"),
            ({"parameters": [["x"]]}, "expected pairs of name and type"),
            ({"parameters": [["x", "fp64"]]}, "parameters has {'fp64'}; expected"),
            ({"extra": 1}, "expected the fields"),
        ],
    )
    def test_bad_record(self, folder, change, message):
        """Even with a right hash: whoever wrote it may have had other fields."""
        path = folder / cubins.MANIFEST
        records = json.loads(path.read_text())["kernels"]
        records[1] |= change
        sha256 = hashlib.sha256(cubins._canonical(records)).hexdigest()
        path.write_text(json.dumps({"schema": 2, "sha256": sha256, "kernels": records}))
        with pytest.raises(KernelStoreError, match=r"kernels\[1\]") as caught:
            Store.load(folder)
        assert message in str(caught.value)


class TestMissing:
    def test_the_message_has_it_all(self, folder):
        wanted = variant({**ARGUMENTS, "count": 639}, constants={"BLOCK": 512, "noise": None})
        text = Store.load(folder).missing(wanted, "plain", 87)
        for part in (
            f"step (plain) is not among the kernels in {folder}",
            "for compute capability 87: (x *fp16, count i32, channels i32, scale fp32)",
            "with BLOCK=512, noise=None, enable_fp_fusion=True, num_stages=2, num_warps=4",
            "any alignment",
            "nearest: ddim_step (plain, float16): BLOCK 1024, wanted 512\n",
            "aligned (count multiples of 8), wanted any alignment",
            f"python -m fuseengine.kernels.aot --capability 87 --out {folder}",
        ):
            assert part in text
        assert text.index("wanted 512\n") < text.index("wanted any alignment")

    def test_pointers_and_flags(self, folder):
        wanted = variant({**ARGUMENTS, "x": Pointer(0, "*fp32")}, constants={"BLOCK": 1024})
        text = Store.load(folder).missing(wanted, "plain", 87)
        assert "x *fp16, wanted *fp32; noise None, wanted absent" in text

    def test_an_unknown_kernel(self, folder):
        wanted = variant()._replace(kernel="warp")
        text = Store.load(folder).missing(wanted, "plain", 90)
        assert "nearest: none, the store has no warp" in text
        assert "--capability 80" in text

    def test_integers_beyond_32_bits(self, folder):
        text = Store.load(folder).missing(variant({**ARGUMENTS, "channels": 2**31}), "plain", 87)
        assert "channels beyond 32 bits: split the tensors" in text
        assert "python -m" not in text


class Recorder:
    """What of CuPy a launch uses, and what was asked of it."""

    def __init__(self, *, streams_from="external", error=None):
        self.calls, self.error = [], error
        cuda = types.SimpleNamespace(Device=self.device)
        if streams_from == "external":
            cuda.Stream = types.SimpleNamespace(from_external=self.from_external)
        else:
            cuda.Stream = types.SimpleNamespace()
            cuda.ExternalStream = self.external_stream
        self.module = types.ModuleType("cupy")
        self.module.cuda, self.module.RawModule = cuda, self.raw_module

    def within(self, *what):
        """A context that can be entered again and again, as CuPy's are."""
        calls = self.calls

        class Within:
            def __enter__(self):
                calls.append(("enter", *what))

            def __exit__(self, *error):
                calls.append(("leave", *what))

        return Within()

    def device(self, index):
        return self.within("device", index)

    def from_external(self, stream):
        version, address = stream.__cuda_stream__()
        assert version == 0
        return self.within("stream", address)

    def external_stream(self, address, device):
        return self.within("old stream", address, device)

    def raw_module(self, *, path):
        self.calls.append(("load", path))
        recorder = self

        class Kernel:
            def __init__(self, name):
                if recorder.error:
                    raise recorder.error
                recorder.calls.append(("function", name))

            def __call__(self, grid, block, words, *, shared_mem):
                recorder.calls.append(("launch", grid, block, words, shared_mem))

            def __setattr__(self, name, value):
                recorder.calls.append((name, value))

        return types.SimpleNamespace(get_function=Kernel)

    def named(self, *names):
        return [call for call in self.calls if call[0] in names]


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "cupy", recorder.module)
    cubins._stream.cache_clear()
    yield recorder
    cubins._stream.cache_clear()


class TestLaunch:
    def test_everything(self, folder, recorder):
        store = Store.load(folder)
        kernel = store.entries[0]
        store.launch(kernel, (5,), ARGUMENTS.values(), device=1, stream=77)
        path = str(folder / kernel.file)
        (launch,) = recorder.named("launch")
        assert recorder.calls == [
            ("enter", "device", 1), ("load", path), ("function", "step"),
            ("enter", "stream", 77), launch, ("leave", "stream", 77), ("leave", "device", 1),
        ]  # fmt: skip
        _, grid, block, words, shared = launch
        assert (grid, block, shared) == ((5, 1, 1), (128, 1, 1), 0)
        # Two hidden pointers, null; each word as wide as its parameter.
        assert words == (1 << 20, 640, 3, 0.5, 0, 0)
        kinds = (np.uint64, np.int32, np.int32, np.float32, np.uint64, np.uint64)
        assert tuple(map(type, words)) == kinds

    def test_loads_once_for_each_device(self, folder, recorder):
        store = Store.load(folder)
        for device in (0, 1, 0):
            store.launch(store.entries[0], (5, 2), ARGUMENTS.values(), device=device)
        assert len(recorder.named("load")) == 2
        assert [call[1] for call in recorder.named("launch")] == [(5, 2, 1)] * 3
        assert not any("stream" in call for call in recorder.calls)

    @pytest.mark.parametrize(("size", "asked"), [(48 << 10, []), (56 << 10, [56 << 10])])
    def test_shared_memory(self, tmp_path, recorder, size, asked):
        kernel = entry(shared_bytes=size)
        cubins.write(tmp_path, [(kernel, b"code")])
        Store.load(tmp_path).launch(kernel, (1,), ARGUMENTS.values())
        found = recorder.named("max_dynamic_shared_size_bytes")
        assert [value for _, value in found] == asked
        assert recorder.named("launch")[0][-1] == size

    def test_cupy_13(self, folder, monkeypatch):
        old = Recorder(streams_from="pointer")
        monkeypatch.setitem(sys.modules, "cupy", old.module)
        cubins._stream.cache_clear()
        store = Store.load(folder)
        store.launch(store.entries[0], (1,), ARGUMENTS.values(), stream=7)
        assert ("enter", "old stream", 7, 0) in old.calls
        cubins._stream.cache_clear()

    def test_wrong_number_of_values(self, folder, recorder):
        store = Store.load(folder)
        with pytest.raises(ValueError, match="zip"):
            store.launch(store.entries[0], (1,), [Pointer(0, "*fp16"), 1])
        assert not recorder.calls

    def test_the_driver_refuses(self, folder, monkeypatch):
        refusing = Recorder(error=RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU"))
        monkeypatch.setitem(sys.modules, "cupy", refusing.module)
        store = Store.load(folder)
        expected = r"refuses .*cubin \(CUDA_ERROR_NO_BINARY_FOR_GPU\); expected a GPU of.* 87"
        with pytest.raises(BackendUnavailableError, match=expected):
            store.launch(store.entries[0], (1,), ARGUMENTS.values())

    def test_without_cupy(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        store = Store.load(folder)
        with pytest.raises(BackendUnavailableError, match="needs CuPy.*pip install cupy-cuda13x"):
            store.launch(store.entries[0], (1,), ARGUMENTS.values())


def test_records_and_fields_agree():
    assert set(cubins._FIELDS) == {field.name for field in dataclasses.fields(Entry)}
