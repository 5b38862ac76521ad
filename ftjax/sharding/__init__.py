"""Where every array lives: a mesh, rules from paths to partition specs, placement, and leaves that gather themselves when they multiply."""

from ftjax.sharding.gather import Sharded, leaves_on_mesh, on_mesh
from ftjax.sharding.layout import abstract, init_on_mesh, place, placement
from ftjax.sharding.mesh import AXES, ROWS, batch_sharding, batch_share, make_mesh, own_rows, row_parts, shard_batch, whole
from ftjax.sharding.rules import REST, RULES, Placed, Row, Rules, placed, report, shardings, state_shardings

__all__ = [
    "AXES",
    "REST",
    "ROWS",
    "RULES",
    "Placed",
    "Row",
    "Rules",
    "Sharded",
    "abstract",
    "batch_share",
    "batch_sharding",
    "init_on_mesh",
    "leaves_on_mesh",
    "make_mesh",
    "on_mesh",
    "own_rows",
    "place",
    "placed",
    "placement",
    "report",
    "row_parts",
    "shard_batch",
    "shardings",
    "state_shardings",
    "whole",
]
