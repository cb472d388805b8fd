"""Labels to and from other tools: TRL, Argilla, Label Studio, CSV.

    export   pairs -> TRL's preferences       questions and labels -> Argilla's datasets, Label Studio's projects, CSV
    import   a file of any of them -> the store; what it is, its content says

Writers write to the path they are given; whoever calls makes that a temporary one and renames it. What each format can
and cannot carry stands in its module.
"""

from dissonance.feedback.exchange.folders import Exported, write_argilla, write_label_studio
from dissonance.feedback.exchange.importing import Imported, import_labels
from dissonance.feedback.exchange.reading import FORMATS, ImportFormat
from dissonance.feedback.exchange.tables import write_csv
from dissonance.feedback.exchange.trl import Preferences, write_preferences

__all__ = [
    "FORMATS",
    "Exported",
    "ImportFormat",
    "Imported",
    "Preferences",
    "import_labels",
    "write_argilla",
    "write_csv",
    "write_label_studio",
    "write_preferences",
]
