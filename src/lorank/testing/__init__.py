"""For authors of methods: the tests that every method must pass, to be run by pytest from any package.

    import lorank.testing

    class TestMagnitudePruning(lorank.testing.AllocatorConformance):
        def make(self, budget=None):
            return MagnitudePruning(budget=budget)

pytest itself is not a dependency of lorank, and nothing here imports it.
"""

from lorank.testing.conformance import AllocatorConformance, Loop
from lorank.testing.plain_peft import PlainPeft, plain_peft
from lorank.testing.tiny_models import TINY_LLAMA, TinyModel

__all__ = ["TINY_LLAMA", "AllocatorConformance", "Loop", "PlainPeft", "TinyModel", "plain_peft"]
