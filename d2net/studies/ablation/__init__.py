"""What each loss term is worth (the paper's Tables 3 and 4): variants of a recipe, trained with several seeds.

A variant is a recipe with some settings changed. Every training of a variant has a folder of its own, with its
checkpoint and, once it is finished and evaluated, ``result.json``; a study that finds one there does not train again.
Variants that differ in localization and evaluation alone share one training: the checkpoint is with one of them.
"""

from d2net.studies.ablation.figure import draw
from d2net.studies.ablation.outputs import TABLES, write_tables
from d2net.studies.ablation.page import write_page
from d2net.studies.ablation.plan import COMPLEMENTS, LOSSES, Run, Variant, choose_losses, parse_variant
from d2net.studies.ablation.run import Ablation, Progress
from d2net.studies.ablation.table import Row, make_rows
from d2net.studies.ablation.tables import Printed, tables_of

__all__ = [
    "COMPLEMENTS",
    "LOSSES",
    "TABLES",
    "Ablation",
    "Printed",
    "Progress",
    "Row",
    "Run",
    "Variant",
    "choose_losses",
    "draw",
    "make_rows",
    "parse_variant",
    "tables_of",
    "write_page",
    "write_tables",
]
