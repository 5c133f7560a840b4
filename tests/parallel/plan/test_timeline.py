"""A timeline shows what was played: every bar where its event is, no lane with two things at once."""

import json
from collections import defaultdict
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from moeforge.errors import UserError
from moeforge.parallel.plan.job import Arrangement, Job, skewed
from moeforge.parallel.plan.simulate import play
from moeforge.parallel.plan.step import step_of
from moeforge.parallel.plan.timeline import SHOWN, bars, write_timeline
from tests.parallel.plan.test_simulate import CLUSTER, model

JOB = Job(model(), 8, 16, accumulate=2, loads={1: skewed(8, 3.0)})


def played(arrangement: Arrangement, job: Job = JOB):
    return play(step_of(job, arrangement), arrangement, CLUSTER)


@pytest.mark.parametrize("arrangement", [Arrangement(8, 4), Arrangement(8, 2, True, chunks=2), Arrangement(8)])
def test_a_lane_does_one_thing_at_a_time_until_the_end(arrangement):
    found, parts = list(bars(played(arrangement), arrangement)), played(arrangement)
    lanes = defaultdict(list)
    for bar in found:
        lanes[bar.rank, bar.lane].append((bar.start, bar.start + bar.seconds))
    for spans in lanes.values():
        assert all(before[1] <= after[0] + 1e-12 for before, after in pairwise(sorted(spans)))
    assert max(bar.start + bar.seconds for bar in found) == pytest.approx(sum(part.seconds for part in parts))
    assert {bar.rank for bar in found} == set(range(arrangement.expert))


def test_of_many_processes_the_busiest_and_the_idlest_are_shown():
    arrangement, job = Arrangement(32, 32), Job(model(moe={"experts": {"num_experts": 32, "d_expert": 32}}), 32, 16)
    loads = {depth: skewed(32, 9.0).flip(0) for depth in (1, 2)}
    shown = {bar.rank for bar in bars(played(arrangement, Job(job.model, 32, 16, loads=loads)), arrangement)}
    assert len(shown) == SHOWN and 31 in shown


def test_the_trace_is_what_chrome_reads(tmp_path):
    arrangement, path = Arrangement(8, 4), tmp_path / "step.json"
    write_timeline(played(arrangement), arrangement, path)
    tree = json.loads(path.read_text())
    complete = [event for event in tree["traceEvents"] if event["ph"] == "X"]
    found = list(bars(played(arrangement), arrangement))
    assert [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in complete] == [
        (bar.rank, bar.lane, bar.name, bar.start * 1e6, bar.seconds * 1e6) for bar in found
    ]
    assert tree["otherData"]["times in a step"] == {"counting": 2, "counts": 1, "micro-batch": 2, "update": 1}


def test_the_picture_has_a_bar_for_each(tmp_path):
    arrangement, path = Arrangement(8, 4), tmp_path / "step.svg"
    write_timeline(played(arrangement), arrangement, path)
    drawn = ElementTree.parse(path).getroot().findall(".//{*}rect[{*}title]")
    found = list(bars(played(arrangement), arrangement))
    assert len(drawn) == len(found)
    assert all(float(rect.get("x")) + float(rect.get("width")) <= 1200 for rect in drawn)


@pytest.mark.parametrize("name, said", [("step.png", "must end in .json"), ("none/step.svg", "No such file")])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        write_timeline(played(Arrangement(8)), Arrangement(8), tmp_path / name)
