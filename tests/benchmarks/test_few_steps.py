"""Few steps: which grids are compared, what the measures say of known cases, and what the committed numbers show."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks import few_steps
from benchmarks.few_steps import AT_A_STEP, HALF_WAY, SOLVERS, Plan, steps_near
from benchmarks.machine import RESULTS
from tests.pipelines.analytic import analytic_pipeline, analytic_transformer
from tests.pipelines.helpers import Passes, tiny_pipeline
from tests.schedulers.fields import Gaussian, fit_order, guided_gaussian


INTERVAL = (0.0, 0.75)
PLAN = Plan(
    targets=(4, 6),
    set_targets=(6,),
    heun_set_targets=(4,),
    sde_set_steps=(5,),
    max_evaluations=8,
    reference_steps=12,
    sde_steps=7,
    num_trajectories=3,
    num_images=20,
)


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "few_steps.json").read_text(encoding="utf-8"))


def points_of(lines, solver):
    return {point["steps"]: point for point in next(line["points"] for line in lines if line["solver"] == solver)}


def first_guided_time(pipe, steps, interval):
    passes = Passes(pipe)
    pipe(class_labels=[3], num_inference_steps=steps, guidance_interval=interval, output_type="latent")
    return passes.guided_times[0]


@pytest.mark.parametrize("high", [0.75, 0.7])
@pytest.mark.parametrize("offset", [AT_A_STEP, HALF_WAY])
def test_grids_begin_guidance_where_they_say(high, offset):
    found = steps_near((8, 16), high, offset)
    assert found == sorted(set(found)) and all(5 <= steps <= 24 for steps in found)
    for steps in found:
        time = first_guided_time(tiny_pipeline(FlowMatchEulerDiscreteScheduler()), steps, (0.0, high))
        assert time == pytest.approx(high - offset / steps, abs=1e-5)


def test_grids_are_those_of_the_numbers_that_fit():
    assert steps_near((4, 8, 12, 16, 20), 0.75, AT_A_STEP) == [4, 8, 12, 16, 20]
    assert steps_near((10, 14, 18, 50), 0.75, HALF_WAY) == [10, 14, 18, 50]
    assert steps_near((10, 30), 0.7, AT_A_STEP) == [10, 30]
    assert steps_near((4, 8), 0.75, HALF_WAY) == [6]
    assert steps_near((250,), 0.75, HALF_WAY) == [250]


@pytest.mark.parametrize(
    ("solver", "offset", "order"),
    [
        ("heun", AT_A_STEP, 2),
        ("heun", HALF_WAY, 1),
        ("unipc", AT_A_STEP, 1),
        ("unipc", HALF_WAY, 2),
        ("unipc-restarted", AT_A_STEP, 2),
    ],
)
def test_where_guidance_begins_decides_the_order(solver, offset, order):
    """Where the end is known in closed form: what the page says of grids holds of the solvers, not of one model."""
    own, null = Gaussian.independent([1.0, 0.2], [0.5, 0.8]), Gaussian.independent([0.0, 0.3], [1.0, 1.1])
    noise = torch.randn(10, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = guided_gaussian(own, null, 1.9, INTERVAL)
    pipe, errors = analytic_pipeline(analytic_transformer(own, null, in_channels=2)), []
    numbers = steps_near((16, 32, 64), INTERVAL[1], offset)
    for steps in numbers:
        pipe.scheduler = SOLVERS[solver].build()
        end = pipe(
            class_labels=[0] * len(noise),
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=1.9,
            guidance_interval=INTERVAL,
            callback_on_step_end=few_steps.restart_history(INTERVAL) if SOLVERS[solver].restarts else None,
            output_type="latent",
        ).images
        errors.append((end - (mean + std * noise)).square().mean().sqrt().item())
    assert fit_order(numbers, errors) == pytest.approx(order, abs=0.35)


def test_a_set_is_at_no_distance_from_itself_and_at_some_from_another():
    images = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    comparison = few_steps.Comparison(images, few_steps.load_digit_classifier())
    same = comparison.measure(images)
    assert same["distance"] == pytest.approx(0, abs=1e-6) and same["diversity"] == 1
    grey = comparison.measure(images // 2)
    assert grey["distance"] > 1 and grey["diversity"] == pytest.approx(0.5, abs=0.01)


def test_everything_is_measured_and_shown(tmp_path):
    pipe = tiny_pipeline("sde", vae={"latents_mean": 0.1, "latents_std": 2.0})
    report = few_steps.measure_all(pipe, PLAN)
    assert json.loads(json.dumps(report)) == report
    trajectories, sets = report["trajectories"], report["sets"]
    assert points_of(trajectories["everywhere"], "heun")[4]["evaluations"] == 7
    assert 6 not in points_of(trajectories["everywhere"], "heun"), "11 evaluations are more than asked for"
    assert {line["solver"] for line in trajectories["at_a_step"]} == SOLVERS.keys() - {"sde"}
    errors = [point["latents"] for point in points_of(trajectories["everywhere"], "euler").values()]
    assert errors[0] > errors[1] > 0
    sde = points_of(sets["lines"], "sde")
    assert sets["floor"] == sde[7]["distance"] and list(sde) == [4, 6, 5, 7]
    assert sets["reference"]["distance"] == pytest.approx(0, abs=1e-6)
    few_steps.draw(report, tmp_path / "first.png")
    few_steps.draw(report, tmp_path / "second.png")
    first = (tmp_path / "first.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "second.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "second.png"]


def test_a_solution_is_at_no_distance_from_itself():
    pipe = tiny_pipeline("sde", vae={"latents_mean": 0.1, "latents_std": 2.0})
    solution = few_steps.solve(pipe, SOLVERS["heun"], 4, 3, INTERVAL)
    plan = Plan(num_trajectories=3)
    (line,) = few_steps.measure_grids(pipe, plan, INTERVAL, {"heun": [4]}, solution)
    assert line["points"] == [{"steps": 4, "evaluations": 7, "latents": 0.0, "pixels": 0.0}]


def test_pipelines_that_the_classifier_does_not_know_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        few_steps.parse_args(["--pipeline", str(tmp_path)])
    assert "run `make demo` first" in capsys.readouterr().err
    tiny_pipeline("sde", transformer={"path": "cosine"}).save_pretrained(tmp_path)
    args = few_steps.parse_args(["--pipeline", str(tmp_path), "--guidance_interval", "0", "0.5"])
    assert args.guidance_interval == [0.0, 0.5]
    with pytest.raises(SystemExit, match="on the cosine path"):
        few_steps.load_pipeline(args.pipeline)


def test_the_committed_tables_are_those_of_the_committed_numbers(committed):
    text = (RESULTS / "few_steps.md").read_text(encoding="utf-8")
    assert text == few_steps.to_markdown(committed) + "\n"


def test_the_committed_numbers_show_what_the_page_says_of_grids(committed):
    parts = committed["trajectories"]
    unipc, heun = (points_of(parts["half_way"], name) for name in ("unipc", "heun"))
    at_a_step, restarted = (points_of(parts["at_a_step"], name) for name in ("unipc", "unipc-restarted"))
    for what in ("latents", "pixels"):
        assert unipc[18][what] < unipc[14][what] < at_a_step[16][what] / 2
        assert restarted[16][what] == pytest.approx(unipc[14][what], rel=0.35)
        assert heun[14][what] > unipc[14][what]
    sets = committed["sets"]
    assert points_of(sets["lines"], "unipc")[18]["distance"] < sets["floor"]
