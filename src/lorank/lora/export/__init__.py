"""Other forms of a trained adapter, each exact, for the programs that read them."""

from lorank.lora.export.export import FORMS, Exported, export_adapter
from lorank.lora.export.programs import Place, places

__all__ = ["FORMS", "Exported", "Place", "export_adapter", "places"]
