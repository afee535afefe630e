"""The same batch through TRL's own loss code, values and gradients.

TRL computes its losses inside `DPOTrainer._compute_loss`, from the per-token results of a model. It runs here
on a trainer that has what the method reads and nothing else, and on models that return given log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_dpo import losses as L
from lightning_dpo.types import PairLogps

trl = pytest.importorskip("trl")

PROMPT = 3
CHOSEN_LENGTHS, REJECTED_LENGTHS = [4, 9, 6, 1], [7, 2, 6, 5]
LENGTHS = CHOSEN_LENGTHS + REJECTED_LENGTHS


class Scored(torch.nn.Module):
    """A model whose per-token results are given."""

    is_gradient_checkpointing = False

    def __init__(self, token_logps, *, lengths=LENGTHS, log_sum_squares=None):
        super().__init__()
        self.lengths = lengths
        self.token_logps = token_logps.clone().requires_grad_()
        self.log_sum_squares = -torch.ones_like(token_logps) if log_sum_squares is None else log_sum_squares

    @property
    def mask(self):
        """Completion tokens, (2 * batch, seq_len); the first column has no log-prob."""
        width = PROMPT + max(self.lengths)
        rows = [[PROMPT <= k < PROMPT + length for k in range(width)] for length in self.lengths]
        return torch.tensor(rows)

    def forward(self, **_):
        mask = self.mask[:, 1:]
        zeros = torch.zeros(mask.shape, dtype=self.token_logps.dtype)
        return SimpleNamespace(
            log_probs=zeros.masked_scatter(mask, self.token_logps),
            log_sum_sq_probs=zeros.masked_scatter(mask, self.log_sum_squares),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=mask,
        )

    def logps(self):
        """The same tokens as this package's scoring sums them."""
        tokens = self.token_logps.split(self.lengths)
        squares = self.log_sum_squares.split(self.lengths)
        lengths = torch.tensor(self.lengths)
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2).tolist()
        sums = torch.stack([t.sum() for t in tokens])
        heads = torch.stack([t[:m].sum() for t, m in zip(tokens, shorter, strict=True)])
        confidences = torch.stack([(t - q).mean() for t, q in zip(tokens, squares, strict=True)]).detach()
        return PairLogps(*sums.chunk(2), *lengths.chunk(2), *heads.chunk(2), *confidences.chunk(2))


def models(dtype=torch.float64, lengths=LENGTHS):
    """A policy and a reference with random tokens."""
    generator = torch.Generator().manual_seed(0)
    draws = [-3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(3)]
    policy, reference, squares = (draw.to(dtype) for draw in draws)
    return Scored(policy, lengths=lengths, log_sum_squares=squares), Scored(reference, lengths=lengths)


def trl_loss(policy, reference, *, loss_type, beta=0.3, **options):
    """TRL's loss of the batch, a scalar."""
    settings = {
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "loss_weights": None,
        "discopop_tau": 0.05,
    } | options
    trainer = object.__new__(trl.DPOTrainer)
    types = loss_type if isinstance(loss_type, list) else [loss_type]
    vars(trainer).update(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau")),
        loss_types=types,
        beta=beta,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings | {"loss_weights": settings["loss_weights"] or [1.0] * len(types)},
    )
    mask = policy.mask
    inputs = {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long()}
    return trainer._compute_loss(policy, inputs, return_outputs=False)


def assert_same(loss, *, dtype=torch.float64, rtol=1e-12, lengths=LENGTHS, **options):
    """Same loss of the batch and same gradient of every token."""
    policy, reference = models(dtype, lengths)
    theirs = trl_loss(policy, reference, **options)
    theirs.backward()
    their_gradient, policy.token_logps.grad = policy.token_logps.grad, None
    ours = loss(policy.logps(), reference.logps() if loss.needs_reference else None).mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    torch.testing.assert_close(policy.token_logps.grad, their_gradient, rtol=rtol, atol=rtol)
    assert their_gradient.abs().max() > 0


