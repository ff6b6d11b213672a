"""Repositories for the Triton Inference Server: configuration, folders, pictures, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.cli import main
from fuseengine.errors import SettingError
from tests.helpers import system

pytest.importorskip("torch")
server = pytest.importorskip("fuseengine.export.triton_server")
text_format = pytest.importorskip("google.protobuf.text_format")

SIZE = (50, 70)

# The fields of ModelConfig that are written, with the types and numbers that
# triton-inference-server/common gives them in protobuf/model_config.proto.
_DOCUMENTED = """
name: "model_config_documented.proto" package: "documented" syntax: "proto3"
enum_type { name: "DataType"
  value { name: "TYPE_INVALID" number: 0 } value { name: "TYPE_UINT8" number: 2 }
  value { name: "TYPE_FP16" number: 10 } value { name: "TYPE_FP32" number: 11 } }
message_type { name: "ModelInput"
  field { name: "name" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "data_type" number: 2 type: TYPE_ENUM type_name: ".documented.DataType"
          label: LABEL_OPTIONAL }
  field { name: "dims" number: 4 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type { name: "ModelOutput"
  field { name: "name" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "data_type" number: 2 type: TYPE_ENUM type_name: ".documented.DataType"
          label: LABEL_OPTIONAL }
  field { name: "dims" number: 3 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type { name: "ModelInstanceGroup"
  enum_type { name: "Kind"
    value { name: "KIND_AUTO" number: 0 } value { name: "KIND_GPU" number: 1 }
    value { name: "KIND_CPU" number: 2 } value { name: "KIND_MODEL" number: 3 } }
  field { name: "kind" number: 4 type: TYPE_ENUM
          type_name: ".documented.ModelInstanceGroup.Kind" label: LABEL_OPTIONAL }
  field { name: "count" number: 2 type: TYPE_INT32 label: LABEL_OPTIONAL } }
message_type { name: "ModelDynamicBatching"
  field { name: "preferred_batch_size" number: 1 type: TYPE_INT32 label: LABEL_REPEATED }
  field { name: "max_queue_delay_microseconds" number: 2 type: TYPE_UINT64
          label: LABEL_OPTIONAL } }
message_type { name: "ModelConfig"
  field { name: "name" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "platform" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "max_batch_size" number: 4 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "input" number: 5 type: TYPE_MESSAGE type_name: ".documented.ModelInput"
          label: LABEL_REPEATED }
  field { name: "output" number: 6 type: TYPE_MESSAGE type_name: ".documented.ModelOutput"
          label: LABEL_REPEATED }
  field { name: "instance_group" number: 7 type: TYPE_MESSAGE
          type_name: ".documented.ModelInstanceGroup" label: LABEL_REPEATED }
  field { name: "dynamic_batching" number: 11 type: TYPE_MESSAGE
          type_name: ".documented.ModelDynamicBatching" label: LABEL_OPTIONAL } }
"""


@pytest.fixture(scope="module", params=["documented", "tritonclient"])
def config_type(request):
    """ModelConfig: as documented, and as NVIDIA's own client has it."""
    if request.param == "tritonclient":
        reason = "NVIDIA's ModelConfig needs: pip install 'tritonclient[grpc]'"
        return pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=reason).ModelConfig
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_DOCUMENTED, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("documented.ModelConfig"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small drfusion-s, served as frames."""
    repository = tmp_path_factory.mktemp("served") / "models"
    model = system("drfusion-s")
    return model, server.export_triton_server(model, repository, SIZE, name="fuse", max_batch=4)


def parsed(folder, config_type):
    return text_format.Parse((folder / "config.pbtxt").read_text(), config_type())


class TestConfiguration:
    def test_of_frames(self, exported, config_type):
        config = parsed(exported[1].folder, config_type)
        assert (config.name, config.platform) == ("fuse", "onnxruntime_onnx")
        assert config.name == exported[1].folder.name
        assert config.max_batch_size == 4
        assert [(t.name, list(t.dims)) for t in config.input] == [
            ("infrared", [50, 70]),
            ("visible", [50, 70, 3]),
        ]
        assert [(t.name, list(t.dims)) for t in config.output] == [("fused", [50, 70, 3])]
        uint8 = 2
        assert {t.data_type for t in (*config.input, *config.output)} == {uint8}
        (group,) = config.instance_group
        assert (group.count, group.kind) == (1, 0)
        assert config.dynamic_batching.max_queue_delay_microseconds == 500

    def test_of_a_plan(self, tmp_path, config_type):
        plan = tmp_path / "fuse.plan"
        plan.write_bytes(b"a plan")
        written = server.export_triton_server(
            system("drfusion-s"), tmp_path / "models", SIZE, plan=plan, device="gpu", instances=2
        )
        assert (written.folder / "1" / "model.plan").read_bytes() == b"a plan"
        config = parsed(written.folder, config_type)
        assert config.platform == "tensorrt_plan" and config.max_batch_size == 0
        assert list(config.input[1].dims) == [1, 50, 70, 3]  # all of it, where nothing is batched
        (group,) = config.instance_group
        assert (group.count, group.kind) == (2, 1)
        assert not config.HasField("dynamic_batching")
        assert "the server checks it" in str(written)

    def test_of_any_size(self, tmp_path, config_type):
        written = server.export_triton_server(system("drfusion-s"), tmp_path / "models")
        config = parsed(written.folder, config_type)
        assert config.max_batch_size == 0
        assert list(config.input[1].dims) == [1, -1, -1, 3]
        assert "no batches: they need a known size" in str(written)

    def test_of_planes_one_at_a_time(self, tmp_path, config_type):
        written = server.export_triton_server(
            system("drfusion-s"), tmp_path / "m", (32, 48), frames=False, max_batch=1, device="cpu"
        )
        config = parsed(written.folder, config_type)
        assert list(config.input[0].dims) == [1, 1, 32, 48] and config.max_batch_size == 0
        assert config.input[0].data_type == 11 and config.instance_group[0].kind == 2


class TestModel:
    def test_a_batch_of_requests_gives_what_an_engine_gives(self, exported):
        import fuseengine as fe

        ort = pytest.importorskip("onnxruntime")
        model, written = exported
        session = ort.InferenceSession(written.folder / "1" / "model.onnx")
        assert session.get_inputs()[0].shape == ["batch", 50, 70]
        rng = np.random.default_rng(1)
        ir = rng.integers(0, 256, (3, *SIZE), np.uint8)
        vis = rng.integers(0, 256, (3, *SIZE, 3), np.uint8)
        (fused,) = session.run(None, {"infrared": ir, "visible": vis})
        engine = fe.compile(model, SIZE, backend="onnxruntime", precision="fp32", device="cpu")
        for index in range(3):
            difference = fused[index].astype(int) - engine(ir[index], vis[index])
            assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["dmfuse-s", "drmf-s", "mask-difuser-s", "dmnet-s"])
    def test_every_system_is_served_in_batches(self, name, tmp_path):
        steps = {"steps": 2} if name == "drmf-s" else {}  # three networks a step
        model = system(name, **steps)
        written = server.export_triton_server(model, tmp_path / "models", (64, 64))
        assert written.note == "" and written.model.max_batch_size == 8


class TestFolders:
    CONFIGURED = server.ServedModel("fuse", "onnxruntime_onnx", 0, (), ())

    def test_a_second_one_is_a_new_version(self, tmp_path):
        for version in (1, 2, 3):
            content = b"model %d" % version
            assert server.write_served_model(tmp_path, self.CONFIGURED, content) == version
        assert sorted(p.name for p in (tmp_path / "fuse").iterdir()) == [
            "1",
            "2",
            "3",
            "config.pbtxt",
        ]
        assert (tmp_path / "fuse" / "2" / "model.onnx").read_bytes() == b"model 2"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["fuse"]

    def test_what_is_not_ours_stays(self, tmp_path):
        (tmp_path / "fuse").mkdir()
        (tmp_path / "fuse" / "config.pbtxt").write_text('name: "fuse"')
        with pytest.raises(SettingError, match="not written by this command"):
            server.write_served_model(tmp_path, self.CONFIGURED, b"")
        assert [p.name for p in (tmp_path / "fuse").iterdir()] == ["config.pbtxt"]

    def test_an_empty_folder_is_not_ours(self, tmp_path):
        (tmp_path / "fuse").mkdir()
        with pytest.raises(SettingError, match="not written by this command"):
            server.write_served_model(tmp_path, self.CONFIGURED, b"")

    def test_another_configuration_is_refused(self, tmp_path):
        server.write_served_model(tmp_path, self.CONFIGURED, b"one")
        other = server.ServedModel("fuse", "onnxruntime_onnx", 8, (), ())
        with pytest.raises(SettingError, match="in another way"):
            server.write_served_model(tmp_path, other, b"two")
        assert sorted(p.name for p in (tmp_path / "fuse").iterdir()) == ["1", "config.pbtxt"]

    def test_neighbours_are_not_touched(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.pbtxt").write_text("theirs")
        server.write_served_model(tmp_path, self.CONFIGURED, b"one")
        assert (tmp_path / "other" / "config.pbtxt").read_text() == "theirs"

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        def full(self, content):
            raise OSError(28, "No space left on device")

        repository = tmp_path / "models"
        monkeypatch.setattr(server.Path, "write_bytes", full)
        with pytest.raises(SettingError, match="No space left"):
            server.write_served_model(repository, self.CONFIGURED, b"one")
        assert list(repository.iterdir()) == []
        assert [p.name for p in tmp_path.iterdir()] == ["models"]

    def test_the_repository_is_a_file(self, tmp_path):
        (tmp_path / "models").touch()
        with pytest.raises(SettingError, match="is a file; expected a folder"):
            server.write_served_model(tmp_path / "models", self.CONFIGURED, b"")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "../up"}, "names a folder"),
        ({"name": 'a"b'}, "names a folder"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"instances": 0}, "instances=0"),
        ({"device": "tpu"}, "device='tpu'; expected one of auto, cpu, gpu"),
        ({"plan": "x.plan", "size": None}, "give its frame size"),
    ],
)
def test_wrong_settings(tmp_path, settings, text):
    with pytest.raises(SettingError, match=text):
        server.export_triton_server(
            system("drfusion-s"), tmp_path / "m", **{"size": SIZE, **settings}
        )
    assert not (tmp_path / "m").exists()


def test_noise_needs_a_size(tmp_path):
    with pytest.raises(SettingError, match="starts from noise"):
        server.export_triton_server(system("mask-difuser-s"), tmp_path / "m")


def test_command(tmp_path, capsys):
    out = tmp_path / "models"
    words = ["export", "triton-server", str(out), "--size", "64x48", "--max-batch", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "version 1, onnxruntime_onnx, one request at a time" in text
    assert "in   visible: TYPE_UINT8 [1, 48, 64, 3]" in text
    assert (out / "drfusion-s" / "1" / "model.onnx").stat().st_size > 1e6
    assert main([*words, "--name", "bad/name"]) == 2
    assert "names a folder" in capsys.readouterr().err
