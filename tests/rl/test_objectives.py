"""CISPO against its written formula (MiniMax-M1 report §3.1, Eq. 4 and 5)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.rl import Cispo
from stages.rl.objectives import cispo, percentile


def random_case(seed=0, shape=(5, 17), spread=1.5):
    """Log-probabilities whose ratios reach far on both sides of 1, advantages constant within a sequence, a mask."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 0.01
    old = logprobs + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64).expand(shape)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = (torch.arange(shape[1]) < lengths).double()
    return logprobs, old, advantages, mask


def gradient(logprobs, *rest, **options):
    logprobs = logprobs.clone().requires_grad_()
    loss, _ = cispo(logprobs, *rest, **options)
    loss.backward()
    return logprobs.grad


def written_gradient(logprobs, old, advantages, mask, config):
    """d loss / d log pi = -r_hat A / tokens, token by token in plain Python."""
    tokens = float(mask.sum())
    result = torch.zeros_like(logprobs)
    for i in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            ratio = math.exp(float(logprobs[i, t] - old[i, t]))
            clipped = min(ratio, config.is_weight_max)
            if config.is_weight_min is not None:
                clipped = max(clipped, config.is_weight_min)
            if mask[i, t]:
                result[i, t] = -clipped * float(advantages[i, t]) / tokens
    return result


BOUNDS = [Cispo(is_weight_max=5.0), Cispo(is_weight_max=1.2), Cispo(is_weight_max=2.0, is_weight_min=0.5)]


@pytest.mark.parametrize("config", BOUNDS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_the_written_formula(config, seed):
    case = random_case(seed)
    torch.testing.assert_close(gradient(*case, config), written_gradient(*case, config), rtol=1e-12, atol=0)


@pytest.mark.parametrize("config", BOUNDS)
def test_gradient_by_finite_differences_of_the_loss_with_frozen_weights(config):
    """The stopped gradient means: differentiate sum(w log pi) with w held at its value at the present point."""
    logprobs, old, advantages, mask = random_case(4, (2, 5))
    weight = torch.exp(logprobs - old).clamp(min=config.is_weight_min, max=config.is_weight_max)

    def frozen(x):
        return float(-(weight * advantages * x * mask).sum() / mask.sum())

    numeric, step = torch.zeros_like(logprobs), 1e-6
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        up, down = logprobs.clone(), logprobs.clone()
        up[tuple(index)] += step
        down[tuple(index)] -= step
        numeric[tuple(index)] = (frozen(up) - frozen(down)) / (2 * step)
    analytic = gradient(logprobs, old, advantages, mask, config)
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-9)
    loss, _ = cispo(logprobs, old, advantages, mask, config)
    assert float(loss) == pytest.approx(frozen(logprobs), rel=1e-12)


