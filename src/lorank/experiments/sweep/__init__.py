"""`lorank sweep`: one recipe with many settings, on Optuna. Workers share the trials; a table and a picture compare
them.

    base: e2e_ard                       # a recipe, a YAML file beside this one, or a whole configuration
    changes: {lora.r: 4}                # settings of every trial
    variants:                           # named settings; several keys may change together
      both: {}
      tv only: {allocator.l1_term: false}
    space:                              # the settings to try
      allocator.l1: [0.001, 0.01, 0.1]  # a list: these values
      training.lr: {low: 0.001, high: 0.1, log: true}  # a range; two whole numbers: a range of whole numbers
    sampler: tpe                        # grid (every combination of lists), random or tpe
    trials: 30                          # for random and tpe
    objectives: [validation_loss, parameters]
    seeds: [0, 1]
    output_dir: runs/my_sweep

A trial is one setting with all its seeds; its value is the mean over the seeds.

    file, space       the YAML file, and what a trial may be          (need neither torch nor Optuna)
    plan              from the file to the configurations of a trial
    storage, queue    the database; trials that workers take from it, each by one worker, and signs of life
    worker, training  a worker's loop; one run
    jobs, process     run_sweep: workers in this process or in several ones; how such a process starts
    progress          what the user sees while it runs
    results, tables   what came of the trials; table, picture, JSON
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorank.lazy import lazy_attributes

if TYPE_CHECKING:
    from lorank.experiments.sweep.jobs import run_sweep
    from lorank.experiments.sweep.plan import Setting, Sweep, load_sweep
    from lorank.experiments.sweep.results import SweepResult

_HOMES = {
    "Setting": "plan",
    "Sweep": "plan",
    "SweepResult": "results",
    "load_sweep": "plan",
    "run_sweep": "jobs",
}

__all__ = ["Setting", "Sweep", "SweepResult", "load_sweep", "run_sweep"]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
