from __future__ import annotations

import re

import pytest
import yaml
from blocks import PAGES, ROOT, Block, blocks, commands, in_text
from command_line import FARM, problem, refused, unknown

ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "sh"]


def test_every_block_says_what_it_is() -> None:
    odd = [block.place for block in ALL if block.language not in {"json", "python", "sh", "text", "yaml"}]
    assert not odd, "write ```sh for commands, ```text for what they print"
    marked = [block.place for block in ALL if block.check != "run" and block.language not in {"python", "sh"}]
    assert not marked, "only commands are run: take the mark away"


def test_what_is_to_be_copied_into_a_file_can_be_read() -> None:
    found = [block for block in ALL if block.language in ("json", "yaml")]
    assert len(found) > 3
    assert all(isinstance(yaml.safe_load(block.text), dict) for block in found)  # JSON is YAML


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_every_command_of_a_block_exists(block: Block) -> None:
    wrong = {" ".join(words): found for words in commands(block.text) if (found := problem(words))}
    assert not wrong


def test_every_command_in_the_text_exists() -> None:
    command = re.compile(r"farm (?!\S+( \S+)?: )")  # and no sentence such as `farm queue: name the concepts …`
    mentioned = [(place, code.split()[1:]) for page in PAGES for place, code in in_text(page) if command.match(code)]
    assert len(mentioned) > 50
    plain = [
        (place, [w for w in words if re.match(r"-|[a-z-]+$", w)]) for place, words in mentioned
    ]  # not NAME, x.yaml
    wrong = {place: found for place, words in plain if (found := unknown(FARM, words))}
    assert not wrong


def test_every_file_in_the_text_is_there() -> None:
    named = re.compile(r"(?:e2gan|farm|jobs|bench|configs|tests|docs|examples)/[\w/.-]+\.\w+$")
    ours = {"configs/mine.yaml", "configs/yours.yaml"}
    missing = [
        f"{place}: {code}"
        for page in PAGES
        for place, code in in_text(page)
        if named.match(code) and code not in ours and not (ROOT / code).exists()
    ]
    assert not missing


def test_the_readmes_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link.partition("#")[0]).exists()]


class TestTheChecks:
    @pytest.mark.parametrize(
        ("line", "sentence"),
        [
            ("farm status --config x.yaml --jsn", "No such option"),
            ("farm status", "Missing option '--config'"),
            ("farm stats --config x.yaml", "No such command 'stats'"),
            ("farm queue add night --config x.yaml --priority high", "valid integer"),
            ("farm edit a.jpg --config x.yaml --concept night", "Missing argument"),
            ("python jobs/run_farms.py --config x.yaml", "no script"),
            ("python jobs/run_farm.py --config x.yaml --quick", "No such option: --quick"),
            ("python bench/cost.py --cheap", "No such option: --cheap"),
            ("make demos", "no target demos"),
            ("ray job submit --working_dir . -- python x.py --whatever", "no option --working_dir"),
        ],
    )
    def test_refuse(self, line: str, sentence: str) -> None:
        (words,) = commands(line)
        assert sentence in (problem(words) or "")

    def test_take(self) -> None:
        script = "A=1 farm status -c 'x y.yaml' --json > o.json  # a comment\n"
        script += "cat > f <<'E'\nfarm nonsense\nE\nmake test | cat"
        assert commands(script) == [
            ["farm", "status", "-c", "x y.yaml", "--json"],
            ["cat"],
            ["make", "test"],
            ["cat"],
        ]
        assert not any(map(problem, commands(script)))

    def test_a_mention_is_checked_for_its_options_alone(self) -> None:
        assert unknown(FARM, ["gc", "--dry-run"]) is None
        assert refused(FARM, ["gc", "--dry-run"])
        assert unknown(FARM, ["gc", "--dryrun"])