def test_on_policy_gradient_is_reinforce_and_that_of_the_clipped_surrogate():
    """At ratio 1 CISPO, REINFORCE and PPO's min/clip (DAPO's loss, same normaliser) have one gradient."""
    logprobs, _, advantages, mask = random_case(1)
    x = logprobs.clone().requires_grad_()
    (-(advantages * x * mask).sum() / mask.sum()).backward()
    y = logprobs.clone().requires_grad_()
    ratio = torch.exp(y - logprobs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    (-(surrogate * mask).sum() / mask.sum()).backward()
    ours = gradient(logprobs, logprobs, advantages, mask, Cispo(is_weight_max=5.0))
    torch.testing.assert_close(ours, x.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, y.grad, rtol=1e-12, atol=0)


def test_unified_form_without_mask_is_cispo():
    """Eq. 6-7 with the mask's bounds out of reach; with them at DAPO's values and r unbounded it is DAPO's gradient."""
    logprobs, old, advantages, mask = random_case(2)
    ratio = torch.exp(logprobs - old)

    def unified(max_weight, eps_low, eps_high):
        dropped = ((advantages > 0) & (ratio > 1 + eps_high)) | ((advantages < 0) & (ratio < 1 - eps_low))
        return -(ratio.clamp(max=max_weight) * advantages * ~dropped * mask) / mask.sum()

    ours = gradient(logprobs, old, advantages, mask, Cispo(is_weight_max=3.0))
    torch.testing.assert_close(ours, unified(3.0, math.inf, math.inf), rtol=1e-12, atol=0)
    y = logprobs.clone().requires_grad_()
    r = torch.exp(y - old)
    surrogate = torch.minimum(r * advantages, r.clamp(0.8, 1.28) * advantages)
    (-(surrogate * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(y.grad, unified(math.inf, 0.2, 0.28), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("is_weight_max", "weight"), [(5.0, 1.5), (1.28, 1.28)])
def test_a_token_that_ppo_drops_keeps_its_gradient(is_weight_max, weight):
    """Positive advantage, ratio 1.5: no gradient under clip-higher 0.28, weight min(1.5, bound) under CISPO."""
    logprobs = torch.tensor([[math.log(0.3)]], dtype=torch.float64)
    old = torch.tensor([[math.log(0.2)]], dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    y = logprobs.clone().requires_grad_()
    ratio = torch.exp(y - old)
    (-torch.minimum(ratio, ratio.clamp(0.8, 1.28))).sum().backward()
    assert float(y.grad) == 0.0
    assert float(gradient(logprobs, old, ones, ones, Cispo(is_weight_max=is_weight_max))) == pytest.approx(-weight)


def test_every_token_inside_the_mask_has_a_gradient_however_far_off_policy():
    logprobs, old, advantages, mask = random_case(3, spread=8.0)
    got = gradient(logprobs, old, advantages, mask, Cispo(is_weight_max=2.0))
    assert bool(((got != 0) == (mask > 0)).all())


def test_gradient_flows_through_the_new_logprobs_alone():
    tensors = [x.clone().requires_grad_() for x in random_case(5)[:3]]
    loss, metrics = cispo(*tensors, random_case(5)[3], Cispo(is_weight_max=2.0))
    loss.backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None or not tensors[1].grad.any()
    assert tensors[2].grad is None or not tensors[2].grad.any()
    assert not any(value.requires_grad for value in metrics.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_padding_changes_nothing(seed, extra):
    case = random_case(seed)
    config = Cispo(is_weight_max=2.0, is_weight_min=0.1)
    fill = (-7.0, 900.0, 3.0, 0.0)
    padded = [
        torch.cat((x, torch.full((x.shape[0], extra), value, dtype=x.dtype)), dim=1) for x, value in zip(case, fill)
    ]
    loss, metrics = cispo(*case, config)
    loss_padded, metrics_padded = cispo(*padded, config)
    torch.testing.assert_close(loss_padded, loss)
    torch.testing.assert_close(metrics_padded, metrics)
    torch.testing.assert_close(gradient(*padded, config)[:, :-extra], gradient(*case, config))
    assert not gradient(*padded, config)[:, -extra:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_splitting_into_micro_batches_changes_nothing(seed, cuts):
    case = random_case(seed)
    config = Cispo(is_weight_max=2.0)
    total = case[3].sum()
    bounds = sorted({0, *cuts, len(case[0])})
    loss, grads = 0.0, []
    for start, end in itertools.pairwise(bounds):
        part = [x[start:end] for x in case]
        loss = loss + cispo(*part, config, total_tokens=total)[0]
        grads.append(gradient(*part, config, total_tokens=total))
    torch.testing.assert_close(loss, cispo(*case, config)[0])
    torch.testing.assert_close(torch.cat(grads), gradient(*case, config))


def test_repeating_every_group_changes_neither_loss_nor_its_scale():
    case = random_case(6)
    twice = [torch.cat((x, x)) for x in case]
    config = Cispo(is_weight_max=2.0)
    torch.testing.assert_close(cispo(*twice, config)[0], cispo(*case, config)[0])


def test_metrics_count_what_is_clipped():
    ratio = torch.tensor([[0.1, 0.9, 1.0, 3.0], [6.0, 1.0, 1.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.float64)
    advantages = torch.tensor([[2.0], [-1.0]], dtype=torch.float64).expand(2, 4)
    logprobs = torch.full((2, 4), -1.0, dtype=torch.float64)
    config = Cispo(is_weight_max=2.0, is_weight_min=0.5)
    _, metrics = cispo(logprobs, logprobs - ratio.log(), advantages, mask, config)
    got = {name: float(value) for name, value in metrics.items()}
    assert got == pytest.approx({
        "cispo/clip_frac_high": 2 / 6,
        "cispo/clip_frac_low": 1 / 6,
        "cispo/is_weight_mean": (0.5 + 0.9 + 1 + 2 + 2 + 1) / 6,
        "cispo/is_weight_p99": 6.0,
        "cispo/is_weight_max": 6.0,
        "cispo/clip_mass_positive": (0.4 * 2 + 1.0 * 2) / 6,
        "cispo/clip_mass_negative": 4.0 / 6,
        "policy/entropy_proxy": 1.0,
        "policy/approx_kl": sum(r - 1 - math.log(r) for r in (0.1, 0.9, 1.0, 3.0, 6.0, 1.0)) / 6,
    })  # fmt: skip


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([[-1e-3, -500.0]])
    old = torch.tensor([[-500.0, -1e-3]])
    ones = torch.ones(1, 2)
    loss, metrics = cispo(logprobs, old, ones, ones, Cispo(is_weight_max=5.0))
    assert math.isfinite(float(loss)) and all(math.isfinite(float(value)) for value in metrics.values())
    assert gradient(logprobs, old, ones, ones, Cispo(is_weight_max=5.0))[0, 0] == pytest.approx(-5.0 / 2)


def test_empty_mask_gives_zero():
    logprobs, old, advantages, mask = random_case(7)
    loss, metrics = cispo(logprobs, old, advantages, torch.zeros_like(mask), Cispo(is_weight_max=5.0))
    assert float(loss) == 0.0 and all(math.isfinite(float(value)) for value in metrics.values())


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_enough_do_not_exceed(values, fraction):
    got = float(percentile(torch.tensor(values, dtype=torch.float64), fraction))
    enough = [v for v in values if sum(w <= v for w in values) >= fraction * len(values) - 1e-9]
    assert got == min(enough)
