"""``fuseengine models``."""

from __future__ import annotations

import json

import pytest

from fuseengine import zoo
from fuseengine.cli import main
from fuseengine.cli.models import _CONFIGURATIONS, describe_models

CARD = {
    "name": "tiny",
    "settings": {"width": 8},
    "channels": "rgb",
    "multiple": 16,
    "steps": 2,
    "parameters": 1_234_567,
    "data": "3 pairs of nothing",
    "tasks": ["day", "night"],
    "results": {"tno": {"EN": 7.0}},
    "limits": ["dark", "far"],
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """One packaged model, described by a card."""
    (tmp_path / "tiny.json").write_text(json.dumps(CARD))
    (tmp_path / "tiny.safetensors").write_bytes(bytes(2_500_000))
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    zoo.packaged_models.cache_clear()
    yield
    zoo.packaged_models.cache_clear()


def test_static_table_agrees_with_build():
    registry = pytest.importorskip("fuseengine.models.registry")
    assert set(_CONFIGURATIONS) == set(registry.model_names())
    for name, known in _CONFIGURATIONS.items():
        model = registry.build(name)
        count = sum(p.numel() for p in model.parameters())
        assert known == (count, model.steps, model.channels, model.multiple), name


def test_packaged_cards_agree_with_the_static_table():
    for row in describe_models():
        if row["packaged"]:
            known = _CONFIGURATIONS[row["name"]]
            assert {k: row[k] for k in known._fields} == known._asdict()
            assert row["megabytes"] < 10


def test_table(tiny, capsys):
    assert main(["models"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    head = " ".join(head.split())
    assert head == "model parameters steps channels sizes packaged trained for"
    assert " ".join(rows[0].split()) == ("tiny 1.23 M 2 rgb any (padded to 16) 2.5 MB day, night")
    assert [row.split()[0] for row in rows] == ["tiny", *_CONFIGURATIONS]
    assert "drfusion 31.77 M 3 luma any (padded to 2) no -" in [" ".join(r.split()) for r in rows]


def test_json(tiny, capsys):
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe_models()


def test_card(tiny, capsys):
    assert main(["models", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "parameters: 1234567\n" in text
    assert "results:\n  tno:\n    EN: 7.0\n" in text
    assert "limits:\n  - dark\n  - far\n" in text
    assert main(["models", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CARD


def test_unknown_card(tiny, capsys):
    assert main(["models", "tinny"]) == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_imports_nothing_heavy(command):
    done = command("models", probe=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
