"""Epsilon of the same mechanisms by several accountants, what noise a target needs, and the published example.

`epsilon`: value with the interval that the accountant itself proves, where it proves one; the upper end is what counts.
An accountant that gives an upper bound alone has no interval. `minus_ours`: its value minus our PRV value.
`inside_our_bounds`: 1 where an independent accountant's value lies between our bounds. `time_ratio`: its time over the
time of our PRV bound, both without caches, medians; low and high are the smallest and largest repeat.

`sigma`: the least noise multiplier found by calibration, with the epsilon that dp-accounting finds for it beside
the target. Peers that are not installed (`prv-accountant`, `autodp`) are left out.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant as OpacusPrv
from opacus.accountants import RDPAccountant as OpacusRdp

from common.privacy import accounting
from common.privacy.accounting import epsilon, epsilon_rdp
from common.privacy.calibration import calibrate
from common.privacy.mechanism import DpSgd, GaussianRelease, Mechanism, NoisedCounts
from common.privacy.rule import choose
from common.settings.study import PrivacySettings, TrainingSettings
from server.published import README, as_executed, as_printed, fresh_draws, patient_level
from tests.benchmarks.hospitals import say
from tests.benchmarks.options import Options
from tests.benchmarks.report import OURS, Row

REPEATS = 5
DP_ACCOUNTING = "dp-accounting PLD"
TARGETS = (1.0, 3.0, 5.0, 7.4, 10.0)
# patients, sampling probability, steps: of our notes, and by the rule (None)
TABLE: tuple[tuple[int, float | None, int | None], ...] = (
    (50, 0.16, 300),
    (50, 1.0, 100),
    (50, None, None),
    (200, 0.08, 5000),
    (200, None, None),
    (1000, 0.032, 5000),
    (1000, None, None),
)

History = list[tuple[float, float, int]]  # noise multiplier, sampling probability, steps
Found = tuple[float, float | None, float | None]  # value, low, high


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was done to one patient."""

    name: str
    delta: float
    mechanisms: tuple[Mechanism, ...]

    @property
    def history(self) -> History | None:
        """The same for accountants that know subsampled Gaussians only; None with anything else in it."""
        rows: History = []
        for mechanism in self.mechanisms:
            match mechanism:
                case DpSgd():
                    rows.append((mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.steps))
                case GaussianRelease():
                    rows.append((mechanism.noise_multiplier, 1.0, 1))
                case _:
                    return None
        return rows


def run(options: Options) -> list[Row]:
    """All tables; with `quick` a few rows of each."""
    cases = _cases()[:2] if options.quick else _cases()
    rows = [row for case in cases for row in _compare(case, repeats=1 if options.quick else REPEATS)]
    table = [(50, 1.0, 100)] if options.quick else TABLE
    for patients, probability, steps in table:
        say(f"accountants: noise for {patients} patients")
        for target in TARGETS[-2:] if options.quick else TARGETS:
            rows += _least_noise(patients, target, probability, steps)
    return rows + _published()


def _cases() -> list[Case]:
    def training(noise: float, probability: float, steps: int) -> DpSgd:
        return DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps)

    release = GaussianRelease(noise_multiplier=3.0)
    return [
        Case(name="30 patients, q 1, T 100", delta=1e-3, mechanisms=(training(7.0, 1.0, 100),)),
        Case(name="200 patients, q 0.08, T 5000", delta=2.9e-3, mechanisms=(training(2.78, 0.08, 5000),)),
        Case(name="50 patients, q 0.5, T 160", delta=1e-3, mechanisms=(training(3.1, 0.5, 160),)),
        Case(name="1000 patients, q 0.032, T 5000", delta=5e-4, mechanisms=(training(1.39, 0.032, 5000),)),
        Case(name="little noise: sigma 0.7, q 0.016, T 1000", delta=5e-4, mechanisms=(training(0.7, 0.016, 1000),)),
        Case(name="warm-up and 160 steps", delta=1e-3, mechanisms=(release, training(3.3, 0.5, 160))),
        Case(
            name="three studies",
            delta=1e-4,
            mechanisms=(training(1.0, 0.1, 100), training(2.0, 0.05, 200), training(1.5, 0.2, 10)),
        ),
        Case(
            name="two studies with warm-ups and two answers",
            delta=1e-3,
            mechanisms=(
                release,
                training(3.3, 0.5, 160),
                release,
                training(5.0, 0.25, 200),
                NoisedCounts(epsilon=0.5),
                NoisedCounts(epsilon=0.5),
            ),
        ),
    ]


