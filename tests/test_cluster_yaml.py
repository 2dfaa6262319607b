"""cluster.yaml and docs/cluster.md, as far as they can be checked without an account at a cloud."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from farm.config import ClusterConfig, FarmConfig
from farm.config_file import load_config

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
DOCS = (ROOT / "docs" / "cluster.md").read_text()
SNIPPETS: list[str] = re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)
GCP: dict[str, Any] = next(found for found in map(yaml.safe_load, SNIPPETS) if "provider" in found)

# vCPUs and GPUs, from the clouds' own tables.
MACHINES = {
    "m7i.2xlarge": (8, 0),
    "m7i.4xlarge": (16, 0),
    "g6e.2xlarge": (8, 1),
    "g6.12xlarge": (48, 4),
    "n2-standard-8": (8, 0),
    "n2-standard-16": (16, 0),
    "g2-standard-8": (8, 1),
    "g2-standard-48": (48, 4),
}
STAGES = ("edit", "base", "ranks", "adapters")


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray's launcher makes of the file; it raises where the file breaks the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return dict(prepared)


def machine(node_type: dict[str, Any]) -> str:
    node = node_type["node_config"]
    return str(node.get("InstanceType") or node["machineType"])


def spot(node_type: dict[str, Any]) -> bool:
    """Whether the cloud may take such a machine back: AWS's words for it, then GCP's."""
    node = node_type["node_config"]
    if "InstanceMarketOptions" in node:
        return bool(node["InstanceMarketOptions"]["MarketType"] == "spot")
    return any(entry.get("preemptible", False) for entry in node.get("scheduling", ()))


def whole(config: dict[str, Any]) -> dict[str, Any]:
    """A cloud's variant on top of cluster.yaml, as docs/cluster.md says to make it."""
    return {**CONFIG, **config}


clouds = pytest.mark.parametrize("config", [CONFIG, whole(GCP)], ids=["aws", "gcp"])


@clouds
def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = validated(config)
    assert set(prepared["available_node_types"]) == {"head", "edit", "train", "cpu"}
    # Ray's own defaults would install another Ray over ours.
    assert prepared["worker_setup_commands"] == prepared["head_setup_commands"] == config["setup_commands"]


def test_ray_would_refuse_a_wrong_one() -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="max_nodes"):
        validated({**CONFIG, "max_nodes": 3})


@clouds
def test_node_types_offer_what_their_machines_have(config: dict[str, Any]) -> None:
    for name, node_type in config["available_node_types"].items():
        cpus, gpus = MACHINES[machine(node_type)]
        offered = (node_type["resources"]["CPU"], node_type["resources"]["GPU"])
        assert offered == ((0, 0) if name == "head" else (cpus, gpus)), name
        assert node_type["labels"] == {"farm": name}
        assert node_type["min_workers"] <= node_type["max_workers"], name
    head = config["available_node_types"][config["head_node_type"]]
    assert head["max_workers"] == 0 and MACHINES[machine(head)][1] == 0
    assert config["max_workers"] == sum(t["max_workers"] for t in config["available_node_types"].values())


@clouds
def test_only_editing_is_on_machines_that_may_be_taken_back(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert [name for name in types if spot(types[name])] == ["edit"]
    assert [name for name in types if types[name]["resources"]["GPU"]] == ["edit", "train"]


def test_every_node_starts_from_one_image_on_a_disk_for_weights() -> None:
    nodes = [node_type["node_config"] for node_type in CONFIG["available_node_types"].values()]
    assert len({node["ImageId"] for node in nodes}) == 1
    assert {node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] for node in nodes} == {300}
    zones = CONFIG["provider"]["availability_zone"].split(",")
    assert all(zone.startswith(CONFIG["provider"]["region"]) for zone in zones)
    assert f"efs.{CONFIG['provider']['region']}.amazonaws.com" in " ".join(CONFIG["setup_commands"])


def test_the_project_is_installed_from_what_is_copied() -> None:
    """pip finds on the node every file that pyproject.toml needs, and the constraints."""
    source = "~/farm-source/"
    copied = {
        remote.removeprefix(source): local
        for remote, local in CONFIG["file_mounts"].items()
        if remote.startswith(source)
    }
    assert all(remote == local and (ROOT / local).exists() for remote, local in copied.items())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    described = {project["project"]["readme"], *project["project"]["license-files"]}
    assert copied.keys() >= packages | described | {"pyproject.toml", "constraints.txt", "configs"}
    (install,) = [command for command in CONFIG["setup_commands"] if "pip install" in command]
    assert "cd ~/farm-source " in install and "-c constraints.txt" in install
    (extra,) = re.findall(r"'\.\[(\w+)\]'", install)
    assert extra in project["project"]["optional-dependencies"]
    python = re.search(r"--python (\S+)", " ".join(CONFIG["setup_commands"]))
    assert python and f"Python {python[1]}" in (ROOT / "constraints.txt").read_text().splitlines()[0]


def test_token_authentication_is_on_everywhere() -> None:
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in CONFIG["setup_commands"][0]
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = [command for command in CONFIG[start] if "ray start" in command]
        assert command.index("RAY_AUTH_MODE=token") < command.index("ray start")
    (head,) = [command for command in CONFIG["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "$RAY_HEAD_IP:6379" in CONFIG["worker_start_ray_commands"][-1] and "--port=6379" in head


def fitting(config: dict[str, Any], stage: str, cluster: ClusterConfig) -> int:
    """How many workers of a stage all machines of the cluster take together, none of them split over two."""
    wanted = getattr(cluster, stage)
    total = 0
    for node_type in config["available_node_types"].values():
        has = node_type["resources"]
        each = has["CPU"] // wanted.cpus
        if wanted.gpus:
            each = min(each, int(has["GPU"] / wanted.gpus))
        total += each * node_type["max_workers"]
    return total


@clouds
@pytest.mark.parametrize("name", ["ffhq", "scenery"])
def test_the_papers_farms_fit(config: dict[str, Any], name: str) -> None:
    farm: FarmConfig = load_config(ROOT / "configs" / f"{name}.yaml")
    for stage in STAGES:
        at_once = farm.base.workers if stage == "base" else 1
        assert fitting(config, stage, farm.cluster) >= at_once, stage
    too_much = farm.cluster.model_copy(update={"edit": farm.cluster.edit.model_copy(update={"gpus": 5.0})})
    assert fitting(config, "edit", too_much) == 0


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    """Packed as Ray packs it, with what .gitignore and .rayignore name left out."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as packed:
        names = set(packed.namelist())
    assert {"jobs/run_farm.py", "farm/config.py", "configs/ffhq.yaml"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv/", "work/", "tests/", "docs/"))]
    assert package.stat().st_size < 5 * 2**20


def test_the_guide_names_what_there_is() -> None:
    for path in set(re.findall(r"\b(?:configs|jobs|docs|tests)/[\w/.]+\w", DOCS)) - {"configs/mine.yaml"}:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", DOCS):
        assert (ROOT / "docs" / link).exists(), link


def test_the_guides_cluster_section_is_valid() -> None:
    (section,) = [found["cluster"] for found in map(yaml.safe_load, SNIPPETS) if "cluster" in found]
    cluster = ClusterConfig.model_validate(section)
    assert all(fitting(CONFIG, stage, cluster) for stage in STAGES)
