"""ALoRA: allocating low-rank adaptation (Liu et al., NAACL 2024, arXiv 2403.16187).

    train K1 epochs
    repeat N_A times:
        IS(r) = S(M) − S(M without r) + S(M with r alone)   for every rank r of every module, on one fixed batch B_val
        prune the n_A ranks with the lowest IS
        give n_A new ranks to the modules that lost none this round
        train K2 epochs

S is the negative cross-entropy; gates are one and frozen. By default IS is estimated to first order on 128 samples.
``scores="exact"`` selects the paper's evaluations on 32 samples. Compared with exact scores on 512 samples, the
estimates are on average as accurate, at about a thirtieth of the cost (``docs/scoring.md``). The budget
R_target = Σ r_m holds from the first step: the run starts with the ranks that the adapter was made with (the paper: 8
in every module), or with a given budget, distributed as evenly as possible.

The paper does not specify the following.

- n_A counts ranks over all adapted modules. By default it is an eighth of them, which at the paper's rank of 8 is the
  paper's one per module.
- By default, K1 and K2 are fractions of the run, because most fine-tuning takes one to three epochs. The paper's epochs
  are selected with ``unit="epochs"``.
- A module may fall to rank 0. It then has no score. It counts as neither pruned nor important and receives no ranks,
  unless ``retry_empty`` is set.
- Exact ties are broken by module order, then rank order.
- A full module (r = min(d_in, d_out)) receives no ranks; the other modules receive its share.
- If every module lost a rank, or every module that lost none is full, the total number of ranks shrinks. A round never
  prunes the last rank.
- Under a given budget, a round adds new ranks as long as the budget has room for them, instead of n_A. A rank costs
  more parameters in one module than in another, so the number of ranks may change while the budget holds in every unit.
  A later round can use the part of the budget that a round leaves unused.
- A module that needs at least one rank (DoRA, a trained bias) keeps its last rank, and the next lowest rank is pruned
  instead.
- A new rank has A as at first initialisation, B = 0 and optimiser moments at zero. ``new_ranks="gradient"`` and
  ``second_moments="mean"`` are other choices.
- With ``unit="epochs"``, if the length of an epoch is unknown, the run counts as ten epochs, the longest training in
  the paper.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.scoring import AblationScorer, BalancedScorer, RandomScorer, RotatedScorer, Scorer


@settings(raises=ScheduleError)
class ALoRA(RoundAllocator):
    """ALoRA, with the paper's settings as defaults, except for the durations.

    Args:
        k1, k2, rounds, unit, per_round, retry_empty, budget, new_ranks, second_moments, per_parameter: settings of the
            rounds, see :class:`~lorank.allocators.rounds.RoundAllocator`.
        terms: which terms of IS count: ``"both"`` (as in the paper), ``"without"`` or ``"alone"``.
        scores: how IS is computed: ``"first_order"`` (estimates by two backward passes, for any number of ranks),
            ``"exact"`` (as in the paper: two evaluations per rank) or ``"screen"`` (estimates for all ranks, then exact
            evaluations until the ranks to prune are certain; it prunes the ranks that ``"exact"`` would prune, often in
            less time). ``"balanced"`` is another score: σ² of balanced truncation
            (:class:`~lorank.scoring.BalancedScorer`), from the passes of training; modules that lose ranks are turned
            to the basis in which these are defined. ``"random"`` is a control: scores drawn from the run's seed.
        samples: |B_val|, if rows are given and a batch is made of them; None: 32 as in the paper, or 128 for
            ``first_order``. A batch that is given is used unchanged. ≥ 1.
        engine: the engine of exact evaluations: ``"exact"`` (prefix reuse, same scores) or ``"reference"`` (plain
            forward passes).
        rotate: whether every module is turned to its balanced basis before its ranks are scored by IS. The basis that
            training arrives at is one of infinitely many, and IS depends on it.

    Raises:
        ScheduleError: a setting is out of its range, or has no meaning beside another one.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    terms: Literal["both", "without", "alone"] = "both"
    scores: Literal["first_order", "exact", "screen", "balanced", "random"] = "first_order"
    samples: Annotated[int | None, Field(ge=1)] = None
    engine: Literal["exact", "reference"] = "exact"
    rotate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores in ("balanced", "random"):
            own: list[tuple[str, object, object]] = [("terms", self.terms, "both"), ("engine", self.engine, "exact")]
            if self.new_ranks == "random":  # else these samples give the gradient
                own.append(("samples", self.samples, None))
            for name, value, default in own:
                if value != default:
                    raise ScheduleError(
                        f"ALoRA(scores={self.scores!r}, {name}={value!r}): {name} belongs to the scores by ablation; "
                        "leave it out, or give scores='first_order'"
                    )
            if self.rotate:
                why = "need no basis" if self.scores == "random" else "are in their own basis already"
                raise ScheduleError(
                    f"ALoRA(scores={self.scores!r}, rotate=True): {self.scores} scores {why}; leave out rotate"
                )
        elif self.per_parameter and self.terms == "both":
            raise ScheduleError(
                "ALoRA(per_parameter=True, terms='both'): IS holds the loss of the model with one rank alone, which is "
                "far from 0 also for a rank that adds nothing, so it cannot be divided by what the rank costs. Give "
                "terms='without' or 'alone', or scores='balanced'"
            )

    @property
    def validation_samples(self) -> int:
        return super().validation_samples if self.samples is None else self.samples

    @property
    def scorer(self) -> Scorer:
        if self.scores == "balanced":
            return BalancedScorer()
        if self.scores == "random":
            return RandomScorer()
        ablation = AblationScorer(self.scores, self.terms, self.samples, self.engine)
        return RotatedScorer(ablation) if self.rotate else ablation
