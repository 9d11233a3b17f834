"""Planted ranks: a problem with a known true allocation, and how close each method comes to it (docs/planted.md)."""

from lorank.experiments.planted.problem import Problem, Scenario, make_problem
from lorank.experiments.planted.study import Row, run_study

__all__ = ["Problem", "Row", "Scenario", "make_problem", "run_study"]
