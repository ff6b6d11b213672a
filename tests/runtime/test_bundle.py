"""Bundles: what is in them, and everything that is refused."""

from __future__ import annotations

import json
import re
import tracemalloc
import zipfile

import numpy as np
import onnx
import pytest

from fuseengine import cache
from fuseengine.errors import BundleError
from fuseengine.program import StageVariant
from fuseengine.runtime import archive, bundle, cubins
from fuseengine.runtime.archive import Archive
from fuseengine.runtime.bundle import MANIFEST, SCHEMA, Bundle
from fuseengine.runtime.fields import Map, OneOf, expect, parse
from tests.fuzz_bundle import Fuzzer, _hash_again
from tests.saved import SIZE, little_engine

NET = StageVariant("net", (0, 1))


@pytest.fixture(scope="module")
def engine():
    return little_engine()


@pytest.fixture(scope="module")
def sound(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "little.fuse"
    engine.save(path)
    return path


@pytest.fixture
def path(sound, tmp_path):
    """A copy that a test may spoil."""
    copy = tmp_path / "copy.fuse"
    copy.write_bytes(sound.read_bytes())
    return copy


def members_of(path):
    with Archive(path) as opened:
        return {name: opened.read(name) for name in opened.members}


def spoil(path, change, *, seal=True):
    """Change a bundle's manifest or members; make its hashes fit again unless told not to."""
    members = members_of(path)
    manifest = json.loads(members.pop(MANIFEST))
    change(manifest, members)
    if seal:
        _hash_again(members, manifest)
    archive.write(path, {MANIFEST: json.dumps(manifest).encode(), **members})


def refused(path, message):
    """Opening fails with such a message, in one line that names the file; nothing is written."""
    before = {p.name for p in path.parent.iterdir()}
    with pytest.raises(BundleError, match=message) as caught:
        Bundle(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name for p in path.parent.iterdir()} == before


class TestContent:
    def test_networks_are_given_back_byte_for_byte(self, engine, sound):
        with Bundle(sound) as opened:
            for variant in engine.program.variants():
                content = opened.onnx(variant)
                assert content == engine.source.onnx(variant)
                onnx.checker.check_model(onnx.load_model_from_string(content))

    def test_shared_weights_are_stored_once(self, engine, sound):
        with Bundle(sound) as opened:
            uses = [sha for network in opened.networks.values() for _, sha in network.weights]
            stored = [n for n in opened.manifest["members"] if n.startswith("weights/")]
        # Both variants of "net" have its body's weight; "last" is too small to be cut.
        assert len(uses) == 2 and len(stored) == 1

    def test_description(self, engine, sound):
        with Bundle(sound) as opened:
            found = opened.description
            assert str(found.program) == str(engine.program)
            for name, array in engine.program.constants.items():
                np.testing.assert_array_equal(found.program.constants[name], array)
            assert found.choice == engine.choice
            assert found.report == engine.report
            assert (found.size, found.device) == (SIZE, "cpu")
            assert opened.target.name == "this" and opened.target.compute_capability is None
            assert opened.size == sound.stat().st_size

    def test_the_manifest_says_what_was_verified(self, sound):
        with Bundle(sound) as opened:
            (text,) = opened.manifest["verified"]
            assert re.search(r"22x30|30x22: fused image against PyTorch in float32, 1\d\d", text)
            assert opened.manifest["not_verified"] == []
            assert opened.manifest["schema"] == 1  # nothing newer is in it

    def test_any_zip_tool_reads_it(self, sound):
        with zipfile.ZipFile(sound) as found:
            assert found.testzip() is None
            manifest = json.loads(found.read(MANIFEST))
        assert set(manifest["members"]) == {*found.namelist()} - {MANIFEST}

    def test_the_same_engine_gives_the_same_bytes(self, engine, sound, tmp_path):
        engine.save(tmp_path / "again.fuse")
        assert (tmp_path / "again.fuse").read_bytes() == sound.read_bytes()

    def test_buffers_are_an_upper_bound(self, engine, sound):
        with Bundle(sound) as opened:
            declared = opened.manifest["buffers"]["bytes"]
        assert engine.executor().buffer_bytes <= declared + 64 * len(engine.program.values)

    def test_no_pickle(self, sound):
        assert not any(b"\x80\x04" in c[:4] or b"PK" in c[:2] for c in members_of(sound).values())

    def test_what_it_does_not_hold(self, sound):
        with Bundle(sound) as opened:
            with pytest.raises(BundleError, match="no int8 network of the stage net-0-1; it holds"):
                opened.onnx(NET, "int8")
            with pytest.raises(BundleError, match="no PyTorch module of net-0-1"):
                opened.module(NET)
            with pytest.raises(BundleError, match="no compiled GPU kernels"):
                opened.kernels()
            assert opened.plan("key") is None
            assert opened.typed(NET, "tf32") == opened.onnx(NET)


class TestPlans:
    def test_added_on_the_device(self, path):
        networks = members_of(path)
        for number in range(2):
            about = {"tensorrt": "10.3.0", "capability": 87}
            bundle.add_plans(path, {f"key{number}": (b"plan %d" % number, about)})
        with Bundle(path) as opened:
            assert (opened.plan("key0"), opened.plan("key1")) == (b"plan 0", b"plan 1")
            assert opened.manifest["plans"]["key0"]["about"] == about
        kept = members_of(path)
        assert {n: kept[n] for n in networks if n != MANIFEST} == {
            n: c for n, c in networks.items() if n != MANIFEST
        }
        assert [p.name for p in path.parent.iterdir()] == ["copy.fuse"]

    def test_a_new_plan_replaces_the_old_one(self, path):
        for content in (b"old", b"new"):
            bundle.add_plans(path, {"key": (content, {})})
        with Bundle(path) as opened:
            assert opened.plan("key") == b"new"
            assert sum(n.startswith("plans/") for n in opened.manifest["members"]) == 1

    def test_whoever_has_it_open_is_not_disturbed(self, path):
        with Bundle(path) as opened:
            bundle.add_plans(path, {"key": (b"plan", {})})
            assert opened.onnx(NET)

    def test_a_damaged_bundle_gets_none(self, path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(BundleError):
            bundle.add_plans(path, {"key": (b"plan", {})})
        assert path.read_bytes() == content


def kernel(capability, code):
    """An entry as the compiler would make it; nothing here launches it."""
    return cubins.Entry(
        op="ddim_step", label="step", dtype="float32", capability=capability, form="cubin",
        file=f"ddim_step.sm_{capability}.cubin", sha256=bundle.hashlib.sha256(code).hexdigest(),
        kernel="k", entry="k", parameters=(("x", "*fp32"),), hidden=2, constants={}, assumes={},
        options={}, threads=128, shared_bytes=0, grid_rule="1", triton_version="3.9.0",
    ), code  # fmt: skip


class TestKernels:
    @pytest.fixture
    def with_kernels(self, engine, sound, tmp_path):
        cubins.write(tmp_path / "store", [kernel(87, b"code 87"), kernel(90, b"code 90")])
        with Bundle(sound) as opened:
            networks = {key: opened.onnx(*key) for key in opened.networks}
            bundle.write(
                tmp_path / "gpu.fuse",
                opened.description,
                networks,
                target=bundle.BuiltFor("orin", "Orin", 87),
                kernels=cubins.Store.load(tmp_path / "store"),
            )
        return tmp_path / "gpu.fuse"

    def test_round_trip(self, with_kernels, tmp_path, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
        with Bundle(with_kernels) as opened:
            assert [(k["capability"], k["count"]) for k in opened.manifest["kernels"]] == [
                (87, 1),
                (90, 1),
            ]
            store = opened.kernels()
            assert store.capabilities == [87, 90]
            assert (store.folder / "ddim_step.sm_87.cubin").read_bytes() == b"code 87"
            assert opened.kernels().folder == store.folder
            assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_a_cache_that_cannot_be_written(self, with_kernels, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "file"))
        with (
            Bundle(with_kernels) as opened,
            pytest.raises(BundleError, match="set FUSEENGINE_CACHE"),
        ):
            opened.kernels()

    def test_damage_in_the_cache_is_mended(self, with_kernels, tmp_path, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
        with Bundle(with_kernels) as opened:
            file = opened.kernels().folder / "ddim_step.sm_87.cubin"
            file.write_bytes(b"other")
            opened.kernels()
            assert file.read_bytes() == b"code 87"
        assert cache.cache_folder() == tmp_path / "cache"


class TestRefused:
    def test_a_newer_schema(self, path):
        def change(manifest, members):
            manifest.update(schema=SCHEMA + 1, made_by="fuseengine 9.0", news={"a": 1})

        spoil(path, change)
        refused(path, rf"schema {SCHEMA + 1}, written by 'fuseengine 9.0'.*install a newer")

    @pytest.mark.parametrize("schema", [0, -1, None, "1", 1.0, True])
    def test_no_schema(self, path, schema):
        spoil(path, lambda manifest, members: manifest.update(schema=schema))
        refused(path, "compile it again")

    def test_other_zips(self, path):
        archive.write(path, {"a": b"1"})
        refused(path, "a zip without manifest.json")
        archive.write(path, {MANIFEST: b'{"format": "other"}'})
        refused(path, "does not say 'fuseengine bundle'")
        for text in (b"", b"[]", b"\xff", b"[" * 200_000, b'{"a": NaN}', b"9" * 5000):
            archive.write(path, {MANIFEST: text})
            refused(path, "manifest.json")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m, x: m.pop("verified"), "the manifest lacks the fields"),
            (lambda m, x: m.update(more=1), "unknown fields"),
            (lambda m, x: m["engine"].update(size=[22]), "engine.size = "),
            (lambda m, x: m["engine"].update(size=[22, 10**9]), "engine.size = "),
            (lambda m, x: m["engine"].update(size=[22, 1.5]), r"engine.size\[1\] = "),
            (lambda m, x: m["engine"].update(device="tpu"), "engine.device = "),
            (lambda m, x: m["engine"].update(choice=[]), "no backend is chosen"),
            (lambda m, x: m["engine"]["report"].update(candidates=3), "report.candidates"),
            (lambda m, x: m["engine"]["report"].update(quantised={}), "engine: "),
            (lambda m, x: m["engine"]["program"].update(multiple=0), "multiple = 0"),
            (lambda m, x: m["engine"]["program"].update(padding="black"), "padding 'black'"),
            (lambda m, x: m["engine"]["program"].update(output="x"), "never made"),
            (lambda m, x: m["engine"]["program"]["values"].pop("level"), "have no shape"),
            (lambda m, x: m["engine"]["program"]["nodes"].reverse(), "before it is made"),
            (lambda m, x: m["buffers"].update(bytes=10**15), "the program's values take"),
            (lambda m, x: m["networks"][0].update(file="x"), r"networks\[0\]"),
            (lambda m, x: m["networks"][0].update(precision="fp8"), r"networks\[0\]"),
            (lambda m, x: m["networks"][0].update(weights=[["0", 0]]), r"networks\[0\].weights"),
            (lambda m, x: x.pop("constants.safetensors"), "constants.safetensors is missing"),
            (lambda m, x: x.update({"constants.safetensors": b"1"}), "constants of 1 bytes"),
            (lambda m, x: m["plans"].update(a={"file": "x", "about": {}}), "is no member"),
        ],
    )
    def test_fields(self, path, change, message):
        spoil(path, change)
        refused(path, message)

    @pytest.mark.parametrize("dim", ["H/0", "0 H", "X", "W/", "1e9 H", -1, 0, 2**50, "H*W*H"])
    def test_dimensions(self, path, dim):
        def change(manifest, members):
            values = manifest["engine"]["program"]["values"]
            values[next(iter(values))][1] = dim

        spoil(path, change)
        refused(path, r"engine.program.values")

    def test_dimensions_that_do_not_come_out_whole(self, path):
        def change(manifest, members):
            values = manifest["engine"]["program"]["values"]
            values[next(iter(values))][2] = "H/7"

        spoil(path, change)
        refused(path, "is not whole")

    def test_values_larger_than_the_machine(self, path):
        def change(manifest, members):
            values = manifest["engine"]["program"]["values"]
            values[next(iter(values))][1] = 10**9
            manifest["buffers"]["bytes"] += 4 * 24 * 32 * (10**9 - 1)  # frames are padded

        spoil(path, change)
        tracemalloc.start()
        refused(path, r"GB at 30x22; this machine has")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()

    def test_constants_of_another_shape(self, path):
        def change(manifest, members):
            values = manifest["engine"]["program"]["values"]
            values["level"][1] = 3
            manifest["buffers"]["bytes"] += 8

        spoil(path, change)
        refused(path, "constant level has shape")

    @pytest.mark.parametrize(
        "change",
        [
            lambda m, x: x.update({"extra": b"1"}),
            lambda m, x: x.pop("networks/0-fp32.bin"),
            lambda m, x: x.update({"networks/0-fp32.bin": b""}),
        ],
    )
    def test_members_that_are_not_listed(self, path, change):
        spoil(path, change, seal=False)
        refused(path, "members differ from those that the manifest lists")

    def test_content_that_does_not_fit_its_hash(self, path):
        def change(manifest, members):
            content = bytearray(members["networks/0-fp32.bin"])
            content[7] ^= 1
            members["networks/0-fp32.bin"] = bytes(content)

        spoil(path, change, seal=False)
        refused(path, "the hash of networks/0-fp32.bin differs")

    @pytest.mark.parametrize("name", ["/x", "../x", "a/../../x", "C:\\x"])
    def test_paths(self, path, name):
        with zipfile.ZipFile(path, "a") as target:
            target.writestr(zipfile.ZipInfo(name), b"1")
        refused(path, "expected plain relative names")

    def test_bombs(self, path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            target.writestr(MANIFEST, b" " * (50 << 20))
        assert path.stat().st_size < 100_000
        tracemalloc.start()
        refused(path, "is compressed")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()

    def test_a_manifest_too_large(self, path, monkeypatch):
        monkeypatch.setattr(bundle, "_MOST_MANIFEST_BYTES", 100)
        refused(path, "expected at most 100")

    def test_many_values(self, path):
        archive.write(path, {MANIFEST: b"[" + b"0," * 600_000 + b"0]"})
        refused(path, "more than 500000 values")


class TestNetworks:
    """Hashes fit here: what is refused is the network itself."""

    def spoiled(self, path, change):
        def changed(manifest, members):
            members["networks/0-fp32.bin"] = change(members["networks/0-fp32.bin"])

        spoil(path, changed)
        with Bundle(path) as opened, pytest.raises(BundleError) as caught:
            opened.onnx(NET)
        return str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: b"",
            lambda content: content[:200],
            lambda content: b"\xff" * len(content),
            lambda content: content.replace(b"\x22\x0a", b"\x22\x7f"),
        ],
    )
    def test_malformed(self, path, change):
        message = self.spoiled(path, change)
        assert str(path) in message and "the fp32 network of net-0-1" in message

    def test_a_wrong_hash_of_the_whole(self, path):
        def change(manifest, members):
            manifest["networks"][0]["sha256"] = "0" * 64

        members = members_of(path)
        manifest = json.loads(members.pop(MANIFEST))
        change(manifest, members)
        archive.write(path, {MANIFEST: json.dumps(manifest).encode(), **members})
        with Bundle(path) as opened, pytest.raises(BundleError, match="its hash differs"):
            opened.onnx(NET)

    def test_a_wrong_size(self, path):
        members = members_of(path)
        manifest = json.loads(members.pop(MANIFEST))
        manifest["networks"][0]["bytes"] += 1
        archive.write(path, {MANIFEST: json.dumps(manifest).encode(), **members})
        with Bundle(path) as opened, pytest.raises(BundleError, match=r"expected \d+$"):
            opened.onnx(NET)