SAME = {
    "sigmoid": (L.DPOLoss(0.3), {}),
    "hinge": (L.HingeLoss(0.3), {}),
    "ipo": (L.IPOLoss(0.3), {}),
    "nca_pair": (L.NCALoss(0.3), {}),
    "robust": (L.RobustDPOLoss(0.3, label_smoothing=0.1), {"label_smoothing": 0.1}),
    "bco_pair": (L.BCOLoss(0.3, track_delta=False), {}),
    "sppo_hard": (L.SPPOLoss(0.3), {}),
    "aot": (L.AOTLoss(0.3, label_smoothing=0.1), {"label_smoothing": 0.1}),
    "aot_unpaired": (L.AOTLoss(0.3, label_smoothing=0.1, unpaired=True), {"label_smoothing": 0.1}),
    "apo_zero": (L.APOZeroLoss(0.3), {}),
    "apo_down": (L.APODownLoss(0.3), {}),
    "discopop": (L.DiscoPOPLoss(0.3, tau=0.1), {"discopop_tau": 0.1}),
    "sft": (L.SFTLoss(token_weighted=True), {}),
    "sigmoid_norm": (L.LengthNormalizedDPOLoss(0.3), {}),
}


@pytest.mark.parametrize("loss_type", SAME)
def test_losses_that_are_the_same(loss_type):
    loss, options = SAME[loss_type]
    assert_same(loss, loss_type=loss_type, **options)


def test_every_loss_of_trl_is_compared():
    documented = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    for name in [*SAME, "exo_pair"]:
        assert f"'{name}'" in documented
    # one quoted name for each, and nothing that is missing here
    assert documented.count("'") == 2 * (len(SAME) + 1)


def test_exo():
    # TRL holds label_smoothing in float32.
    assert_same(L.EXOLoss(0.3, label_smoothing=0.01), loss_type="exo_pair", label_smoothing=0.01, rtol=1e-7)


ON_MARGIN = {
    "sigmoid": L.DPOLoss,
    "hinge": L.HingeLoss,
    "ipo": L.IPOLoss,
    "sigmoid_norm": L.LengthNormalizedDPOLoss,
    "discopop": L.DiscoPOPLoss,
}


@pytest.mark.parametrize("loss_type", ON_MARGIN)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_divergences(loss_type, divergence):
    loss = ON_MARGIN[loss_type](0.3, divergence=divergence)
    assert_same(loss, loss_type=loss_type, f_divergence_type=divergence)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_alpha_divergence(alpha):
    # TRL computes exp(x) - 1 in float32, where this package has expm1 in the input's precision.
    assert_same(
        L.DPOLoss(0.3, divergence="alpha_divergence", alpha=alpha),
        dtype=torch.float32,
        rtol=2e-5,
        loss_type="sigmoid",
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=alpha,
    )


def test_summed_ipo_is_trl_s_on_completions_of_one_token():
    # TRL has the mean only; with |y| = 1 for all, sum and mean are one.
    ones = [1] * 8
    assert_same(L.IPOLoss(0.3, length_normalized=False), loss_type="ipo", lengths=ones)
    policy, reference = models()
    summed = L.IPOLoss(0.3, length_normalized=False)(policy.logps(), reference.logps()).mean()
    assert (summed - trl_loss(policy, reference, loss_type="ipo")).abs() > 1


def test_bco_shift_moves_trl_s_rewards():
    # TRL has no running mean: its loss on rewards r - delta is this package's at delta.
    policy, reference = models()
    loss = L.BCOLoss(0.3)
    ours = loss(policy.logps(), reference.logps()).mean()
    assert loss.delta.abs() > 0.1
    # beta * (pi - ref - shift) = r - delta, with the shift on each completion's first token
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    moved = reference.token_logps.detach().index_add(0, starts, (loss.delta.double() / 0.3).expand(8))
    theirs = trl_loss(policy, Scored(moved), loss_type="bco_pair")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# TRL refuses aot, as this package does. It multiplies by the weights in place, which fails on its hinge (relu
