"""Training steps: normalisation, masks, refusal of gradients that are not numbers, per-layer norms."""

from __future__ import annotations

import math
import random

import pytest
import torch

from m1.training.batch import Batch, full_batch, padded_batch, shared_prompt_batch


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def gradients(trainer) -> list[torch.Tensor]:
    """What the last step handed to the optimizer."""
    return [parameter.main_grad.clone() for parameter in trainer.model.parameters()]


def test_splitting_a_batch_into_micro_batches_changes_nothing(make_trainer, micro_batches) -> None:
    from m1.training.trainer import language_model_loss

    whole, split = make_trainer(), make_trainer()
    parts = micro_batches(0)
    joined = Batch(
        *(torch.cat([getattr(b, name) for b in parts]) for name in ("tokens", "labels", "loss_mask", "padding_mask"))
    )
    one = whole.step([joined], language_model_loss, 1e-3)
    two = split.step(parts, language_model_loss, 1e-3)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    # Gradients and not weights: the first step of Adam moves a weight by the sign of its gradient, so that one near
    # zero, whose sign is that of a rounding error, moves it by the whole learning rate in either direction. Sums of 64
    # tokens in another order differ by some 2^-24 of their terms, a micro-batch of a wrong weight by a part of one.
    for ours, expected in zip(gradients(split), gradients(whole), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_losses_are_normalised_by_tokens_not_by_sequences(make_trainer) -> None:
    """A long and a short response weigh by their tokens, whatever micro-batches they stand in."""
    from m1.training.trainer import language_model_loss

    trainer = make_trainer()
    long, short = [5, *range(40, 60)], [6, 70, 71]
    apart = trainer.evaluate([padded_batch([long], [1]), padded_batch([short], [1])], language_model_loss)
    together = trainer.evaluate([padded_batch([long, short], [1, 1])], language_model_loss)
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert apart["tokens"] == together["tokens"] == 22


def test_padding_changes_no_log_probability(make_trainer) -> None:
    trainer = make_trainer(moe_aux_loss_coeff=0.01)
    response = [5, *range(40, 50)]
    alone = trainer.token_logprobs(padded_batch([response], [1], multiple=1))
    padded = trainer.token_logprobs(padded_batch([response, [7] * 60], [1, 1]))
    assert torch.allclose(alone[0], padded[0, : alone.shape[1]], atol=1e-5)


def test_the_loss_falls_on_one_batch(make_trainer, micro_batches) -> None:
    from m1.training.trainer import language_model_loss

    trainer = make_trainer(moe_aux_loss_coeff=0.01)
    losses = [trainer.step(micro_batches(0), language_model_loss, 3e-3) for _ in range(25)]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[0]["moe_aux_loss"] >= 0.99  # 1 is perfect balance


def test_a_gradient_that_is_not_a_number_leaves_the_weights_alone(make_trainer, micro_batches) -> None:
    from m1.training.trainer import NonFiniteGradient, language_model_loss

    trainer = make_trainer()
    before = weights(trainer)

    def broken(logprobs, batch):
        loss, tokens, sums = language_model_loss(logprobs, batch)
        return loss * math.nan, tokens, sums

    with pytest.raises(NonFiniteGradient, match="not changed"):
        trainer.step(micro_batches(0), broken, 1e-3)
    assert torch.equal(before, weights(trainer))
    trainer.step(micro_batches(0), language_model_loss, 1e-3)  # and goes on from there
    assert torch.isfinite(weights(trainer)).all()


def test_layer_norms_are_those_of_autograd(make_trainer) -> None:
    from m1.config.parallel import Parallel
    from m1.config.training import Optimizer
    from m1.model.hybrid import build_model
    from m1.training.trainer import language_model_loss, token_logprobs

    trainer = make_trainer(optimizer=Optimizer(eps=1e-8, clip_grad=1e9))
    batch = full_batch(torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1)))
    oracle = build_model(trainer.model.settings, Parallel(), seed=3)  # the trainer's own initial weights
    positions = torch.arange(16).expand(2, 16)
    loss = -token_logprobs(oracle(batch.tokens, positions, None), batch.labels).mean()
    parameters = dict(oracle.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True)
    )
    trainer.step([batch], language_model_loss, 1e-3)
    for layer, norm in trainer.layer_gradient_norms().items():
        expected = sum(
            float(g.square().sum()) for n, g in gradients.items() if f"layers.{layer}." in n and g is not None
        )
        assert norm == pytest.approx(math.sqrt(expected), rel=1e-4)


def test_tokens_seen_are_inputs_without_padding_and_survive_a_checkpoint(make_trainer, tmp_path) -> None:
    from m1.training.trainer import language_model_loss

    trainer = make_trainer()
    batch = padded_batch([[5, *range(40, 50)], [7, 8, 9]], [1, 1])
    for _ in range(3):
        metrics = trainer.step([batch], language_model_loss, 1e-3)
    assert metrics["tokens_seen"] == trainer.tokens_seen == 3 * (10 + 2)
    trainer.evaluate([batch], language_model_loss)
    assert trainer.tokens_seen == 36
    folder = trainer.save(tmp_path / "step_3", {"step": 3})
    continued, fresh = make_trainer(), make_trainer()
    continued.load(folder)
    fresh.load(folder, optimizer=False)
    assert (continued.tokens_seen, fresh.tokens_seen) == (36, 0)


def test_a_shared_prompt_gives_what_it_gives_before_every_response(make_trainer) -> None:
    """Log-probabilities and gradients are those of prompt and response in a row of their own."""
    rng = random.Random(0)
    prompts = [[rng.randrange(99) for _ in range(length)] for length in (20, 1, 70, 2)]
    owners = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    responses = [[rng.randrange(99) for _ in range(rng.randrange(1, 60))] for _ in owners]
    weights = {"weight": [[rng.random() for _ in response] for response in responses]}
    shared = shared_prompt_batch(prompts, responses, owners, extra=weights)
    starts = [len(prompts[owner]) for owner in owners]
    apart = padded_batch([prompts[o] + r for o, r in zip(owners, responses)], starts, extra=weights)
    trainer = make_trainer()
    found = [trainer.token_logprobs(batch)[batch.loss_mask > 0] for batch in (shared, apart)]
    assert torch.allclose(*found, atol=1e-5)

    def weighted(logprobs, batch):
        loss = -(logprobs * batch.extra["weight"]).sum()
        return loss, batch.loss_mask.sum(), {"loss": loss.detach()}

    found = []
    for batch in (shared, apart):
        trainer.step([batch], weighted, 0.0)
        found.append(gradients(trainer))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
