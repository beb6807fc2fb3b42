"""Several processes: groups of them, collectives with derivatives, and item tables split over them."""

from td3_fast.parallel.collectives import copied, gather, select, total
from td3_fast.parallel.group import ALONE, Group, LostRank, Ranks, grid, is_launched, join
from td3_fast.parallel.tables import WHOLE, ItemTables, SplitTables, WholeTables, item_tables

__all__ = [
    "ALONE",
    "WHOLE",
    "Group",
    "ItemTables",
    "LostRank",
    "Ranks",
    "SplitTables",
    "WholeTables",
    "copied",
    "gather",
    "grid",
    "is_launched",
    "item_tables",
    "join",
    "select",
    "total",
]
