"""The fifth section of RewardBench v1, of sets that were there before it."""

import json

import numpy as np
import pytest
from commands import in_process, write_rows
from rich.console import Console
from tiny import tiny_reward_model

from adaptrm.data.rows import BadRows
from adaptrm.evaluate.rewardbench import PRIOR_SETS, PUBLISHED, read_prior_sets
from adaptrm.evaluate.table import for_people


def row(subset: str, number: int, chosen: float, rejected: float) -> dict:
    return {"prompt": "?", "chosen": str(chosen), "rejected": str(rejected), "subset": subset, "id": number}


def test_prior_sets_as_the_hub_has_them(tmp_path, monkeypatch):
    """Messages, then texts; ids are numbers that every split has, the column subset says what of a split it is."""
    given = row("other", 0, 2, 1) | {"prompt": [{"role": "user", "content": "?"}]}
    monkeypatch.chdir(tmp_path)  # files of these names are read in place of the hub's splits
    (tmp_path / "allenai").mkdir()
    for split in (*PRIOR_SETS, "pku_safer"):
        write_rows(tmp_path / "allenai" / f"pref-test-sets:{split}", [given])
    found = [(one.id, one.subset, one.responses) for one in read_prior_sets("allenai/pref-test-sets", BadRows())]
    assert found == [(f"{split}/0", split, ("2", "1")) for split in PRIOR_SETS]


def test_prior_sets_from_a_file_and_their_place_on_the_leaderboard(tmp_path, monkeypatch, capsys, one_device):
    data = write_rows(tmp_path / "rows.jsonl", [row(subset, 0, 2, 1) for subset in PUBLISHED])
    prior = write_rows(tmp_path / "prior.jsonl", [row("shp", 0, 2, 1), row("summarize", 0, 2, 1)])
    out, reward_model = tmp_path / "out.json", tiny_reward_model(tmp_path / "model")
    command = ("evaluate", reward_model, "--suite", "rewardbench", "--data", data, "--out", out, "--json")
    code, text, _ = in_process(monkeypatch, capsys, *command, "--prior-sets", prior)
    result = json.loads(text)
    accuracies = {name: result["subsets"][name]["accuracy"] for name in ("shp", "summarize")}
    assert code == 0 and result["sections"]["Prior Sets"] == pytest.approx(np.mean(list(accuracies.values())))
    # Two of four, one row each.
    assert {name: one for name, one in result["incomplete"].items() if name in PRIOR_SETS} == {
        name: {"n": int(name in accuracies), "published": n} for name, n in PRIOR_SETS.items()
    }
    with (console := Console(width=100)).capture() as text:
        console.print(for_people(result)["table"])
    shown = " ".join(text.get().split())
    assert "Overall (Prior Sets half)" in shown and "27 of 27 subsets differ" in shown
    named = {"model": str(reward_model), "model_type": "Seq. Classifier", "chat_template": "tokenizer"}
    assert json.loads((tmp_path / "out.prior-sets.leaderboard.json").read_text()) == named | accuracies
    assert not set(PRIOR_SETS) & set(json.loads((tmp_path / "out.leaderboard.json").read_text()))
    # The benchmark's own rows are no prior set: they would count twice.
    again = write_rows(tmp_path / "again.jsonl", [row("hep-go", 0, 2, 1)])
    code, _, err = in_process(monkeypatch, capsys, *command, "--prior-sets", again)
    assert code == 2 and "line 1: subset is 'hep-go'; it must be one of anthropic_helpful, " in err
