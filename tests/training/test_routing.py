"""Load balance over the global batch, capacity, and what is counted, against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.training.batch import padded_batch

MODEL = Model(
    num_layers=3, softmax_every=3, hidden_size=32, num_attention_heads=2, num_query_groups=1, head_dim=16,
    num_experts=6, moe_router_topk=2, moe_ffn_hidden_size=24, vocab_size=300, max_position_embeddings=256,
)  # fmt: skip
COEFFICIENT = 0.3


@pytest.fixture
def batches():
    """Three micro-batches of different padding."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for lengths in ((30, 12), (20, 17), (26, 9)):
        samples = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]
        found.append(padded_batch(samples, [3, 4]))
    return found


@pytest.fixture
def make(make_trainer):
    """A trainer of a model with more experts than are chosen; `make_trainer` has prepared this process."""
    from m1.training.trainer import Trainer

    def make(coefficient=COEFFICIENT, **settings):
        optimizer = Optimizer(eps=1e-8, clip_grad=1e9)  # gradients stay as they were computed
        return Trainer(MODEL, Parallel(**settings), seed=3, optimizer=optimizer, moe_aux_loss_coeff=coefficient)

    return make


def router_inputs(model, batches):
    """Every router's logits for the real tokens of every micro-batch, (micro-batch)(layer)(tokens, experts); logits."""
    from m1.model.router import routers

    found, outputs = [], []
    for batch in batches:
        layers = []
        real = ~batch.padding_mask.T.reshape(-1)
        for router in routers([model]):
            gating = type(router).gating

            def record(x, router=router, gating=gating, layers=layers, real=real):
                logits = gating(router, x)
                layers.append(logits.reshape(-1, MODEL.num_experts)[real])
                return logits

            router.gating = record
        outputs.append(model(batch.tokens, batch.positions, None, padding_mask=batch.padding_mask))
        found.append(layers)
    return found, outputs


def choices(logits):
    """How often each expert is among a token's best, (experts,)."""
    return torch.bincount(logits.topk(MODEL.moe_router_topk, dim=-1).indices.flatten(), minlength=MODEL.num_experts)


def global_aux_losses(inputs):
    """GShard's loss of every layer over all tokens of all micro-batches, balanced at one."""
    losses = []
    for layer in range(MODEL.num_layers):
        logits = torch.cat([layers[layer] for layers in inputs])
        f = choices(logits) / (len(logits) * MODEL.moe_router_topk)
        losses.append(MODEL.num_experts * (f * torch.softmax(logits, dim=-1).mean(dim=0)).sum())
    return losses


def oracle(trainer):
    from m1.model.hybrid import build_model

    return build_model(MODEL, trainer.parallel, seed=3)


def test_gradient_of_the_loss_over_the_global_batch(make, batches):
    """Cross entropy per label plus the coefficient times every layer's auxiliary loss, differentiated by autograd."""
    from m1.training.trainer import language_model_loss, token_logprobs

    trainer = make()
    model = oracle(trainer)
    inputs, outputs = router_inputs(model, batches)
    losses = global_aux_losses(inputs)
    labels = sum(batch.num_tokens for batch in batches)
    cross_entropy = sum(language_model_loss(token_logprobs(o, b.labels), b)[0] for o, b in zip(outputs, batches))
    (cross_entropy / labels + COEFFICIENT * sum(losses)).backward()

    metrics = trainer.step(batches, language_model_loss, 0.0)

    assert metrics["moe_aux_loss"] == pytest.approx(sum(loss.item() for loss in losses) / len(losses), rel=1e-5)
    for (name, expected), ours in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_running_counts_take_the_micro_batches_so_far(make, batches):
    from m1.training.trainer import language_model_loss, token_logprobs

    trainer = make(moe_aux_loss_counts="running")
    model = oracle(trainer)
    inputs, outputs = router_inputs(model, batches)
    tokens = sum(len(layers[0]) for layers in inputs)
    total = torch.zeros(())
    for layer in range(MODEL.num_layers):
        seen = torch.zeros(MODEL.num_experts)
        for layers in inputs:
            seen += choices(layers[layer])
            probabilities = torch.softmax(layers[layer], dim=-1).sum(dim=0) / tokens
            total = total + MODEL.num_experts * (seen / seen.sum() * probabilities).sum()
    cross_entropy = sum(language_model_loss(token_logprobs(o, b.labels), b)[0] for o, b in zip(outputs, batches))
    (cross_entropy / sum(batch.num_tokens for batch in batches) + COEFFICIENT * total).backward()

    metrics = trainer.step(batches, language_model_loss, 0.0)

    assert metrics["moe_aux_loss"] == pytest.approx(total.item() / MODEL.num_layers, rel=1e-5)
    for (name, expected), ours in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loads_are_shares_of_the_choices(make, batches):
    from m1.training.trainer import language_model_loss

    trainer = make(coefficient=0.0)
    inputs, _ = router_inputs(oracle(trainer), batches)
    counts = torch.stack([sum(choices(layers[layer]) for layers in inputs) for layer in range(MODEL.num_layers)])
    load = counts / counts.sum(dim=1, keepdim=True)
    metrics = trainer.step(batches, language_model_loss, 0.0)
    for expert in range(MODEL.num_experts):
        assert metrics[f"moe_load/{expert:02d}"] == pytest.approx(float(load[:, expert].mean()), abs=1e-6)
    assert metrics["moe_load_max"] == pytest.approx(float(load.max()) * MODEL.num_experts, rel=1e-6)
    assert "moe_dropped_tokens" not in metrics and "moe_aux_loss" not in metrics