# keeps its result for the backward pass) and sft (an expanded tensor).
@pytest.mark.parametrize("loss_type", sorted(set(SAME) - {"aot", "aot_unpaired", "hinge", "sft"}))
def test_wpo(loss_type):
    loss, options = SAME[loss_type]
    assert_same(L.WPO(loss), loss_type=loss_type, use_weighting=True, **options)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sppo_hard", "apo_down"])
def test_ld_dpo(loss_type):
    assert_same(L.LDDPO(SAME[loss_type][0], alpha=0.3), loss_type=loss_type, ld_alpha=0.3)


def test_ld_dpo_of_a_mean_differs_by_the_tokens_it_divides_by():
    # TRL divides the reweighted sum by |y|, this package by m + alpha (|y| - m).
    policy, reference = models()
    loss = L.LDDPO(L.LengthNormalizedDPOLoss(0.3), alpha=0.3)
    given = policy.logps(), reference.logps()
    over_all_tokens = [
        logps._replace(
            chosen=0.7 * logps.chosen_common + 0.3 * logps.chosen,
            rejected=0.7 * logps.rejected_common + 0.3 * logps.rejected,
        )
        for logps in given
    ]
    theirs = trl_loss(policy, reference, loss_type="sigmoid_norm", ld_alpha=0.3)
    same = L.LengthNormalizedDPOLoss(0.3)(*over_all_tokens).mean()
    torch.testing.assert_close(same, theirs, rtol=1e-12, atol=0)
    assert (loss(*given).mean() - theirs).abs() > 1e-3


def test_combined():
    # MPO's weights
    loss = L.CombinedLoss(
        [L.DPOLoss(0.3), L.BCOLoss(0.3, track_delta=False), L.SFTLoss(token_weighted=True)],
        weights=[0.8, 0.2, 1.0],
    )
    assert_same(loss, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])


def test_sft_by_pair_is_trl_s_where_completions_are_equally_long():
    assert_same(L.SFTLoss(), loss_type="sft", lengths=[5] * 8)


class TestReferenceFree:
    """Losses of TRL's experimental trainers, which take log-probs."""

    @pytest.fixture(autouse=True)
    def logps(self, monkeypatch):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        self.policy = models()[0].logps()
        self.chosen_mean = self.policy.chosen / self.policy.chosen_lengths
        self.rejected_mean = self.policy.rejected / self.policy.rejected_lengths

    def cpo(self, chosen, rejected, **settings):
        from trl.experimental.cpo import CPOTrainer

        stub = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu")),
            alpha=0.0,
            beta=0.3,
            label_smoothing=0.0,
            **settings,
        )
        return CPOTrainer.cpo_loss(stub, chosen, rejected)[0]

    def test_simpo(self):
        theirs = self.cpo(self.chosen_mean, self.rejected_mean, loss_type="simpo", simpo_gamma=0.5)
        torch.testing.assert_close(L.SimPOLoss(0.3, gamma=0.5)(self.policy), theirs, rtol=1e-12, atol=0)

    def test_cpo(self):
        # TRL adds the likelihood outside, as a mean over tokens: here that is SFTLoss(token_weighted=True)
        # beside a CPOLoss without it. CPOLoss itself sums over tokens, as the paper does.
        theirs = self.cpo(self.policy.chosen, self.policy.rejected, loss_type="sigmoid")
        ours = L.CPOLoss(0.3, sft_weight=0.0)(self.policy)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        whole = L.CPOLoss(0.3, sft_weight=0.5)(self.policy)
        torch.testing.assert_close(whole, theirs - 0.5 * self.policy.chosen, rtol=1e-12, atol=0)

    def test_orpo(self):
        from trl.experimental.orpo import ORPOTrainer

        # TRL computes in float32, and adds the likelihood outside.
        stub = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=0.2)
        theirs = ORPOTrainer.odds_ratio_loss(stub, self.chosen_mean, self.rejected_mean)[0]
        ours = L.ORPOLoss(0.2)(self.policy) - L.SFTLoss()(self.policy)
        torch.testing.assert_close(-ours, theirs.double(), rtol=1e-5, atol=1e-6)
