"""The decoder: what it may look at, what it shares, how big it is."""

import dataclasses
import math

import llama
import pytest
import torch
import torch.nn.functional as F

SMALL = llama.Size(hidden=16, intermediate=24, layers=2, heads=2)


def model(size=SMALL, vocab_size=32, tie_head=False, seed=0):
    """In fp64, with weights large enough that every path matters."""
    result = llama.Llama(size, vocab_size, tie_head).initialize(seed).double()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return result


@pytest.mark.parametrize("position", [0, 3, 8])
def test_a_byte_changes_no_earlier_logit_and_every_later_one(position):
    tokens = torch.randint(32, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1) % 32
    with torch.no_grad():
        difference = (model()(tokens) - model()(changed)).abs().amax(-1)[0]
    # Positions are computed together, so a kernel may round differently; it cannot do so by more than a few
    # ulp of a logit of size ~10.
    assert difference[:position].max().item() < 1e-13 if position else True
    assert (difference[position:] > 1e-6).all()


def test_a_tied_head_is_the_embedding():
    tied, untied = model(tie_head=True), model(tie_head=False)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    llama.loss(tied, torch.arange(8)[None]).backward()
    unseen = tied.embed_tokens.weight.grad[20:]
    assert unseen.abs().sum() > 0  # words that were not read are still scored


def test_rotary_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)

    def score(s, t):
        cos, sin = llama.rotary_angles(torch.tensor([s, t]), 16)
        rotated = llama.rotate(torch.stack((q, k)), cos, sin)
        return (rotated[0] @ rotated[1]).item()

    # fp32: angles up to 40 are rounded to 40·2⁻²⁴ ≈ 2.4e-6, on 16 terms of size ~1.
    assert score(3, 7) == pytest.approx(score(36, 40), abs=16 * 1e-5)
    assert abs(score(3, 7) - score(3, 9)) > 1e-2
    assert score(5, 5) == pytest.approx((q @ k).item(), abs=16 * 1e-5)


def test_rotation_keeps_norms():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    rotated = llama.rotate(x, *llama.rotary_angles(torch.arange(5), 8))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[0], x[0])
    assert not torch.allclose(rotated[1:], x[1:])


def test_rms_norm_is_its_formula():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    norm = llama.RMSNorm(7)
    norm.weight.data = torch.arange(1.0, 8.0)
    expected = torch.arange(1.0, 8.0) * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(1000 * x), expected)


@pytest.mark.parametrize("tie_head", [False, True])
@pytest.mark.parametrize("name", ["tiny", "9m", "60m"])
def test_parameter_count(name, tie_head):
    with torch.device("meta"):
        built = llama.Llama(llama.SIZES[name], 256, tie_head)
    assert llama.parameter_count(llama.SIZES[name], 256, tie_head) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("size", llama.SIZES.values(), ids=llama.SIZES)
def test_heads_divide_the_width_in_pairs(size):
    assert size.hidden % (2 * size.heads) == 0


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    first = llama.Llama(SMALL, 32).initialize(5).state_dict()
    torch.manual_seed(2)
    again, other = llama.Llama(SMALL, 32).initialize(5).state_dict(), llama.Llama(SMALL, 32).initialize(6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_an_untrained_model_knows_nothing():
    """At initialization the loss is that of a uniform guess, ln 256, within the spread of logits of std
    0.02·sqrt(128)."""
    fresh = llama.Llama(dataclasses.replace(llama.SIZES["tiny"], layers=1), 256).initialize(0)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    assert llama.loss(fresh, tokens).item() == pytest.approx(math.log(256), abs=0.15)


def test_loss_predicts_the_next_byte():
    built = model()
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    log_p = F.log_softmax(built(tokens), dim=-1)
    expected = -torch.stack([log_p[b, t, tokens[b, t + 1]] for b in range(2) for t in range(5)]).mean()
    assert llama.loss(built, tokens).item() == pytest.approx(expected.item(), rel=1e-6)  # the loss is taken in fp32
