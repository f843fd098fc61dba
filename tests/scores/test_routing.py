"""What routers do: load, balance and decision, experts chosen together, and how that is shown."""

import math

import pytest
import torch

import secateur
from secateur import make_plan, open_model, prune, save
from secateur.calibration.routing import RoutingSums
from secateur.cli.tables import scores_table
from secateur.data.windows import Windows
from secateur.errors import ModelError, NumericsError
from secateur.reporting.expert_figures import removal_maps, routing_maps
from secateur.reporting.page import report
from secateur.reporting.pictures import draw_scores
from secateur.scores.measure import score_model
from secateur.scores.profile import Scores
from secateur.scores.routing import describe_block
from tiny_models import VOCABULARY, build

WINDOWS = Windows.of(torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1)))


def test_a_router_described_by_hand():
    """Ten tokens, two experts each of four: the last never; 0 and 1 together six times, 0 and 2 four times."""
    sums = RoutingSums(4)
    sums.tokens += 10
    sums.load += torch.tensor([10.0, 6, 4, 0])
    sums.gated += torch.tensor([5.0, 6, 1, 0])
    sums.together[[0, 0], [1, 2]] = torch.tensor([6.0, 4], dtype=torch.float64)
    sums.together += sums.together.T.clone()
    sums.entropy += 10 * 0.5 * math.log(2)
    found = describe_block(sums)
    assert found.load == pytest.approx((1.0, 0.6, 0.4, 0.0))
    assert found.saliency == pytest.approx((0.5, 1.0, 0.25, 0.0))
    assert found.idle == (3,)
    assert found.decision == pytest.approx(0.5)
    assert found.balance == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(4))
    assert [(one.experts, one.share) for one in found.together] == [((0, 1), 1.0), ((0, 2), 1.0)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-mixed"])
def test_a_skeleton_gives_the_same(tiny, name, tmp_path):
    memory, skeleton = (
        secateur.score(tiny(name, blocks=3, skeleton=one), texts=WINDOWS, kinds=("experts",)) for one in (False, True)
    )
    assert memory.routing == skeleton.routing
    assert memory.has(["experts"])
    assert not memory.has(["cosine"])
    memory.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json") == memory
    dense = [block for block, one in enumerate(memory.routing.blocks) if one is None]
    assert dense == ([1] if "mixed" in name else [])
    assert all(sum(one.load) == pytest.approx(2) for one in memory.routing.blocks if one is not None)


def test_a_dense_model_has_no_router(tiny):
    with pytest.raises(ModelError, match="a llama has no experts"):
        score_model(tiny("llama", blocks=3), WINDOWS, ["experts"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_in_an_expert_is_named(value):
    module = build("mixtral", blocks=3)
    with torch.no_grad():
        module.model.layers[1].mlp.experts.down_proj[0, 3, 4] = value
    with pytest.raises(NumericsError, match="block 1"):
        score_model(open_model(module), WINDOWS, ["experts"])


def test_routing_is_drawn_and_printed(tiny, tmp_path):
    scores = score_model(tiny("qwen3_moe-mixed", blocks=3), WINDOWS, ["cosine", "experts"])
    (drawn,) = routing_maps(scores)
    assert [len(row) for row in drawn.data[0]["z"]] == [4, 4, 4]
    assert drawn.data[0]["z"][1] == [None] * 4
    assert {path.name for path in draw_scores(scores, tmp_path)} == {"redundancy.png", "cosine.png", "experts.png"}
    routers = scores_table(scores).renderables[-1]
    assert list(routers.columns[0].cells) == ["0", "2"]
    assert routing_maps(score_model(tiny("llama", blocks=3), WINDOWS, ["cosine"])) == []


def test_the_report_shows_which_experts_were_removed(tiny, tmp_path):
    model = tiny("qwen3_moe-mixed", blocks=3)
    plan = make_plan(model, method="reap", texts=WINDOWS, settings={"experts": 2})
    (drawn,) = removal_maps([plan])
    cells, crosses = drawn.data
    for block, scores in enumerate(plan.steps[0].scores):
        assert cells["z"][block] == ([None] * 4 if block == 1 else [one / max(scores) for one in scores])
    marked = list(zip(crosses["y"], crosses["x"], strict=True))
    assert marked == [(block, one) for block in (0, 2) for one in range(4) if one not in plan.steps[0].kept[block]]
    save(prune(model, plan, texts=WINDOWS), tmp_path / "cut", check=False)
    page = report(tmp_path / "cut").read_text()
    assert "4 experts removed by reap" in page
    assert "2 of 4 experts" in page
