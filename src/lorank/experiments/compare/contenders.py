"""The contenders of a comparison on a recipe's task: for every method and budget, a configuration at that budget.

A method that prunes begins wider. The factor s of the update is the base's for all of them.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from lorank.allocators.budget import Budget
from lorank.config.settings import FullSettings, RunConfig, make_config
from lorank.experiments.adapted_model import adapted_model
from lorank.experiments.compare.file import WIDE_STARTS, CompareFile, MethodKeys
from lorank.experiments.compare.recipe_runs import RecipeTrial, config_text, selection_loss
from lorank.experiments.study.trials import Line
from lorank.experiments.study.tuning import Contender, Setting, Stage
from lorank.lora import AdapterLayers, find_layers
from lorank.tasks import Task

Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Size:
    """A budget.

    Args:
        label: as it is told to users.
        parameters: the numbers in A and B that it buys.
        cap: the highest rank of a module that it allows; None: any.
    """

    label: str
    parameters: int
    cap: int | None = None


class Contenders:
    """Makes contenders. Two methods whose configurations are equal at a budget share one, so that no run is done twice.

    Args:
        file: the comparison.
        task: its task.

    Attributes:
        layers: the layers of the methods' adapters.
    """

    def __init__(self, file: CompareFile, task: Task) -> None:
        self._file = file
        self._forgetting = None if file.forgetting is None else file.forgetting.model_dump_json()
        self._shared: dict[tuple[Any, ...], Contender] = {}
        self.layers = Layers(task)

    def of(
        self, config: RunConfig, method: str, keys: MethodKeys, size: Size, others: Mapping[str, Contender]
    ) -> Contender:
        """The contender of a method.

        Args:
            config: the method's configuration, without a budget.
            method: its key in the file.
            keys: its own keys.
            size: the budget.
            others: the contenders of other methods at this budget, for a control.
        """
        after = None if keys.ranks_of is None else others[keys.ranks_of]
        cut = size.parameters if keys.cut_at_end else None
        text = self._text(config, keys, size)
        grid = tuple(sorted(keys.lrs or self._file.lrs))
        key = (text, grid, cut, keys.ranks_of, keys.shuffled, size.label if after else None)
        if key not in self._shared:
            trial = partial(RecipeTrial, method, size.label, cut=cut, forgetting=self._forgetting)

            @cache  # a plan asks for it again after every run
            def plain(setting: Setting, seed: int, stage: Stage) -> RecipeTrial:
                return trial(setting[0], seed, stage, text)

            def control(setting: Setting, seed: int, stage: Stage, before: Line) -> RecipeTrial:
                ranks = before.get("ranks")
                if ranks is None:
                    return trial(setting[0], seed, stage, text, failure=f"{keys.ranks_of} failed, so it has no ranks")
                if keys.shuffled:
                    ranks = self.layers.shuffled(config, ranks, seed)
                return trial(setting[0], seed, stage, _with_ranks(text, ranks))

            self._shared[key] = Contender(
                kind=f"{method} {size.label}",
                grid=[(lr, None) for lr in grid],
                trial=plain if after is None else control,
                selection=selection_loss,
                growth=self._file.growth,
                factor=self._file.factor,
                after=after,
            )
        return self._shared[key]

    def _text(self, config: RunConfig, keys: MethodKeys, size: Size) -> str:
        """The configuration at the budget."""
        if isinstance(config.allocator, FullSettings):
            return config_text(config)
        limits = {"parameters": size.parameters, **({} if size.cap is None else {"max_lora_rank": size.cap})}
        rank, _ = self.layers.even(config, Budget.parse(limits))
        start = keys.start or WIDE_STARTS.get(config.allocator.name, 1.0)
        given_ranks = keys.cut_at_end or keys.ranks_of is not None  # a budget would change them
        return config_text(_at_budget(config, None if given_ranks else limits, math.ceil(rank * start)))


class Layers:
    """The layers of a method's adapter: made once for all methods and budgets with the same `lora` section."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._made: dict[str, AdapterLayers] = {}

    def of(self, config: RunConfig) -> AdapterLayers:
        lora = config.lora.model_copy(update={"init": "default"})  # which matters to no size, and may take long
        key = lora.model_dump_json()
        if key not in self._made:
            self._made[key] = find_layers(adapted_model(config.model_copy(update={"lora": lora}), self._task))
        return self._made[key]

    def even(self, config: RunConfig, budget: Budget) -> tuple[int, int]:
        """(the highest rank, the numbers in A and B) of even ranks that use up the budget."""
        layers = self.of(config)
        ranks = budget.resolve(layers, layers.ranks).uniform()
        return max(ranks.values()), sum(rank * (layers[n].d_in + layers[n].d_out) for n, rank in ranks.items())

    def shuffled(self, config: RunConfig, ranks: Ranks, seed: int) -> Ranks:
        """The ranks in random order among modules of the same shape, so that the adapter has the same size."""
        layers, shapes = self.of(config), dict[tuple[int, int], list[str]]()
        for name in ranks:
            shapes.setdefault((layers[name].d_in, layers[name].d_out), []).append(name)
        draw, found = random.Random(seed), dict[str, int]()
        for names in shapes.values():
            found |= zip(names, draw.sample([ranks[name] for name in names], len(names)), strict=True)
        return {name: found[name] for name in ranks}


def _at_budget(config: RunConfig, limits: Mapping[str, int] | None, rank: int) -> RunConfig:
    """The configuration with this budget, made with this rank; the factor s of the update does not change."""
    lora, ratio = config.lora, rank / config.lora.r
    alpha = lora.alpha * (math.sqrt(ratio) if lora.use_rslora else ratio)
    values = config.model_dump(mode="json")
    values["lora"] |= {"r": rank, "alpha": alpha}
    if limits is not None:
        values["allocator"]["budget"] = dict(limits)
    return make_config(values)


def _with_ranks(text: str, ranks: Ranks) -> str:
    """A configuration with these ranks at the start."""
    values = json.loads(text)
    values["lora"]["rank_pattern"] = {re.escape(name): rank for name, rank in ranks.items()}
    return json.dumps(values, sort_keys=True)
