"""A page that holds every kind of figure, made once."""

from __future__ import annotations

import pytest

from lorank.report.comparison import compare_runs
from lorank.report.numbers import Comparison, estimate
from lorank.report.page import report_page
from tests.report.runs import HOSTILE, made_run, unmoved_run, unusual_run


@pytest.fixture(scope="session")
def page_text() -> str:
    runs = [made_run(), unmoved_run(), unusual_run()]
    hostile = Comparison(HOSTILE, HOSTILE, {HOSTILE: [estimate(HOSTILE, [1.0, 2.0])]}, sentence=HOSTILE)
    return report_page(runs, [hostile, *compare_runs(runs)])
