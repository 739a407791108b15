"""AutoDiffusion: candidates, operators that stay within the space, the search's promises, and images as a measure."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from imagewright.guidance.layer_skipping import LayerSkipped, layers_of
from imagewright.metrics import digits_features
from imagewright.metrics.statistics import moments_of
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.oracles import GaussianMixture
from imagewright.paths.discrete import DiscreteSchedule, uniform_times
from imagewright.samplers import DDIM
from imagewright.tuning import feature_distance
from imagewright.tuning.autodiffusion import AutoDiffusion, Candidate, Operators, Space, random_search, search
from imagewright.tuning.feature_distance import FeatureDistance
from imagewright.types import DataSpec, UserError

JOINT = Space(layers=10, max_layers=42)
SMALL = {"population": 20, "parents": 5, "mutants": 8, "crossovers": 6, "first_random": 10}


def far_from(*wanted):
    """A fitness whose minimum is known: squared distance of the times to these, layer 3 best skipped everywhere."""

    def fitness(candidate):
        times = sum((t - w) ** 2 for t, w in itertools.zip_longest(candidate.times, wanted, fillvalue=0))
        return float(times - 50_000 * sum(3 in ids for ids in candidate.skips))

    return fitness


def operators(space, seed=0, skipped=(0.0, 0.0)):
    made = Operators(space, np.random.default_rng(seed))
    made.skipped = skipped
    return made


# --- candidates -------------------------------------------------------------------------------------------------------


def test_a_candidate_travels_through_json():
    printed = {"timesteps": [944, 94, 217, 354, 574, 834]}
    candidate = Candidate.from_json(printed)
    assert candidate == Candidate.of({94, 217, 354, 574, 834, 944})
    assert candidate.times == (94, 217, 354, 574, 834, 944) and candidate.skips == ((),) * 6
    skipping = Candidate.of({500: (4, 1), 20: ()})
    assert skipping == Candidate((20, 500), ((), (1, 4)))
    assert Candidate.from_json(json.loads(json.dumps(skipping.to_json()))) == skipping


def test_levels_are_the_schedules_and_end_at_the_denoisers_range():
    schedule, model = DiscreteSchedule(), EDMPrecond(torch.nn.Identity())
    candidate = Candidate.of({0: (1,), 250: (2,), 500: (), 998: (3,), 999: (4,)})
    levels = candidate.levels(schedule, model)
    assert list(levels)[1:] == sorted(schedule.sigmas([0, 250, 500]).tolist(), reverse=True)
    assert levels[80.0] == (3,) and len(levels) == 4  # both times beyond 80 share it; DDIM between equal levels rests


def test_equal_levels_are_a_step_that_does_nothing():
    oracle = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64), 0.2)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = DDIM(levels=(2.0, 0.5))(oracle, x)
    torch.testing.assert_close(DDIM(levels=(2.0 + 1e-9, 2.0, 0.5))(oracle, x), once, rtol=1e-6, atol=1e-8)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space", [Space(steps=6), Space(steps=3, times=(1, 5, 9, 700)), Space(steps=3, times=(1, 5, 9))]
)
def test_operators_keep_the_number_of_distinct_times(space):
    made = operators(space)
    a, b = made.random(), made.random()
    for _ in range(100):
        a, b = made.mutated(a, 0.25), made.crossed(a, b)
        for candidate in (a, b):
            assert len(candidate.times) == space.steps and set(candidate.times) <= set(space.times)
            assert list(candidate.times) == sorted(set(candidate.times)) and not any(candidate.skips)


def test_mutation_replaces_a_quarter_of_the_times():
    made, parent = operators(Space(steps=8)), Candidate.of(uniform_times(8))
    kept = [len(set(parent.times) & set(made.mutated(parent, 0.25).times)) for _ in range(400)]
    assert np.mean(kept) == pytest.approx(6, abs=0.2)


def test_children_take_entries_from_both_parents():
    made = operators(Space(steps=4))
    a, b = Candidate.of((0, 100, 200, 300)), Candidate.of((50, 150, 250, 350))
    children = {made.crossed(a, b).times for _ in range(300)}
    assert children == set(itertools.product((0, 50), (100, 150), (200, 250), (300, 350)))
    # Positions that give the same time twice: the second one becomes a new time.
    c, d = Candidate.of((0, 1, 2, 3)), Candidate.of((1, 2, 3, 4))
    assert all(len(made.crossed(c, d).times) == 4 for _ in range(100))


def test_children_of_unequal_parents_keep_the_longer_tail():
    made = operators(JOINT)
    a, b = Candidate.of({1: (0,), 2: ()}), Candidate.of({3: (), 4: (), 5: (1, 2), 6: (3,)})
    for child in (made.crossed(*pair) for pair in [(a, b), (b, a)] * 20):
        steps = dict(zip(child.times, child.skips, strict=True))
        assert len(steps) == 4 and steps[5] == (1, 2) and steps[6] == (3,)


def test_random_candidates_spend_the_layer_budget():
    made, steps, skipped = operators(JOINT, skipped=(0.0, 0.4)), set(), set()
    for _ in range(300):
        candidate = made.random()
        cost = JOINT.cost(candidate.skips)
        # A step more that skips all it may would not have fitted: a draw that is too dear does not end the list.
        assert cost <= 42 < cost + 10 - 4
        assert all(len(set(ids)) == len(ids) and set(ids) <= set(range(10)) for ids in candidate.skips)
        steps.add(len(candidate.times))
        skipped.update(map(len, candidate.skips))
    assert {4, 5} <= steps and skipped == {0, 1, 2, 3, 4}
    # 4 of 10 at once only where nothing less fits: the number is int(10 * share), share below 0.4.
    assert {len(made.random().skips[0]) for _ in range(100)} <= {0, 1, 2, 3, 4}
    assert all(len(ids) >= 2 for _ in range(50) for ids in operators(JOINT, skipped=(0.2, 0.4)).random().skips)


@pytest.mark.parametrize(
    ("layers", "budget", "shares", "steps", "counts"),
    [
        (10, 42, (0.0, 0.4), 4.871, (0.219, 0.228, 0.247, 0.279, 0.026)),
        (13, 22, (0.0, 0.3), 1.740, (0.149, 0.191, 0.269, 0.391)),
        (10, 42, (0.2, 0.5), 5.924, (0.0, 0.0, 0.303, 0.323, 0.352, 0.021)),
    ],
)
def test_random_candidates_are_distributed_as_the_published_programs(layers, budget, shares, steps, counts):
    """Mean number of steps, and shares of steps that skip 0, 1, 2, ... layers, in 20,000 draws of
    `EvolutionSearcher.sample_active_subnet` of lilijiangg/AutoDiffusion at 1292082."""
    made = operators(Space(layers=layers, max_layers=budget), skipped=shares)
    drawn = [made.random() for _ in range(3000)]
    skipped = [len(ids) for candidate in drawn for ids in candidate.skips]
    assert np.mean([len(candidate.times) for candidate in drawn]) == pytest.approx(steps, abs=0.03)
    assert np.bincount(skipped) / len(skipped) == pytest.approx(np.array(counts), abs=0.02)


def test_mutants_and_children_cost_no_more_than_the_budget():
    made = operators(JOINT, skipped=(0.0, 0.4))
    a, b = made.random(), made.random()
    for _ in range(200):
        steps = len(a.times)
        a = made.mutated(a, 0.25)
        assert len(a.times) == steps  # a mutant neither gains nor loses one
        a, b = b, made.crossed(a, b)
        assert JOINT.affords(JOINT.cost(a.skips)) and JOINT.affords(JOINT.cost(b.skips))


def test_skipped_layers_mutate_and_full_networks_may_stay():
    made = operators(JOINT, skipped=(0.2, 0.2))
    parent = Candidate.of({10: (0, 1, 2), 20: (), 30: (5,), 40: (6, 7)})
    changed = np.zeros(3)
    for _ in range(600):
        child = made.mutated(parent, 0.25)
        by_time = dict(zip(child.times, child.skips, strict=True))
        changed += [
            10 in by_time and by_time[10] != (0, 1, 2),
            by_time.get(30, (5,)) != (5,),
            len(by_time.get(20, ())) == 2,
        ]
    assert changed[0] / 600 == pytest.approx(0.75 * (1 - 0.75**3), abs=0.07)  # time kept, a layer replaced
    assert changed[1] / 600 == pytest.approx(0.75 * 0.25, abs=0.07)
    assert changed[2] / 600 == pytest.approx(0.75 * 0.25, abs=0.07)  # the full network's list, replaced as a whole
    plain = operators(JOINT).mutated(Candidate.of({10: (), 20: ()}), 1.0)
    assert not any(plain.skips)  # the first stage skips nothing


# --- the search -------------------------------------------------------------------------------------------------------


def test_it_finds_a_known_minimum_and_beats_random():
    fitness, wanted = far_from(94, 354, 574, 944), 500
    found = search(Space(), fitness, AutoDiffusion(seed=3))
    control = random_search(Space(), fitness, AutoDiffusion(seed=3))
    assert len(found.best_so_far) == len(control.best_so_far) == wanted
    assert found.fitness < 0.3 * control.fitness < found.uniform
    assert found.uniform == fitness(Candidate.of((0, 250, 500, 750)))
    assert found.fitness == fitness(found.best) == found.best_so_far[-1] == found.by_generation[-1]


@pytest.mark.parametrize("space", [Space(steps=3), JOINT], ids=["times", "joint"])
def test_best_never_rises_and_every_candidate_is_measured_once(space):
    asked = []

    def fitness(candidate):
        asked.append(candidate)
        return float(np.random.default_rng(candidate.times).normal())

    found = search(space, fitness, AutoDiffusion(generations=8, **SMALL))
    assert len(set(asked)) == len(asked) == len(found.best_so_far) == 160 and len(found.by_generation) == 8
    assert all(b <= a for a, b in itertools.pairwise(found.best_so_far))
    assert all(b <= a for a, b in itertools.pairwise(found.by_generation))
    assert asked[0] == space.uniform() and found.fitness <= found.uniform
    assert [value for _, value in found.parents] == sorted(value for _, value in found.parents)[:5]


def test_the_first_population_and_the_two_stages():
    asked = []

    def fitness(candidate):
        asked.append(candidate)
        return -float(len(asked))  # always changing, so the first stage lasts as long as it may

    search(JOINT, fitness, AutoDiffusion(generations=12, max_prun=0.5, min_prun=0.2, **SMALL))
    generations = [asked[i : i + 20] for i in range(0, 240, 20)]
    near = [len(set(c.times) & set(JOINT.uniform().times)) for c in generations[0]]
    assert near[0] == 4 and np.mean(near[1:11]) < 0.5 and np.mean(near[11:]) > 2.5
    most = [max(len(ids) for c in g for ids in c.skips) for g in generations]
    # As a run of the published loop (at 1292082) with these settings: six populations without, then a fifth of max_prun
    # more in each, of which the whole part of a random share is skipped, all of it only where nothing less fits; from
    # the eighth on, at least min_prun. Theirs: 0 0 0 0 0 0 0 2 2 3 5 5.
    assert most[:7] == [0] * 7 and most[7:9] == [2, 2] and 3 <= most[9] <= 4 <= most[10] <= most[11] <= 5
    fresh = [len(ids) for g in generations[8:] for c in g[14:] for ids in c.skips]  # the random ones
    assert min(fresh) == 2  # min_prun, from the population after the sixth epoch on


def test_the_settings_are_the_published_scripts():
    """search_*.sh of lilijiangg/AutoDiffusion, and what its programs derive from them."""
    plain, joint = AutoDiffusion(), AutoDiffusion.joint()
    assert (plain.generations, plain.crossovers) == (10, 15) and (joint.generations, joint.crossovers) == (15, 10)
    for c in (plain, joint):
        assert (c.population, c.parents, c.mutants, c.mutation, c.retries) == (50, 10, 25, 0.25, 10)
        assert (c.first_random, c.first_mutation, c.max_prun, c.min_prun) == (25, 0.1, 0.1, 0.0)


@pytest.mark.parametrize(
    ("config", "population", "shares"),
    [
        (AutoDiffusion(), 50, (10, 25, 15, 25)),
        (AutoDiffusion(), 8, (2, 4, 2, 4)),
        (AutoDiffusion(), 2, (2, 1, 0, 1)),
        (AutoDiffusion.joint(), 20, (4, 10, 4, 10)),
        (AutoDiffusion(), 100, (20, 50, 30, 50)),
    ],
)
def test_another_population_keeps_the_published_shares(config, population, shares):
    sized = config.sized(population)
    assert (sized.parents, sized.mutants, sized.crossovers, sized.first_random) == shares
    assert sized == replace(config, population=population, parents=shares[0], mutants=shares[1],
                            crossovers=shares[2], first_random=shares[3])  # fmt: skip


def test_the_first_stage_ends_when_the_best_stops_changing():
    most = []
    search(
        JOINT, lambda c: most.append(max(map(len, c.skips))) or 0.0, AutoDiffusion(generations=4, max_prun=0.9, **SMALL)
    )
    assert [max(most[i : i + 20]) for i in (0, 20, 40, 60)] == [0, 0, 1, 3]


def test_joint_search_finds_the_layer_worth_skipping():
    space = Space(layers=10, max_layers=40)
    found = search(space, far_from(100, 300, 600, 900), AutoDiffusion.joint(max_prun=0.3, seed=1))
    assert sum(3 in ids for ids in found.best.skips) >= len(found.best.times) - 1
    assert AutoDiffusion.joint().generations == 15 and AutoDiffusion.joint(crossovers=3).crossovers == 3


def test_refinement_stays_in_its_windows():
    space = Space(steps=6).around((94, 217, 354, 574, 834, 995))
    uniform = set(uniform_times(6))
    near = set().union(*(range(max(t - 10, 0), min(t + 10, 1000)) for t in {94, 217, 354, 574, 834, 995} | uniform))
    assert set(space.times) == near and {84, 103, 999, 0, 9} <= near and not {83, 104, 10} & near
    asked = []
    search(space, lambda c: asked.append(c) or float(sum(c.times)), AutoDiffusion(generations=3, **SMALL))
    assert all(set(c.times) <= set(space.times) for c in asked)


def test_it_repeats_reports_and_ends_with_the_space():
    config, calls = AutoDiffusion(generations=3, seed=5, **SMALL), []
    space = Space(steps=2, times=(0, 100, 500, 900))
    found = search(space, far_from(100, 900), config, lambda done, best: calls.append((done, best)))
    assert len(calls) == 6 and calls[-1] == (6, 0.0) and found.best.times == (100, 900)  # six pairs, all of them
    assert search(space, far_from(100, 900), config) == found
    record = json.loads(json.dumps(found.to_json()))
    assert record["evaluations"] == 6 and record["best"] == {"timesteps": [100, 900], "skip_layers": [[], []]}


def test_a_value_that_is_no_number_never_wins():
    found = search(
        Space(steps=2),
        lambda c: float("nan") if c.times[0] < 400 else 1.0,
        AutoDiffusion(generations=1, **{**SMALL, "first_random": 19}),
    )
    assert found.fitness == 1.0 and found.uniform == float("inf")


# --- images -----------------------------------------------------------------------------------------------------------


def distance(**settings):
    torch.manual_seed(0)
    network = SongUNet(
        SongUNetConfig(
            img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=8, channel_mult=(1,),
            num_blocks=1, attn_resolutions=(8,), dropout=0.0,
        )
    )  # fmt: skip
    reference = moments_of(np.random.default_rng(0).normal(size=(200, digits_features().dim)))
    spec = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
    given = {"images": 24, "batch_size": 10} | settings
    return FeatureDistance(
        model=EDMPrecond(network), spec=spec, extractor=digits_features(), reference=reference, **given
    )


def test_images_are_fresh_for_each_candidate_and_the_same_when_asked_again():
    measure = distance()
    candidate = Candidate.of({100: (), 600: (0, 2)})
    assert measure(candidate) == measure(candidate)
    assert measure(candidate) != distance(seed=1)(candidate)
    layers = len(layers_of(measure.model.network))
    found = search(
        Space(layers=layers, max_layers=2 * layers),
        measure,
        AutoDiffusion(generations=2, population=4, parents=2, mutants=2, crossovers=1, first_random=2),
    )
    assert found.fitness <= found.uniform


def test_every_candidate_has_noise_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(feature_distance, "frechet_of_model", lambda *_, seed, **__: seeds.append(seed) or 0.0)
    measure = distance()
    for steps in ({100: (), 600: ()}, {100: (), 601: ()}, {100: (0,), 600: ()}, {100: (), 600: (0,)}):
        measure(Candidate.of(steps))
    assert len(set(seeds)) == 4


def test_a_candidate_draws_by_ddim_with_its_skips():
    measure = distance()
    generator = measure.generator(Candidate.of({100: (), 600: (0, 2)}))
    low, high = DiscreteSchedule().sigmas([100, 600]).tolist()
    assert generator.sampler == DDIM(levels=(high, low)) and generator.nfe == 2
    assert isinstance(generator.model, LayerSkipped) and generator.model.skips == {high: (0, 2), low: ()}
    assert measure.generator(Candidate.of((100, 600))).model is measure.model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Space(steps=0), "steps is 0; it must lie in 1 to 1000"),
        (lambda: Space(times=(5, 6)), "steps is 4; it must lie in 1 to 2"),
        (lambda: Space(times=(5, 1000)), "whole numbers in 0 to 999"),
        (lambda: Space(layers=10, max_layers=9), "layers is 10 and max_layers 9; the budget"),
        (lambda: Space(steps=400).uniform(), "no even stride"),
        (lambda: AutoDiffusion(parents=1), "2 <= parents <= population"),
        (lambda: AutoDiffusion(mutants=40), "together they must fit a population of 50"),
        (lambda: AutoDiffusion(first_random=50), "first_random is 50; it must lie in 0 to 49"),
        (lambda: AutoDiffusion(mutation=0.0), r"both must lie in \(0, 1\]"),
        (lambda: AutoDiffusion(min_prun=0.2), "0 <= min <= max < 1"),
        (lambda: Candidate.from_json({"timesteps": [1, 1]}), "must be distinct, with one list each"),
        (lambda: Candidate.from_json({"timesteps": [1], "skip_layers": [[], []]}), "with 2 lists of skip_layers"),
        (lambda: distance(images=1), "images is 1 and batch_size 10; they must be at least 2 and 1"),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
