"""Losses from configuration: class_path and init_args, and one clear error for each mistake."""

import copy
import inspect
import math
import pickle
import re

import jsonargparse
import pytest

from lightning_dpo import losses as L

CONFIGS = {
    "DPOLoss": {"beta": 0.2, "label_smoothing": 0.1, "divergence": "alpha_divergence", "alpha": 0.3},
    "IPOLoss": {"beta": 0.2, "length_normalized": False, "divergence": "js_divergence"},
    "HingeLoss": {"beta": 0.2, "divergence": "forward_kl"},
    "RobustDPOLoss": {"beta": 0.2, "label_smoothing": 0.3},
    "LengthNormalizedDPOLoss": {"beta": 2.0},
    "EXOLoss": {"beta": 0.2, "label_smoothing": 0.01, "divergence": "chi_squared_kl", "max_reward": 4.0},
    "RDPOLoss": {"beta": 0.2, "length_penalty": 0.05},
    "ODPOLoss": {"beta": 0.2, "offset_weight": 0.5, "offset_scale": "linear"},
    "DiscoPOPLoss": {"beta": 0.2, "tau": 0.1},
    "DPOPLoss": {"beta": 0.2, "anchor": 5.0},
    "NCALoss": {"beta": 0.2},
    "BCOLoss": {"beta": 0.2, "track_delta": False},
    "SPPOLoss": {"beta": 0.2},
    "APOZeroLoss": {"beta": 0.2},
    "APODownLoss": {"beta": 0.2},
    "AOTLoss": {"beta": 0.2, "unpaired": True, "label_smoothing": 0.1},
    "SimPOLoss": {"beta": 2.5, "gamma": 1.2},
    "ORPOLoss": {"odds_weight": 0.2},
    "CPOLoss": {"beta": 0.2, "sft_weight": 0.5},
    "SFTLoss": {"token_weighted": True},
    "UnlikelihoodLoss": {"alpha": 0.4},
    "CombinedLoss": {
        "losses": [
            {"class_path": "lightning_dpo.losses.DPOLoss", "init_args": {"beta": 0.2}},
            {"class_path": "lightning_dpo.losses.SFTLoss"},
        ],
        "weights": [1.0, 0.5],
    },
    "WPO": {"loss": {"class_path": "lightning_dpo.losses.DPOLoss", "init_args": {"beta": 0.2}}},
    "LDDPO": {"loss": {"class_path": "lightning_dpo.losses.DPOLoss"}, "alpha": 0.3},
}


UNPAIRED = {"KTOLoss", "UnpairedAPOZeroLoss", "UnpairedLoss"}
"""Losses of judged completions and their base, which take other arguments; see test_unpaired.py."""


def parser():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--loss", type=L.PreferenceLoss)
    return made


def instantiate(name, init_args):
    config = {"loss": {"class_path": f"lightning_dpo.losses.{name}", "init_args": init_args}}
    return parser().instantiate_classes(parser().parse_object(config)).loss


def test_every_public_loss_is_configured_here():
    others = {"PreferenceLoss", "MarginLoss", *UNPAIRED}
    assert set(CONFIGS) | others == set(L.__all__)
    assert all(inspect.isabstract(base) for base in (L.PreferenceLoss, L.MarginLoss))


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_made_by_class_path(name):
    loss = instantiate(name, CONFIGS[name])
    assert type(loss) is getattr(L, name)
    for argument, value in CONFIGS[name].items():
        if not isinstance(value, dict) and argument != "losses":
            assert getattr(loss, argument) == value


def test_parts_are_made_by_class_path():
    combined = instantiate("CombinedLoss", CONFIGS["CombinedLoss"])
    assert [type(part).__name__ for part in combined.losses] == ["DPOLoss", "SFTLoss"]
    assert combined.beta == 0.2
    assert instantiate("WPO", CONFIGS["WPO"]).loss.beta == 0.2


@pytest.mark.parametrize("name", CONFIGS)
def test_defaults_suffice(name):
    required = {k: v for k, v in CONFIGS[name].items() if k in ("loss", "losses")}
    assert isinstance(instantiate(name, required), L.PreferenceLoss)


def test_command_line_and_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("loss:\n  class_path: lightning_dpo.losses.DPOLoss\n  init_args:\n    beta: 0.1\n")
    made = parser()
    made.add_argument("--config", action="config")
    config = made.parse_args([f"--config={path}", "--loss.init_args.label_smoothing=0.2"])
    loss = made.instantiate_classes(config).loss
    assert (loss.beta, loss.label_smoothing) == (0.1, 0.2)


def test_saved_configurations_name_the_public_path():
    made = parser()
    saved = made.dump(made.parse_args(["--loss=IPOLoss", "--loss.beta=0.4"]))
    assert "class_path: lightning_dpo.losses.IPOLoss" in saved


def test_short_class_names_resolve():
    made = parser()
    loss = made.instantiate_classes(made.parse_args(["--loss=IPOLoss", "--loss.beta=0.4"])).loss
    assert isinstance(loss, L.IPOLoss)
    assert loss.beta == 0.4


