"""Other forms of a trained adapter, each exact, for the programs that read them; and the sum of several adapters."""

from lorank.lora.export.adapter_file import read_adapter_file
from lorank.lora.export.export import FORMS, Exported, export_adapter, write_form
from lorank.lora.export.programs import Place, places
from lorank.lora.export.weighted_sum import weighted_sum

__all__ = [
    "FORMS",
    "Exported",
    "Place",
    "export_adapter",
    "places",
    "read_adapter_file",
    "weighted_sum",
    "write_form",
]