def test_recomputation_counts_nothing_twice(make, batches):
    from m1.training.trainer import language_model_loss

    reports = [
        make(recompute=recompute, moe_expert_capacity_factor=0.6).step(batches, language_model_loss, 1e-3)
        for recompute in ("none", "full")
    ]
    assert reports[0] == reports[1]
    assert reports[0]["moe_dropped_tokens"] > 0


def test_dropped_tokens_are_those_above_the_capacity(make, batches):
    """The first layer's choices do not depend on what is dropped, so a model of one layer is counted exactly."""
    from m1.training.trainer import Trainer, language_model_loss

    one_layer = MODEL.model_copy(update={"num_layers": 1, "softmax_every": 1})
    layout = Parallel(moe_expert_capacity_factor=0.7)
    trainer = Trainer(one_layer, layout, seed=3, optimizer=Optimizer())
    from m1.model.hybrid import build_model

    inputs, _ = router_inputs(build_model(one_layer, Parallel(), seed=3), batches)
    dropped = 0
    for batch, (logits,) in zip(batches, inputs):
        capacity = math.ceil(batch.tokens.numel() * MODEL.moe_router_topk / MODEL.num_experts * 0.7)
        dropped += int((choices(logits) - capacity).clamp(min=0).sum())
    assert dropped > 0
    assert trainer.step(batches, language_model_loss, 1e-3)["moe_dropped_tokens"] == dropped


def test_a_full_expert_keeps_the_most_probable_tokens_and_no_padding(make):
    router = make(moe_expert_capacity_factor=0.5).routing.routers[0]
    logits = torch.randn(40, 2, MODEL.num_experts, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(40, 2, dtype=torch.bool)
    padding[30:, 1] = True
    weights, kept = router.routing(logits, padding)
    capacity = math.ceil(80 * MODEL.moe_router_topk / MODEL.num_experts * 0.5)
    best = logits.view(80, -1).topk(MODEL.moe_router_topk, dim=-1)
    expected = torch.zeros(80, MODEL.num_experts).scatter(1, best.indices, torch.softmax(best.values, dim=-1))
    expected *= ~padding.reshape(-1, 1)
    for expert in range(MODEL.num_experts):
        chosen = expected[:, expert] > 0
        assert int(kept[:, expert].sum()) == min(capacity, int(chosen.sum()))
        left_out = expected[:, expert][chosen & ~kept[:, expert]]
        assert not len(left_out) or left_out.max() <= expected[:, expert][kept[:, expert]].min()
    torch.testing.assert_close(weights, expected * kept)
    assert not kept[padding.reshape(-1)].any()


def test_room_for_all_drops_nothing(make, batches):
    from m1.training.trainer import language_model_loss

    roomy = make(moe_expert_capacity_factor=float(MODEL.num_experts))
    metrics = roomy.step(batches, language_model_loss, 1e-3)
    free = make().step(batches, language_model_loss, 1e-3)
    assert metrics.pop("moe_dropped_tokens") == 0
    assert metrics == pytest.approx(free, rel=1e-5)


def test_routers_compute_in_float32_in_a_bf16_model(make, batches):
    trainer = make(precision="bf16")
    inputs, _ = router_inputs(trainer.model, batches[:1])
    assert {logits.dtype for logits in inputs[0]} == {torch.float32}