def _compare(case: Case, *, repeats: int) -> list[Row]:
    """All accountants on one case, in turn."""
    say(f"accountants: {case.name}")
    methods = _accountants(case)
    found: dict[str, Found] = {}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, account in methods.items():
            _forget()
            began = time.perf_counter()
            found[name] = account()
            times[name].append(time.perf_counter() - began)
    ours, lower, upper = found[OURS]
    rows = [
        _row(case.name, name, "epsilon", value, "epsilon", low=low, high=high)
        for name, (value, low, high) in found.items()
    ]
    rows += [
        _row(case.name, name, "minus_ours", value - ours, "epsilon")
        for name, (value, _, _) in found.items()
        if name != OURS
    ]
    pld = found[DP_ACCOUNTING][0]
    # A discretised PLD stays above the exact value of a Gaussian by a little.
    slack = 2e-3 if lower is not None and upper is not None and upper - lower < 1e-6 else 0.0
    inside = lower is not None and upper is not None and lower - slack <= pld <= upper + slack
    rows.append(_row(case.name, DP_ACCOUNTING, "inside_our_bounds", float(inside), "yes or no"))
    for name in methods:
        ratios = [theirs / mine for theirs, mine in zip(times[name], times[OURS], strict=True)]
        if name != OURS:
            rows.append(
                _row(
                    case.name,
                    name,
                    "time_ratio",
                    statistics.median(ratios),
                    "ratio",
                    low=min(ratios),
                    high=max(ratios),
                    n=repeats,
                )
            )
    return rows


def _accountants(case: Case) -> dict[str, Callable[[], Found]]:
    """Who can account for this case, each as a call without arguments."""

    def ours() -> Found:
        found = epsilon(case.mechanisms, case.delta)
        return found.value, found.lower, found.upper

    methods: dict[str, Callable[[], Found]] = {
        OURS: ours,
        "consilium RDP": lambda: (epsilon_rdp(case.mechanisms, case.delta), None, None),
        DP_ACCOUNTING: lambda: (_pld(case.mechanisms, case.delta), None, None),
        "dp-accounting RDP": lambda: (_composed(RdpAccountant(), case.mechanisms, case.delta), None, None),
    }
    history = case.history
    if history is not None:
        methods["Opacus PRV"] = lambda: (_opacus(OpacusPrv(), history, case.delta), None, None)
        methods["Opacus RDP"] = lambda: (_opacus(OpacusRdp(), history, case.delta), None, None)
        if find_spec("prv_accountant"):
            methods["prv-accountant"] = lambda: _microsoft(history, case.delta)
        if find_spec("autodp"):
            methods["autodp RDP"] = lambda: (_autodp(history, case.delta), None, None)
    return methods


def _pld(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Google's privacy loss distributions, discretised upwards: an upper bound close to the truth."""
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return _composed(PLDAccountant(relation, value_discretization_interval=5e-4), mechanisms, delta)


def _composed(accountant: dp_accounting.PrivacyAccountant, mechanisms: Sequence[Mechanism], delta: float) -> float:
    pure = 0.0  # discrete Laplace noise is no event of dp-accounting; its epsilon is added, as we do
    for mechanism in mechanisms:
        match mechanism:
            case DpSgd():
                gaussian = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
                step = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_probability, gaussian)
                accountant.compose(step, mechanism.steps)
            case GaussianRelease():
                accountant.compose(dp_accounting.GaussianDpEvent(mechanism.noise_multiplier))
            case NoisedCounts():
                pure += mechanism.epsilon
            case _:
                raise ValueError(f"{mechanism} has no epsilon")
    return float(accountant.get_epsilon(delta)) + pure