def test_ipo_says_that_it_knows_no_label_smoothing():
    with pytest.raises(jsonargparse.ArgumentError, match="label_smoothing"):
        instantiate("IPOLoss", {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="label_smoothing"):
        L.IPOLoss(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: L.IPOLoss(label_smoothing=0.1),
            "`label_smoothing` is not an argument of IPOLoss, which takes beta, length_normalized, "
            "divergence, alpha, max_reward; losses that have it: AOTLoss, DPOLoss, EXOLoss, RobustDPOLoss",
        ),
        (
            lambda: L.DPOLoss(gamma=1),
            "`gamma` is not an argument of DPOLoss, which takes beta, label_smoothing, divergence, alpha, "
            "max_reward; losses that have it: SimPOLoss",
        ),
        (
            lambda: L.SimPOLoss(2.0, divergence="js_divergence"),
            "`divergence` is not an argument of SimPOLoss, which takes beta, gamma; losses that have it: "
            "DPOLoss, DiscoPOPLoss, EXOLoss, HingeLoss, IPOLoss, LengthNormalizedDPOLoss, ODPOLoss, "
            "RDPOLoss, RobustDPOLoss",
        ),
        (
            lambda: L.ORPOLoss(betta=1),
            "`betta` is not an argument of ORPOLoss, which takes odds_weight; no loss has it",
        ),
    ],
)
def test_arguments_of_other_losses_are_named_with_their_losses(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_losses_of_ones_own_are_checked_and_are_no_advice():
    class Mine(L.DPOLoss):
        def __init__(self, *, sharpness=1.0):
            super().__init__(0.3)

    class Passing(L.DPOLoss):
        def __init__(self, *, sharpness=1.0, **options):
            super().__init__(**options)

    assert Mine(sharpness=2.0).beta == 0.3
    assert Passing(sharpness=2.0, label_smoothing=0.1).label_smoothing == 0.1
    with pytest.raises(ValueError, match="`beta` is not an argument of Mine, which takes sharpness; losses"):
        Mine(beta=0.1)
    with pytest.raises(ValueError, match=r"`sharpness` is not an argument of IPOLoss, .*; no loss has it"):
        L.IPOLoss(sharpness=1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_copied_and_pickled(name):
    loss = instantiate(name, CONFIGS[name])
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(copied) is type(loss)
        assert str(copied) == str(loss)


@pytest.mark.parametrize(
    "name", ["NCALoss", "BCOLoss", "SPPOLoss", "APOZeroLoss", "APODownLoss", "AOTLoss", "DPOPLoss"]
)
def test_divergences_are_refused_by_losses_that_are_not_on_the_margin(name):
    with pytest.raises(jsonargparse.ArgumentError, match="divergence"):
        instantiate(name, {"divergence": "js_divergence"})


WITH_BETA = [name for name, config in CONFIGS.items() if "beta" in config]


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, "0.1", True, None])
@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_is_positive(name, beta):
    with pytest.raises(
        ValueError, match=rf"^`beta` must be .* greater than 0, got beta={beta!r}; usual values"
    ):
        getattr(L, name)(beta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: L.DPOLoss(label_smoothing=0.5),
            r"`label_smoothing` must be in \[0, 0.5\), got .*=0.5; it is",
        ),
        (lambda: L.DPOLoss(label_smoothing=-0.1), r"`label_smoothing` must be in \[0, 0.5\)"),
        (lambda: L.RobustDPOLoss(label_smoothing=0.5), r"`label_smoothing` must be in \[0, 0.5\)"),
        (lambda: L.AOTLoss(label_smoothing=0.7), r"`label_smoothing` must be in \[0, 0.5\)"),
        (lambda: L.EXOLoss(label_smoothing=0.0), r"`label_smoothing` must be in \(0, 0.5\), .* 1e-3"),
        (lambda: L.EXOLoss(label_smoothing=0.5), r"`label_smoothing` must be in \(0, 0.5\)"),
        (
            lambda: L.DPOLoss(divergence="kl"),
            r"`divergence` must be one of .*'reverse_kl'.* got divergence='kl'",
        ),
        (lambda: L.DPOLoss(divergence="alpha_divergence", alpha=1.5), r"`alpha` must be in \[0, 1\], got"),
        (lambda: L.DiscoPOPLoss(tau=0.0), r"`tau` must be in \(0, 1\], got tau=0.0; the paper uses 0.05"),
        (lambda: L.DiscoPOPLoss(tau=2.0), r"`tau` must be in \(0, 1\]"),
        (lambda: L.DPOPLoss(anchor=-1.0), r"`anchor` must be .* at least 0, got anchor=-1.0"),
        (lambda: L.SimPOLoss(gamma=-1.0), r"`gamma` must be .* at least 0"),
        (lambda: L.ORPOLoss(-0.1), r"`odds_weight` must be .* at least 0"),
        (lambda: L.CPOLoss(sft_weight=math.inf), r"`sft_weight` must be a finite number"),
        (lambda: L.UnlikelihoodLoss(-1.0), r"`alpha` must be .* at least 0"),
        (
            lambda: L.DPOLoss(max_reward=0.0),
            r"`max_reward` must be .* greater than 0, got max_reward=0.0; None leaves margins as they are",
        ),
        (
            lambda: L.RDPOLoss(length_penalty=-0.1),
            r"`length_penalty` must be .* at least 0, got .*=-0.1; 0 is",
        ),
        (lambda: L.ODPOLoss(offset_weight=math.nan), r"`offset_weight` must be .* at least 0, got"),
        (
            lambda: L.ODPOLoss(offset_scale="square"),
            r"`offset_scale` must be one of \('log', 'linear'\), got offset_scale='square'",
        ),
        (lambda: L.LDDPO(L.DPOLoss(), alpha=1.1), r"`alpha` must be in \[0, 1\], got alpha=1.1; it weights"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("WPO", "LDDPO", "CombinedLoss")])
def test_arguments_after_the_first_are_keyword_only(name):
    _, *rest = inspect.signature(getattr(L, name)).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)


def test_printing_shows_the_arguments():
    assert str(L.CPOLoss(0.2, sft_weight=0.5)) == "CPOLoss(beta=0.2, sft_weight=0.5)"
    assert "weights=[1.0, 0.5]" in str(instantiate("CombinedLoss", CONFIGS["CombinedLoss"]))
