"""Modifiers and weighted sums of losses."""

import math

import pytest
import torch

from lightning_dpo.losses import (
    LDDPO,
    WPO,
    AOTLoss,
    BCOLoss,
    CombinedLoss,
    DPOLoss,
    IPOLoss,
    LengthNormalizedDPOLoss,
    SFTLoss,
    SimPOLoss,
)
from lightning_dpo.types import PairLogps


def completions(seed, lengths):
    """Per-token log-probs of completions, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return [-torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]


LENGTHS = [4, 9, 6], [7, 2, 6]


def logps(seed, *, confidence=False):
    """PairLogps of random tokens, and the tokens."""
    chosen, rejected = completions(seed, LENGTHS[0]), completions(seed + 100, LENGTHS[1])
    shorter = [min(pair) for pair in zip(*LENGTHS, strict=True)]
    values = PairLogps(
        torch.stack([tokens.sum() for tokens in chosen]),
        torch.stack([tokens.sum() for tokens in rejected]),
        *map(torch.tensor, LENGTHS),
        torch.stack([tokens[:m].sum() for tokens, m in zip(chosen, shorter, strict=True)]),
        torch.stack([tokens[:m].sum() for tokens, m in zip(rejected, shorter, strict=True)]),
    )
    if confidence:
        values = values._replace(
            chosen_confidence=torch.tensor([-0.5, -0.1, 0.2], dtype=torch.float64),
            rejected_confidence=torch.tensor([-1.5, 0.0, -0.3], dtype=torch.float64),
        )
    return values, chosen, rejected


def minus_log_sigmoid(x):
    return math.log(1 + math.exp(-x))


class TestWPO:
    def test_weights_each_pair_by_both_confidences(self):
        policy, *_ = logps(0, confidence=True)
        reference, *_ = logps(1)
        plain, weighted = DPOLoss(0.3)(policy, reference), WPO(DPOLoss(0.3))(policy, reference)
        for i, (a, b) in enumerate([(-0.5, -1.5), (-0.1, 0.0), (0.2, -0.3)]):
            assert weighted[i].item() == pytest.approx(math.exp(a) * math.exp(b) * plain[i].item(), rel=1e-12)

    def test_weights_take_no_gradient(self):
        policy, *_ = logps(0, confidence=True)
        confidence = policy.chosen_confidence.clone().requires_grad_()
        chosen = policy.chosen.clone().requires_grad_()
        reference, *_ = logps(1)
        WPO(DPOLoss(0.3))(
            policy._replace(chosen=chosen, chosen_confidence=confidence), reference
        ).sum().backward()
        assert confidence.grad is None
        assert (chosen.grad != 0).all()

    def test_asks_for_confidences(self):
        assert WPO(DPOLoss()).needs_confidence
        assert not DPOLoss().needs_confidence
        policy, *_ = logps(0)
        with pytest.raises(ValueError, match=r"`policy` must hold `chosen_confidence` .* got None; score it"):
            WPO(DPOLoss())(policy, policy)

    @pytest.mark.parametrize("loss", [AOTLoss(), CombinedLoss([DPOLoss(), AOTLoss()]), LDDPO(AOTLoss())])
    def test_refuses_losses_that_sort_the_batch(self, loss):
        with pytest.raises(ValueError, match=r"`loss` must give each pair .* across the batch"):
            WPO(loss)

    def test_value_at_start_depends_on_the_data(self):
        assert WPO(DPOLoss()).expected_at_start() is None


class TestLDDPO:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_tokens_beyond_the_shorter_length_count_alpha_times(self, alpha):
        policy, policy_chosen, policy_rejected = logps(0)
        reference, reference_chosen, reference_rejected = logps(1)
        measured = LDDPO(DPOLoss(0.3), alpha=alpha)(policy, reference)
        for i, m in enumerate([4, 2, 6]):
            parts = [policy_chosen[i], policy_rejected[i], reference_chosen[i], reference_rejected[i]]
            weighted = [
                sum(t * (1 if k < m else alpha) for k, t in enumerate(tokens.tolist())) for tokens in parts
            ]
            pc, pr, rc, rr = weighted
            value = minus_log_sigmoid(0.3 * ((pc - rc) - (pr - rr)))
            assert measured[i].item() == pytest.approx(value, rel=1e-12)

    def test_means_per_token_divide_by_the_tokens_as_they_count(self):
        policy, *_ = logps(0)
        measured = LDDPO(SFTLoss(), alpha=0.3)(policy, None)
        head, total = policy.chosen_common[1].item(), policy.chosen[1].item()
        assert measured[1].item() == pytest.approx(-(head + 0.3 * (total - head)) / (2 + 0.3 * 7), rel=1e-12)

    def test_alpha_one_changes_nothing(self):
        policy, reference = logps(0)[0], logps(1)[0]
        for loss in (DPOLoss(0.3), IPOLoss(0.3), LengthNormalizedDPOLoss(0.3), SimPOLoss()):
            torch.testing.assert_close(
                LDDPO(loss, alpha=1.0)(policy, reference), loss(policy, reference), rtol=1e-12, atol=0
            )

    def test_gradient_is_the_weight(self):
        policy, *_ = logps(0)
        head, total = (policy[i].clone().requires_grad_() for i in (4, 0))
        LDDPO(SFTLoss(), alpha=0.3)(policy._replace(chosen=total, chosen_common=head), None).sum().backward()
        lengths = torch.tensor([4.0, 2 + 0.3 * 7, 6.0], dtype=torch.float64)
        torch.testing.assert_close(total.grad, -0.3 / lengths, rtol=1e-12, atol=0)
        torch.testing.assert_close(head.grad, -0.7 / lengths, rtol=1e-12, atol=0)

    def test_asks_for_heads(self):
        policy, *_ = logps(0)
        bare = policy._replace(chosen_common=None)
        with pytest.raises(ValueError, match=r"`policy` must hold `chosen_common`"):
            LDDPO(DPOLoss())(bare, policy)
        with pytest.raises(ValueError, match=r"`reference` must hold `chosen_common`"):
            LDDPO(DPOLoss())(policy, bare)

    def test_reference_is_asked_for_by_the_wrapped_loss(self):
        policy, *_ = logps(0)
        with pytest.raises(ValueError, match=r"`reference` .* for DPOLoss, got None"):
            LDDPO(DPOLoss())(policy, None)

    def test_value_at_start_is_the_wrapped_loss_s(self):
        assert LDDPO(IPOLoss(0.1)).expected_at_start() == pytest.approx(25.0)
        policy, *_ = logps(0)
        assert LDDPO(IPOLoss(0.1))(policy, policy).tolist() == pytest.approx([25.0] * 3)

    def test_goes_with_wpo(self):
        policy, reference = logps(0, confidence=True)[0], logps(1)[0]
        loss = WPO(LDDPO(DPOLoss(0.3), alpha=0.3))
        inner = LDDPO(DPOLoss(0.3), alpha=0.3)(policy, reference)
        weights = torch.exp(policy.chosen_confidence + policy.rejected_confidence)
        torch.testing.assert_close(loss(policy, reference), inner * weights, rtol=1e-12, atol=0)
        assert loss.needs_confidence


class TestCombinedLoss:
    def test_adds_weighted_losses(self):
        policy, reference = logps(0)[0], logps(1)[0]
        loss = CombinedLoss(
            [DPOLoss(0.3), BCOLoss(0.2, track_delta=False), SFTLoss()], weights=[0.8, 0.2, 1.0]
        )
        expected = (
            0.8 * DPOLoss(0.3)(policy, reference)
            + 0.2 * BCOLoss(0.2, track_delta=False)(policy, reference)
            + SFTLoss()(policy, None)
        )
        torch.testing.assert_close(loss(policy, reference), expected, rtol=1e-12, atol=0)

    def test_weights_are_one_where_not_given(self):
        policy, reference = logps(0)[0], logps(1)[0]
        both = CombinedLoss([DPOLoss(0.3), SFTLoss()])(policy, reference)
        torch.testing.assert_close(both, DPOLoss(0.3)(policy, reference) + SFTLoss()(policy, None))

    def test_needs_what_its_parts_need(self):
        free = CombinedLoss([SFTLoss(), SimPOLoss(beta=2.5)])
        assert (free.needs_reference, free.needs_confidence) == (False, False)
        full = CombinedLoss([SFTLoss(), WPO(DPOLoss(beta=0.3)), LDDPO(SFTLoss())])
        assert (full.needs_reference, full.needs_confidence) == (True, True)

    def test_beta_is_that_of_the_first_loss_that_has_one(self):
        assert CombinedLoss([SFTLoss(), WPO(DPOLoss(beta=0.3)), IPOLoss(beta=0.7)]).beta == 0.3
        assert CombinedLoss([WPO(SFTLoss()), IPOLoss(beta=0.7)]).beta == 0.7
        assert CombinedLoss([SFTLoss()]).beta == 1.0

    def test_parts_follow_train_and_eval_and_are_saved(self):
        loss = CombinedLoss([DPOLoss(), BCOLoss()])
        assert set(loss.state_dict()) == {"losses.1.delta", "losses.1.pairs_seen"}
        assert not loss.eval().losses[1].training

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), r"`losses` must hold at least one loss, got none"),
            (([DPOLoss(), SFTLoss()], [1.0]), r"`weights` must have one number for each of the 2 losses"),
            (([DPOLoss()], [-1.0]), r"`weights\[0\]` must be .* at least 0, got weights\[0\]=-1.0"),
        ],
    )
    def test_errors(self, arguments, message):
        losses, *weights = arguments
        with pytest.raises(ValueError, match=message):
            CombinedLoss(losses, weights=weights[0] if weights else None)
