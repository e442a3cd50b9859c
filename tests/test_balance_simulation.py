"""The simulation counts what a step would see, and its pictures and tables are made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import examples_support  # noqa: F401
import numpy as np
import pytest
from placements import random_placement, zipf

import plots as example_plots
from jaxmoe import balance, cli
from jaxmoe.balance import MoveRule, Simulation, plots, simulate, synthetic_loads
from jaxmoe.balance.loads import PATTERNS, draw_choices, recorded_loads
from jaxmoe.balance.simulation import rows_per_token

SMALL = Simulation(num_devices=8, devices_per_node=4, top_k=4, num_tokens=16, num_topics=4, every=5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_loads_sum_to_one_and_repeat(pattern: str):
    loads = synthetic_loads(pattern, num_steps=40, num_experts=32, seed=3)
    np.testing.assert_allclose(loads.sum(-1), 1)
    np.testing.assert_array_equal(
        loads, synthetic_loads(pattern, num_steps=40, num_experts=32, seed=3)
    )
    changes = np.abs(np.diff(loads, axis=0)).max(-1) > 1e-12
    assert changes.any() == (pattern != "zipf")
    assert changes.all() == (pattern == "drifting")
    ranked = np.sort(loads[0])[::-1]
    if pattern != "bursts":
        np.testing.assert_allclose(ranked, zipf(32))


def test_choices_follow_the_load_and_the_topics():
    load = np.r_[np.full(8, 4.0), np.full(24, 1.0)]
    options = dict(num_devices=4, num_tokens=2000, top_k=2, seed=0)
    ids = draw_choices(load, **options, num_topics=1)
    assert ids.shape == (4, 2000, 2) and np.all(ids[..., 0] != ids[..., 1])
    share = np.bincount(ids.ravel(), minlength=32) / ids.size
    assert share[:8].mean() / share[8:].mean() == pytest.approx(4, rel=0.15)
    pairs = draw_choices(np.ones(32), **options, num_topics=8).reshape(-1, 2)
    free = draw_choices(np.ones(32), **options, num_topics=1).reshape(-1, 2)
    topic = np.random.default_rng(0).permutation(32) % 8
    together = [np.mean(topic[p[:, 0]] == topic[p[:, 1]]) for p in (pairs, free)]
    assert together[0] > 1.5 * together[1]


def test_rows_of_replicas_counted_by_hand():
    placement = random_placement(np.random.default_rng(0), 20, 32)
    ids = np.stack([np.random.default_rng(d).permutation(20)[None, :4] for d in range(8)])
    ids = ids.astype(np.int32)
    devices = nodes = 0
    for device in range(8):
        near = balance.near_replicas(placement, device, num_devices=8, devices_per_node=4)
        slots = np.asarray(balance.choose_replicas(near, ids[device]))
        targets = {slot // 4 for slot in slots.ravel().tolist()} - {device}
        devices += len(targets)
        nodes += sum(target // 4 != device // 4 for target in targets)
    assert rows_per_token(placement, ids, SMALL) == (devices / 8, nodes / 8)


def test_policies_do_what_they_are_for():
    loads = synthetic_loads("drifting", num_steps=30, num_experts=32)
    courses = simulate(loads, SMALL)
    figures = {name: course.summary(5) for name, course in courses.items()}
    assert figures["static"]["moves"] == figures["static"]["first_moves"] == 0
    assert figures["static"]["mean_imbalance"] > 1.6
    assert figures["eplb"]["mean_imbalance"] < 1.25
    assert figures["migrating"]["mean_imbalance"] < 1.3
    assert figures["migrating"]["moves"] < 0.5 * figures["eplb"]["moves"]
    assert figures["affinity"]["rows_to_devices"] < figures["static"]["rows_to_devices"]
    # No policy sees the future: until the first look all are where they began.
    first = [course.moves[:4] for course in courses.values()]
    assert first == [[0] * 4] * 4
    assert courses["static"].imbalance[2] == pytest.approx(
        balance.imbalance(balance.contiguous(32), loads[2], 8)
    )
    still = MoveRule(min_gain=0.99)
    frozen = simulate(loads, balance_config(rule=still), ("migrating",))["migrating"]
    assert sum(frozen.moves[5:]) == 0


def balance_config(**changes: Any) -> Simulation:
    return Simulation(**{**{k: getattr(SMALL, k) for k in vars(SMALL)}, **changes})


def test_many_devices_share_experts():
    loads = synthetic_loads("zipf", num_steps=4, num_experts=16)
    config = balance_config(num_devices=64, devices_per_node=8, every=2)
    courses = simulate(loads, config, ("static", "eplb"))
    assert courses["eplb"].imbalance[-1] < 0.5 * courses["static"].imbalance[-1]


def test_recorded_loads(tmp_path: Path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "tokens_per_expert": [[1, 3], [2, 2]]}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded_loads(path).tolist() == [[0.25, 0.75]]
    assert recorded_loads(path, 1).tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"^`recorded_loads`: .*shape \[1, 2, 2\]; .* a layer 2"):
        recorded_loads(path, 2)
    np.save(tmp_path / "loads.npy", [[1.0, np.nan]])
    with pytest.raises(ValueError, match=r"^`recorded_loads`: load holds nan"):
        recorded_loads(tmp_path / "loads.npy")


@pytest.mark.parametrize(
    "changes, policies, sentence",
    [
        ({}, ("fast",), r"`simulate`: policies \['fast'\] are unknown. Use some of static"),
        (dict(top_k=33), ("static",), r"`simulate`: top_k \(33\) is more than the 32 experts"),
        (dict(num_devices=12), ("static",), "`simulate`: 32 experts and 12 devices must divide"),
        (dict(num_devices=64), ("affinity",), "`simulate`: the policy 'affinity' has one slot"),
        (dict(num_devices=6), (), r"`Simulation`: num_devices \(6\) must be divisible by dev"),
        (dict(every=0), (), "`Simulation`: every must be at least 1, got 0"),
    ],
)
def test_bad_input(changes: dict[str, Any], policies: tuple[str, ...], sentence: str):
    loads = np.full((2, 32), 1 / 32)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        simulate(loads, balance_config(**changes), policies)
    with pytest.raises(ValueError, match=r"^`synthetic_loads`: pattern must be one of zipf, drift"):
        synthetic_loads("waves", num_steps=1, num_experts=2)


SMALL_RUN = ["simulate", "--devices", "8", "--devices-per-node", "4", "--experts", "16"]
SMALL_RUN += ["--steps", "12", "--top-k", "2", "--tokens", "8", "--every", "4"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "balance.png"
    assert cli.main([*SMALL_RUN, "--loads", "zipf", "bursts", "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-7] for line in lines[1:9]] == [
        "static", "eplb", "affinity", "migrating",
    ] * 2  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert cli.main([*SMALL_RUN, "--policies", "eplb", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["title"] == "zipf, 8 devices" and len(entry["policies"]["eplb"]["moves"]) == 12
    assert cli.main([*SMALL_RUN, "--loads", "waves"]) == 2
    assert "`synthetic_loads`: pattern must be one of" in capsys.readouterr().err
    assert cli.main([*SMALL_RUN, "--recorded", str(tmp_path / "none.npy")]) == 2
    assert "none.npy" in capsys.readouterr().err


def test_pictures_of_statistics(tmp_path: Path):
    rng = np.random.default_rng(0)
    load = rng.random((3, 16))
    plots.draw_load(load, tmp_path / "load.png")
    plots.draw_imbalance({"experts": load, "devices": rng.random((3, 4))}, tmp_path / "max.png")
    plots.draw_traffic(rng.random((4, 4)), tmp_path / "traffic.png")
    for name in ("load", "max", "traffic"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.new.png"))


def test_pictures_of_a_training_run(tmp_path: Path):
    """What examples/trainer.py draws from its records, also before the first record of loads."""
    example_plots.draw_balance([{"step": 1, "loss": 1.0}], tmp_path)
    example_plots.draw_balance([{"step": 1, "tokens_per_expert": []}], tmp_path)  # a dense model
    assert not list(tmp_path.iterdir())
    records = [{"step": s, "tokens_per_expert": [[1, 2, s], [3, 4, 5]]} for s in range(20)]
    example_plots.draw_balance(records, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["imbalance.png", "load.png"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"^`jaxmoe.balance.plots`: matplotlib is not ins"
                       r"talled.*pip install 'jaxmoe\[balance\]'"):  # fmt: skip
        plots.draw_load(np.ones((1, 4)), tmp_path / "load.png")
