"""Recurrent decoding against the training forward, token by token."""

import copy

import pytest
import torch
from small_model import ALONE, SMALL, logits_of

from m1.rollout.decoder import Decoder

TOLERANCE = 1e-4


def decode_along(decoder, tokens, lengths, steps, capacity=0):
    """Logits at each row's positions lengths[b] - 1 + i, i = 0..steps, feeding the row's own tokens."""
    lengths = torch.tensor(lengths)
    cache, logits = decoder.prefill(tokens[:, : int(lengths.max())], lengths, capacity)
    collected = [logits]
    for i in range(steps):
        collected.append(decoder.step(cache, tokens[torch.arange(len(lengths)), lengths + i]))
    return torch.stack(collected, dim=1)


def along(reference, lengths, steps):
    return torch.stack([row[n - 1 : n + steps] for row, n in zip(reference, lengths, strict=True)])


def assert_equal_logits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_equals_the_training_forward_over_a_long_ragged_batch(hybrid, tokens):
    tokens = torch.cat((tokens, tokens.flip(0)))
    lengths, steps = [1, 63, 64, 200], 390
    expected = along(logits_of(hybrid, tokens), lengths, steps)
    assert_equal_logits(decode_along(Decoder(hybrid), tokens, lengths, steps), expected)


@pytest.mark.parametrize("seed", range(5))
def test_random_raggedness(hybrid, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, steps = int(torch.randint(1, 6, (), generator=generator)), 5
    lengths = torch.randint(1, 90, (batch,), generator=generator).tolist()
    tokens = torch.randint(0, SMALL.vocab_size, (batch, max(lengths) + steps), generator=generator)
    expected = along(logits_of(hybrid, tokens), lengths, steps)
    assert_equal_logits(decode_along(Decoder(hybrid), tokens, lengths, steps), expected)


def test_padding_and_neighbours_change_nothing(hybrid, tokens):
    decoder = Decoder(hybrid)
    together = decode_along(decoder, tokens, [5, 300], 20)
    torch.testing.assert_close(together[:1], decode_along(decoder, tokens[:1], [5], 20), rtol=0, atol=1e-5)
    other_padding = tokens.clone()
    other_padding[0, 25:] = 9
    assert torch.equal(decode_along(decoder, other_padding, [5, 300], 20), together)


def test_follows_the_rotary_base(hybrid, tokens):
    decoder, base = Decoder(hybrid), hybrid.rotary_base
    before = decode_along(decoder, tokens, [80, 90], 10)
    try:
        hybrid.set_rotary_base(200.0)
        expected = along(logits_of(hybrid, tokens[:, :101]), [80, 90], 10)
        after = decode_along(decoder, tokens, [80, 90], 10)
    finally:
        hybrid.set_rotary_base(base)
    assert_equal_logits(after, expected)
    assert (after - before).abs().max() > 10 * TOLERANCE


def test_sees_the_weights_of_the_newest_training_step(tokens):
    from m1.config.training import Optimizer
    from m1.training import parallel
    from m1.training.batch import full_batch
    from m1.training.trainer import Trainer, language_model_loss

    parallel.initialize(ALONE, 1)
    trainer = Trainer(SMALL, ALONE, seed=3, optimizer=Optimizer())
    decoder = Decoder(trainer.model)
    before = decode_along(decoder, tokens, [20, 30], 10)
    trainer.step([full_batch(tokens[:, :65])], language_model_loss, 1e-2)
    after = decode_along(decoder, tokens, [20, 30], 10)
    assert_equal_logits(after, along(logits_of(trainer.model, tokens[:, :41]), [20, 30], 10))
    assert (after - before).abs().max() > 10 * TOLERANCE


def test_many_experts_take_the_sorted_path(tokens):
    from m1.model.hybrid import build_model
    from m1.training import parallel

    parallel.initialize(ALONE, 1)
    settings = SMALL.model_copy(update={"num_experts": 7, "moe_router_topk": 3})
    model = build_model(settings, ALONE, seed=5).eval()
    expected = along(logits_of(model, tokens[:, :101]), [7, 60], 40)
    assert_equal_logits(decode_along(Decoder(model), tokens, [7, 60], 40), expected)


def test_cache_grows_beyond_its_capacity(hybrid, tokens):
    decoder = Decoder(hybrid)
    small = decode_along(decoder, tokens, [3, 7], 60)
    assert torch.equal(small, decode_along(decoder, tokens, [3, 7], 60, capacity=128))


def test_select_keep_and_append_move_rows_whole(hybrid, tokens):
    decoder = Decoder(hybrid)
    rows = torch.cat((tokens, tokens.flip(1)))
    lengths = torch.tensor([10, 25, 40, 5])
    cache, logits = decoder.prefill(rows[:, :40], lengths)
    cache, source = cache.select(torch.tensor([3, 0, 0, 2, 1])), [3, 0, 0, 2, 1]
    order = cache.keep([1, 3, 4])
    assert sorted(order) == [1, 3, 4]
    source = [source[i] for i in order]
    other, _ = decoder.prefill(rows[:2, :12], torch.tensor([12, 9]))
    cache, source, seen = cache.append(other), [*source, 0, 1], [*lengths[source].tolist(), 12, 9]
    reference = logits_of(hybrid, rows[:, :60])
    seen = torch.tensor(seen)
    for i in range(6):
        at = seen + i
        logits = decoder.step(cache, rows[source, at])
        assert_equal_logits(logits, reference[source, at])


@pytest.mark.parametrize(
    "name", ["tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"]
)
def test_refuses_a_split_model(hybrid, name):
    split = copy.copy(hybrid)
    split.config = copy.copy(hybrid.config)
    setattr(split.config, name, 2)
    with pytest.raises(ValueError, match=f"{name} is 2"):
        Decoder(split)


def test_refuses_impossible_lengths(hybrid, tokens):
    for lengths in ([0, 3], [3, 11], [3]):
        with pytest.raises(ValueError, match="lengths"):
            Decoder(hybrid).prefill(tokens[:, :10], torch.tensor(lengths))
