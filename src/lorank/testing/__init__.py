"""The conformance suite for authors of methods. pytest runs these tests from any package; every method must pass them.

    import lorank.testing

    class TestMagnitudePruning(lorank.testing.AllocatorConformance):
        def make(self, budget=None):
            return MagnitudePruning(budget=budget)

pytest is not a dependency of lorank, and this package does not import it.
"""

from lorank.testing.conformance import AllocatorConformance, Loop
from lorank.testing.plain_peft import PlainPeft, plain_peft
from lorank.testing.tiny_models import TINY_LLAMA, TinyModel

__all__ = ["TINY_LLAMA", "AllocatorConformance", "Loop", "PlainPeft", "TinyModel", "plain_peft"]
