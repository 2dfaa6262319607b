from __future__ import annotations

import pytest
import yaml

from farm.errors import UserError
from farm.serve.settings import Settings

FARM = """
name: small
store: {store}
catalogue:
  - {{id: ink, prompt: an ink drawing, domain: face, editor: {{kind: procedural}}}}
  - {{id: fog, prompt: thick fog, editor: {{kind: procedural}}}}
base: {{concepts: [ink]}}
ranks: {{concepts: [fog]}}
serve: {{max_side: 128, cache_mb: 7}}
"""


def test_a_farms_file_stands_for_what_is_left_out(tmp_path):
    file = tmp_path / "farm.yaml"
    file.write_text(FARM.format(store=tmp_path / "store"))
    settings = Settings.of({"config": str(file), "max_side": "256", "cpus": "2"})  # `serve run` gives strings
    assert settings.store == (tmp_path / "store").as_uri()
    assert (settings.max_side, settings.cache_mb, settings.max_body_mb, settings.cpus) == (256, 7, 10, 2)
    assert [(row.id, row.prompt, row.domain) for row in settings.concepts] == [
        ("ink", "an ink drawing", "face"),
        ("fog", "thick fog", "scenery"),
    ]


def test_the_store_is_the_same_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings.of({"store": "work/it"}).store == (tmp_path / "work" / "it").as_uri()


@pytest.mark.parametrize(
    ("args", "place"),
    [
        ({}, "store"),
        ({"store": "work", "cache_bm": 1}, "cache_bm"),
        ({"store": "work", "max_side": 8}, "max_side"),
        ({"store": "work", "concepts": [{"prompt": "x"}]}, r"concepts\.0\.id"),
        ({"config": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, monkeypatch, args, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=place):
        Settings.of(args)


def test_serve_yaml_is_for_this_service(tmp_path, request):
    document = yaml.safe_load((request.config.rootpath / "serve.yaml").read_text())
    (application,) = document["applications"]
    Settings.of({**application["args"], "store": str(tmp_path)})
    assert document["http_options"]["host"] == "127.0.0.1"