class TestFuzz:
    def test_mutated_bundles(self, sound, tmp_path):
        """Thousands more by ``python -m tests.fuzz_bundle``."""
        fuzzer = Fuzzer(sound, seed=1, fuse=False)
        path = tmp_path / "case.fuse"
        verdicts = {}
        for number in range(1000):
            fuzzer.write(number, path)
            verdict = fuzzer.judge(path)
            verdicts[verdict] = verdicts.get(verdict, 0) + 1
            assert list(tmp_path.iterdir()) == [path]
        assert verdicts["refused"] > 700
        # The mutations reach everything behind the hashes too.
        assert verdicts["read"] > 10 and verdicts["sound"] > 10

    def test_the_judge_sees_memory(self, sound, monkeypatch):
        fuzzer = Fuzzer(sound)
        whole = Bundle.onnx

        def greedy(self, *args):
            self.waste = bytearray(5 << 20)
            return whole(self, *args)

        monkeypatch.setattr(Bundle, "onnx", greedy)
        with pytest.raises(AssertionError, match="bytes for"):
            fuzzer.judge(sound)


class TestFields:
    @pytest.mark.parametrize(
        ("value", "form", "message"),
        [
            (True, int, "x = 'True'; expected a whole number"),
            (1.0, int, "a whole number"),
            (float("inf"), float, "a number"),
            ("a", OneOf((None, int)), "null or a whole number"),
            ([1, "a"], [int], r"x\[1\] = 'a'"),
            ({"k": [1]}, Map([str]), r"x\.k\[0\]"),
            ({}, {"k": int}, r"lacks the fields \['k'\]"),
            ({"k": 1, "z" * 99: 1}, {"k": int}, "unknown fields"),
            (None, dict, "x = 'None'"),
        ],
    )
    def test_wrong(self, value, form, message):
        if form is dict:
            form = {}
        with pytest.raises(BundleError, match=message):
            expect(value, form, "x")

    def test_right(self):
        form = {"a": [OneOf((None, float))], "b": Map(object), "c": bool}
        expect({"a": [None, 1, 2.5], "b": {"x": [{}]}, "c": False}, form, "x")

    def test_parse(self):
        assert parse(b'{"a": [1, null]}', 10, "x") == {"a": [1, None]}
        for text in (b"{", b"[1,2,3,4,5]", b"[Infinity]"):
            with pytest.raises(BundleError, match="^x "):
                parse(text, 4, "x")
