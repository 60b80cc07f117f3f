"""The demo's ledger: what is valid is reused, what was interrupted goes on, what changed is made again."""

import json

import pytest

from spikingbrain.demo import stages
from spikingbrain.demo.pipeline import Demo, checks
from spikingbrain.demo.stages import Stage, run_stages


class Maker:
    """Stages `a` and `b` that write a file each and note that they were made."""

    def __init__(self, work):
        self.work, self.made, self.fails = work, [], ""

    def stage(self, name, depends="", resumable=False):
        file = self.work / name

        def make():
            self.made.append((name, file.read_text() if file.exists() else ""))
            file.write_text("half")
            if self.fails == name:
                raise KeyboardInterrupt
            file.write_text("whole")
            return {"n": len(self.made)}

        return Stage(name, make, lambda figures: f"made {figures['n']}", (file,), depends, resumable)

    def run(self, depends="", resumable=False):
        return run_stages([self.stage("a", depends), self.stage("b", resumable=resumable)], self.work)


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "work")


def test_a_second_run_reuses_everything_and_gives_the_same_figures(maker, capsys):
    first = maker.run()
    assert maker.run() == first
    assert [name for name, _ in maker.made] == ["a", "b"]
    assert capsys.readouterr().out.count("(reused)") == 2


def test_an_interrupted_run_goes_on_with_the_stage_it_was_in(maker):
    maker.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        maker.run()
    maker.fails = ""
    assert maker.run()["b"]["figures"] == {"n": 3}
    assert maker.made == [("a", ""), ("b", ""), ("b", "")]


def test_a_resumable_stage_finds_what_it_left(maker):
    maker.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        maker.run(resumable=True)
    maker.fails = ""
    maker.run(resumable=True)
    assert maker.made[-1] == ("b", "half")


def test_a_changed_stage_and_all_after_it_are_made_again_from_nothing(maker):
    maker.run()
    maker.run(depends="another seed")
    assert maker.made == [("a", ""), ("b", ""), ("a", ""), ("b", "")]


def test_a_file_that_is_gone_is_made_again(maker):
    maker.run()
    (maker.work / "a").unlink()
    maker.run()
    assert [name for name, _ in maker.made] == ["a", "b", "a"]


@pytest.mark.parametrize("code", [2, 130])
def test_a_command_that_fails_ends_the_demo_as_the_command_ended(code, monkeypatch, tmp_path):
    script = tmp_path / "spikingbrain"
    script.write_text(f"#!/bin/sh\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(stages, "script", lambda: str(script))
    with pytest.raises(KeyboardInterrupt if code == 130 else stages.InputError):
        stages.command("convert")


def test_another_base_replaces_the_stages_that_make_one(tmp_path):
    for name in ("base", "distil", "pretrain", "spike"):
        (tmp_path / f"demo-{name}.yaml").write_text(json.dumps({}))

    def names(base):
        return [stage.name for stage in Demo(tmp_path / "work", tmp_path / "out", tmp_path, 0, base).stages()]

    assert set(names(None)) - set(names(tmp_path / "qwen")) == {"tokenizer", "base"}


def test_an_unmet_promise_is_said():
    losses = {"unigram": 5.0, "base": 3.5, "converted": 6.0, "trained": 4.5, "spiking": 4.7}
    server = {"state_bytes": {"100": 8, "1000": 9}, "num_tokens_compared": 4, "exit_code": 1}
    server |= {"tokens_equal_generate": False, "streamed_equals_whole": False}
    rows = checks({"losses": losses, "server": server}, own_base=True)
    assert [row["figure"] for row in rows] == ["30.0%", "60.0%", "+4.44%", "4 tokens", "no", "9 bytes", "exit code 1"]
    assert not any(row["met"] for row in rows)