def _opacus(accountant: OpacusPrv | OpacusRdp, history: History, delta: float) -> float:
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where its orders end, and where a quadrature is hard
        return float(accountant.get_epsilon(delta))


def _microsoft(history: History, delta: float) -> Found:
    from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant  # optional

    steps = [n for _, _, n in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [
            GaussianMechanism(noise)
            if probability == 1
            else PoissonSubsampledGaussianMechanism(noise_multiplier=noise, sampling_probability=probability)
            for noise, probability, _ in history
        ]
        accountant = PRVAccountant(
            prvs=losses, max_self_compositions=steps, eps_error=accounting.EPSILON_ERROR, delta_error=delta / 1000
        )
        low, value, high = accountant.compute_epsilon(delta, steps)
    return float(value), float(low), float(high)


def _autodp(history: History, delta: float) -> float:
    from autodp import mechanism_zoo, transformer_zoo  # optional

    sampled = transformer_zoo.AmplificationBySampling(PoissonSampling=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gaussians = [mechanism_zoo.GaussianMechanism(sigma=noise) for noise, _, _ in history]
        parts = [
            gaussian if probability == 1 else sampled(gaussian, probability, improved_bound_flag=True)
            for gaussian, (_, probability, _) in zip(gaussians, history, strict=True)
        ]
        composed = transformer_zoo.Composition()(parts, [n for _, _, n in history])
        return float(composed.get_approxDP(delta))


def _least_noise(patients: int, target: float, probability: float | None, steps: int | None) -> list[Row]:
    """What calibration finds, and what the independent accountant says it costs. delta = patients^-1.1."""
    delta = patients**-1.1
    chosen = choose(reference_patients=patients, target_epsilon=target, delta=delta, warm_start=True)
    q = probability or chosen.sampling_probability
    total = steps or chosen.steps
    plan = calibrate(
        PrivacySettings(
            target_epsilon=target, delta=delta, sampling_probability=q, reference_patients=patients, epsilon_cap=100.0
        ),
        TrainingSettings(rounds=1, critic_steps_per_round=total),
    )
    by_rule = " by the rule" if probability is None else ""
    case = f"{patients} patients, q {q:g}, T {total}{by_rule}, delta {delta:.2g}, epsilon {target:g}"
    return [
        _row(case, OURS, "sigma", plan.mechanism.noise_multiplier, "clip norms"),
        _row(case, DP_ACCOUNTING, "epsilon", _pld(plan.mechanisms, delta), "epsilon"),
    ]


def _published() -> list[Row]:
    """The README of the published DP-WGAN: per patch in three readings, and per patient."""
    case = "published DP-WGAN, README: 41 patients x 1000 patches, B 32, sigma 1, 50 epochs"
    patch = "accounted by patch"
    return [
        _row(case, patch, "epsilon_as_printed", as_printed(README), "epsilon"),
        _row(case, patch, "epsilon_as_executed", as_executed(README), "epsilon"),
        _row(case, patch, "epsilon_fresh_draws", fresh_draws(README), "epsilon"),
        _row(case, "accounted by patient", "epsilon_as_executed", patient_level(README), "epsilon"),
    ]


def _row(
    case: str,
    method: str,
    metric: str,
    value: float,
    unit: str,
    *,
    low: float | None = None,
    high: float | None = None,
    n: int = 1,
) -> Row:
    return Row(case=case, method=method, metric=metric, value=value, low=low, high=high, unit=unit, n=n)


def _forget() -> None:
    """Empty our caches, so that each repeat pays what a first question pays."""
    accounting._subsampled_gaussian.cache_clear()
    accounting._renyi_of_step.cache_clear()
